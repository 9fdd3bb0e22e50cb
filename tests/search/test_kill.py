"""A run that is killed, interrupted or terminated at any moment ends as if nothing had happened."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from dnal_mini.models import MODELS
from dnal_mini.pruning.netfile import load
from dnal_mini.runs import runlog

ROOT = Path(__file__).parents[2]
WORDS = [
    "--data", "toy", "--val", "32", "--width", "0.07", "--weight-epochs", "3", "--arch-epochs", "4",
    "--fine-tune-epochs", "3", "--batch", "8", "--arch-lr", "1", "--gate-price", "1e-3",
    "--precision", "float32", "--channels-last", "false", "--checkpoint-s", "0.2",
]  # fmt: skip
TIMES = {"seconds", "images_per_s", "latency_s", "created", "commit", "dirty"}


def start(folder: Path) -> subprocess.Popen:
    """``dnal run`` in a process of its own; the same command starts and resumes."""
    command = [sys.executable, "-m", "dnal_mini", "run", "digits", *WORDS, "--out", str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True)


def finish(folder: Path) -> str:
    process = start(folder)
    said, complained = process.communicate(timeout=300)
    assert process.returncode == 0, complained[-2000:]
    return said + complained


def rows(folder: Path) -> list[dict]:
    """The record without times, and without the rows that tell of resuming."""
    found = [row for row in runlog.read(folder) if row["kind"] != "resume"]
    return [{name: value for name, value in row.items() if name not in TIMES} for row in found]


def weights(folder: Path) -> list[tuple[str, torch.Tensor]]:
    """All tensors that a run leaves: of its nets, before and after fine-tuning."""
    found = []
    for name in ("pruned", "small"):
        found += load(folder / f"{name}.safetensors", MODELS["vgg16"]).module.state_dict().items()
    for stage in ("weight_stage", "baseline", "arch_stage", "fine_tune"):
        found += torch.load(folder / f"{stage}.pt", weights_only=True)["net"].items()
    return found


def same(one: Path, other: Path) -> None:
    """Assert that two runs are the same, bit by bit."""
    for a, b in zip(rows(one), rows(other), strict=True):
        assert a == b
    for (name, a), (other_name, b) in zip(weights(one), weights(other), strict=True):
        assert name == other_name
        assert torch.equal(a, b), name


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """An uninterrupted run, and the seconds it took."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    begin = time.perf_counter()
    finish(folder)
    return folder, time.perf_counter() - begin


SEEDS = [*range(3), *(pytest.param(n, marks=pytest.mark.slow) for n in range(3, 20))]


@pytest.mark.parametrize("seed", SEEDS)
def test_a_run_killed_at_any_moment_ends_bit_identical(whole, tmp_path, seed):
    folder, seconds = whole
    moment = random.Random(seed).uniform(0.3, 0.95) * seconds  # imports take the first part
    process = start(tmp_path / "run")
    time.sleep(moment)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    finish(tmp_path / "run")
    same(folder, tmp_path / "run")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_the_step_end_saves_and_says_how_to_go_on(whole, tmp_path, number):
    folder = tmp_path / "run"
    process = start(folder)
    while not (folder / "arch_stage.pt").exists():  # written after its first epoch, or inside it
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(number)
    _, complained = process.communicate(timeout=120)
    last = complained.splitlines()[-1]
    assert process.returncode == 130
    assert last.startswith("dnal: interrupted ")
    assert last.endswith(f"continue with: dnal resume {folder}")
    state = torch.load(folder / "arch_stage.pt", weights_only=True)
    assert state["stage"] == "arch_stage"
    assert state["step"] > 0  # stopped inside an epoch: nothing of it is lost
    assert {"delta", "price", "lr", "optimizer", "schedule", "place"} <= state.keys()
    finish(folder)
    same(whole[0], folder)
