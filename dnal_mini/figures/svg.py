"""Panels of a figure as SVG: axes, marks, ticks, legend; from numbers to text, without matplotlib.

Read ``Axes`` and ``Frame`` first. A page holds many frames of one figure, so they have to be small:
paths with one decimal, in the book's colours, without fonts or styles of their own.
Stands aside: imports nothing from the package. ``slider.py`` puts a slider under it.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dnal_mini.refused import Refused

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
                raise Refused(f"got range ({low}, {high}); need two finite numbers, lower first")
            if log and low <= 0:
                raise Refused(f"got range ({low}, {high}) on a log axis; need it above 0")

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


def draw_mark(mark: Mark, axes: Axes) -> str:
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


def scaffold(axes: Axes) -> str:
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


def legend(frame: Frame) -> str:
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
