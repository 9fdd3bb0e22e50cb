"""A slider and a play button over one data function, live in a notebook and on a built page.

Both front ends show SVG from the same Python renderer (``svg.py``): with a kernel an ipywidgets
slider calls the data function at any value, on a page without one a few lines of script swap
frames that were drawn beforehand. No file, no font and no script is asked of anybody.
Stands aside, with ``svg.py``. The figures of the book are in ``widgets.py``.
"""

import hashlib
import itertools
import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from html import escape
from typing import Any, Literal

from dnal_mini.figures import svg
from dnal_mini.figures.svg import BOTTOM, DARK, HEIGHT, LEFT, LIGHT, RIGHT, TOP, WIDTH, Axes, Frame
from dnal_mini.refused import Refused

WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"


Scale = Literal["log", "linear", "steps"]


PLAY_S = 6.0  # all frames, from the first to the last


class SliderFigure:
    """One or more panels under a slider; display it by ending a cell with it.

    ``draw(value)`` is the only source of what is shown: the page holds its frames at ``values``,
    the live figure calls it at the value under the slider. ``scale`` says which values lie
    between: "log" and "linear" are continuous, "steps" has none but ``values``. ``alt`` says in
    words what the figure shows; each frame's readout is added to it. A button plays the frames on
    a page, and beside a slider of "steps" live; nothing moves before it is pressed.

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
            raise Refused(f"got slider values {self.values}; need at least two, growing")
        if scale == "log" and self.values[0] <= 0:
            raise Refused(f"got slider value {self.values[0]} on a log scale; need it above 0")
        if not 0 <= start < len(self.values):
            raise Refused(f"got start {start}; need an index below {len(self.values)}")
        self.frames = [self.frame(value) for value in self.values]

    def frame(self, value: float) -> Frame:
        """The data function's frame at a value, checked against the axes."""
        frame = self.draw(value)
        if len(frame.panels) != len(self.axes):
            raise Refused(f"got {len(frame.panels)} panels; need one for each of the axes")
        return frame

    def marks(self, frame: Frame) -> list[str]:
        """What changes with the slider: SVG for each panel. Both front ends show this."""
        pairs = zip(self.axes, frame.panels, strict=True)
        return ["".join(svg.draw_mark(mark, axes) for mark in marks) for axes, marks in pairs]

    def picture(self, frame: Frame, name: str) -> str:
        """The panels of one frame and their legend, as HTML; ``name`` begins all its ids."""
        drawn = []
        for k, (axes, marks) in enumerate(zip(self.axes, self.marks(frame), strict=True)):
            words = f"{self.alt} {frame.readout}"
            drawn.append(
                f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
                f'aria-labelledby="{name}-t{k} {name}-d{k}"><title id="{name}-t{k}">'
                f'{escape(axes.title)}</title><desc id="{name}-d{k}">{escape(words)}</desc>'
                f'<clipPath id="{name}-c{k}"><rect x="{LEFT}" y="{TOP - 6}" '
                f'width="{RIGHT - LEFT + 6}" height="{BOTTOM - TOP + 12}"/></clipPath>'
                f'{svg.scaffold(axes)}<g class="marks" clip-path="url(#{name}-c{k})">'
                f"{marks}</g></svg>"
            )
        return f'<div class="dnal-panels">{"".join(drawn)}</div>{svg.legend(frame)}'

    def html(self) -> str:
        """The figure for a page: needs no kernel, no network and no other script.

        Slider and button are native ones, so the keyboard works them; without scripts both stay
        hidden. For a reader who wants less motion the button goes on by one frame at a press.
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
            f'<div class="dnal-control" hidden>{PLAY}'
            f'<label for="{name}-in">{escape(self.label)}</label>'
            f'<input type="range" id="{name}-in" min="0" max="{len(frames) - 1}" step="1" '
            f'value="{self.start}" aria-valuetext="{escape(first.readout)}"></div>'
            f'<output for="{name}-in" aria-live="polite">{escape(first.readout)}</output></div>'
            f'<script type="application/json" id="{name}-data">{data}</script>'
            f"<script>({SCRIPT})({json.dumps(name)}, {self.pace_ms()})</script>"
        )

    def pace_ms(self) -> int:
        """Milliseconds from frame to frame while it plays: slow enough to see each of them."""
        return round(1e3 * min(max(PLAY_S / len(self.values), 0.15), 0.75))

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
        if self.scale != "steps":
            return w.VBox([picture, slider])
        play = w.Play(max=len(self.values) - 1, value=self.start, interval=self.pace_ms())
        w.link((play, "value"), (slider, "index"))
        return w.VBox([picture, w.HBox([play, slider], layout=w.Layout(flex_flow="row wrap"))])

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
.dnal-play{{width:2.6rem;height:2rem;padding:0;border:1px solid var(--ink);border-radius:.4rem;
background:none;color:inherit;cursor:pointer}}
.dnal-play:is(:hover,[aria-pressed="true"]){{background:var(--blue);color:var(--ground)}}
.dnal-play:focus-visible{{outline:3px solid var(--amber);outline-offset:2px}}
.dnal-play svg{{width:1rem;height:1rem;fill:currentColor;display:block;margin:auto}}
.dnal-play[aria-pressed="true"] .play,.dnal-play[aria-pressed="false"] .pause{{display:none}}
.dnal-fig output{{display:block;font-variant-numeric:tabular-nums;min-height:1.5em}}
</style>"""


PLAY = (
    '<button type="button" class="dnal-play" aria-pressed="false" aria-label="play">'
    '<svg viewBox="0 0 16 16" aria-hidden="true"><path class="play" d="M3 1V15L15 8Z"/>'
    '<path class="pause" d="M2 1H6V15H2ZM10 1H14V15H10Z"/></svg></button>'
)


# The reader's hand on the slider stops the film; while it plays, no readout is read aloud.
SCRIPT = """(name, pace) => {
  const root = document.getElementById(name);
  const data = JSON.parse(document.getElementById(name + "-data").textContent);
  const slider = document.getElementById(name + "-in");
  const button = root.querySelector(".dnal-play");
  const output = root.querySelector("output");
  const last = data.frames.length - 1;
  const calm = matchMedia("(prefers-reduced-motion: reduce)");
  let timer = 0;
  const show = () => {
    const frame = data.frames[Number(slider.value)];
    root.querySelectorAll(".marks").forEach((g, k) => { g.innerHTML = frame.marks[k]; });
    const words = data.alt + " " + frame.readout;
    root.querySelectorAll("desc").forEach((d) => { d.textContent = words; });
    output.textContent = frame.readout;
    slider.setAttribute("aria-valuetext", frame.readout);
  };
  const playing = (yes) => {
    clearInterval(timer);
    timer = yes ? setInterval(step, pace) : 0;
    button.setAttribute("aria-pressed", String(yes));
    output.setAttribute("aria-live", yes ? "off" : "polite");
  };
  const step = () => {
    slider.value = Number(slider.value) < last ? Number(slider.value) + 1 : 0;
    show();
    if (Number(slider.value) === last) playing(false);
  };
  slider.addEventListener("input", () => { playing(false); show(); });
  button.addEventListener("click", () => {
    if (timer) { playing(false); return; }
    if (!calm.matches) playing(true);
    step();
  });
  root.querySelector(".dnal-control").hidden = false;
  show();
}"""
