"""Launch buttons lead to the published repository; the setup cell makes a notebook run there."""

import ast
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import launch
import nbformat
import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
ADDRESS = "https://github.com/example/book"
needs_git = pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
# What stands in for Colab: its module, and a pip that writes down what it is asked for.
COLAB = """
import sys, types
sys.modules["google"] = types.ModuleType("google")
sys.modules["google.colab"] = types.ModuleType("google.colab")
"""
RECORDING = """
import subprocess
run, asked = subprocess.run, []
def recording(command, **options):
    asked.append(list(map(str, command)))
    return run(command, **options) if command[0] == "git" else None
subprocess.run = recording
"""
REPORT = "\nimport json, os\nprint(json.dumps([asked, os.getcwd(), sorted(os.listdir())]))"


def run_cell(folder: Path, source: str, colab: bool) -> tuple[list[list[str]], Path, list[str]]:
    """Commands that a cell runs in a folder, where it ends up, and the files there."""
    code = (COLAB if colab else "") + RECORDING + source + REPORT
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    asked, place, files = json.loads(done.stdout)
    return asked, Path(place), files


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """A repository with a branch ``launch`` that holds the files a setup cell needs."""
    folder = tmp_path / "published"
    (folder / "dnal_mini").mkdir(parents=True)
    (folder / "notebooks").mkdir()
    for name in ("pyproject.toml", "dnal_mini/__init__.py", "notebooks/02_ss_layer.ipynb"):
        shutil.copy(ROOT / name, folder / name)
    who = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    for words in (["init", "-q", "-b", launch.BRANCH], ["add", "."], [*who, "commit", "-qm", "a"]):
        subprocess.run(["git", *words], cwd=folder, check=True)
    return folder


@pytest.fixture
def nobody(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An environment that says nothing of a repository."""
    monkeypatch.delenv("DNAL_REPOSITORY", raising=False)
    return monkeypatch


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_first_code_cell_is_the_setup_cell_folded_and_without_an_address(path: Path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    number = next(k for k, cell in enumerate(cells) if cell["cell_type"] == "code")
    assert number == 1, "right behind the title"
    assert "".join(cells[number]["source"]) == launch.SETUP_CELL
    assert cells[number]["id"] == launch.SETUP_ID
    assert cells[number]["metadata"]["tags"] == ["hide-cell"]


@needs_git
def test_on_colab_the_setup_cell_brings_the_book_and_installs_it(tmp_path: Path, published: Path):
    (content := tmp_path / "content").mkdir()
    source = launch.filled(launch.SETUP_CELL, f"file://{published}")
    asked, place, files = run_cell(content, source, colab=True)
    assert [command[0] for command in asked] == ["git", sys.executable]
    assert asked[1][1:] == ["-m", "pip", "install", "-q", "./book"]
    assert place == content / "book" / "notebooks"
    assert files == ["02_ss_layer.ipynb"]
    assert (place.parent / "pyproject.toml").is_file()


@needs_git
def test_the_setup_cell_may_run_again_in_the_same_and_in_a_new_kernel(
    tmp_path: Path, published: Path
):
    (content := tmp_path / "content").mkdir()
    source = launch.filled(launch.SETUP_CELL, f"file://{published}")
    asked, place, _ = run_cell(content, f"{source}\n{source}", colab=True)
    assert len(asked) == 2
    again, same, _ = run_cell(content, source, colab=True)
    assert [command[0] for command in again] == [sys.executable], "the book is there already"
    assert same == place


@needs_git
def test_what_the_setup_cell_installs_is_the_package(tmp_path: Path, published: Path):
    pytest.importorskip("setuptools", minversion="77")
    target = tmp_path / "site"
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--target", str(target)]
    command = [sys.executable, "-m", "pip", "install", "-q", *options, str(published)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (target / "dnal_mini" / "__init__.py").is_file()


@pytest.mark.parametrize(("address", "colab"), [("", True), (ADDRESS, False), ("", False)])
def test_elsewhere_the_setup_cell_does_nothing(tmp_path: Path, address: str, colab: bool):
    source = launch.SETUP_CELL.replace('ADDRESS = ""', f'ADDRESS = "{address}"')
    assert run_cell(tmp_path, source, colab) == ([], tmp_path, [])


def test_a_notebook_of_a_checkout_is_left_where_it_is(tmp_path: Path):
    (tmp_path / "dnal_mini").mkdir()
    (folder := tmp_path / "notebooks").mkdir()
    source = launch.filled(launch.SETUP_CELL, ADDRESS)
    assert run_cell(folder, source, colab=True) == ([], folder, [])


def test_the_script_fills_the_address_in_and_changes_nothing_else(tmp_path: Path, nobody, capsys):
    path = tmp_path / "copy.ipynb"
    shutil.copy(NOTEBOOKS[0], path)
    nobody.setenv("DNAL_REPOSITORY", ADDRESS)
    assert launch.main([str(path)]) == 0
    before, after = (nbformat.read(p, as_version=4) for p in (NOTEBOOKS[0], path))
    assert f'ADDRESS = "{ADDRESS}"' in after.cells[1].source
    ast.parse(after.cells[1].source)
    after.cells[1].source = before.cells[1].source
    assert after == before
    assert launch.main([str(path)]) == 2, "filled twice"
    assert "SETUP_CELL" in capsys.readouterr().err


def test_without_an_address_there_are_no_buttons_and_nothing_to_fill_in(nobody, capsys):
    nobody.setattr(launch.subprocess, "run", lambda *_, **__: SimpleNamespace(stdout=""))
    assert launch.repository() == ""
    assert launch.buttons("") == {}
    assert launch.main([]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("origin", "address"),
    [
        ("https://github.com/example/book.git\n", ADDRESS),
        ("https://gitlab.com/example/book\n", "https://gitlab.com/example/book"),
        ("git@github.com:example/book.git\n", ""),
        ("https://git.inside.example/example/book\n", ""),
        ("https://github.com.evil.example/example/book\n", ""),
        ("https://github.com/example/book/tree/x\n", ""),
        ("../elsewhere\n", ""),
    ],
)
def test_only_an_origin_on_a_public_host_is_taken(nobody, origin: str, address: str):
    nobody.setattr(launch.subprocess, "run", lambda *_, **__: SimpleNamespace(stdout=origin))
    assert launch.repository() == address


@pytest.mark.parametrize(
    "given",
    ["http://github.com/a/b", "github.com/a/b", 'https://x.org/a/b";import os', "https://x"],
)
def test_an_address_that_is_none_is_refused_in_one_line(nobody, given: str, capsys):
    nobody.setenv("DNAL_REPOSITORY", given)
    with pytest.raises(ValueError, match="need https://HOST/OWNER/NAME"):
        launch.repository()
    assert launch.main([]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_buttons_open_the_branch_with_filled_notebooks(nobody):
    nobody.setenv("DNAL_REPOSITORY", ADDRESS)
    config = SimpleNamespace(html_theme_options={"kept": 1})
    launch.add_buttons(None, config)
    options = config.html_theme_options
    assert (options["kept"], options["repository_url"]) == (1, ADDRESS)
    assert options["repository_branch"] == launch.BRANCH
    assert set(options["launch_buttons"]) == {"binderhub_url", "colab_url", "notebook_interface"}
    elsewhere = launch.buttons("https://gitlab.com/example/book")["launch_buttons"]
    assert "colab_url" not in elsewhere, "Colab opens notebooks of GitHub only"
