"""Sphinx extension: tables of where the numbers of the book come from, computed when it is built.

The directive ``{provenance}`` takes a word: "records" (one row per folder of ``results/``), "pages"
(which notebook reads which folder) or "tools" (what this site was built with). No kernel runs, so
that the tables are the same whether notebooks are executed or not.
"""

import json
import platform
import re
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

ROOT = Path(__file__).parents[1]
TOOLS = (
    "torch", "torchvision", "numpy", "pandas", "matplotlib", "scikit-learn", "jupyter-book",
    "sphinx", "myst-nb",
)  # fmt: skip
WHOLE = ("rglob", "results/*.jsonl")  # a page with one of these reads every record
Row = dict[str, Any]


def first_rows() -> Iterator[tuple[str, Row, Row]]:
    """Folder, first row and last whole row of every record in ``results/``."""
    for path in sorted((ROOT / "results").rglob("*.jsonl")):
        rows = []
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:  # a run that is being written, or was killed
                continue
        if rows:
            yield path.parent.relative_to(ROOT / "results").as_posix(), rows[0], rows[-1]


def records() -> list[Row]:
    """What each folder of ``results/`` holds, made of what its records say of themselves."""
    folders: dict[str, list[tuple[Row, Row]]] = {}
    for folder, first, last in first_rows():
        folders.setdefault(folder, []).append((first, last))
    table = []
    for folder, pairs in folders.items():
        firsts = [first for first, _ in pairs]
        seconds = [last.get("seconds", 0.0) for _, last in pairs if last.get("kind") == "result"]
        total = sum(s["total"] for s in seconds if isinstance(s, dict))
        devices = [first.get("device", {}) for first in firsts]
        stamps = sorted(first["created"][:10] for first in firsts if "created" in first)
        row = {"folder": f"`{folder if folder != '.' else 'results'}`", "files": len(pairs)}
        row["recipes"] = _words(first.get("config", {}).get("name") for first in firsts)
        row["seeds"] = _words(first.get("config", {}).get("seed") for first in firsts)
        row["machine"] = _words(device.get("name") for device in devices)
        row["threads"] = _words(device.get("threads") for device in devices)
        row["torch"] = _words(_torch(first) for first in firsts)
        row["commits"] = len({first["commit"] for first in firsts if first.get("commit")})
        row["made"] = " to ".join(dict.fromkeys((stamps[0], stamps[-1]))) if stamps else ""
        row["hours"] = f"{total / 3600:.1f}" if total else ""
        table.append(row)
    return table


def _torch(first: Row) -> Any:
    versions = first.get("versions", {})
    return versions.get("torch") or first.get("torch")


def _words(values: Any) -> str:
    """The different values that there are, in order, as one cell."""
    return ", ".join(str(value) for value in dict.fromkeys(v for v in values if v is not None))


def pages() -> list[Row]:
    """Which notebook reads which folder of ``results/``, and which tables of the paper."""
    folders = sorted({folder for folder, _, _ in first_rows()} - {"."})
    tables = sorted(path.name for path in (ROOT / "book" / "data").glob("*.csv"))
    found = []
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        code = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "code")
        reads = re.search(r"\bresults\b", code) and re.search(r"runlog|read_json|jsonl", code)
        in_path = r"""/ *["']{0}["'/]|["'/]{0}/"""  # a joined path, or a part of one
        in_path += r"""|\bfor folder in \([^)]*["']{0}["']"""  # or a loop over folders
        named = [f"`{f}`" for f in folders if re.search(in_path.format(f), code)]
        everything = reads and any(word in code for word in WHOLE)
        page = f"{{doc}}`/notebooks/{path.stem}`"
        shown = "all" if everything else ", ".join(named) if reads else ""
        data = ", ".join(f"`{name}`" for name in tables if name in code)
        figures = sum("image/svg+xml" in json.dumps(cell.get("outputs", [])) for cell in cells)
        found.append({"page": page, "reads records in": shown or "none: computed on the page"}
                     | {"published tables": data, "figures": figures})  # fmt: skip
    return found


def tools() -> list[Row]:
    """Versions of the machine and the packages that build this site."""
    rows = [{"what": "Python", "version": platform.python_version()}]
    rows.append({"what": "machine", "version": f"{platform.system()} on {platform.machine()}"})
    for name in TOOLS:
        try:
            rows.append({"what": name, "version": version(name)})
        except PackageNotFoundError:
            rows.append({"what": name, "version": "not installed"})
    return rows


def markdown(table: list[Row]) -> list[str]:
    """Lines of a table of MyST; all rows have the same columns."""
    if not table:
        return ["Nothing yet."]
    lines = ["| " + " | ".join(table[0]) + " |", "|" + ":--|" * len(table[0])]
    return lines + ["| " + " | ".join(str(cell) for cell in row.values()) + " |" for row in table]


TABLES = {"records": records, "pages": pages, "tools": tools}


class Provenance(SphinxDirective):
    """``{provenance} records``, ``pages`` or ``tools``."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        if (word := self.arguments[0]) not in TABLES:
            raise self.error(f"got {word!r}; need one of {', '.join(TABLES)}")
        self.env.note_reread()  # records change without this page
        node = nodes.container()
        lines = markdown(TABLES[word]())
        self.state.nested_parse(StringList(lines, source="provenance"), self.content_offset, node)
        return node.children


def setup(app: Sphinx) -> dict[str, Any]:
    """Called by Sphinx."""
    app.add_directive("provenance", Provenance)
    return {"parallel_read_safe": True}
