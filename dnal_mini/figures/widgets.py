"""Interactive figures of the book: each takes numbers and returns a ``SliderFigure``.

Live in a notebook, playable on a page without a kernel, both from one data function; how that works
is in ``slider.py``, how marks become SVG in ``svg.py``. The names that a figure is made of
are here too, so that a notebook can build its own. Static figures are in ``plots.py``.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dnal_mini.figures.slider import SliderFigure
from dnal_mini.figures.svg import Axes, Bars, Colour, Dots, Frame, Line, Mark
from dnal_mini.refused import Refused


def gate_figure(s: ArrayLike, deltas: Iterable[float]) -> SliderFigure:
    """The gates ``p = sigmoid(delta * s)`` of a population of ``s`` under a slider for delta.

    Left the curve, its slope as a share of the largest one (delta / 4, at s = 0), and nine of the
    gates; right the histogram of all of them, as shares.
    """
    s = np.sort(np.asarray(s, dtype=np.float64))
    reach = float(np.abs(s).max()) * 1.05
    some = s[np.linspace(0, len(s) - 1, 9).round().astype(int)]
    edges = np.linspace(0, 1, 11)
    flank = np.linspace(-8, 8, 81)  # in units of 1 / delta: where a steep curve bends

    def gate(x: NDArray[np.float64], delta: float) -> NDArray[np.float64]:
        return 0.5 * (1 + np.tanh(delta * x / 2))  # the sigmoid, without overflow

    def draw(delta: float) -> Frame:
        x = np.union1d(np.linspace(-reach, reach, 41), np.clip(flank / delta, -reach, reach))
        p, curve = gate(s, delta), gate(x, delta)
        shares = np.histogram(p, edges)[0] / len(p)
        left = (
            Line(x, 4 * curve * (1 - curve), "slope, as a share of its peak", "amber", dashed=True),
            Line(x, curve, "gate p", "blue"),
            Dots(some, gate(some, delta), "nine of the gates", "vermilion"),
        )
        undecided = float(np.mean((p > 0.1) & (p < 0.9)))
        return Frame(
            (left, (Bars(edges, shares, "", "blue"),)),
            f"δ = {delta:.4g} · steepest slope δ/4 = {delta / 4:.4g} · "
            f"undecided gates (0.1 < p < 0.9): {undecided:.0%}",
        )

    return SliderFigure(
        [
            Axes("The sigmoid becomes a switch", "s", "p", (-reach, reach), (0, 1)),
            Axes(
                f"All {len(s):,} gates choose a side",
                "gate p",
                "share of the gates",
                (0, 1),
                (0, 1),
            ),
        ],
        draw,
        deltas,
        label="steepness δ",
        alt="A sigmoid turns into a switch as δ grows, and the gates gather at 0 and 1.",
        scale="log",
    )


def price_figure(
    share: ArrayLike, paths: dict[str, Sequence[ArrayLike]], deltas: Sequence[float]
) -> SliderFigure:
    """Gates over gain / price under a slider for the epoch, for the two forms of the price.

    ``share``: gain / price, one channel each. ``paths``: for "paper" and "code" the ``s`` of all
    channels after each epoch. ``deltas``: delta of each epoch.
    """
    ink: dict[str, tuple[Colour, bool]] = {"paper": ("blue", False), "code": ("vermilion", True)}
    share = np.asarray(share, dtype=np.float64)
    span = (float(share.min()), float(share.max()))
    every = np.concatenate([np.asarray(s) for path in paths.values() for s in path])
    reach = (float(every.min()) * 1.1, float(every.max()) * 1.1)

    def draw(epoch: float) -> Frame:
        delta = deltas[int(epoch) - 1]
        s = {form: np.asarray(path[int(epoch) - 1], dtype=float) for form, path in paths.items()}
        p = {form: 0.5 * (1 + np.tanh(delta * s[form] / 2)) for form in s}
        panels = [[Line(share, q[f], f"{f} form", *ink[f]) for f in s] for q in (p, s)]
        return Frame(panels, f"epoch {epoch:g} of {len(deltas)} · δ = {delta:,.4g}")

    return SliderFigure(
        [
            Axes("The paper's price: open if worth it", "gain / price", "gate p", span, (0, 1)),
            Axes("The scripts' price holds s near 0", "gain / price", "s", span, reach),
        ],
        draw,
        range(1, len(deltas) + 1),
        label="epoch",
        alt="Gates over gain divided by price; the paper's form opens those above 1.",
        scale="steps",
    )


FAINT = 1e-8  # a gradient of s below it moves no gate: 1e5 steps at a rate of 1 change s by 0.001


def microscope_figure(rows: Sequence[dict[str, Any]], name: str) -> SliderFigure:
    """What the microscope saw of the gates of a network, under a slider for the epoch.

    ``rows``: a record with rows of kind "look", from before the first step to after the last
    epoch, and those of the epochs of the architecture stage. ``name``: that of the network.
    Panels: histogram of all gates; undecided and frozen share of each layer; mean size of the
    gradient of s in each layer, with and without the price; accuracy with soft and with hard gates
    so far. Gradients below ``FAINT`` are not drawn.

    Raises: ValueError for a record with fewer than two looks.
    """
    looks = {row["epoch"]: row for row in rows if row["kind"] == "look"}
    if len(looks) < 2:
        raise Refused(f"got {len(looks)} looks; need two or more: a record of the microscope")
    trained = [row for row in rows if row["kind"] == "epoch" and row["stage"] == "arch_stage"]
    after = {row["epoch"]: row for row in trained}
    layers = list(looks[min(looks)]["layers"].values())
    count, depth, last = sum(sum(each["histogram"]) for each in layers), len(layers), max(looks)
    every = [each["gradient"] for row in looks.values() for each in row["layers"].values()]

    def draw(epoch: float) -> Frame:
        panels, words = _seen(looks[int(epoch)])
        when = [e for e in sorted(after) if e <= epoch]
        soft, hard = ([after[e][f"{of}val_accuracy"] for e in when] for of in ("", "hard_"))
        accuracy: list[Mark] = [
            Line(when, soft, "accuracy, soft gates", "purple", dashed=True),
            Line(when, hard, "accuracy, hard gates", "blue"),
            Dots(when, soft, "", "purple"),
            Dots(when, hard, "", "blue"),
        ]
        end = f" · accuracy soft {soft[-1]:.1%}, hard {hard[-1]:.1%}" if when else ""
        return Frame([*panels, accuracy], f"epoch {epoch:g} of {last} · {words}{end}")

    span, top, order = (0.5, depth + 0.5), max(every) * 2, "layer, from the first to the last"
    return SliderFigure(
        [
            Axes(f"{name}: all {count:,} gates", "gate p", "share of the gates", (0, 1), (0, 1)),
            Axes("Who is undecided, who is frozen", order, "share of its gates", span, (0, 1)),
            Axes("What still moves", order, "mean size of ∂L/∂s", span, (FAINT, top), y_log=True),
            Axes("Soft and hard become one", "epoch", "validation accuracy", (0, last), (0, 1)),
        ],
        draw,
        sorted(looks),
        label="epoch",
        alt=f"Gates of {name} leave the middle, freeze, and soft and hard accuracy meet.",
        scale="steps",
    )


def _seen(look: dict[str, Any]) -> tuple[list[list[Mark]], str]:
    """Three panels and the readout for one row of kind "look"."""
    layers = list(look["layers"].values())
    counts = np.array([each["histogram"] for each in layers], dtype=float)
    place, channels, total = np.arange(1, len(layers) + 1), counts.sum(axis=1), counts.sum()
    found = {key: np.array([each[key] for each in layers], dtype=float)
             for key in ("undecided", "frozen", "gradient", "data_gradient")}  # fmt: skip
    share = {key: float(found[key] @ channels / total) for key in found}
    drawn = {key: np.where(found[key] < FAINT, np.nan, found[key]) for key in found}
    seen = np.isfinite(drawn["gradient"])
    edges, walls = np.linspace(0, 1, counts.shape[1] + 1), np.arange(len(layers) + 1) + 0.5
    panels: list[list[Mark]] = [
        [Bars(edges, counts.sum(axis=0) / total, "", "blue")],
        [Bars(walls, found["undecided"], "undecided", "amber"),
         Dots(place, found["frozen"], "frozen", "vermilion")],
        [Line(place, drawn["data_gradient"], "gradient without the price", "grey"),
         Dots(place[seen], drawn["gradient"][seen], "gradient with it", "green")],
    ]  # fmt: skip
    return panels, (
        f"δ = {look['delta']:,.4g} · undecided {share['undecided']:.1%}, "
        f"frozen {share['frozen']:.1%} · gradient {share['gradient']:.0e}"
    )
