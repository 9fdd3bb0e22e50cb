"""Every public name has an example in its docstring, and every example is true."""

import doctest
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import dnal_mini as dnal
from dnal_mini.models import MODELS

PUBLIC = {name: getattr(dnal, name) for name in dnal.__all__ if name != "models"}
PUBLIC |= {f"models.{name}": builder for name, builder in MODELS.items()}
GIVEN = {"dnal": dnal, "torch": torch}  # what every example may use without importing it


def examples(thing: object, name: str) -> doctest.DocTest:
    """The example of one docstring; of a class its own, of a module that at its head."""
    return doctest.DocTestParser().get_doctest(thing.__doc__ or "", GIVEN, name, None, 0)


@pytest.fixture(autouse=True)
def apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A folder to write to, one thread and repeatable numbers."""
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", PUBLIC)
def test_the_example_of_a_public_name_is_there_and_true(name: str):
    test = examples(PUBLIC[name], name)
    lines = "".join(part.source for part in test.examples).splitlines()
    told: list[str] = []
    outcome = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test, out=told.append)
    assert not outcome.failed, "".join(told)
    assert 2 <= len(lines) <= 8, "short, but more than a call"
    assert any(part.want for part in test.examples), "something is to be seen"
    assert re.search(r"^ *Example:\n +>>> ", test.docstring, re.MULTILINE), "under its heading"
    assert any(name.split(".")[-1] in line for line in lines)


def test_a_wrong_example_is_noticed():
    def half() -> None:
        """Half.

        Example:
            >>> 1 / 2
            0.25
        """

    runner = doctest.DocTestRunner(verbose=False)
    assert runner.run(examples(half, "half"), out=lambda text: None).failed == 1
