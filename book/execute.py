"""Run the notebooks top to bottom in fresh kernels and store their outputs: ``make notebooks``.

``python book/execute.py [NOTEBOOK...]`` writes in place, with ``--copy DIR`` beside the originals;
``--check`` runs nothing and names those whose stored outputs are not of their cells.
Not for the site: Jupyter Book executes on its own (``make book``).
"""

import argparse
import hashlib
import json
import re
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[1] / "notebooks"
CELL_TIMEOUT_S = 300
VOLATILE = {"ExecuteTime", "collapsed", "execution", "scrolled", "trusted", "vscode"}
WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"


def code_sha256(notebook: Mapping[str, Any]) -> str:
    """Fingerprint of the code cells of a notebook (parsed JSON): outputs and prose do not count."""
    sources = ["".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "code"]
    return hashlib.sha256(json.dumps(sources).encode()).hexdigest()


def stored_sha256(notebook: Mapping[str, Any]) -> str:
    """Fingerprint of the code cells that made the outputs; empty if ``execute`` never ran."""
    return notebook["metadata"].get("dnal", {}).get("code_sha256", "")


def normalise(notebook: Any) -> None:
    """Drop what differs from run to run though nothing has changed; in place, works on any run."""
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
        "dnal": {"code_sha256": code_sha256(notebook)},
    }
    for cell in notebook.cells:
        cell.metadata = {k: v for k, v in cell.metadata.items() if k not in VOLATILE}
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            data.pop(WIDGET_VIEW, None)  # its model lived in the kernel that is gone
            if "text/plain" in data:
                data["text/plain"] = re.sub(r"\b0x[0-9a-f]{6,}", "0x...", data["text/plain"])


def execute(source: Path, target: Path) -> float:
    """Run ``source`` in its own folder and write it with outputs to ``target``; returns seconds.

    ``target`` is written only after the last cell; a cell that fails leaves it as it was.
    Raises: nbclient's CellExecutionError or CellTimeoutError.
    """
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(source, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=CELL_TIMEOUT_S,
        kernel_name="python3",
        resources={"metadata": {"path": str(source.parent)}},
        store_widget_state=False,
        record_timing=False,
        coalesce_streams=True,
    )
    start = time.perf_counter()
    client.execute()
    normalise(notebook)
    unfinished = target.with_suffix(".part")
    nbformat.write(notebook, unfinished)
    unfinished.replace(target)
    return time.perf_counter() - start


def stale(paths: Sequence[Path]) -> list[Path]:
    """Those notebooks whose stored outputs are not of their code cells."""
    notebooks = {path: json.loads(path.read_text(encoding="utf-8")) for path in paths}
    return [path for path, nb in notebooks.items() if stored_sha256(nb) != code_sha256(nb)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0, or 1 where a notebook fails or, with ``--check``, is stale."""
    parser = argparse.ArgumentParser(description="Run notebooks and store their outputs.")
    parser.add_argument("paths", nargs="*", type=Path, help="default: every notebook of the book")
    parser.add_argument("--copy", type=Path, metavar="DIR", help="write the executed ones here")
    parser.add_argument("--check", action="store_true", help="run nothing, name the stale ones")
    options = parser.parse_args(arguments)
    paths = options.paths or sorted(FOLDER.glob("*.ipynb"))
    if options.check:
        for path in (late := stale(paths)):
            print(f"{path.name}: outputs are not of these cells; do: make notebooks")
        return 1 if late else 0
    if options.copy:
        options.copy.mkdir(parents=True, exist_ok=True)
    from nbclient.exceptions import CellExecutionError, CellTimeoutError

    for path in paths:
        try:
            seconds = execute(path.resolve(), (options.copy or path.parent) / path.name)
        except (CellExecutionError, CellTimeoutError) as error:
            print(f"{path.name}: not written, a cell failed\n{error}", file=sys.stderr)
            return 1
        print(f"{path.name}: {seconds:.1f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
