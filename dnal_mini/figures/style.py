"""The look of every static figure of the book, and its words for those who do not see it."""

from typing import TYPE_CHECKING, Any

from dnal_mini.figures.colours import AMBER, BLUE, GREEN, GREY, INK, PURPLE, VERMILION

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STYLE: dict[Any, Any] = {
    "figure.figsize": (6.4, 3.6), "figure.constrained_layout.use": True,
    "figure.facecolor": "white",
    "axes.facecolor": "white", "axes.edgecolor": INK, "axes.labelcolor": INK,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "axes.axisbelow": True, "axes.titlelocation": "left", "axes.titleweight": "bold",
    "axes.titlesize": 11, "axes.titlecolor": INK,
    "grid.color": "#d9dee4", "grid.linewidth": 0.7, "text.color": INK,
    "xtick.color": INK, "ytick.color": INK, "font.size": 10, "lines.linewidth": 2,
    "legend.frameon": False, "legend.fontsize": 9, "savefig.facecolor": "white",
    "svg.hashsalt": "dnal_mini",
}  # fmt: skip


def use_style() -> None:
    """Give every figure of this session the book's look, and notebooks SVG pictures.

    White ground and dark ink, so that a figure is legible on a dark page too. The same code draws
    the same bytes: no date and no random ids are written into the picture.
    """
    import matplotlib as mpl
    from cycler import cycler

    cycle = cycler(color=[BLUE, VERMILION, GREEN, PURPLE, AMBER, GREY])
    mpl.rcParams.update({**STYLE, "axes.prop_cycle": cycle})
    if mpl.get_backend().lower().endswith("inline"):
        from IPython import get_ipython
        from matplotlib.figure import Figure
        from matplotlib_inline.backend_inline import set_matplotlib_formats

        set_matplotlib_formats("svg")
        formatters = get_ipython().display_formatter.formatters
        formatters["image/svg+xml"].for_type(Figure, _picture)


def _picture(figure: "Figure") -> tuple[str, dict[str, str]] | None:
    """A figure as SVG without a date, and its alt text as metadata of the output."""
    from IPython.core.pylabtools import print_figure

    svg = print_figure(figure, "svg", metadata={"Date": None})
    return None if svg is None else (svg, {"alt": alt_text(figure)})


def describe(part: "Figure | Axes", words: str) -> None:
    """Say what a figure shows to those who do not see it; a second call replaces the words.

    For a picture whose titles, axes and legend do not tell already what is to be seen:
    ``alt_text`` takes the words in their place, behind the headline.
    """
    part.figure.set_label(words)


def alt_text(figure: "Figure") -> str:
    """A figure's headline and what ``describe`` said, or else all its titles, axes and legends."""
    titles = [figure.get_suptitle()]
    for ax in figure.axes:
        titles += [ax.get_title("left"), ax.get_title("center"), ax.get_title("right")]
    titles = [title for title in titles if title]
    if words := str(figure.get_label()):
        return _sentences([titles[0]] if figure.get_suptitle() or len(titles) == 1 else [], [words])
    words_of_axes = []
    for ax in figure.axes:
        x, y, legend = ax.get_xlabel() or _groups(ax), ax.get_ylabel(), ax.get_legend()
        words_of_axes.append(f"{y} over {x}" if x and y else x or y)
        named = [text.get_text() for text in legend.get_texts()] if legend else []
        words_of_axes.append("Legend: " + ", ".join(named) if named else "")
    return _sentences(titles, words_of_axes)


def _sentences(titles: list[str], words: list[str]) -> str:
    """One line, each part once and with a full stop."""
    parts = [" ".join(part.split()).rstrip(".") for part in dict.fromkeys([*titles, *words])]
    return " ".join(f"{part}." for part in parts if part)


def _groups(ax: "Axes") -> str:
    """The names that stand below an axis in place of numbers."""
    from matplotlib.ticker import FixedLocator

    if not isinstance(ax.xaxis.get_major_locator(), FixedLocator):
        return ""
    return ", ".join(filter(None, (text.get_text() for text in ax.get_xticklabels())))
