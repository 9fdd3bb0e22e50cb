"""Numbers in prose come from cells: a typed-in result on any page of the book is found."""

import io
import json
import re
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PAGES = sorted((ROOT / "book").glob("*.md"))
MAX_SMALL = 12  # up to here a bare whole number is a word of the language, as in "two layers"

# Numbers that are not results and stand in no cell of their page, with the reason.
ALLOWED: dict[str, dict[str, str]] = {
    "03_whole_road_digits": {"20": "gate epochs of the paper's program, which is not run there"},
    "glossary": {
        "10,000": "the last delta, a setting",
        "0.1": "definition of undecided",
        "0.9": "definition of undecided",
    },
    "intro": {"10,000": "the last delta, a setting"},
    "notation": {"10,000": "the last delta, a setting"},
}

# A language or a directive whose body is no prose.
CODE_FENCE = re.compile(
    r"^(?P<fence>`{3,}|~{3,})(?:\w[\w-]*|\{(?:code-cell|code-block|bibliography|nb-exec-table"
    r"|literalinclude|contents|tableofcontents)\}.*)?\n.*?^(?P=fence)[ ]*$",
    re.MULTILINE | re.DOTALL,
)
NOT_PROSE = [
    CODE_FENCE,
    re.compile(r"<!--.*?-->", re.DOTALL),
    re.compile(r"\A---\n.*?^---$", re.MULTILINE | re.DOTALL),  # front matter
    re.compile(r"^\*\*Budget\*\*.*?(?=\n\n|\Z)", re.MULTILINE | re.DOTALL),
    re.compile(
        r"(?:\{[\w:-]+\})?(?<!`)(`{1,2})(?!`)(?:.|\n(?!\n))+?(?<!`)\1(?!`)"
    ),  # code spans and roles
    re.compile(r"\$\$.*?\$\$|\$[^$\n]+\$", re.DOTALL),
    re.compile(r"(?<=\])\([^)]*\)|<[^>\s][^>]*>|https?://\S+"),  # addresses, tags
    re.compile(r"^(?:#+ +|\s*)\d+[a-z]?\. ", re.MULTILINE),  # numbering of headings and lists
]
NAMES_A_THING = (
    r"notebooks?|chapters?|sections?|parts?|equations?|algorithm|exercises?|solutions?|stages?"
    r"|tables?|figures?|rows?|columns?|channels?|places|seeds?|row|block|question|session|week"
    r"|facts?|step|Python|torch|version|arXiv"
)
ONE = r"\d[\d.]*[a-z]?\b"
NOT_RESULTS = [
    re.compile(rf"\b(?:{NAMES_A_THING}) {ONE}(?:(?:,| and| to| or|, and) {ONE})*", re.IGNORECASE),
    re.compile(r"\d+(?:,\d+)*(?: ?× ?\d+(?:,\d+)*)+"),  # sizes: 3 × 3
    re.compile(r"\b\d+[ -]bits?\b"),
    re.compile(r"\b[A-Z][\w.]+(?: (?:et al\.|and [A-Z]\w+))?,? \(?(?:19|20)\d\d\b"),  # Guo 2022
    re.compile(r"\bCC BY \d\.\d"),
    re.compile(r"\bbudget: \d+ s\b"),  # said by the cell that checks it
]
UNITS = {"k": 1e3, "M": 1e6, "G": 1e9, "million": 1e6, "billion": 1e9}
UNIT = (
    r"percent\b|%|points?\b|times\b|×|x\b|-?fold\b|ms\b|s\b|seconds?\b|minutes?\b|min\b|hours?\b"
    r"|h\b|days?\b|[kMG]i?B\b|[kMG]\b|MACs\b|param\w*|million\b|billion\b|epochs?\b"
)
TOKEN = re.compile(
    r"(?<![\w.])(?<![A-Za-z)]-)(?P<number>\d+(?:,\d{3})*(?:\.\d+)?(?:e[-−+]?\d+)?)"
    rf"(?:\s?(?P<unit>{UNIT})|(?!\w))"
)
PRINTED = re.compile(r"(?<![\w.])\d+(?:,\d{3})*(?:\.\d+)?(?:e[-+]?\d+)?\s?%?")
SUPERSCRIPT = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")


@dataclass(frozen=True)
class Number:
    """A number as printed: its value, half a unit in its last digit, and whether percent."""

    value: float
    slack: float
    percent: bool
    whole: bool


def number(digits: str, percent: bool = False, scale: float = 1.0) -> Number:
    """What a reader understands by these digits."""
    digits = digits.replace(",", "").replace("_", "").replace("−", "-").lower()
    mantissa, _, exponent = digits.partition("e")
    power = int(exponent or 0)
    last = scale * 10.0 ** (power - len(mantissa.partition(".")[2]))
    whole = "." not in mantissa and not exponent and scale == 1
    return Number(float(digits) * scale, last / 2 * (1 + 1e-9), percent, whole)


def prose(markdown: str) -> str:
    """The text of a page without code, formulas, addresses, numbering and its budget."""
    for pattern in NOT_PROSE:
        markdown = pattern.sub(" ", markdown)
    for pattern in NOT_RESULTS:
        markdown = pattern.sub(" ", markdown)
    markdown = re.sub(r"[*_]+(?=\S)|(?<=\S)[*_]+", "", markdown)
    power = re.compile(r"(?<!\w)(\d+)([⁻⁰¹²³⁴-⁹]+)")
    return power.sub(lambda m: f"{float(m[1]) ** int(m[2].translate(SUPERSCRIPT)):g}", markdown)


def results(text: str) -> Iterator[tuple[str, Number]]:
    """Every number in a piece of prose that reads as a result: as it stands, and what it says."""
    for match in TOKEN.finditer(text):
        unit = match["unit"] or ""
        digits = match["number"]
        found = number(digits, unit in {"%", "percent"}, UNITS.get(unit, 1.0))
        if unit or not found.whole or found.value > MAX_SMALL:
            yield " ".join(match[0].split()), found


def says(found: Number, ground: Number) -> bool:
    """True if a number in prose is this number of a cell, perhaps rounded."""
    if found.percent and not ground.percent:
        return ground.value <= 1 and abs(100 * ground.value - found.value) <= found.slack
    if ground.percent and not found.percent:
        return not found.whole and abs(ground.value / 100 - found.value) <= found.slack
    if found.whole and not found.percent:
        return found.value == ground.value
    return abs(ground.value - found.value) <= found.slack


def numbers_of_code(source: str) -> tuple[list[Number], list[str]]:
    """The numbers that a cell computes with; its comments and the sentences in its strings."""
    grounds, comments, sentences = [], [], []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        kind, text = tokenize.tok_name[token.type], token.string
        if kind == "NUMBER" and re.fullmatch(r"[\d._]+(?:e[-+]?\d+)?", text):
            grounds.append(number(text))
        elif kind == "COMMENT":
            comments.append(text.lstrip("# "))
        elif kind in {"STRING", "FSTRING_MIDDLE"}:
            words = re.sub(r"^[a-zA-Z]*[\'\"]+|\{[^}]*\}|[\'\"]+$", " ", text)
            sentences += [words] if " " in words.strip() else []  # else a name, a colour, a format
    return grounds, [" ".join(comments), *sentences]


def text_of(output: dict) -> str:
    """What a reader sees of an output as text: printed lines and tables, no pictures."""
    data = {kind: "".join(value) for kind, value in output.get("data", {}).items()}
    html = data.get("text/html", "")
    tables = re.findall(r"<table.*?</table>", html, re.DOTALL)
    shown = [re.sub(r"<[^>]*>", " ", table) for table in tables]
    plain = [] if html else [data.get("text/plain", "")]
    return " ".join(["".join(output.get("text", "")), *shown, *plain])


def printed(text: str) -> list[Number]:
    """All numbers in the text of an output."""
    found = (match[0].strip() for match in PRINTED.finditer(text))
    return [number(digits.rstrip("% "), digits.endswith("%")) for digits in found]


def typed_in(notebook: dict) -> list[str]:
    """Numbers in the prose of a notebook that no cell of it computes with or prints.

    Prose is what stands in markdown cells, in comments, in the titles and messages of the code,
    and in the descriptions of figures.
    """
    grounds, texts = [], []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            texts.append(prose(source))
            continue
        numbers, words = numbers_of_code(source)
        grounds += numbers
        alt = cell["metadata"].get("mystnb", {}).get("image", {}).get("alt", "")
        texts += [prose(text) for text in (*words, alt)]
        for output in cell["outputs"]:
            grounds += printed(text_of(output))
    found = [each for text in texts for each in results(text)]
    return [shown for shown, value in found if not any(says(value, g) for g in grounds)]


def found_on(path: Path) -> list[str]:
    """Typed-in results of a page of the book; on a page without cells every result is one."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        return typed_in(json.loads(text))
    return [shown for shown, _ in results(prose(text))]


@pytest.mark.parametrize("path", [*NOTEBOOKS, *PAGES], ids=lambda path: path.stem)
def test_no_number_on_a_page_is_typed_in(path: Path):
    found = [shown for shown in found_on(path) if shown not in ALLOWED.get(path.stem, {})]
    assert not found, f"{found}: print it in a cell, compute it, or say it in words"


def test_what_is_allowed_is_there():
    pages = {path.stem: path for path in (*NOTEBOOKS, *PAGES)}
    late = {name: set(numbers) - set(found_on(pages[name])) for name, numbers in ALLOWED.items()}
    assert not any(late.values()), f"allowed, but not needed any more: {late}"


def a_notebook(markdown: str, code: str, output: str) -> dict:
    """Parsed JSON of a notebook with one cell of each kind."""
    shown = [{"output_type": "stream", "name": "stdout", "text": output}]
    cell = {"cell_type": "code", "source": code, "metadata": {}, "outputs": shown}
    return {"cells": [{"cell_type": "markdown", "source": markdown, "metadata": {}}, cell]}


@pytest.mark.parametrize(
    "sentence",
    [
        "It keeps 61 % of the MACs.",
        "It keeps 61.5% of the MACs.",
        "It keeps 61.5 percent of them, or 0.615 in code.",
        "It has 14,991,946 parameters, which is 15 million, or 14.99 M.",
        "At a price of 1e-4 or of 10⁻⁴ it takes 2.35 ms.",
        "It is 3 times smaller, or 3×, since 12 layers were cut.",
        "See notebook 5, section 7.2, {cite}`guo2022dnal`, a 17 × 19 image in 64 bits, $x = 77$.",
        "## 17. A heading\n\n23. An exercise, with `code = 31`\n\n```bash\nrun --price 0.77\n```",
        "**Budget** two cores, 45 seconds.",
    ],
)
def test_a_number_that_a_cell_prints_may_be_told(sentence: str):
    printed = "kept 0.6149, share 61.5%; 14,991,946 parameters; 2.349 ms; 3 times"
    assert typed_in(a_notebook(sentence, "price = 1e-4", printed)) == []


@pytest.mark.parametrize(
    ("sentence", "caught"),
    [
        ("It keeps 63 % of the MACs.", "63 %"),
        ("It keeps 61.4% of the MACs.", "61.4%"),
        ("It keeps **61.4** percent of them.", None),
        ("It keeps 0.616 of them.", "0.616"),
        ("It has 14,991,947 parameters.", "14,991,947 parameters"),
        ("It has 14.98 M parameters.", "14.98 M"),
        ("At a price of 2e-4.", "2e-4"),
        ("At a price of 10⁻³.", "0.001"),
        ("It takes 2.36 ms.", "2.36 ms"),
        ("It is 4 times smaller.", "4 times"),
        ("It is 4× smaller.", "4×"),
        ("It lost 2 points.", "2 points"),
        ("With 47 layers.", "47"),
        ("> A quote says 0.71.", "0.71"),
        ("| a table | 83.95 |", "83.95"),
        ("```{note}\nA box says 71 %.\n```", "71 %"),
    ],
)
def test_a_typed_in_number_is_caught(sentence: str, caught: str | None):
    printed = "kept 0.6149, share 61.5%; 14,991,946 parameters; 2.349 ms; 3 times"
    found = typed_in(a_notebook(sentence, "price = 1e-4", printed))
    assert found == [caught] if caught else len(found) == 1


def test_comments_and_titles_are_prose_and_the_rest_of_the_code_is_not():
    code = 'x = 0.25  # gives 0.31\nax.set_title("Falls to 0.41 in the end")\ny = "#0072b2"'
    assert typed_in(a_notebook("About 0.25.", code, "")) == ["0.31", "0.41"]


def test_the_description_of_a_figure_is_prose():
    notebook = a_notebook("Text.", "x = 0.25", "")
    notebook["cells"][1]["metadata"] = {"mystnb": {"image": {"alt": "Falls from 0.25 to 0.13."}}}
    assert typed_in(notebook) == ["0.13"]


def test_pictures_and_scripts_are_no_source_of_numbers():
    notebook = a_notebook("It is 0.77.", "show()", "")
    data = {"image/svg+xml": "<path d='0.77'/>", "text/html": "<script>x = 0.77</script>"}
    notebook["cells"][1]["outputs"] = [{"output_type": "display_data", "data": data}]
    assert typed_in(notebook) == ["0.77"]
    data["text/html"] = "<table><tr><td>0.774</td></tr></table>"
    assert typed_in(notebook) == []
