"""Static figures from tables: each function takes a table and an axis, and returns the axis.

Read ``use_style`` first, then any one figure. A table is a pandas DataFrame, or a dict or list of
rows that makes one. Nothing here trains, reads a file or shows a window. Accuracies and shares
come in [0, 1] and become percent only here. Stands aside: imports nothing from the package; the
interactive figures are in ``widgets.py``.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dnal_mini.figures.colours import AMBER, BLUE, COLOURS, INK, PURPLE, colour, looks
from dnal_mini.refused import Refused

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

Table = Any  # a DataFrame or what makes one: {column: values} or [{column: value}, ...]


PALE, MIDDLE = "#dde2e8", "#98a2ad"


# What becomes of a channel: colour, hatch, words. Strong: it stays; pale: it goes.
FATES = {
    "needed": (BLUE, "", "stays: live and needed"),
    "tied": (AMBER, "", "stays: tied to others"),
    "walled": (INK, "", "stays: at a wall"),
    "held": (PURPLE, "", "stays: for the width"),
    "zero, gone": (PALE, "", "gone: always zero"),
    "constant, gone": ("#f2dfae", "....", "gone: constant, part of a bias"),
    "unneeded, gone": (MIDDLE, "////", "gone: not needed"),
}


STAGE_TITLES = {
    "weight_stage": "weight stage",
    "arch_stage": "architecture stage",
    "fine_tune": "fine-tuning",
}


def _frame(table: Table, *columns: str) -> "pd.DataFrame":
    """The table as a DataFrame. Raises: ValueError for a column that it lacks, or for no rows."""
    import pandas as pd

    frame = pd.DataFrame(table)
    missing = [name for name in columns if name not in frame]
    if missing:
        raise Refused(f"got columns {list(frame)}; need {', '.join(missing)} too")
    if frame.empty:
        raise Refused("got a table without rows; need at least one")
    return frame


def _finish(ax: "Axes", title: str, x_label: str, y_label: str) -> "Axes":
    ax.set(title=title, xlabel=x_label, ylabel=y_label)
    return ax


def _percent(axis: Any) -> None:
    from matplotlib.ticker import PercentFormatter

    axis.set_major_formatter(PercentFormatter(xmax=1, decimals=None))


def curves(
    table: Table, ax: "Axes", x: str, y: str, by: str, *, title: str, x_label: str, y_label: str
) -> "Axes":
    """One line of ``y`` over ``x`` for each value of ``by``, which is named at the line's legend.

    Numbers in ``by`` are an order and get shades from light to dark; names get their own colours.
    """
    from pandas.api.types import is_numeric_dtype

    frame = _frame(table, x, y, by)
    groups = list(frame.groupby(by, sort=is_numeric_dtype(frame[by])))
    shades = _shades(len(groups)) if is_numeric_dtype(frame[by]) else []
    for k, (name, part) in enumerate(groups):
        label = f"{by} = {name:g}" if shades else str(name)
        ax.plot(part[x], part[y], color=shades[k] if shades else colour(str(name)), label=label)
    ax.legend()
    return _finish(ax, title, x_label, y_label)


def _shades(count: int) -> list[Any]:
    """Colours of one order, light to dark, none too light for a white ground."""
    import matplotlib as mpl

    return list(mpl.colormaps["viridis_r"](np.linspace(0.2, 1, count)))


def gate_histogram(table: Table, ax: "Axes", *, title: str) -> "Axes":
    """Where the gates are, epoch by epoch: share of the gates in each bin of p, as shade.

    Table: one row per epoch with ``delta`` and ``histogram`` (counts in equal bins of [0, 1]).
    The scale is logarithmic, so that a few undecided gates are seen beside thousands of others.
    """
    from matplotlib.colors import LogNorm

    frame = _frame(table, "delta", "histogram")
    counts = np.array(frame["histogram"].tolist(), dtype=float)
    shares = counts / counts.sum(axis=1, keepdims=True)
    epochs, bins = shares.shape
    mesh = ax.pcolormesh(
        np.arange(epochs + 1) - 0.5,
        np.linspace(0, 1, bins + 1),
        np.where(shares > 0, shares, np.nan).T,
        cmap="viridis_r",
        norm=LogNorm(vmin=1e-3, vmax=1),
        rasterized=True,
    )
    ax.figure.colorbar(mesh, ax=ax, label="share of the gates")
    places = np.unique(np.linspace(0, epochs - 1, min(epochs, 7)).round().astype(int))
    ax.set_xticks(places, [f"{float(f'{d:.3g}'):,.8g}" for d in frame["delta"].iloc[places]])
    ax.grid(False)
    return _finish(ax, title, "δ, one column per epoch", "gate p")


def training_curves(
    table: Table, ax: "Axes", *, title: str, accuracy: str = "accuracy", kept: str = "kept"
) -> "Axes":
    """Accuracy over the epochs of all stages, each stage on its own ground; both in percent.

    Table: one row per epoch in the order of training, with ``stage`` and the accuracy column;
    ``kept`` (share of open gates) is drawn if there is such a column, ``seed`` gives one thin line
    per seed and the median as a thick one.

    Raises: ValueError for seeds that do not have the same stages.
    """
    from matplotlib.ticker import MaxNLocator

    frame = _frame(table, "stage", accuracy)
    seeds = [part for _, part in frame.groupby("seed")] if "seed" in frame else [frame]
    seeds = [part.reset_index(drop=True) for part in seeds]
    if any(list(part["stage"]) != list(seeds[0]["stage"]) for part in seeds):
        raise Refused("got seeds with different epochs; need the same stages for each")
    stages = seeds[0]["stage"]
    epoch = np.arange(1, len(stages) + 1)
    for stage in stages.unique():
        own = epoch[stages == stage]
        ax.axvspan(own[0] - 0.5, own[-1] + 0.5, color=colour(stage), alpha=0.1, lw=0)
        name = STAGE_TITLES.get(stage, stage)
        place = ((own[0] + own[-1]) / 2, 1.0)
        ax.text(*place, name, ha="center", va="bottom", size=9, transform=ax.get_xaxis_transform())
    drawn = [
        (accuracy, "accuracy", BLUE, "-"),
        (kept, "share of gates open", COLOURS["kept"], "--"),
    ]
    for column, label, ink, line in [row for row in drawn if row[0] in frame]:
        runs = np.array([part[column].to_numpy(dtype=float) for part in seeds])
        if len(runs) > 1:
            ax.plot(epoch, runs.T, color=ink, lw=0.7, alpha=0.5, ls=line)
        ax.plot(epoch, np.median(runs, axis=0), color=ink, ls=line, label=label)
    _percent(ax.yaxis)
    ax.set_xlim(0.5, len(epoch) + 0.5)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_ylim(0, 1.02)
    ax.legend(loc="lower right")
    _finish(ax, title, "epoch", "")
    ax.set_title(title, pad=20)
    return ax


def widths(table: Table, ax: "Axes", *, title: str) -> "Axes":
    """Channels of each layer before and after. Table: ``layer``, ``before``, ``after``."""
    frame = _frame(table, "layer", "before", "after")
    place = np.arange(len(frame))
    ax.bar(place, frame["before"], width=0.82, color="#d9dee4", label="before")
    ax.bar(place, frame["after"], width=0.82, color=COLOURS["pruned"], label="after")
    if len(frame) <= 24:
        for k, (before, after) in enumerate(zip(frame["before"], frame["after"], strict=True)):
            ax.text(k, before, f"{after}", ha="center", va="bottom", size=8)
    turn = len(frame) > 8
    ax.set_xticks(
        place, frame["layer"], rotation=60 if turn else 0, ha="right" if turn else "center"
    )
    ax.grid(axis="x", visible=False)
    ax.legend(loc="upper left")
    return _finish(ax, title, "layer", "channels (number: after)")


def channel_sets(table: Table, ax: "Axes", *, title: str) -> "Axes":
    """What becomes of every channel: one row of cells per layer or tensor, one cell per channel.

    Table: ``layer``, ``channel`` (number within its layer) and ``fate``, a word of ``FATES``: what
    ``Report.fates()`` of a pruned network gives. Rows of cells stand in the order in which their
    layers first appear; the legend has only the fates that there are, with their counts. Beyond 40
    layers only every other name is written, and so on.

    Raises: ValueError for an unknown fate.
    """
    from matplotlib.collections import PolyCollection

    frame = _frame(table, "layer", "channel", "fate")
    if unknown := sorted(set(frame["fate"]) - set(FATES)):
        raise Refused(f"got fate {unknown[0]!r}; need one of {', '.join(FATES)}")
    layers = list(dict.fromkeys(frame["layer"]))
    left = frame["channel"].to_numpy(dtype=float)[:, None, None]
    row = frame["layer"].map({layer: k for k, layer in enumerate(layers)}).to_numpy()[:, None, None]
    corners = np.array([[-0.5, -0.4], [0.5, -0.4], [0.5, 0.4], [-0.5, 0.4]])
    cells = np.concatenate([left + corners[:, :1], row + corners[:, 1:]], axis=2)
    ax.grid(False)
    for fate, (ink, hatch, words) in FATES.items():
        if (own := (frame["fate"] == fate).to_numpy()).any():
            look: dict[str, Any] = {"facecolor": ink, "edgecolor": "white", "hatch": hatch}
            label = f"{words} ({own.sum():,})"
            ax.add_collection(PolyCollection(cells[own], lw=0.6, label=label, **look))
    ax.set_xlim(-0.5, left.max() + 0.5)
    ax.set_ylim(len(layers) - 0.5, -0.5)
    places = range(0, len(layers), -(-len(layers) // 40))
    ax.set_yticks(places, [layers[k] for k in places], size=9 if len(layers) <= 20 else 6)
    ax.tick_params(axis="y", length=0)
    legend = ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0.2)
    ax.spines[["left", "bottom"]].set_visible(False)
    _finish(ax, title, "channel", "")
    ax.set_title(title, pad=10 + 14 * -(-len(legend.get_texts()) // 2))
    return ax


def trade_off(table: Table, ax: "Axes", *, title: str) -> "Axes":
    """Accuracy in percent over MACs on a log axis, each method in its own colour and marker.

    Table: ``method``, ``macs``, ``accuracy``, one row per run. Runs of one ``setting`` (a column
    that may lack) are joined: small points for the runs, a large one for their median.
    """
    frame = _frame(table, "method", "macs", "accuracy")
    look_of = looks(frame["method"].astype(str))
    for method, runs in frame.groupby("method", sort=False):
        look: dict[str, Any] = dict(zip(("color", "marker"), look_of[str(method)], strict=True))
        middle = runs
        if "setting" in frame:
            ax.plot(runs["macs"], runs["accuracy"], ls="", ms=3, alpha=0.5, **look)
            middle = runs.groupby("setting")[["macs", "accuracy"]].median()
        middle = middle.sort_values("macs")
        ax.plot(middle["macs"], middle["accuracy"], lw=1, ms=7, label=str(method), **look)
    ax.set_xscale("log")
    _percent(ax.yaxis)
    ax.legend(loc="lower right")
    return _finish(ax, title, "MACs for one image", "test accuracy")


def kept_accuracy(table: Table, ax: "Axes", *, title: str) -> "Axes":
    """Tuned accuracy over the share of MACs kept: runs as points, a line through their means.

    Table: ``method``, ``setting``, ``seed``, ``macs_kept``, ``accuracy``, ``dense_accuracy``, one
    row per run. The line of a method joins the means of its settings; its dense network is a
    dashed line with a band of one sample standard deviation over seeds. The axis of MACs is
    logarithmic where shares differ by more than a factor of 10.
    """
    from matplotlib.ticker import LogLocator, NullFormatter

    names = ("method", "setting", "seed", "macs_kept", "accuracy", "dense_accuracy")
    frame = _frame(table, *names)
    look_of = looks(frame["method"].astype(str))
    for method, runs in frame.groupby("method", sort=False):
        ink, mark = look_of[str(method)]
        look: dict[str, Any] = {"color": ink, "marker": mark}
        dense = runs.drop_duplicates("seed")["dense_accuracy"]
        middle, around = dense.mean(), dense.std() if len(dense) > 1 else 0.0
        ax.axhspan(middle - around, middle + around, color=ink, alpha=0.18, lw=0)
        ax.axhline(middle, color=ink, ls="--", lw=1.2, label=f"{method}, dense")
        ax.plot(runs["macs_kept"], runs["accuracy"], ls="", ms=4, alpha=0.55, mew=0, **look)
        settings = runs.groupby("setting")
        fewest, most = settings.size().min(), settings.size().max()
        count = str(most) if fewest == most else f"{fewest} to {most}"
        look |= {"label": f"{method}, mean of {count} seeds" if most > 1 else str(method)}
        means = settings[["macs_kept", "accuracy"]].mean().sort_values("macs_kept")
        ax.plot(means["macs_kept"], means["accuracy"], lw=1.2, ms=7, mfc="none", **look)
    if frame["macs_kept"].max() > 10 * frame["macs_kept"].min():
        ax.set_xscale("log")
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.xaxis.set_minor_formatter(NullFormatter())
    _percent(ax.xaxis)
    _percent(ax.yaxis)
    ax.legend(loc="lower right")
    return _finish(ax, title, "MACs kept of the dense network's", "test accuracy")


def points(
    table: Table, ax: "Axes", by: str, y: str, *, title: str, y_label: str, log: bool = False
) -> "Axes":
    """Every value of ``y`` as a point above its group ``by``, the median as a bar.

    A log axis cannot show 0; such values are left out of the picture and counted in the label.
    """
    frame = _frame(table, by, y)
    names: Sequence[Any] = list(dict.fromkeys(frame[by]))
    labels = []
    for k, name in enumerate(names):
        values = np.sort(frame.loc[frame[by] == name, y].to_numpy(dtype=float))
        shown = values[values > 0] if log else values
        spread = np.linspace(-0.16, 0.16, len(shown))[
            np.argsort(np.arange(len(shown)) * 7919 % 101)
        ]
        ink = colour(str(name))
        ax.plot(k + spread, shown, "o", color=ink, ms=5, alpha=0.6, mew=0)
        if len(shown):
            ax.hlines(np.median(shown), k - 0.3, k + 0.3, color=ink, lw=2.5)
        hidden = len(values) - len(shown)
        labels.append(f"{name}\n({hidden} at 0)" if hidden else str(name))
    if log:
        ax.set_yscale("log")
    ax.set_xticks(range(len(names)), labels)
    ax.set_xlim(-0.6, len(names) - 0.4)
    ax.grid(axis="x", visible=False)
    return _finish(ax, title, "", y_label)
