"""The built pages in a real browser, network cut: they load, fit, and their figures move.

Needs Playwright and a Chromium of the system; ``.ci/run`` installs both, and sets ``DNAL_BROWSER``
to the browser's path, so that nothing is skipped there.
"""

import http.server
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml

from dnal_mini.figures.slider import SliderFigure
from dnal_mini.figures.svg import Axes, Dots, Frame

pytestmark = pytest.mark.browser
ROOT = Path(__file__).parents[1]
SITE = ROOT / "_build" / "html"
TOC = yaml.safe_load((ROOT / "_toc.yml").read_text())
PAGES = [TOC["root"], *(entry["file"] for part in TOC["parts"] for entry in part["chapters"])]
NARROW, WIDE = (360, 740), (1600, 900)
PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
PROGRAM = os.environ.get("DNAL_BROWSER") or next(filter(None, map(shutil.which, PROGRAMS)), None)
OFFLINE = "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1"
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", OFFLINE]
SETTLED = "async () => { await document.fonts.ready; await window.MathJax?.startup?.promise; }"
# What sticks out of the page to the right, outermost first; [] where the page does not scroll.
TOO_WIDE = """() => {
  const page = document.scrollingElement, room = document.documentElement.clientWidth;
  if (page.scrollWidth <= room) return [];
  const out = [...document.body.querySelectorAll("*")].filter(
    (element) => element.getBoundingClientRect().right > room + 1);
  return [`page is ${page.scrollWidth} px wide in ${room} px`].concat(
    out.slice(0, 4).map((e) => `<${e.tagName.toLowerCase()} class="${e.className}">`));
}"""


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Files of a folder, without a log."""

    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""


@pytest.fixture(scope="module")
def serve() -> Iterator[Callable[[Path], str]]:
    """A function that serves a folder on this machine and returns its address."""
    servers = []

    def start(folder: Path) -> str:
        server = http.server.ThreadingHTTPServer(
            ("127.0.0.1", 0), partial(Quiet, directory=str(folder))
        )
        servers.append(server)
        threading.Thread(target=partial(server.serve_forever, 0.05), daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """The system's Chromium; no name but this machine's can be resolved."""
    if "DNAL_BROWSER" not in os.environ:
        pytest.importorskip("playwright", reason="no Playwright; do: make setup")
    if PROGRAM is None:
        pytest.skip(f"no {', '.join(PROGRAMS)}; do: apt install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=PROGRAM, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def site(serve: Callable[[Path], str]) -> str:
    """Address of the built book."""
    if not SITE.is_dir() and "DNAL_BROWSER" not in os.environ:
        pytest.skip("no _build/html; do: make book")
    assert (SITE / "index.html").is_file()
    return serve(SITE)


@pytest.fixture(scope="module")
def contexts(browser: Any) -> Iterator[dict[str, Any]]:
    """Readers who chose the light and the dark theme."""
    readers = {}
    for theme in ("light", "dark"):
        readers[theme] = browser.new_context(color_scheme=theme)
        choose = "".join(f'localStorage.setItem("{key}", "{theme}");' for key in ("mode", "theme"))
        readers[theme].add_init_script(choose)
    yield readers
    for reader in readers.values():
        reader.close()


def watch(page: Any, own: str) -> list[str]:
    """A list that fills with what goes wrong on a page while it loads and is used."""
    found: list[str] = []
    here = urlsplit(own).netloc

    def asked(request: Any) -> None:
        place = urlsplit(request.url)
        if place.scheme not in {"data", "blob"} and place.netloc != here:
            found.append(f"asks another host: {request.url}")

    def answered(response: Any) -> None:
        if response.status >= 400:
            found.append(f"status {response.status}: {response.url}")

    def said(message: Any) -> None:
        if message.type == "error":
            found.append(f"console error: {message.text}")

    page.on("request", asked)
    page.on("response", answered)
    page.on("console", said)
    page.on("requestfailed", lambda request: found.append(f"failed: {request.url}"))
    page.on("pageerror", lambda error: found.append(f"page error: {error}"))
    return found


def load(context: Any, address: str, size: tuple[int, int]) -> tuple[Any, list[str]]:
    """A loaded page whose formulas are set, and the list of what goes wrong on it."""
    page = context.new_page()
    page.set_viewport_size({"width": size[0], "height": size[1]})
    found = watch(page, address)
    page.goto(address, wait_until="load")
    page.evaluate(SETTLED)
    return page, found


def page_faults(context: Any, address: str, theme: str = "") -> list[str]:
    """What is wrong with a page: errors, requests, a wrong theme, sideways scrolling."""
    first, second = (NARROW, WIDE) if theme != "dark" else (WIDE, NARROW)
    page, found = load(context, address, first)
    for width, height in (first, second):
        page.set_viewport_size({"width": width, "height": height})
        found += page.evaluate(TOO_WIDE)
    if theme and page.evaluate("document.documentElement.dataset.theme") != theme:
        found.append(f"not in the {theme} theme")
    page.close()
    return found


class Figure:
    """A slider figure on a loaded page, as a reader sees and moves it."""

    def __init__(self, root: Any) -> None:
        self.root, self.page = root, root.page
        self.slider, self.button = root.locator("input[type=range]"), root.locator("button")

    def value(self) -> int:
        """Number of the frame under the slider."""
        return int(self.slider.input_value())

    def last(self) -> int:
        """Number of the last frame."""
        return int(self.slider.get_attribute("max"))

    def seen(self) -> tuple[bytes, str]:
        """The picture, pixel by pixel, and the words below it."""
        return self.root.locator(".dnal-panels").screenshot(), self.root.locator(
            "output"
        ).inner_text()

    def press(self, key: str) -> tuple[bytes, str]:
        """What is seen after a key on the slider."""
        self.slider.press(key)
        return self.seen()

    def drag(self, start: float, end: float) -> tuple[bytes, str]:
        """What is seen after the mouse has drawn the handle over shares of the track."""
        self.slider.scroll_into_view_if_needed()
        box = self.slider.bounding_box()
        middle = box["y"] + box["height"] / 2
        self.page.mouse.move(box["x"] + box["width"] * start, middle)
        self.page.mouse.down()
        self.page.mouse.move(box["x"] + box["width"] * end, middle, steps=3)
        self.page.mouse.up()
        return self.seen()

    def playing(self) -> bool:
        """What the button says of itself."""
        return self.button.get_attribute("aria-pressed") == "true"

    def comes_to(self, frame: int) -> bool:
        """Whether the film comes to a frame within 5 seconds."""
        from playwright.sync_api import TimeoutError as TooLate

        script = "([element, frame]) => Number(element.value) === frame"
        try:
            arguments = [self.slider.element_handle(), frame]
            self.page.wait_for_function(script, arg=arguments, timeout=5000)
        except TooLate:
            return False
        return True


def figures(page: Any) -> list[Figure]:
    """The slider figures of a page."""
    return [Figure(root) for root in page.locator(".dnal-fig").all()]


def changes(before: tuple[bytes, str], after: tuple[bytes, str], how: str) -> list[str]:
    """What did not change between two looks at a figure."""
    names = ("picture", "readout")
    return [
        f"{name} does not change {how}"
        for name, old, new in zip(names, before, after, strict=True)
        if old == new
    ]


def slider_faults(figure: Figure) -> list[str]:
    """What does not follow the slider, moved from one end to the other by keyboard and by mouse."""
    first = figure.press("Home")
    found = [] if figure.value() == 0 else ["Home does not go to the first frame"]
    if figure.press("ArrowRight")[1] == first[1] or figure.value() != 1:
        found.append("an arrow key does not go on by a frame")
    found += changes(first, figure.press("End"), "by keyboard")
    if figure.value() != figure.last():
        found.append("End does not go to the last frame")
    last = figure.seen()
    found += changes(last, figure.drag(0.98, 0.1), "by mouse")
    if figure.value() > figure.last() / 3:
        found.append("the mouse does not move the slider")
    return found


def player_faults(figure: Figure) -> list[str]:
    """What the play button does not do: play, stop, end at the last frame, start again."""
    found = ["plays by itself"] if figure.playing() else []
    before = figure.press("Home")
    figure.button.press("Enter")
    found += [] if figure.playing() else ["Enter does not start it"]
    found += [] if figure.comes_to(min(2, figure.last())) else ["it does not go on"]
    found += changes(before, figure.seen(), "while it plays")
    figure.press("End")
    if figure.playing():
        return [*found, "a hand on the slider does not stop it"]
    figure.press("ArrowLeft")
    figure.button.click()
    ended = figure.comes_to(figure.last()) and not figure.playing()
    found += [] if ended else ["does not stop at the last frame"]
    figure.button.click()
    found += [] if figure.value() == 0 else ["does not start again at the first frame"]
    figure.button.press(" ")
    found += ["Space does not stop it"] if figure.playing() else []
    return found


# The book ---------------------------------------------------------------------------------------


LATER = pytest.mark.slow  # each page once by default, in the light theme or in the dark one
THEMED = [
    pytest.param(page, theme, marks=[LATER] if (k + (theme == "dark")) % 2 else [])
    for k, page in enumerate(PAGES)
    for theme in ("light", "dark")
]


@pytest.mark.parametrize(("page", "theme"), THEMED)
def test_a_page_loads_without_an_error_or_another_host_and_never_scrolls_sideways(
    contexts: dict[str, Any], site: str, page: str, theme: str
):
    assert page_faults(contexts[theme], f"{site}/{page}.html", theme) == []


@pytest.mark.parametrize("most", [1, pytest.param(99, marks=LATER)])  # figures of a page
@pytest.mark.parametrize("page", [page for page in PAGES if page.startswith("notebooks/")])
def test_the_sliders_and_players_of_a_page_move_its_picture(
    contexts: dict[str, Any], site: str, page: str, most: int
):
    html = (SITE / f"{page}.html").read_text(encoding="utf-8")
    count = html.count('class="dnal-fig"')
    if not count:
        assert "dnal-control" not in html, "a control without a figure"
        return
    loaded, found = load(contexts["light"], f"{site}/{page}.html", WIDE)
    there = figures(loaded)
    assert len(there) == count
    for k, figure in enumerate(there[:most], start=1):
        found += [f"figure {k}: {fault}" for fault in slider_faults(figure) + player_faults(figure)]
    loaded.close()
    assert found == []


# A slider figure on a page of its own -----------------------------------------------------------


def a_figure() -> SliderFigure:
    """A dot that climbs, fast: nobody waits for it twice."""
    box = Axes("A dot", "x", "y", (0, 6), (0, 6))
    return SliderFigure(
        [box],
        lambda value: Frame([[Dots([value], [value])]], f"at {value:g}"),
        [k / 8 for k in range(1, 41)],
        label="place",
        alt="A dot climbs.",
    )


def document(body: str) -> str:
    """A page that asks for nothing."""
    return f'<!DOCTYPE html><meta charset="utf-8"><link rel="icon" href="data:,">{body}'


def test_a_reader_who_wants_less_motion_gets_one_frame_at_a_press(browser, serve, tmp_path):
    (tmp_path / "calm.html").write_text(document(a_figure().html()), encoding="utf-8")
    context = browser.new_context(reduced_motion="reduce")
    page, found = load(context, f"{serve(tmp_path)}/calm.html", WIDE)
    (figure,) = figures(page)
    figure.button.click()
    assert (figure.value(), figure.playing()) == (1, False)
    page.wait_for_timeout(2 * a_figure().pace_ms())
    assert figure.value() == 1
    context.close()
    assert found == []


# The checks can fail ----------------------------------------------------------------------------

PLANTED = {
    "a console error": ('<script>console.error("no")</script>', "console error"),
    "an exception": ("<script>undefinedName()</script>", "page error"),
    "a missing file": ('<img src="gone.svg" alt="gone">', "status 404"),
    "another host": ('<script src="https://cdn.example/x.js"></script>', "asks another host"),
    "a wide element": ('<div style="width: 500px">wide</div>', "page is 508 px wide in 360 px"),
    "a wide element on a wide page": ('<div style="width: 1700px">w</div>', "in 1600 px"),
}


@pytest.mark.parametrize(("body", "words"), PLANTED.values(), ids=PLANTED)
def test_a_planted_fault_of_a_page_is_found(contexts, serve, tmp_path, body: str, words: str):
    (tmp_path / "bad.html").write_text(document(body), encoding="utf-8")
    assert words in " ".join(page_faults(contexts["light"], f"{serve(tmp_path)}/bad.html"))


def test_a_sound_page_has_no_fault_but_for_a_theme_that_it_lacks(contexts, serve, tmp_path):
    (tmp_path / "good.html").write_text(document("<p>sound</p>"), encoding="utf-8")
    address = f"{serve(tmp_path)}/good.html"
    assert page_faults(contexts["light"], address) == []
    assert page_faults(contexts["light"], address, "dark") == ["not in the dark theme"]


def test_a_wide_element_is_found_in_the_books_own_frame(contexts, site):
    page, found = load(contexts["light"], f"{site}/{PAGES[1]}.html", NARROW)
    assert page.evaluate(TOO_WIDE) == []
    page.evaluate(
        """() => document.querySelector(".bd-article p").insertAdjacentHTML(
        "afterend", '<div style="width: 500px">wide</div>')"""
    )
    assert page.evaluate(TOO_WIDE) != []
    page.close()
    assert found == []


def figure_faults(context: Any, address: str) -> str:
    """All faults of a page with one figure, in one line."""
    page, found = load(context, address, WIDE)
    (figure,) = figures(page)
    found += player_faults(figure) + slider_faults(figure)
    page.close()
    return " ".join(found)


def test_a_sound_figure_has_no_fault(contexts, serve, tmp_path):
    (tmp_path / "good.html").write_text(document(a_figure().html()), encoding="utf-8")
    assert figure_faults(contexts["light"], f"{serve(tmp_path)}/good.html") == ""


@pytest.mark.parametrize(
    ("sound", "broken", "words"),
    [
        ("g.innerHTML = frame.marks[k]", "g.id = k", "picture does not change by mouse"),
        ("output.textContent = frame.readout", "0", "readout does not change by keyboard"),
        ("playing(false); show(); }", "show(); }", "a hand on the slider does not stop it"),
        ("Number(slider.value) === last", "false", "does not stop at the last frame"),
        ('setAttribute("aria-pressed", String(yes))', "blur()", "Enter does not start it"),
        ("  show();\n}", "  show(); button.click();\n}", "plays by itself"),
    ],
)
def test_a_planted_fault_of_a_figure_is_found(
    contexts, serve, tmp_path, sound: str, broken: str, words: str
):
    html = a_figure().html()
    assert html.count(sound) == 1
    (tmp_path / "bad.html").write_text(document(html.replace(sound, broken)), encoding="utf-8")
    assert words in figure_faults(contexts["light"], f"{serve(tmp_path)}/bad.html")
