"""Make a virtual environment and install into it: ``python environment.py DIR PIP_ARGUMENT...``

Needs Python and one of ensurepip (Debian's and Ubuntu's python3-venv) or pip (python3-pip).
An environment that is there already is kept and brought up to date.
"""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path


def create(folder: Path) -> Path:
    """The Python of an environment that has pip; made where it is missing."""
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    has_pip = [python, "-c", "from importlib.util import find_spec; exit(not find_spec('pip'))"]
    if python.exists() and subprocess.call(has_pip) == 0:
        return python
    if find_spec("ensurepip"):
        subprocess.check_call([sys.executable, "-m", "venv", "--clear", folder])
        return python
    subprocess.check_call([sys.executable, "-m", "venv", "--clear", "--without-pip", folder])
    borrowed = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "pip"]
    subprocess.check_call(borrowed)
    return python


def main() -> int:
    """Exit code of pip, or 2 with one line where this Python will not do."""
    version = "got Python {}.{}".format(*sys.version_info[:2])
    if sys.version_info < (3, 11):  # noqa: UP036 - it is an older Python that reads this line
        print(f"{version}; need 3.11 or newer; do: make setup PYTHON=python3.12", file=sys.stderr)
        return 2
    if not find_spec("venv") or not (find_spec("ensurepip") or find_spec("pip")):
        need = "need its venv module and pip; do: sudo apt install python3-venv python3-pip"
        print(f"{version} without them; {need}", file=sys.stderr)
        return 2
    python = create(Path(sys.argv[1]))
    # Python compiles what is imported, once; compiling all of it here takes two thirds of the time.
    return subprocess.call([python, "-m", "pip", "install", "--no-compile", *sys.argv[2:]])


if __name__ == "__main__":
    sys.exit(main())
