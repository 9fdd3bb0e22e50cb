"""Render the site from the committed outputs; nothing runs, and warnings are errors.

For ``make test``, where pytest runs the notebooks; ``make book`` executes them itself.
"""

import shutil
import subprocess
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "_build"


def main() -> int:
    """Exit code of Jupyter Book."""
    config = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))
    config["execute"]["execute_notebooks"] = "off"
    local = config["sphinx"]["local_extensions"]  # folders are relative to the file they stand in
    config["sphinx"]["local_extensions"] = {name: str(ROOT / path) for name, path in local.items()}
    BUILD.mkdir(exist_ok=True)
    settings = BUILD / "render.yml"
    settings.write_text(yaml.safe_dump(config), encoding="utf-8")
    shutil.rmtree(BUILD / "html", ignore_errors=True)  # a page that left the book would stay
    program = Path(sys.executable).with_name("jupyter-book")
    options = ["--config", str(settings), "-W", "--keep-going", "--all", "--quiet"]
    return subprocess.call([program, "build", ROOT, *options])


if __name__ == "__main__":
    sys.exit(main())
