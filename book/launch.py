"""Launch buttons, and the setup cell that makes a notebook run where a button opens it.

As a Sphinx extension it puts buttons for Colab and Binder on every notebook's page, if it knows
where the repository is published. As a script, ``python book/launch.py NOTEBOOK...`` writes that
address into the setup cells, for the branch that the buttons open: Colab brings a notebook alone.
"""

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
BRANCH = "launch"  # notebooks with filled setup cells; the publishing workflow pushes it
HOSTS = ("github.com", "gitlab.com")  # a clone from elsewhere says nothing of where readers find it
ADDRESS = re.compile(r"https://[\w.-]+(/[\w.-]+){2}")
SETUP_ID = "setup"
SETUP_CELL = """\
# Colab opens this file alone: fetch the book, install its package. Elsewhere nothing happens.
import os
import subprocess
import sys
from pathlib import Path

ADDRESS = ""  # filled in where a launch button of the site opens this notebook
if ADDRESS and "google.colab" in sys.modules and not Path("../dnal_mini").is_dir():
    if not Path("book").is_dir():
        subprocess.run(["git", "clone", "-q", "--depth=1", "-blaunch", ADDRESS, "book"], check=True)
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "./book"], check=True)
    os.chdir("book/notebooks")
    sys.path.insert(0, str(Path("..").resolve()))  # its package: the records are beside"""


def repository() -> str:
    """The https address where the repository is published, or "" if nobody says.

    ``DNAL_REPOSITORY`` says it, or else git's ``origin``, if that is on a public host.
    Raises: ValueError for a ``DNAL_REPOSITORY`` that is no https address of a repository.
    """
    if given := os.environ.get("DNAL_REPOSITORY", ""):
        if not ADDRESS.fullmatch(given):
            need = "need https://HOST/OWNER/NAME; do: export DNAL_REPOSITORY=..., or unset it"
            raise ValueError(f"got DNAL_REPOSITORY={given!r}; {need}")
        return given
    command = ["git", "-c", "safe.directory=*", "remote", "get-url", "origin"]
    try:
        asked = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    origin = asked.stdout.strip().removesuffix("/").removesuffix(".git")
    public = any(origin.startswith(f"https://{host}/") for host in HOSTS)
    return origin if public and ADDRESS.fullmatch(origin) else ""


def filled(source: str, address: str) -> str:
    """The setup cell with an address. Raises: ValueError where it is not the one above."""
    if source != SETUP_CELL:
        raise ValueError("got another first code cell; need SETUP_CELL of book/launch.py; copy it")
    return source.replace('ADDRESS = ""', f'ADDRESS = "{address}"', 1)


def fill(path: Path, address: str) -> None:
    """Write the address into the setup cell of a notebook; all else stays as it is."""
    import nbformat

    notebook = nbformat.read(path, as_version=4)
    first = next(cell for cell in notebook.cells if cell.cell_type == "code")
    first.source = filled(first.source, address)
    nbformat.write(notebook, path)


def buttons(address: str) -> dict[str, Any]:
    """Theme options: the buttons for a repository; Colab opens GitHub's only. None for ""."""
    if not address:
        return {}
    launch = {"binderhub_url": "https://mybinder.org", "notebook_interface": "jupyterlab"}
    if address.startswith("https://github.com/"):
        launch["colab_url"] = "https://colab.research.google.com"
    place = {"repository_url": address, "repository_branch": BRANCH, "path_to_docs": ""}
    return {**place, "launch_buttons": launch}


def add_buttons(app: Any, config: Any) -> None:
    """Before the theme reads its options."""
    config.html_theme_options = {**config.html_theme_options, **buttons(repository())}


def setup(app: Any) -> dict[str, Any]:
    """Called by Sphinx."""
    app.connect("config-inited", add_buttons)
    return {"parallel_read_safe": True}


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0, or 2 with one line where the address or a setup cell is wrong."""
    try:
        address = repository()
        if not address:
            raise ValueError("got no address; need one of a public repository; set DNAL_REPOSITORY")
        for name in sys.argv[1:] if arguments is None else arguments:
            fill(Path(name), address)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
