"""Interactive figures: a slider over one data function, live in a notebook and on a built page.

Read ``SliderFigure`` first. Both front ends show SVG from the same Python renderer: with a kernel
an ipywidgets slider calls the data function at any value, on a page without one a few lines of
script swap frames that were drawn beforehand. No file, no font and no script is asked of anybody.
Stands aside: imports nothing from the package. Static figures are in ``plots.py``.
"""

import hashlib
import itertools
import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"
Scale = Literal["log", "linear", "steps"]
Colour = Literal["blue", "vermilion", "green", "purple", "amber", "grey"]

# Okabe and Ito's colours, which colour-blind readers can tell apart; lighter ones on a dark ground.
LIGHT = {
    "blue": "#0072b2", "vermilion": "#d55e00", "green": "#007a5a",
    "purple": "#a8488a", "amber": "#b07800", "grey": "#6b7280",
}  # fmt: skip
DARK = {
    "blue": "#56b4e9", "vermilion": "#ff9152", "green": "#3ddbb0",
    "purple": "#e9a3cb", "amber": "#f2c14e", "grey": "#9aa4b2",
}  # fmt: skip

WIDTH, HEIGHT = 400, 290
LEFT, RIGHT, TOP, BOTTOM = 56, 388, 34, 242


@dataclass(frozen=True)
class Line:
    """A curve: ``x`` and ``y`` of one length; a value that is not finite leaves a gap."""

    x: ArrayLike
    y: ArrayLike
    label: str = ""
    colour: Colour = "blue"
    dashed: bool = False


@dataclass(frozen=True)
class Dots:
    """Marked points."""

    x: ArrayLike
    y: ArrayLike
    label: str = ""
    colour: Colour = "vermilion"


@dataclass(frozen=True)
class Bars:
    """A histogram: ``heights`` between ``edges``, of which there is one more."""

    edges: ArrayLike
    heights: ArrayLike
    label: str = ""
    colour: Colour = "blue"


Mark = Line | Dots | Bars


@dataclass(frozen=True)
class Axes:
    """The frame of one panel, the same at every slider value, so that pictures can be compared."""

    title: str
    x_label: str
    y_label: str
    x_range: tuple[float, float]
    y_range: tuple[float, float]
    x_log: bool = False
    y_log: bool = False

    def __post_init__(self) -> None:
        for (low, high), log in ((self.x_range, self.x_log), (self.y_range, self.y_log)):
            if not (math.isfinite(low) and math.isfinite(high) and low < high):
                raise ValueError(f"got range ({low}, {high}); need two finite numbers, lower first")
            if log and low <= 0:
                raise ValueError(f"got range ({low}, {high}) on a log axis; need it above 0")

    def to_x(self, x: ArrayLike) -> NDArray[np.float64]:
        """Horizontal place in the picture."""
        return LEFT + (RIGHT - LEFT) * _share(x, self.x_range, self.x_log)

    def to_y(self, y: ArrayLike) -> NDArray[np.float64]:
        """Vertical place in the picture, downwards."""
        return BOTTOM - (BOTTOM - TOP) * _share(y, self.y_range, self.y_log)


@dataclass(frozen=True)
class Frame:
    """What is drawn at one slider value: marks for each panel, and the same in words."""

    panels: Sequence[Sequence[Mark]]
    readout: str


def _share(values: ArrayLike, limits: tuple[float, float], log: bool) -> NDArray[np.float64]:
    """0 at the lower limit, 1 at the upper one; far outside is cut off at -1 and 2."""
    value = np.asarray(values, dtype=np.float64)
    low, high = limits
    if log:
        value = np.log10(np.maximum(value, low * 1e-9))
        low, high = math.log10(low), math.log10(high)
    return np.clip((value - low) / (high - low), -1, 2)


# The renderer: from numbers to SVG -------------------------------------------------------------


def ticks(low: float, high: float, log: bool = False, about: int = 5) -> list[float]:
    """Round numbers between two limits: 1, 2 or 5 times a power of ten; on a log axis powers."""
    if log:
        first, last = math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9)
        step = max(1, math.ceil((last - first) / about))
        return [10.0**power for power in range(first, last + 1, step)]
    size = 10 ** math.floor(math.log10((high - low) / about))
    step = next(size * k for k in (1, 2, 5, 10) if (high - low) / (size * k) <= about + 1e-9)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(k * step, 12) for k in range(first, last + 1)]


def tick_text(value: float, log: bool = False) -> str:
    """A number for an axis: ``10⁻³`` on a log axis, plain elsewhere, with a true minus sign."""
    power = round(math.log10(value)) if log else 0
    if log and abs(power) > 2:
        return "10" + str(power).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"{value:g}".replace("-", "−")


def _path(x: NDArray[np.float64], y: NDArray[np.float64]) -> str:
    """Path data with one decimal; points that are not finite break the line."""
    steps, pen = [], "M"
    for a, b in zip(x, y, strict=True):
        if not (math.isfinite(a) and math.isfinite(b)):
            pen = "M"
            continue
        steps.append(f"{pen}{a:.1f} {b:.1f}")
        pen = "L"
    return "".join(step for step, _ in itertools.groupby(steps))


def _draw(mark: Mark, axes: Axes) -> str:
    """One mark as SVG."""
    if isinstance(mark, Bars):
        edges, tops = axes.to_x(mark.edges), axes.to_y(mark.heights)
        boxes = zip(edges[:-1], edges[1:], tops, strict=True)
        d = "".join(f"M{a + 0.8:.1f} {BOTTOM}V{y:.1f}H{b - 0.8:.1f}V{BOTTOM}Z" for a, b, y in boxes)
        return f'<path class="bar k-{mark.colour}" d="{d}"/>'
    x, y = axes.to_x(mark.x), axes.to_y(mark.y)
    if isinstance(mark, Line):
        dash = ' stroke-dasharray="7 5"' if mark.dashed else ""
        return f'<path class="line k-{mark.colour}" d="{_path(x, y)}"{dash}/>'
    dots = (f'<circle cx="{a:.1f}" cy="{b:.1f}" r="4.5"/>' for a, b in zip(x, y, strict=True))
    return f'<g class="dot k-{mark.colour}">{"".join(dots)}</g>'


def _scaffold(axes: Axes) -> str:
    """Grid, ticks, labels and title of a panel."""
    parts = [f'<text class="title" x="{LEFT}" y="18">{escape(axes.title)}</text>']
    for value in ticks(*axes.x_range, axes.x_log):
        x, text = float(axes.to_x(value)), tick_text(value, axes.x_log)
        parts.append(f'<path class="grid" d="M{x:.1f} {TOP}V{BOTTOM}"/>')
        parts.append(f'<text x="{x:.1f}" y="{BOTTOM + 18}" text-anchor="middle">{text}</text>')
    for value in ticks(*axes.y_range, axes.y_log):
        y, text = float(axes.to_y(value)), tick_text(value, axes.y_log)
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 7}" y="{y + 4.5:.1f}" text-anchor="end">{text}</text>')
    middle, height = (LEFT + RIGHT) / 2, (TOP + BOTTOM) / 2
    parts.append(f'<path class="axis" d="M{LEFT} {TOP}V{BOTTOM}H{RIGHT}"/>')
    parts.append(
        f'<text x="{middle}" y="{HEIGHT - 10}" text-anchor="middle">{escape(axes.x_label)}</text>'
        f'<text transform="translate(14 {height}) rotate(-90)" text-anchor="middle">'
        f"{escape(axes.y_label)}</text>"
    )
    return "".join(parts)


def _legend(frame: Frame) -> str:
    """The labelled marks of a frame, each once, as a line of HTML that wraps."""
    seen: dict[str, Mark] = {}
    for mark in itertools.chain.from_iterable(frame.panels):
        if mark.label:
            seen.setdefault(mark.label, mark)
    shapes = {Line: '<path class="line" d="M1 7H25"{}/>', Dots: '<circle cx="13" cy="7" r="4.5"/>'}
    items = []
    for label, mark in seen.items():
        shape = shapes.get(type(mark), '<path class="bar" d="M7 1H19V13H7Z"/>')
        dash = ' stroke-dasharray="7 5"' if isinstance(mark, Line) and mark.dashed else ""
        picture = f'<svg viewBox="0 0 26 14" aria-hidden="true">{shape.format(dash)}</svg>'
        items.append(f'<span class="k-{mark.colour}">{picture}<b>{escape(label)}</b></span>')
    return f'<div class="dnal-legend">{"".join(items)}</div>' if items else ""


# The two front ends ----------------------------------------------------------------------------


class SliderFigure:
    """One or more panels under a slider; display it by ending a cell with it.

    ``draw(value)`` is the only source of what is shown: the page holds its frames at ``values``,
    the live figure calls it at the value under the slider. ``scale`` says which values lie
    between: "log" and "linear" are continuous, "steps" has none but ``values``. ``alt`` says in
    words what the figure shows; each frame's readout is added to it.

    Raises: ValueError for no or unordered ``values``, a frame that does not fit ``axes``, or a
    log scale over numbers that are not above 0.
    """

    _shown = itertools.count(1)  # figures of one kernel have different ids, the same at each run

    def __init__(
        self,
        axes: Sequence[Axes],
        draw: Callable[[float], Frame],
        values: Iterable[float],
        label: str,
        alt: str,
        scale: Scale = "linear",
        start: int = 0,
    ) -> None:
        self.axes, self.draw, self.label, self.alt = list(axes), draw, label, alt
        self.values = [float(value) for value in values]
        self.scale, self.start = scale, start
        if len(self.values) < 2 or any(a >= b for a, b in itertools.pairwise(self.values)):
            raise ValueError(f"got slider values {self.values}; need at least two, growing")
        if scale == "log" and self.values[0] <= 0:
            raise ValueError(f"got slider value {self.values[0]} on a log scale; need it above 0")
        if not 0 <= start < len(self.values):
            raise ValueError(f"got start {start}; need an index below {len(self.values)}")
        self.frames = [self.frame(value) for value in self.values]

    def frame(self, value: float) -> Frame:
        """The data function's frame at a value, checked against the axes."""
        frame = self.draw(value)
        if len(frame.panels) != len(self.axes):
            raise ValueError(f"got {len(frame.panels)} panels; need one for each of the axes")
        return frame

    def marks(self, frame: Frame) -> list[str]:
        """What changes with the slider: SVG for each panel. Both front ends show this."""
        pairs = zip(self.axes, frame.panels, strict=True)
        return ["".join(_draw(mark, axes) for mark in marks) for axes, marks in pairs]

    def picture(self, frame: Frame, name: str) -> str:
        """The panels of one frame and their legend, as HTML; ``name`` begins all its ids."""
        panels = []
        for k, (axes, marks) in enumerate(zip(self.axes, self.marks(frame), strict=True)):
            words = f"{self.alt} {frame.readout}"
            panels.append(
                f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
                f'aria-labelledby="{name}-t{k} {name}-d{k}"><title id="{name}-t{k}">'
                f'{escape(axes.title)}</title><desc id="{name}-d{k}">{escape(words)}</desc>'
                f'<clipPath id="{name}-c{k}"><rect x="{LEFT}" y="{TOP - 6}" '
                f'width="{RIGHT - LEFT + 6}" height="{BOTTOM - TOP + 12}"/></clipPath>'
                f'{_scaffold(axes)}<g class="marks" clip-path="url(#{name}-c{k})">{marks}</g></svg>'
            )
        return f'<div class="dnal-panels">{"".join(panels)}</div>{_legend(frame)}'

    def html(self) -> str:
        """The figure for a page: needs no kernel, no network and no other script.

        The slider is a native one, so the keyboard moves it; without scripts it stays hidden.
        """
        first = self.frames[self.start]
        frames = [{"readout": f.readout, "marks": self.marks(f)} for f in self.frames]
        data = json.dumps({"alt": self.alt, "frames": frames}, ensure_ascii=False)
        data = data.replace("<", "\\u003c")  # no tag inside a script element can end it
        digest = hashlib.sha256(data.encode()).hexdigest()[:8]
        name = f"dnal-{digest}-{next(self._shown)}"
        return (
            f'{STYLE}<div class="dnal-fig" id="{name}" role="group" '
            f'aria-label="{escape(self.alt)}">{self.picture(first, name)}'
            f'<div class="dnal-control" hidden><label for="{name}-in">{escape(self.label)}</label>'
            f'<input type="range" id="{name}-in" min="0" max="{len(frames) - 1}" step="1" '
            f'value="{self.start}" aria-valuetext="{escape(first.readout)}"></div>'
            f'<output for="{name}-in" aria-live="polite">{escape(first.readout)}</output></div>'
            f'<script type="application/json" id="{name}-data">{data}</script>'
            f"<script>({SCRIPT})({json.dumps(name)})</script>"
        )

    def widget(self) -> Any:
        """The same figure as an ipywidgets box whose slider calls the data function."""
        import ipywidgets as w

        low, high = self.values[0], self.values[-1]
        look = {"description": self.label, "value": self.values[self.start]}
        look["layout"] = w.Layout(width="min(100%, 36rem)")
        look["style"] = {"description_width": "initial"}
        slider: Any
        if self.scale == "log":
            low, high = math.log10(low), math.log10(high)
            slider = w.FloatLogSlider(min=low, max=high, step=(high - low) / 200, **look)
        elif self.scale == "linear":
            slider = w.FloatSlider(min=low, max=high, step=(high - low) / 200, **look)
        else:
            options = [(f"{value:g}", value) for value in self.values]
            slider = w.SelectionSlider(options=options, **look)
        name, picture = f"dnal-live-{next(self._shown)}", w.HTML()

        def show(value: float) -> None:
            frame = self.frame(value)
            readout = f'<output aria-live="polite">{escape(frame.readout)}</output>'
            body = self.picture(frame, name) + readout
            picture.value = f'{STYLE}<div class="dnal-fig">{body}</div>'

        slider.observe(lambda change: show(change["new"]), names="value")
        show(slider.value)
        return w.VBox([picture, slider])

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        bundle = {"text/plain": f"{self.alt} {self.frames[self.start].readout}"}
        bundle["text/html"] = self.html()
        if live_front_end():
            bundle[WIDGET_VIEW] = self.widget()._repr_mimebundle_()[WIDGET_VIEW]
        return bundle


def live_front_end() -> bool:
    """True in a kernel that a Jupyter server or VS Code has started, with ipywidgets installed.

    A kernel that only executes a notebook for a page has no one to move a live slider: a widget
    would leave a model there that no reader can reach.
    """
    if "ipykernel" not in sys.modules:
        return False
    from importlib.util import find_spec

    from IPython import get_ipython

    variables = getattr(get_ipython(), "user_ns", {})
    served = "JPY_SESSION_NAME" in os.environ or "__vsc_ipynb_file__" in variables
    return served and find_spec("ipywidgets") is not None


def _colours(table: dict[str, str]) -> str:
    return ";".join(f"--{name}:{value}" for name, value in table.items())


# The figure brings its own ground and ink, since themes put outputs on grounds of their own.
# Dark: the book's theme, JupyterLab, VS Code.
STYLE = f"""<style>
.dnal-fig{{--ink:#1f2933;--ground:#fff;{_colours(LIGHT)};color:var(--ink);background:var(--ground);
max-width:1120px;padding:.5rem;border-radius:.4rem;box-sizing:border-box;line-height:1.4}}
html[data-theme="dark"] .dnal-fig,[data-jp-theme-light="false"] .dnal-fig,
.vscode-dark .dnal-fig{{--ink:#e3e8ee;--ground:#14181e;{_colours(DARK)}}}
html[data-theme="dark"] .bd-content .cell_output .text_html:has(.dnal-fig){{padding:0;
background:none}}
{"".join(f".dnal-fig .k-{name}{{color:var(--{name})}}" for name in LIGHT)}
.dnal-panels{{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,290px),1fr));
gap:.5rem}}
.dnal-panels svg{{width:100%;max-width:600px;height:auto;display:block}}
.dnal-panels text{{fill:var(--ink);font:13px system-ui,sans-serif}}
.dnal-panels .title{{font-weight:600;font-size:14px}}
.dnal-fig .line{{fill:none;stroke:currentColor;stroke-width:2.4;stroke-linejoin:round}}
.dnal-fig .bar{{fill:currentColor;opacity:.85}}
.dnal-fig circle{{fill:currentColor;stroke:var(--ground);stroke-width:1}}
.dnal-fig .grid{{stroke:var(--ink);opacity:.13}}.dnal-fig .axis{{stroke:var(--ink);fill:none}}
.dnal-legend{{display:flex;flex-wrap:wrap;gap:.1rem 1.2rem;margin:.2rem 0 .3rem;font-size:.9rem}}
.dnal-legend span{{display:inline-flex;align-items:center;gap:.4rem}}
.dnal-legend svg{{width:26px;height:14px;flex:none}}
.dnal-legend b{{font-weight:400;color:var(--ink)}}
.dnal-control{{display:flex;flex-wrap:wrap;align-items:center;gap:.2rem .7rem}}
.dnal-control[hidden]{{display:none}}
.dnal-control input{{flex:1 1 12rem;max-width:36rem;min-height:1.8rem;accent-color:var(--blue)}}
.dnal-fig output{{display:block;font-variant-numeric:tabular-nums;min-height:1.5em}}
</style>"""

SCRIPT = """(name) => {
  const root = document.getElementById(name);
  const data = JSON.parse(document.getElementById(name + "-data").textContent);
  const slider = document.getElementById(name + "-in");
  const show = () => {
    const frame = data.frames[Number(slider.value)];
    root.querySelectorAll(".marks").forEach((g, k) => { g.innerHTML = frame.marks[k]; });
    const words = data.alt + " " + frame.readout;
    root.querySelectorAll("desc").forEach((d) => { d.textContent = words; });
    root.querySelector("output").textContent = frame.readout;
    slider.setAttribute("aria-valuetext", frame.readout);
  };
  slider.addEventListener("input", show);
  root.querySelector(".dnal-control").hidden = false;
  show();
}"""


# A figure of the book -------------------------------------------------------------------------


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
