"""The built site: every page is there and whole, and none asks another host for anything.

Whole: as many figures as its notebook stores, all told in words, no error, light enough to load.
"""

import functools
import json
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import yaml

ROOT = Path(__file__).parents[1]
SITE = ROOT / "_build" / "html"
TOC = yaml.safe_load((ROOT / "_toc.yml").read_text())
PAGES = [TOC["root"], *(entry["file"] for part in TOC["parts"] for entry in part["chapters"])]
TRACES = ("Traceback (most recent call last)", "output traceback", "CellExecutionError")
# Attributes by which a page makes the browser fetch something; <a href> fetches nothing.
FETCHES = {"script": "src", "link": "href", "img": "src", "iframe": "src", "source": "src"}
SLIDER = 'class="dnal-fig"'
# What the book had when this was written: a build that lost pages or figures does not pass.
LEAST = {"pages": 18, "pictures": 63, "sliders": 10}
LEAST_WORDS = 30  # letters of alt text
MAX_PAGE_BYTES = 3_000_000
needs_site = pytest.mark.skipif(not SITE.is_dir(), reason="no _build/html; do: make book")


class Fetches(HTMLParser):
    """Collects the addresses that a page makes the browser fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        canonical = attributes.get("rel") in {"canonical", "next", "prev", "index", "search"}
        if (address := attributes.get(FETCHES.get(tag, ""))) and not canonical:
            self.addresses.append(address)


@functools.cache
def fetched(html: str) -> list[str]:
    """Addresses that a page makes the browser fetch, data: URIs left out; parsed once."""
    parser = Fetches()
    parser.feed(html)
    return [address for address in parser.addresses if not address.startswith("data:")]


@functools.cache
def html_of(page: str) -> str:
    """The text of a built page, read once."""
    return (SITE / f"{page}.html").read_text(encoding="utf-8")


def is_external(address: str) -> bool:
    """True for an address on another host, also without a scheme (``//host/path``)."""
    return bool(urlsplit(address).netloc)


def test_an_external_script_is_seen_and_an_ordinary_link_is_not():
    html = '<script src="//cdn.example/x.js"></script><a href="https://example.org">x</a>'
    html += '<link rel="stylesheet" href="../_static/book.css"><img src="data:image/png;base64,AA">'
    assert fetched(html) == ["//cdn.example/x.js", "../_static/book.css"]
    assert [is_external(address) for address in fetched(html)] == [True, False]


def test_the_table_of_contents_names_every_notebook():
    names = sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))
    assert [Path(page).name for page in PAGES if page.startswith("notebooks/")] == names


@needs_site
def test_the_site_has_the_pages_of_the_table_of_contents_and_no_others():
    built = [path.relative_to(SITE).with_suffix("") for path in SITE.rglob("*.html")]
    ours = {str(path) for path in built if path.parts[0] in {"book", "notebooks"}}
    assert ours == set(PAGES)
    assert (SITE / "index.html").is_file()


@needs_site
@pytest.mark.parametrize("page", PAGES)
def test_a_page_shows_no_error(page: str):
    html = html_of(page)
    assert [trace for trace in TRACES if trace in html] == []


@needs_site
@pytest.mark.parametrize("page", PAGES)
def test_a_page_fetches_only_files_that_the_site_holds(page: str):
    path = SITE / f"{page}.html"
    addresses = fetched(html_of(page))
    assert addresses
    assert [address for address in addresses if is_external(address)] == []
    local = {path.parent / unquote(urlsplit(address).path) for address in addresses}
    assert [str(target) for target in local if not target.exists()] == []


@needs_site
@pytest.mark.parametrize("page", PAGES)
def test_a_page_with_formulas_carries_its_own_mathjax(page: str):
    html = html_of(page)
    mathjax = [address for address in fetched(html) if "mathjax" in address]
    assert 'class="math' not in html or mathjax == ["../_static/mathjax/tex-chtml.js"]


def stored(page: str) -> dict[str, int]:
    """How many figures and errors the outputs of a page's notebook hold; none for Markdown."""
    path = ROOT / f"{page}.ipynb"
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"] if path.exists() else []
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    html = ["".join(output.get("data", {}).get("text/html", "")) for output in outputs]
    return {
        "pictures": sum(
            not words and any(kind.startswith("image/") for kind in output.get("data", {}))
            for words, output in zip(html, outputs, strict=True)
        ),
        "sliders": sum(words.count(SLIDER) for words in html),
        "errors": sum(output["output_type"] == "error" for output in outputs),
    }


def shown(html: str) -> dict[str, int]:
    """The same, counted on a built page."""
    return {
        "pictures": sum("_images/" in address for address in Figures(html).pictures),
        "sliders": html.count(SLIDER),
        "errors": sum(trace in html for trace in TRACES),
    }


class Figures(HTMLParser):
    """The pictures of a page, by address, and what is wrong with their words."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.pictures: list[str] = []
        self.wordless: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        words = {name: value or "" for name, value in attrs}
        if tag == "img":
            self.pictures.append(words.get("src", ""))
            alt = words.get("alt", "")
            own = "_images/" in words.get("src", "")
            if not alt or "_images/" in alt or (own and len(alt) < LEAST_WORDS):
                self.wordless.append(f"img {words.get('src')}: alt is {alt!r}")
        hidden = words.get("aria-hidden") == "true"
        named = words.get("role") == "img" and {"aria-label", "aria-labelledby"} & words.keys()
        if tag == "svg" and not hidden and not named:
            self.wordless.append(f"svg {words.get('class', '')}")


def page_bytes(path: Path) -> int:
    """Weight of a page: its HTML and its own pictures; theme files are fetched once for all."""
    own = {a for a in fetched(path.read_text(encoding="utf-8")) if "_images/" in a}
    return path.stat().st_size + sum((path.parent / unquote(a)).stat().st_size for a in own)


def test_figures_without_words_are_found():
    path = "../_images/1f.svg"
    told = f'<img src="{path}" alt="{"x" * LEAST_WORDS}"><img src="logo.svg" alt="Home">'
    told += '<svg aria-hidden="true"></svg><svg role="img" aria-labelledby="a b"></svg>'
    assert Figures(told).wordless == []
    assert shown(told) == {"pictures": 1, "sliders": 0, "errors": 0}
    for untold in (f'<img src="{path}">', f'<img src="{path}" alt="{path}">', "<svg></svg>",
                   f'<img src="{path}" alt="short">', '<img src="logo.svg" alt="">'):  # fmt: skip
        assert len(Figures(untold).wordless) == 1, untold


@needs_site
@pytest.mark.parametrize("page", PAGES)
def test_a_page_shows_what_its_notebook_stores(page: str):
    html = html_of(page)
    assert shown(html) == stored(page)


@needs_site
def test_the_site_is_not_empty():
    pages = [html_of(page) for page in PAGES]
    counts = [shown(html) for html in pages]
    found = {name: sum(count[name] for count in counts) for name in counts[0]}
    assert len(pages) >= LEAST["pages"]
    assert found["pictures"] >= LEAST["pictures"]
    assert found["sliders"] >= LEAST["sliders"]
    assert found["errors"] == 0
    assert min(len(html) for html in pages) > 10_000, "a page without content"


@needs_site
@pytest.mark.parametrize("page", PAGES)
def test_every_figure_is_told_in_words(page: str):
    assert Figures(html_of(page)).wordless == []


@needs_site
@pytest.mark.parametrize("page", PAGES)
def test_a_page_weighs_at_most_three_megabytes(page: str):
    assert page_bytes(SITE / f"{page}.html") <= MAX_PAGE_BYTES


@needs_site
@pytest.mark.parametrize("page", [page for page in PAGES if page.startswith("notebooks/")])
def test_a_notebook_can_be_downloaded_from_its_page(page: str):
    html = html_of(page)
    assert f'href="../_sources/{page}.ipynb"' in html
    copy = (SITE / "_sources" / f"{page}.ipynb").read_bytes()
    assert copy == (ROOT / f"{page}.ipynb").read_bytes()
