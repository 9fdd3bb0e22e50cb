"""The reference pages of the book are true: notation, API, glossary, bibliography, handouts."""

import ast
import importlib
import json
import platform
import re
from importlib.util import find_spec
from pathlib import Path

import api
import handout
import nbformat
import pytest
import status
import yaml

from dnal_mini.config import SearchConfig
from dnal_mini.layers.scaled_sigmoid import ScaledSigmoid
from dnal_mini.methods.dnal import DNAL
from dnal_mini.runs.runlog import epochs, read

ROOT = Path(__file__).parents[1]
BOOK = ROOT / "book"
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MADE = {"SearchConfig": SearchConfig, "DNAL": DNAL, "ScaledSigmoid": lambda: ScaledSigmoid(3)}


def rows_of_notation(markdown: str) -> list[list[str]]:
    """The cells of all rows of the notation tables, titles left out."""
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [row for row in cells if row[0] != "symbol" and not row[0].startswith(":--")]


def resolves(dotted: str) -> bool:
    """True if a dotted name exists, as a class's own or as an instance's.

    It begins with "dnal." for a public name, else with a module or package of ``dnal_mini``.
    """
    first, *path = dotted.split(".")
    thing = importlib.import_module("dnal_mini" if first == "dnal" else f"dnal_mini.{first}")
    for name in path:
        if hasattr(thing, "__path__") and find_spec(f"{thing.__name__}.{name}"):
            thing = importlib.import_module(f"{thing.__name__}.{name}")
            continue
        fields = getattr(thing, "__annotations__", {})
        if not hasattr(thing, name) and name not in fields:
            thing = MADE[thing.__name__]() if getattr(thing, "__name__", "") in MADE else thing
        if not hasattr(thing, name) and name not in fields:
            return False
        thing = getattr(thing, name, None)
    return True


def columns_of_records() -> set[str]:
    """The names of numbers in the epoch rows of a record that the repository holds."""
    record = read(ROOT / "results" / "digits-seed0.jsonl")
    return {name for row in epochs(record) for name in row}


def test_every_name_of_the_notation_exists():
    rows = rows_of_notation((BOOK / "notation.md").read_text(encoding="utf-8"))
    names = re.findall(r"`([\w.]+)`", " ".join(row[1] for row in rows))
    assert len(rows) > 30
    assert all(len(row) == 5 for row in rows), "symbol, in code, meaning, unit, first met"
    for name in names:
        known = resolves(name) if "." in name else name in columns_of_records()
        assert known, f"{name} is not in the package"


@pytest.mark.parametrize(
    "name", ["dnal.ScaledSigmoid.steepness", "config.SearchConfig.lambda_", "gating.open_doors"]
)
def test_a_name_that_is_not_there_is_noticed(name: str):
    assert not resolves(name)
    assert resolves("dnal.ScaledSigmoid.s")


def test_the_api_page_has_a_place_for_the_names():
    assert api.PAGE.read_text(encoding="utf-8").count(api.MARK) == 1
    assert api.MARK not in api.page()


def test_the_api_page_names_every_public_name_of_every_module():
    text = api.page()
    for module in api.modules():
        path = api.PACKAGE.joinpath(*module.split("."))
        path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        kinds = (ast.FunctionDef, ast.ClassDef)
        names = {n.name for n in ast.parse(path.read_text()).body if isinstance(n, kinds)}
        shown = text.partition(f"\n### `{module}`\n")[2].partition("\n### ")[0]
        missing = {n for n in names if not n.startswith("_") and f"#### `{n}`" not in shown}
        assert shown, f"{module} is not on the page"
        assert not missing, f"{module}: {missing}"


def test_the_api_page_begins_with_what_the_package_exports():
    import dnal_mini

    start = api.page().partition("\n## The gate")[0]
    parts = {"models", "recipes"}
    assert [n for n in dnal_mini.__all__ if n not in parts and f"{{ref}}`{n} <" not in start] == []


def test_a_docstring_becomes_words_and_fields():
    source = '''
def double(x: Tensor, times: int = 2, *, exact: bool = False) -> Tensor:
    """Twice ``x``, at *least*: (3, c).

    In nats.

    Source: Guo et al. 2022, eq. 9 [guo2022dnal].
    Raises: ValueError for
    times < 0.

    Example:
        >>> [double(x)
        ...  for x in (1, 2)]
        [2, 4]
    """
'''
    (entry,) = api.entries(ast.parse(source))
    shown = "\n".join(api.section("gate", entry, {"02_layer": "y = dnal.double(x)"}))
    assert "double(x: Tensor, times: int = 2, *, exact: bool = False) -> Tensor" in shown
    assert "Twice `x`, at \\*least\\*: (3, c)." in shown
    assert "- **Source** Guo et al. 2022, eq. 9 {cite}`guo2022dnal`." in shown
    assert "- **Raises** ValueError for times \\< 0.\n" in shown
    assert "\n\n```python\n>>> [double(x)\n...  for x in (1, 2)]\n[2, 4]\n```\n" in shown
    assert "Example" not in shown
    assert "{doc}`2 </notebooks/02_layer>`" in shown


def pages() -> dict[str, str]:
    """The prose of the book by page: markdown, and the markdown cells of notebooks."""
    texts = {path.stem: path.read_text(encoding="utf-8") for path in BOOK.glob("*.md")}
    for path in NOTEBOOKS:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        prose = ("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
        texts[path.stem] = "\n".join(prose)
    return texts


def test_every_reference_is_cited_and_every_citation_has_its_reference():
    keys = set(re.findall(r"^@\w+\{(\w+),", (BOOK / "references.bib").read_text(), re.MULTILINE))
    cited = set()
    for text in pages().values():
        for inside in re.findall(r"\{cite(?::\w+)?\}`([^`]+)`", text):
            cited |= {key.strip() for key in inside.split(",")}
    assert cited - keys == set(), "cited, but not in references.bib"
    assert keys - cited == set(), "in references.bib, but nobody cites it"


def test_every_term_that_a_page_links_to_is_in_the_glossary():
    glossary = (BOOK / "glossary.md").read_text(encoding="utf-8")
    terms = re.findall(r"^(\w.*)\n  \S", glossary.partition("```{glossary}\n")[2], re.MULTILINE)
    assert terms == sorted(terms, key=str.lower), "in the order of the alphabet"
    linked = set()
    for text in pages().values():
        for inside in re.findall(r"\{term\}`([^`]+)`", text):
            linked.add(re.sub(r".*<(.*)>", r"\1", " ".join(inside.split())))
    assert linked - set(terms) == set()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_handout_has_the_exercises_and_no_solution(path: Path):
    notebook = nbformat.read(path, as_version=4)
    solved = handout.solutions(notebook)
    given = handout.without_solutions(notebook)
    code = [cell for cell in given.cells if cell.cell_type == "code"]
    assert len(solved) >= 3, "three exercises, solved"
    assert all(cell.outputs == [] and cell.execution_count is None for cell in code)
    assert not any("Solution" in cell.source for cell in code)
    assert "## Exercises" in "\n".join(cell.source for cell in given.cells)
    assert len(given.cells) == len(notebook.cells) - len(solved) + 3, "a place for each answer"
    kept = [c.source for c in notebook.cells if c.cell_type == "code" and c not in solved]
    assert [cell.source for cell in code if not handout.is_place(cell)] == kept


def test_the_command_writes_copies_and_leaves_the_book_alone(tmp_path: Path, capsys):
    before = NOTEBOOKS[0].read_bytes()
    assert handout.main([str(tmp_path / "class"), str(NOTEBOOKS[0])]) == 0
    assert [path.name for path in (tmp_path / "class").iterdir()] == [NOTEBOOKS[0].name]
    assert NOTEBOOKS[0].read_bytes() == before
    assert handout.main([str(NOTEBOOKS[0].parent), str(NOTEBOOKS[0])]) == 2
    assert "another folder" in capsys.readouterr().err
    assert NOTEBOOKS[0].read_bytes() == before


READS = {  # which folders a page opens a record of, as seen while it runs
    "04_cutting_channels": ["pruning"],
    "06_gates_across_delta": ["ablations", "base", "microscope"],
    "07_order_of_the_layer": ["base", "order"],
    "08_joint_or_sequential": ["base", "joint"],
    "09_what_matters": ["ablations", "base", "controls", "joint", "order"],
    "10_paper_code_ours": ["ablations", "base", "cifar10_cpu"],
}


def test_the_page_of_numbers_counts_every_record_and_every_notebook():
    files = {
        path.parent.name for path in (ROOT / "results").rglob("*.jsonl") if path.stat().st_size
    }
    named = {row["folder"].strip("`") for row in status.records()}
    assert named == files, "a row for every folder that holds a record"
    digits = next(row for row in status.records() if row["folder"] == "`results`")
    assert (digits["files"], digits["recipes"], digits["seeds"]) == (1, "digits", "0")
    reads = {row["page"]: row["reads records in"] for row in status.pages()}
    assert set(reads) >= {f"{{doc}}`/notebooks/{path.stem}`" for path in NOTEBOOKS}
    for page, folders in READS.items():
        assert reads[f"{{doc}}`/notebooks/{page}`"] == ", ".join(f"`{f}`" for f in folders)
    assert reads["{doc}`/notebooks/05_cifar10_full_runs`"] == "all"
    assert reads["{doc}`/notebooks/01_sigmoid_to_switch`"].startswith("none")
    assert {"what": "Python", "version": platform.python_version()} in status.tools()


def test_a_table_is_myst():
    rows = [{"a": 1, "b": "x"}, {"a": 2, "b": ""}]
    assert status.markdown(rows) == ["| a | b |", "|:--|:--|", "| 1 | x |", "| 2 |  |"]


def test_the_map_leads_to_every_page_of_the_book():
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))
    files = [entry["file"] for part in toc["parts"] for entry in part["chapters"]]
    linked = re.findall(r"\{doc\}`(?:[^`]*</)?([^`>]+)>?`", (BOOK / "intro.md").read_text("utf-8"))
    assert len(files) >= 12
    assert [file for file in files if file.removeprefix("book/") not in linked] == []
