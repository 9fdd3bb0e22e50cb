"""Slider figures: one renderer, two front ends, and a button that plays."""

import itertools
import json
import re
import sys
from html.parser import HTMLParser

import numpy as np
import pytest

from dnal_mini.figures import colours, svg
from dnal_mini.figures import slider as sliderfigure
from dnal_mini.figures.slider import STYLE, WIDGET_VIEW, SliderFigure, live_front_end
from dnal_mini.figures.svg import Axes, Bars, Dots, Frame, Line

BOX = Axes("Panel", "x", "y", (-2, 3), (0, 5))


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
    assert set(bundle) == {"text/plain", "text/html", WIDGET_VIEW}
    assert bundle[WIDGET_VIEW]["model_id"]


def test_a_front_end_is_live_only_in_a_kernel_that_a_server_has_started(
    monkeypatch: pytest.MonkeyPatch,
):
    pytest.importorskip("IPython")
    monkeypatch.setitem(sys.modules, "ipykernel", sys)
    monkeypatch.delenv("JPY_SESSION_NAME", raising=False)
    assert not live_front_end()
    monkeypatch.setenv("JPY_SESSION_NAME", "a.ipynb")
    assert live_front_end()
    monkeypatch.delitem(sys.modules, "ipykernel")
    assert not live_front_end()


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


@pytest.mark.parametrize(("palette", "ground"), [(svg.LIGHT, "#ffffff"), (svg.DARK, "#14181e")])
def test_every_colour_can_be_seen_on_its_ground(palette: dict, ground: str):
    assert ground.replace("ffffff", "fff") in STYLE
    for colour in palette.values():
        bright, dark = sorted((luminance(colour), luminance(ground)), reverse=True)
        assert (bright + 0.05) / (dark + 0.05) >= 3  # WCAG 2.2, 1.4.11: graphical objects


def test_both_kinds_of_figures_use_the_same_inks():
    assert svg.LIGHT["blue"] == colours.COLOURS["paper"]
    assert svg.LIGHT["vermilion"] == colours.COLOURS["code"]
    assert set(svg.LIGHT.values()) <= {
        colours.BLUE, colours.VERMILION, colours.GREEN, colours.PURPLE, colours.AMBER, colours.GREY,
    }  # fmt: skip
