"""The committed notebooks keep the notebook rules; the tool that executes them keeps its word."""

import json
import re
from pathlib import Path

import execute
import launch
import nbformat
import pytest

ROOT = Path(__file__).parents[1]
PATHS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MAX_CELL_LINES = 12
MAX_BYTES = 2_000_000
MACHINE_PATH = re.compile(
    r"(?<![\w.:~$}/<-])/(?:" + "|".join(["home", "root", "work", "tmp"]) + ")/"
)


def source(cell: dict) -> str:
    """Text of a cell; notebooks store it as one string or as lines."""
    return "".join(cell["source"])


def cells(notebook: dict, kind: str) -> list[dict]:
    """The cells of a kind: "code" or "markdown"."""
    return [cell for cell in notebook["cells"] if cell["cell_type"] == kind]


def faults(notebook: dict) -> list[str]:
    """Every notebook rule that a notebook (parsed JSON) breaks, one line each."""
    first, code = notebook["cells"][0], cells(notebook, "code")
    found = [
        f"the first cell does not say {words!r}"
        for words in ("You will learn", "You need", "Budget")
        if first["cell_type"] != "markdown" or words not in source(first)
    ]
    counts = [cell["execution_count"] for cell in code]
    if counts != list(range(1, len(code) + 1)):
        found.append(f"execution counts {counts}: not one run from top to bottom")
    for number, cell in enumerate(code, start=1):
        lines = len(source(cell).rstrip().splitlines())
        if lines > MAX_CELL_LINES and cell.get("id") != launch.SETUP_ID:  # it is folded away
            found.append(f"code cell {number} has {lines} lines; at most {MAX_CELL_LINES}")
        if any(output["output_type"] == "error" for output in cell["outputs"]):
            found.append(f"code cell {number} stores an error")
    if not any(re.search(r"^\s*assert\b", source(cell), re.MULTILINE) for cell in code):
        found.append("no assert: no claim is checked")
    prose = "\n".join(source(cell) for cell in cells(notebook, "markdown"))
    _, heading, exercises = prose.rpartition("\n## Exercises")
    found += [
        f"no exercise to {verb} at the end"
        for verb in ("predict", "change", "break")
        if not heading or not re.search(rf"\b{verb}", exercises, re.IGNORECASE)
    ]
    if MACHINE_PATH.search(json.dumps(notebook)):
        found.append("names a folder of somebody's machine")
    if execute.stored_sha256(notebook) != execute.code_sha256(notebook):
        found.append("outputs are not of these cells; do: make notebooks")
    return found


def a_notebook(*code: str) -> nbformat.NotebookNode:
    """A notebook that keeps every rule, if its code does; not executed."""
    header = "# Title\n\nYou will learn\n\nYou need\n\nBudget"
    end = "Reading.\n\n## Exercises\n\n1. **Predict** it. 2. **Change** it. 3. **Break** it."
    middle = [nbformat.v4.new_code_cell(text) for text in code]
    markdown = nbformat.v4.new_markdown_cell
    return nbformat.v4.new_notebook(cells=[markdown(header), *middle, markdown(end)])


def test_the_book_has_its_notebooks():
    assert len(PATHS) >= 3


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_a_notebook_keeps_the_rules(path: Path):
    assert path.stat().st_size < MAX_BYTES
    assert not faults(json.loads(path.read_text(encoding="utf-8")))


def test_a_run_stores_what_the_rules_ask_for(tmp_path: Path):
    path = tmp_path / "sound.ipynb"
    show = "data = {'text/plain': 'x', 'text/html': '<b>x</b>'}\n"
    show += "data['application/vnd.jupyter.widget-view+json'] = {'model_id': 'gone'}\n"
    show += "display(data, raw=True)"
    nbformat.write(a_notebook("assert 3 + 4 == 7", "object()", show), path)
    assert faults(json.loads(path.read_text()))

    assert execute.main([str(path)]) == 0
    notebook = json.loads(path.read_text())
    assert not faults(notebook)
    assert execute.main(["--check", str(path)]) == 0
    address, shown = (cell["outputs"][0]["data"] for cell in cells(notebook, "code")[1:])
    assert address["text/plain"] == ["<object at 0x...>"]
    assert set(shown) == {"text/plain", "text/html"}
    assert set(notebook["metadata"]) == {"kernelspec", "language_info", "dnal"}

    first = path.read_bytes()
    assert execute.main([str(path)]) == 0
    assert path.read_bytes() == first


def test_a_failing_cell_leaves_the_notebook_as_it_was(tmp_path: Path, capsys):
    path, copies = tmp_path / "failing.ipynb", tmp_path / "copies"
    nbformat.write(a_notebook("assert 3 + 4 == 8"), path)
    before = path.read_bytes()
    assert execute.main(["--copy", str(copies), str(path)]) == 1
    assert "AssertionError" in capsys.readouterr().err
    assert path.read_bytes() == before
    assert list(copies.iterdir()) == []


def test_each_broken_rule_is_named():
    sound = a_notebook("assert 3 + 4 == 7")
    sound.cells[1].execution_count = 1
    execute.normalise(sound)
    assert faults(sound) == []
    broken = a_notebook("x = 1\n" * 13)
    broken.cells[0].source = "# Title"
    broken.cells[1].outputs = [nbformat.v4.new_output("error", ename="E", evalue="", traceback=[])]
    broken.cells[2].source = "The end. See " + "/".join(["", "home", "me"])
    named = " ".join(faults(broken))
    rules = "learn need Budget counts 13 error assert predict change break folder cells"
    assert [word for word in rules.split() if word not in named] == []


def test_changed_code_makes_a_notebook_stale_and_changed_prose_does_not(tmp_path: Path, capsys):
    path = tmp_path / "edited.ipynb"
    notebook = a_notebook("assert 3 + 4 == 7")
    execute.normalise(notebook)
    notebook.cells[0].source += "\n\nMore prose."
    nbformat.write(notebook, path)
    assert execute.main(["--check", str(path)]) == 0
    notebook.cells[1].source += "  # edited"
    nbformat.write(notebook, path)
    assert execute.main(["--check", str(path)]) == 1
    assert "edited.ipynb" in capsys.readouterr().out
