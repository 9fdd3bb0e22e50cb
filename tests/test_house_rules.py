"""House rules that a machine can check."""

import ast
import json
import re
import shutil
import socket
import subprocess
import sys
import tomllib
from itertools import chain
from pathlib import Path
from types import ModuleType

import pytest
import yaml

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "dnal_mini"
ROWS = [  # a package or module imports only from itself and from rows above its own
    {"refused"},
    {"layers", "data", "figures"},
    {"graph"},
    {"gating", "models", "training"},
    {"deployment"},
    {"measure"},
    {"pruning"},
    {"methods"},
    {"config"},
    {"runs"},
    {"search", "recipes"},
    {"cli"},
    {"__main__"},
]
RANK = {name: rank for rank, row in enumerate(ROWS) for name in row}
HEAVY = {"IPython", "PIL", "ipywidgets", "matplotlib", "pandas", "scipy", "seaborn", "sklearn"}
HEAVY |= {"torchvision", "tyro"}  # tqdm is not on the list: torch loads it
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
REQUIREMENTS = set(chain(PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()))


def module_name(path: Path) -> str:
    """The module or subpackage of dnal_mini that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(source: str) -> set[str]:
    """Dotted names of all that a source imports, at the top or inside functions."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            names |= {f"{base}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


def wrong_imports(name: str, source: str) -> set[str]:
    """Imports a module of the package may not have: from below its row, from aside, relative."""
    wrong = set()
    for dotted in imported(source):
        top, _, rest = dotted.partition(".")
        module = rest.split(".")[0]
        upwards = module != name and RANK.get(module, 99) >= RANK.get(name, 99)
        if not top or (top == "dnal_mini" and upwards):
            wrong.add(dotted)
    return wrong


def can_fail(test: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """True if the body holds an assert of something that can be false, or a call that raises."""
    return any(
        (isinstance(n, ast.Assert) and not isinstance(n.test, ast.Constant))
        or (isinstance(n, ast.Attribute) and n.attr in {"assert_close", "raises", "warns"})
        or (isinstance(n, ast.Attribute) and n.attr.startswith("assert_"))
        for n in ast.walk(test)
    )


def idle_tests(source: str) -> list[str]:
    """Names of the tests in a source that cannot fail, not even by a helper of the same source."""
    nodes = ast.walk(ast.parse(source))
    functions = [n for n in nodes if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    helpers = {f.name for f in functions if not f.name.startswith("test_") and can_fail(f)}

    def asks_helper(test: ast.AST) -> bool:
        return any(isinstance(n, ast.Name) and n.id in helpers for n in ast.walk(test))

    tests = [f for f in functions if f.name.startswith("test_")]
    return [f.name for f in tests if not can_fail(f) and not asks_helper(f)]


def tracked_files() -> list[Path]:
    """All files of the repository that git tracks and that are still there."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("needs git and a clone: only tracked files are looked at")
    command = ["git", "-c", "safe.directory=*", "ls-files", "-z"]
    listing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [ROOT / name for name in listing.split("\0") if name and (ROOT / name).is_file()]


def tree_entries(markdown: str) -> dict[str, dict[str, str]]:
    """The layout block of a README: {folder: {entry: role}}; folder "" is the root.

    A line is one or more names, then their role; lines below ``folder/`` are indented.
    """
    blocks = re.findall(r"^```\w*\n(.*?)^```", markdown, flags=re.MULTILINE | re.DOTALL)
    layout = next((block for block in blocks if re.search(r"^dnal_mini/", block, re.M)), "")
    entries: dict[str, dict[str, str]] = {"": {}}
    folder = ""
    for line in filter(str.strip, layout.splitlines()):
        indented = line[0] == " "
        folder = folder if indented else ""
        words = line.split()
        count = 1
        while count < len(words) and (ROOT / folder / words[count]).exists():
            count += 1
        for name in words[:count]:
            entries.setdefault(folder, {})[name.rstrip("/")] = " ".join(words[count:])
        if not indented and words[0].endswith("/"):
            folder = words[0].rstrip("/")
    return entries


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.stem)
def test_imports_are_absolute_and_point_up_the_table(path: Path):
    name = module_name(path)
    assert name in {*RANK, "__init__"}, f"{name} stands in no import row; add it to ROWS"
    wrong = set() if name == "__init__" else wrong_imports(name, path.read_text())
    assert not wrong, f"{name} must not import {sorted(wrong)}"


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("graph", "from dnal_mini.gating import gates"),
        ("gating", "from dnal_mini.models import vgg16"),
        ("gating", "def f():\n    import dnal_mini.search.driver"),
        ("models", "from dnal_mini import prune"),
        ("pruning", "from dnal_mini.methods import contract"),
        ("measure", "from .cost import cost"),
    ],
)
def test_a_planted_import_against_the_rows_is_caught(name: str, line: str):
    assert wrong_imports(name, line)
    assert not wrong_imports(name, f"import torch\nfrom dnal_mini.{name} import other")
    assert not wrong_imports("search", "from dnal_mini.gating import gates")


def functions(path: Path) -> list[ast.FunctionDef]:
    """All functions and methods of a file."""
    nodes = ast.walk(ast.parse(path.read_text()))
    return [node for node in nodes if isinstance(node, ast.FunctionDef)]


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.stem)
def test_a_file_is_one_idea_and_a_function_one_step(path: Path):
    assert len(path.read_text().splitlines()) <= 400
    for each in functions(path):
        lines = each.end_lineno - each.lineno + 1
        given = [*each.args.posonlyargs, *each.args.args, *each.args.kwonlyargs]
        count = len([arg for arg in given if arg.arg not in ("self", "cls")])
        assert lines <= 60, f"{each.name} has {lines} lines"
        assert count <= 8, f"{each.name} has {count} parameters"


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.stem)
def test_what_is_not_so_is_refused_by_class(path: Path):
    """A ``ValueError`` of ours is a ``Refused``, so that it is never told by its text."""
    raised = {
        node.exc.func.id
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Raise)
        and isinstance(node.exc, ast.Call)
        and isinstance(node.exc.func, ast.Name)
    }
    assert "ValueError" not in raised


LACKING = {  # attributes and modules that Windows does not have
    *("fork", "forkpty", "geteuid", "getuid", "killpg", "mkfifo", "O_DIRECTORY", "O_NOFOLLOW"),
    *("SIGHUP", "SIGKILL", "SIGUSR1", "alarm", "setitimer", "fcntl", "pwd", "resource", "termios"),
}


def lacking(source: str) -> set[str]:
    """Names in a source that Windows does not have."""
    modules = {name.partition(".")[0] for name in imported(source)}
    nodes = ast.walk(ast.parse(source))
    return LACKING & (modules | {node.attr for node in nodes if isinstance(node, ast.Attribute)})


def test_nothing_asks_for_what_windows_lacks_but_the_helper_that_skips():
    folders = (PACKAGE, ROOT / "book", ROOT / "tests")
    found = {path: lacking(path.read_text()) for each in folders for path in each.rglob("*.py")}
    named = {path.relative_to(ROOT).as_posix(): names for path, names in found.items() if names}
    assert named == {"tests/systems.py": {"geteuid", "mkfifo"}}
    assert lacking("import fcntl\nos.kill(1, signal.SIGKILL)") == {"fcntl", "SIGKILL"}


def test_no_function_hides_a_module_and_the_public_names_come_from_one_place():
    import dnal_mini

    for name in set(dnal_mini.__all__) - {"models", "recipes"}:
        assert not isinstance(getattr(dnal_mini, name), ModuleType)
        for there in (PACKAGE / name, PACKAGE / f"{name}.py"):
            assert not there.exists(), f"{there} is hidden by dnal.{name}"
    for path in PACKAGE.rglob("__init__.py"):
        if path.parent.name not in ("dnal_mini", "models", "methods"):
            assert not imported(path.read_text()), f"{path} hands names on"


def test_lines_of_the_readme_fit_a_screen():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert [line for line in lines if len(line) >= 100] == []


def test_the_reading_path_is_five_files_and_nine_hundred_lines():
    section = (ROOT / "README.md").read_text().partition("## The whole idea in an hour")[2]
    files = re.findall(r"^\d\. `(dnal_mini/[\w/]+\.py)`", section, re.MULTILINE)
    assert len(files) == 5
    assert sum(len((ROOT / file).read_text().splitlines()) for file in files) <= 900


def test_figures_know_nothing_of_torch():
    paths = sorted((PACKAGE / "figures").glob("*.py"))
    names = {name for path in paths for name in imported(path.read_text())}
    assert len(paths) > 5
    assert not {name for name in names if name.split(".")[0] == "torch"}


@pytest.mark.parametrize(
    "path", sorted((ROOT / "tests").rglob("test_*.py")), ids=lambda path: path.stem
)
def test_every_test_can_fail(path: Path):
    idle = idle_tests(path.read_text())
    assert not idle, f"no check in {idle}"


def test_a_planted_idle_test_is_caught():
    idle = "def test_prints():\n    print(1)\ndef test_constant():\n    assert True\n"
    sound = "def test_sum():\n    assert 1 + 1 == 2\n"
    assert idle_tests(idle + sound) == ["test_prints", "test_constant"]


def test_tests_run_offline():
    with socket.socket() as sock, pytest.raises(OSError, match="offline"):
        sock.connect(("192.0.2.1", 80))  # an address that RFC 5737 keeps for examples


def test_importing_the_package_loads_torch_and_nothing_heavier():
    code = "import json, sys, dnal_mini; print(json.dumps(sorted(sys.modules)))"
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    modules = set(json.loads(done.stdout))
    assert "torch" in modules
    assert sorted(modules & HEAVY) == []


def test_the_tree_in_the_readme_is_the_folder():
    entries = tree_entries((ROOT / "README.md").read_text())
    files = [path.relative_to(ROOT) for path in tracked_files()]
    for folder, hidden in (("", set()), ("dnal_mini", {"__init__.py", "py.typed"})):
        inside = [f.relative_to(folder) for f in files if f.is_relative_to(folder)]
        there = {path.parts[0] for path in inside} - hidden
        named = {name.split("/")[0] for name in entries.get(folder, {})}
        assert named == there, (
            f"{folder or 'top level'}: missing {there - named}, gone {named - there}"
        )
        assert all(entries[folder].values()), f"a line of {folder or 'top level'} gives no role"


def test_conda_takes_the_same_ranges_as_pip():
    conda = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    listed = next(part["pip"] for part in conda if isinstance(part, dict))
    assert f"python{PROJECT['requires-python']}" in conda
    assert set(listed) == {"-c constraints.txt", "-e .", *REQUIREMENTS}


def test_constraints_pin_everything_that_the_project_names():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    names = {re.sub(r"[-_.]+", "-", pin.split("==")[0]).lower() for pin in pins}
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", pin) for pin in pins)
    assert {re.match(r"[\w-]+", want)[0] for want in REQUIREMENTS} <= names


def test_no_file_names_a_folder_of_somebodys_machine():
    folders = "|".join(["home", "root", "work", "tmp", "Users", "mnt", "opt"])
    pattern = re.compile(rf"(?<![\w.:~$}}/-])/(?:{folders})/")
    found = []
    for path in tracked_files():
        text = path.read_bytes().decode("utf-8", errors="ignore")
        found += [f"{path.relative_to(ROOT)}: {hit[0]}" for hit in pattern.finditer(text)]
    assert not found, found
