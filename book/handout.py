"""Copies of the notebooks for a class, without solutions: ``python book/handout.py DIR``.

Solutions are the hidden code cells below the exercises; each exercise gets an empty cell in their
place. Outputs are cleared, so that nobody reads an answer before having predicted it.
"""

import argparse
import copy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[1] / "notebooks"
PLACE = "# Your answer to exercise {}"
EXERCISES = 3


def solutions(notebook: Any) -> list[Any]:
    """The hidden code cells below the exercises; other hidden cells are helpers and stay."""
    starts = [k for k, cell in enumerate(notebook.cells) if _asks(cell)]
    below = notebook.cells[starts[-1] :] if starts else []
    hidden = [cell for cell in below if "hide-cell" in cell.metadata.get("tags", [])]
    return [cell for cell in hidden if cell.cell_type == "code"]


def _asks(cell: Any) -> bool:
    return cell.cell_type == "markdown" and "## Exercises" in cell.source


def is_place(cell: Any) -> bool:
    """True for the empty cell of an exercise."""
    return any(cell.source == PLACE.format(k + 1) for k in range(EXERCISES))


def without_solutions(notebook: Any) -> Any:
    """A copy of a notebook with a place for each answer, no solution, no output."""
    from nbformat.v4 import new_code_cell

    given = copy.deepcopy(notebook)
    cells: list[Any] = []
    solved = {cell.id for cell in solutions(given)}
    for cell in given.cells:
        if cell.id in solved:
            continue
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
        cells.append(cell)
        if _asks(cell):
            for k in range(EXERCISES):
                cells.append(new_code_cell(PLACE.format(k + 1), id=f"answer{k + 1}"))
    given.cells = cells
    given.metadata.pop("dnal", None)  # the fingerprint is that of an executed notebook
    return given


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0, or 2 for a folder that would overwrite the book's own notebooks."""
    import nbformat

    parser = argparse.ArgumentParser(description="Write notebooks without their solutions.")
    parser.add_argument("folder", type=Path, help="where to; is made")
    parser.add_argument("paths", nargs="*", type=Path, help="default: every notebook of the book")
    options = parser.parse_args(arguments)
    paths = options.paths or sorted(FOLDER.glob("*.ipynb"))
    if options.folder.resolve() in {path.resolve().parent for path in paths}:
        print(
            f"got {options.folder}, where the notebooks are; need another folder", file=sys.stderr
        )
        return 2
    options.folder.mkdir(parents=True, exist_ok=True)
    for path in paths:
        given = without_solutions(nbformat.read(path, as_version=4))
        nbformat.write(given, options.folder / path.name)
        print(options.folder / path.name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
