"""Processes that tests may kill: forked from one that has imported the package, so they start at
once. Where a fork is not safe (macOS) or not there (Windows) they are spawned, and import again.
"""

import contextlib
import multiprocessing
import os
import socket
import sys
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from stopwatch import shorten

from dnal_mini.cli.commands import main

FORKS = sys.platform == "linux"
CONTEXT: Any = multiprocessing.get_context("forkserver" if FORKS else "spawn")
if FORKS:  # a server of their own: it has imported all that they need, and has no threads
    WARM = ["dnal_mini.cli.commands", "lightning_fabric", "pytest", "torch.export._trace", "tyro"]
    CONTEXT.set_forkserver_preload(WARM)


def start(said: Path, function: Callable, *arguments: Any, **environment: str) -> BaseProcess:
    """Call a function in a process; what it prints goes to the file ``said``."""
    child = CONTEXT.Process(target=_act, args=(said, environment, function, arguments), daemon=True)
    child.start()
    return child


def dnal(said: Path, *words: object) -> BaseProcess:
    """The ``dnal`` command in a process; its exit code is the command's."""
    return start(said, main, [str(word) for word in words])


def ranks(count: int, said: Path, function: Callable, *arguments: Any) -> list[BaseProcess]:
    """Call a function in ``count`` processes that know each other as torchrun's do."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {
        "TORCHELASTIC_RUN_ID": "tests", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count),
    }  # fmt: skip
    return [
        start(said.with_suffix(f".{n}"), function, *arguments, RANK=str(n), LOCAL_RANK=str(n),
              **shared)
        for n in range(count)
    ]  # fmt: skip


def ended(*children: BaseProcess, timeout_s: float = 120) -> list[int | None]:
    """The exit codes of processes, once all have ended; those that do not are killed."""
    for child in children:
        child.join(timeout_s)
    codes = [child.exitcode for child in children]
    for child in children:
        child.kill()
        child.join()
    return codes


def _act(said: Path, environment: dict[str, str], function: Callable, arguments: tuple) -> None:
    os.environ.update(environment)
    sys.argv = ["nothing"]  # what Fabric would start once more: not the tests
    torch.set_num_threads(1)
    shorten(pytest.MonkeyPatch())  # as in the process that asks
    with said.open("w") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        for number in (1, 2):  # what libraries write below Python's streams goes there too
            os.dup2(file.fileno(), number)
        code = function(*arguments)
        file.flush()
    sys.exit(code)
