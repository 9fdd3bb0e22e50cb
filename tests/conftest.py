"""What every test stands on: a seed, repeatable kernels, one thread, no network."""

import gc
import os
import random
import socket
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings
from small_runs import CONFIG
from stopwatch import shorten

from dnal_mini.search.driver import run

gc.disable()  # until all is collected, see below
torch.set_num_threads(1)  # the nets are tiny: threads that wait for each other cost more,
os.environ.setdefault("OMP_NUM_THREADS", "1")  # also in the processes that tests start
CHILDREN = str(Path(__file__).parent / "children")  # what the processes that tests start read first
os.environ["PYTHONPATH"] = os.pathsep.join([CHILDREN, *filter(None, [os.getenv("PYTHONPATH")])])
torch.use_deterministic_algorithms(True)
settings.register_profile("dnal", deadline=None, derandomize=True)
settings.load_profile("dnal")


# Where workers share the files of tests and notebooks, these go first, so that all end together.
LONG = (
    "03_whole_road_digits.ipynb", "04_cutting_channels.ipynb", "10_paper_code_ours.ipynb",
    "07_order_of_the_layer.ipynb", "11_your_own_cnn.ipynb", "test_pages.py", "test_random_nets.py",
    "test_kill.py", "test_sweep.py", "test_devices.py", "test_own_net.py", "test_recipes.py",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first; else the order stays."""
    ranks = {name: rank for rank, name in enumerate(LONG)}
    items.sort(key=lambda item: ranks.get(item.path.name, len(LONG)))


def pytest_collection_finish() -> None:
    """What is there before the first test stays: the search for garbage need not look at it."""
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True)
def seed() -> None:
    """The same random numbers in every test, whichever tests run before it."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - libraries may draw from the global generator
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def brief_latencies() -> Iterator[None]:
    """No run of this process spends two seconds on a stopwatch; no test looks at its times."""
    with pytest.MonkeyPatch.context() as patch:
        shorten(patch)
        yield


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of ``small_runs.CONFIG``, to be copied and left as it is."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    run(CONFIG, folder)
    return folder


@pytest.fixture(autouse=True)
def no_network(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection to another host raises, except in tests marked ``download``."""
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: object) -> None:
        host = address[0] if isinstance(address, tuple) else "localhost"  # a str is a Unix socket
        if host not in {"localhost", "127.0.0.1", "::1"}:
            raise OSError(f"got a connection to {host}; tests run offline; mark it `download`")
        connect(self, address)  # type: ignore[arg-type]

    if request.node.get_closest_marker("download") is None:
        monkeypatch.setattr(socket.socket, "connect", guarded)
