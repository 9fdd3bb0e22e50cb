"""The built site: every page is there, none shows an error, none asks another host for anything."""

import json
import re
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


def fetched(html: str) -> list[str]:
    """Addresses that a page makes the browser fetch, data: URIs left out."""
    parser = Fetches()
    parser.feed(html)
    return [address for address in parser.addresses if not address.startswith("data:")]


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
    html = (SITE / f"{page}.html").read_text(encoding="utf-8")
    assert [trace for trace in TRACES if trace in html] == []


@needs_site
@pytest.mark.parametrize("page", PAGES)
def test_a_page_fetches_only_files_that_the_site_holds(page: str):
    path = SITE / f"{page}.html"
    addresses = fetched(path.read_text(encoding="utf-8"))
    assert addresses
    assert [address for address in addresses if is_external(address)] == []
    local = {path.parent / unquote(urlsplit(address).path) for address in addresses}
    assert [str(target) for target in local if not target.exists()] == []


@needs_site
@pytest.mark.parametrize("page", PAGES)
def test_a_page_with_formulas_carries_its_own_mathjax(page: str):
    html = (SITE / f"{page}.html").read_text(encoding="utf-8")
    mathjax = [address for address in fetched(html) if "mathjax" in address]
    assert 'class="math' not in html or mathjax == ["../_static/mathjax/tex-chtml.js"]


@needs_site
@pytest.mark.parametrize("page", [page for page in PAGES if page.startswith("notebooks/")])
def test_every_output_of_a_notebook_is_on_its_page(page: str):
    notebook = json.loads((ROOT / f"{page}.ipynb").read_text(encoding="utf-8"))
    pictures = sum(
        "image/png" in output.get("data", {}) and "text/html" not in output["data"]
        for cell in notebook["cells"]
        for output in cell.get("outputs", [])
    )
    html = (SITE / f"{page}.html").read_text(encoding="utf-8")
    assert len(re.findall(r"<img[^>]*_images/[0-9a-f]{20,}\.png", html)) == pictures
