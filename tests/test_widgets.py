"""Slider figures: one renderer, two front ends, and pictures at the right place."""

import itertools
import json
import re
import sys
from html.parser import HTMLParser

import numpy as np
import pytest

from dnal_mini import panels, plots, sliderfigure, widgets
from dnal_mini.widgets import Axes, Bars, Dots, Frame, Line, SliderFigure

BOX = Axes("Panel", "x", "y", (-2, 3), (0, 5))
LEFT, RIGHT, TOP, BOTTOM = panels.LEFT, panels.RIGHT, panels.TOP, panels.BOTTOM


def a_figure(**changes) -> SliderFigure:
    """Two panels whose marks move with the slider."""

    def draw(value: float) -> Frame:
        marks = [[Line([-2, 3], [0, value], "a line"), Dots([0], [value], "a dot")]]
        marks.append([Bars([-2, 0, 3], [1, value])])
        return Frame(marks, f"value {value:g} < 7 & more")

    settings = {"values": [1, 2, 5], "label": "v", "alt": 'It "moves".', "scale": "linear"}
    return SliderFigure([BOX, BOX], draw, **{**settings, **changes})


class Elements(HTMLParser):
    """Tags with their attributes, and the text of scripts by id."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.open: list[str] = []
        self.scripts: dict[str, str] = {}
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in {"input", "path", "circle", "rect"}:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            name = next(a for t, a in reversed(self.tags) if t == "script").get("id", "")
            self.scripts[name] = self.scripts.get(name, "") + data


def test_data_land_where_the_axes_say():
    assert BOX.to_x([-2, 0.5, 3]).tolist() == [LEFT, (LEFT + RIGHT) / 2, RIGHT]
    assert BOX.to_y([0, 2.5, 5]).tolist() == [BOTTOM, (TOP + BOTTOM) / 2, TOP]
    log = Axes("", "", "", (0.01, 100), (1, 1000), x_log=True, y_log=True)
    assert log.to_x(1).item() == pytest.approx((LEFT + RIGHT) / 2)
    assert log.to_y(10).item() == pytest.approx(BOTTOM - (BOTTOM - TOP) / 3)


def test_values_far_outside_are_cut_off_and_zero_has_a_place_on_a_log_axis():
    log = Axes("", "", "", (0.01, 100), (1, 1000), x_log=True)
    assert np.isfinite(log.to_x([0, -1, 1e300])).all()
    assert log.to_x(0) < LEFT < RIGHT < log.to_x(1e300)


def test_a_gap_in_the_data_is_a_gap_in_the_line():
    path = panels.draw_mark(Line([-2, -1, 0, 1, 2], [1, 2, np.nan, 3, 4]), BOX)
    assert path.count("M") == 2
    assert path.count("L") == 2


def test_bars_stand_on_the_axis_and_reach_their_heights():
    path = panels.draw_mark(Bars([-2, 0.5, 3], [5, 2.5]), BOX)
    d = re.search(r' d="([^"]*)"', path).group(1)
    tops = [float(y) for y in re.findall(r"V([\d.]+)H", d)]
    assert tops == pytest.approx([TOP, (TOP + BOTTOM) / 2])
    assert d.count(f"V{BOTTOM}Z") == 2


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-0.3, 0.7), (3, 17000), (-1e-5, 2e-5)])
def test_ticks_are_few_round_and_inside(low: float, high: float):
    found = panels.ticks(low, high)
    steps = np.diff(found)
    assert 2 <= len(found) <= 7
    assert low - 1e-12 <= found[0] <= found[-1] <= high + 1e-12
    np.testing.assert_allclose(steps, steps[0])
    lead = steps[0] / 10 ** np.floor(np.log10(steps[0]) + 1e-9)
    assert min(abs(lead - k) for k in (1, 2, 5)) < 1e-6


def test_log_ticks_are_powers_of_ten():
    assert panels.ticks(0.05, 2000, log=True) == pytest.approx([0.1, 1, 10, 100, 1000])
    assert panels.tick_text(1e-4, log=True) == "10⁻⁴"
    assert panels.tick_text(100, log=True) == "100"
    assert panels.tick_text(-0.2) == "−0.2"


def test_the_page_needs_nothing_from_outside():
    page = a_figure().html()
    assert not re.search(r"https?:|//[a-z]|@import|url\((?!#)", page)
    assert not [a for _, a in Elements(page).tags if "src" in a or "href" in a]


def test_the_page_is_whole_and_its_slider_is_native_and_named():
    page = Elements(a_figure(start=1).html())
    assert page.open == []
    (slider,) = (a for tag, a in page.tags if tag == "input")
    (label,) = (a for tag, a in page.tags if tag == "label")
    (output,) = (a for tag, a in page.tags if tag == "output")
    (button,) = (a for tag, a in page.tags if tag == "button")
    assert slider["type"] == "range"
    assert (slider["min"], slider["max"], slider["value"]) == ("0", "2", "1")
    assert label["for"] == slider["id"] == output["for"]
    assert slider["aria-valuetext"] == "value 2 < 7 & more"
    assert output["aria-live"] == "polite"
    assert (button["type"], button["aria-label"], button["aria-pressed"]) == (
        "button", "play", "false",
    )  # fmt: skip


@pytest.mark.parametrize(("count", "pace_ms"), [(2, 750), (20, 300), (30, 200), (300, 150)])
def test_a_film_takes_six_seconds_unless_a_frame_would_be_too_short_or_too_long(count, pace_ms):
    figure = a_figure(values=range(1, count + 1))
    assert figure.pace_ms() == pace_ms
    assert figure.html().endswith(f", {pace_ms})</script>")


def test_every_panel_has_a_name_and_words_for_those_who_do_not_see_it():
    page = Elements(a_figure().html())
    ids = {a["id"]: tag for tag, a in page.tags if "id" in a}
    panels = [a for tag, a in page.tags if tag == "svg" and a.get("role") == "img"]
    assert len(panels) == 2
    for panel in panels:
        assert [ids[name] for name in panel["aria-labelledby"].split()] == ["title", "desc"]


def test_ids_are_different_on_one_page_and_the_same_at_the_next_run(
    monkeypatch: pytest.MonkeyPatch,
):
    figure = a_figure()
    page = Elements(figure.html() + figure.html() + a_figure(values=[1, 4]).html())
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))
    runs = []
    for _ in range(2):
        monkeypatch.setattr(SliderFigure, "_shown", itertools.count(1))  # as in a new kernel
        runs.append(a_figure().html())
    assert runs[0] == runs[1]


def test_the_stored_frames_are_what_the_renderer_draws():
    figure = a_figure()
    scripts = Elements(figure.html()).scripts
    (name,) = (name for name in scripts if name.endswith("-data"))
    stored = json.loads(scripts[name])
    assert len(stored["frames"]) == 3
    for value, frame in zip((1, 2, 5), stored["frames"], strict=True):
        assert frame["marks"] == figure.marks(figure.draw(value))
        assert frame["readout"] == f"value {value} < 7 & more"
    assert "<" not in scripts[name]


def test_the_live_figure_draws_what_the_page_shows_and_any_value_between():
    figure = a_figure()
    picture, slider = figure.widget().children
    for value in (1, 2, 5):
        slider.value = value
        for marks in figure.marks(figure.draw(value)):
            assert marks in picture.value
    slider.value = 3.0
    assert figure.marks(figure.draw(3.0))[0] in picture.value
    assert "value 3 &lt; 7 &amp; more" in picture.value


@pytest.mark.parametrize(
    ("scale", "kind"),
    [("log", "FloatLogSlider"), ("linear", "FloatSlider"), ("steps", "SelectionSlider")],
)
def test_the_live_slider_starts_where_the_page_does(scale: str, kind: str):
    slider = a_figure(scale=scale, start=1).widget().children[1]
    if scale == "steps":
        _, slider = slider.children
    assert type(slider).__name__ == kind
    assert slider.value == pytest.approx(2)


def test_live_steps_are_played_by_a_button_that_moves_the_slider_and_is_moved_by_it():
    figure = a_figure(scale="steps", start=1)
    picture, row = figure.widget().children
    play, slider = row.children
    assert (play.min, play.value, play.max) == (0, 1, 2)
    assert play.interval == figure.pace_ms()
    assert not play.playing
    play.value = 2
    assert slider.value == 5
    assert figure.marks(figure.draw(5))[0] in picture.value
    slider.value = 1
    assert play.value == 0
    assert figure.marks(figure.draw(1))[0] in picture.value


def test_a_widget_is_sent_only_to_a_front_end_that_can_show_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sliderfigure, "live_front_end", lambda: False)
    assert set(a_figure()._repr_mimebundle_()) == {"text/plain", "text/html"}
    monkeypatch.setattr(sliderfigure, "live_front_end", lambda: True)
    bundle = a_figure()._repr_mimebundle_()
    assert set(bundle) == {"text/plain", "text/html", sliderfigure.WIDGET_VIEW}
    assert bundle[sliderfigure.WIDGET_VIEW]["model_id"]


def test_a_front_end_is_live_only_in_a_kernel_that_a_server_has_started(
    monkeypatch: pytest.MonkeyPatch,
):
    pytest.importorskip("IPython")
    monkeypatch.setitem(sys.modules, "ipykernel", sys)
    monkeypatch.delenv("JPY_SESSION_NAME", raising=False)
    assert not widgets.live_front_end()
    monkeypatch.setenv("JPY_SESSION_NAME", "a.ipynb")
    assert widgets.live_front_end()
    monkeypatch.delitem(sys.modules, "ipykernel")
    assert not widgets.live_front_end()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"values": []}, "at least two"),
        ({"values": [1]}, "at least two"),
        ({"values": [1, 3, 2]}, "growing"),
        ({"values": [0, 1], "scale": "log"}, "above 0"),
        ({"start": 3}, "below 3"),
    ],
)
def test_a_slider_that_cannot_work_is_refused(changes: dict, words: str):
    with pytest.raises(ValueError, match=words):
        a_figure(**changes)


def test_axes_and_frames_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="lower first"):
        Axes("", "", "", (1, 1), (0, 1))
    with pytest.raises(ValueError, match="log axis"):
        Axes("", "", "", (0, 1), (0, 1), x_log=True)
    with pytest.raises(ValueError, match="got 1 panels"):
        SliderFigure([BOX, BOX], lambda v: Frame([[]], ""), [1, 2], "v", "alt")


def luminance(colour: str) -> float:
    """Relative luminance of ``#rrggbb`` (WCAG 2)."""
    parts = np.array([int(colour[k : k + 2], 16) for k in (1, 3, 5)]) / 255
    linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


@pytest.mark.parametrize(
    ("palette", "ground"), [(widgets.LIGHT, "#ffffff"), (widgets.DARK, "#14181e")]
)
def test_every_colour_can_be_seen_on_its_ground(palette: dict, ground: str):
    assert ground.replace("ffffff", "fff") in sliderfigure.STYLE
    for colour in palette.values():
        bright, dark = sorted((luminance(colour), luminance(ground)), reverse=True)
        assert (bright + 0.05) / (dark + 0.05) >= 3  # WCAG 2.2, 1.4.11: graphical objects


def test_both_kinds_of_figures_use_the_same_inks():
    assert widgets.LIGHT["blue"] == plots.COLOURS["paper"]
    assert widgets.LIGHT["vermilion"] == plots.COLOURS["code"]
    assert set(widgets.LIGHT.values()) <= {
        plots.BLUE, plots.VERMILION, plots.GREEN, plots.PURPLE, plots.AMBER, plots.GREY,
    }  # fmt: skip


def test_the_gate_figure_shows_the_sigmoid_and_counts_every_gate():
    s = np.random.default_rng(3).normal(0, 0.05, 501)
    figure = widgets.gate_figure(s, [1, 30, 1e4])
    line, dots = figure.draw(30).panels[0][1:]
    np.testing.assert_allclose(line.y, 1 / (1 + np.exp(-30 * line.x)), rtol=1e-12)
    assert set(dots.x) <= set(s)
    (bars,) = figure.draw(30).panels[1]
    p = 1 / (1 + np.exp(-30 * s))
    middle = np.mean((p >= 0.4) & (p < 0.5))
    assert sum(bars.heights) == pytest.approx(1)
    assert bars.heights[4] == pytest.approx(middle)
    assert "δ/4 = 7.5" in figure.draw(30).readout
    assert len(figure.html()) < 100_000


def test_the_price_figure_shows_each_form_at_its_epoch():
    share, deltas = np.linspace(0, 2, 7), [10.0, 1000.0, 1e4]
    paths = {form: [np.full(7, k * sign) for k in (0.1, 0.2, 0.3)] for form, sign in
             (("paper", 1), ("code", -1))}  # fmt: skip
    figure = widgets.price_figure(share, paths, deltas)
    gates, values = figure.draw(1).panels
    assert [line.label for line in gates] == ["paper form", "code form"]
    np.testing.assert_allclose(gates[0].y, 1 / (1 + np.exp(-1.0)), rtol=1e-12)
    np.testing.assert_allclose(gates[1].y, 1 / (1 + np.exp(1.0)), rtol=1e-12)
    np.testing.assert_allclose(figure.draw(3).panels[1][1].y, -0.3)
    assert len(values) == 2
    assert "epoch 3 of 3" in figure.draw(3).readout


def seen_through_the_microscope() -> list[dict]:
    """A record of two epochs and a look before them: layers of 3 and 5 gates."""

    def look(epoch: int, delta: float, *layers: tuple) -> dict:
        names = ("histogram", "undecided", "frozen", "gradient", "data_gradient")
        found = {f"g{k}": dict(zip(names, layer, strict=True)) for k, layer in enumerate(layers)}
        return {"kind": "look", "epoch": epoch, "delta": delta, "layers": found}

    def epoch(number: int, soft: float, hard: float, stage: str = "arch_stage") -> dict:
        row = {"kind": "epoch", "stage": stage, "epoch": number}
        return row | {"val_accuracy": soft, "hard_val_accuracy": hard}

    return [
        epoch(1, 0.9, 0.9, "weight_stage"),
        look(0, 1.0, ([0, 0, 3, 0], 1.0, 0.0, 2e-3, 1e-3), ([0, 0, 5, 0], 1.0, 0.0, 4e-3, 3e-3)),
        epoch(1, 0.7, 0.2),
        look(1, 9.0, ([1, 1, 1, 0], 2 / 3, 0.0, 8e-3, 7e-3), ([2, 0, 0, 3], 0.0, 0.4, 1e-9, 0.0)),
        epoch(2, 0.6, 0.5),
        look(2, 1e4, ([2, 0, 0, 1], 0.0, 1.0, 0.0, 0.0), ([2, 0, 0, 3], 0.0, 1.0, 0.0, 0.0)),
    ]


def test_the_microscope_figure_counts_gates_not_layers():
    figure = widgets.microscope_figure(seen_through_the_microscope(), "a net")
    assert figure.values == [0, 1, 2]
    gates, shares, moving, accuracy = figure.draw(1).panels
    np.testing.assert_allclose(gates[0].heights, [3 / 8, 1 / 8, 1 / 8, 3 / 8])
    assert gates[0].edges.tolist() == [0, 0.25, 0.5, 0.75, 1]
    bars, dots = shares
    assert (bars.heights.tolist(), dots.y.tolist()) == ([2 / 3, 0.0], [0.0, 0.4])
    assert (bars.edges.tolist(), dots.x.tolist()) == ([0.5, 1.5, 2.5], [1, 2])
    line, points = moving
    assert (points.x.tolist(), points.y.tolist()) == ([1], [8e-3]), "1e-9 moves nothing: not drawn"
    np.testing.assert_array_equal(line.y, [7e-3, np.nan])
    assert accuracy[0].y == [0.7], "of the architecture stage, up to this epoch"
    assert "undecided 25.0%, frozen 25.0%" in figure.draw(1).readout
    assert figure.draw(1).readout.endswith("soft 70.0%, hard 20.0%")
    assert figure.axes[0].title == "a net: all 8 gates"


def test_the_microscope_figure_is_drawn_from_before_the_first_step_to_the_last():
    figure = widgets.microscope_figure(seen_through_the_microscope(), "a net")
    assert "nan" not in figure.html()
    assert figure.draw(0).panels[3][0].y == []
    assert "accuracy" not in figure.draw(0).readout
    assert figure.draw(2).panels[3][1].y == [0.2, 0.5]
    assert figure.draw(2).panels[2][1].y.tolist() == []
    low, high = figure.axes[2].y_range
    assert (low, high) == (widgets.FAINT, 2 * 8e-3)


def test_a_record_without_the_microscope_is_refused():
    rows = [row for row in seen_through_the_microscope() if row["kind"] == "epoch"]
    with pytest.raises(ValueError, match="got 0 looks"):
        widgets.microscope_figure(rows, "a net")
