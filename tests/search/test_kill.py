"""A run that is killed, interrupted or terminated at any moment ends as if nothing had happened."""

import os
import random
import signal
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from processes import dnal, ended, ranks
from processes import start as started
from small_runs import CONFIG, Stop
from torch import nn

from dnal_mini.cli.commands import main
from dnal_mini.config import SearchConfig
from dnal_mini.models import MODELS
from dnal_mini.pruning.netfile import load
from dnal_mini.runs import runlog
from dnal_mini.search.driver import run
from dnal_mini.training.loop import _Loop

WORDS = [
    "--data", "toy", "--val", "32", "--width", "0.07", "--weight-epochs", "2", "--arch-epochs", "3",
    "--fine-tune-epochs", "2", "--batch", "16", "--arch-lr", "1", "--gate-price", "1e-3",
    "--precision", "float32", "--channels-last", "false", "--checkpoint-s", "0.05",
]  # fmt: skip
TIMES = {"seconds", "images_per_s", "latency_s", "created", "commit", "dirty"}
STAGES = ("weight_stage", "baseline", "arch_stage", "fine_tune")


def start(folder: Path) -> BaseProcess:
    """``dnal run`` in a process of its own; the same command starts and resumes."""
    return dnal(folder.with_suffix(".said"), "run", "digits", *WORDS, "--out", folder)


def finish(folder: Path) -> None:
    assert ended(start(folder)) == [0], folder.with_suffix(".said").read_text()[-2000:]


def rows(folder: Path) -> list[dict]:
    """The record without times, and without the rows that tell of resuming."""
    found = [row for row in runlog.read(folder) if row["kind"] != "resume"]
    return [{name: value for name, value in row.items() if name not in TIMES} for row in found]


def checkpoints(folder: Path) -> list[tuple[str, torch.Tensor]]:
    """All tensors of the nets that the stages of a run leave."""
    found = []
    for stage in STAGES:
        if (folder / f"{stage}.pt").exists():
            found += torch.load(folder / f"{stage}.pt", weights_only=True)["net"].items()
    return found


def weights(folder: Path) -> list[tuple[str, torch.Tensor]]:
    """All tensors that a run leaves: of its nets, before and after fine-tuning."""
    found = checkpoints(folder)
    for name in ("pruned", "small"):
        found += load(folder / f"{name}.safetensors", MODELS["vgg16"]).module.state_dict().items()
    return found


def same(one: Path, other: Path, tensors=weights) -> None:
    """Assert that two runs are the same, bit by bit."""
    for a, b in zip(rows(one), rows(other), strict=True):
        assert a == b
    for (name, a), (other_name, b) in zip(tensors(one), tensors(other), strict=True):
        assert name == other_name
        assert torch.equal(a, b), name


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """An uninterrupted run, and the seconds it took."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    begin = time.perf_counter()
    finish(folder)
    return folder, time.perf_counter() - begin


SEEDS = [*range(2), *(pytest.param(n, marks=pytest.mark.slow) for n in range(2, 12))]


@pytest.mark.parametrize("seed", SEEDS)
def test_a_run_killed_at_any_moment_ends_bit_identical(whole, tmp_path, seed):
    folder, seconds = whole
    process = start(tmp_path / "run")
    time.sleep(random.Random(seed).uniform(0.05, 0.95) * seconds)
    process.kill()
    process.join()
    finish(tmp_path / "run")
    same(folder, tmp_path / "run")


def signalled(number: int, words: list[str]) -> int:
    """The command, with a signal that arrives in the fifth step of the second epoch of stage 2.

    Before it come two epochs of weights, two of the baseline and one of gates, of 8 steps each.
    """
    after_each_step(lambda loop, step: os.kill(os.getpid(), number) if step == 45 else None)
    return main(words)


@pytest.mark.skipif(sys.platform == "win32", reason="a signal ends a process there at once")
@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)]
)
def test_a_signal_lets_the_step_end_saves_and_says_how_to_go_on(whole, tmp_path, number):
    folder = tmp_path / "run"
    words = ["run", "digits", *WORDS, "--out", str(folder)]
    assert ended(started(folder.with_suffix(".said"), signalled, number, words)) == [130]
    last = folder.with_suffix(".said").read_text().splitlines()[-1]
    assert last.startswith("dnal: interrupted ")
    assert last.endswith(f"continue with: dnal resume {folder}")
    state = torch.load(folder / "arch_stage.pt", weights_only=True)
    # stopped inside an epoch: nothing of it is lost
    assert (state["stage"], state["epoch"], state["step"]) == ("arch_stage", 1, 5)
    assert {"delta", "price", "lr", "optimizer", "schedule", "place"} <= state.keys()
    finish(folder)
    same(whole[0], folder)


def after_each_step(end) -> None:
    """After every step of this process ``end(loop, step)`` may act, and put another loss in the
    place of what the step returned; ``step`` counts from 1, through all stages."""
    plain, taken = _Loop.step, []

    def step(loop, *given):
        taken.append(plain(loop, *given))
        other = end(loop, len(taken))
        return taken[-1] if other is None else other

    _Loop.step = step


def test_a_folder_that_is_being_written_is_refused_to_a_second_process(tmp_path):
    folder, said, refused = tmp_path / "run", tmp_path / "second.said", []

    def second(row):
        if row["kind"] == "epoch" and not refused:
            assert ended(started(said, run, CONFIG, folder)) == [1]
            refused.append(said.read_text().splitlines()[-1])
            raise Stop

    with pytest.raises(Stop):
        run(CONFIG, folder, on_row=second)
    assert "which another process is writing; need one at a time" in refused[0]


# --- two processes -----------------------------------------------------------------------------


def shared_run(folder: Path, end=lambda loop, step: None) -> None:
    """A run of a net with dropout, with ``end`` after each of its steps.

    An epoch has 32 steps, so a checkpoint falls behind steps 8, 16 and 24 of it.
    """
    torch.manual_seed(3)
    net = nn.Sequential(
        nn.Conv2d(3, 7, 3, stride=2), nn.BatchNorm2d(7), nn.ReLU(), nn.Dropout(0.3),
        nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Linear(63, 10),
    )  # fmt: skip
    config = SearchConfig().replace(
        data="toy", val=32, weight_epochs=1, arch_epochs=2, fine_tune_epochs=1, batch=4,
        baseline="none", arch_lr=1.0, precision="float32", channels_last=False, checkpoint_s=0.0,
    )  # fmt: skip
    after_each_step(end)
    run(config, folder, net=net)


def die(loop: _Loop, step: int) -> None:
    """In the 21st step of the second epoch of stage 2, without a word to anybody."""
    if loop.stage.name == "arch_stage" and step == 2 * 32 + 21:
        os._exit(9)


def spoil(loop: _Loop, step: int) -> torch.Tensor | None:
    """A loss that is not finite in the last step of an epoch, in one process of two."""
    return torch.full((3,), torch.nan) if step == 32 and os.environ["RANK"] == "1" else None


def share(folder: Path, *end) -> tuple[list[int | None], str]:
    """Two processes of a run: their exit codes and what the second one said."""
    pytest.importorskip("lightning_fabric", reason="needs lightning-fabric (extra: devices)")
    codes = ended(*ranks(2, folder.with_suffix(".said"), shared_run, folder, *end))
    return codes, folder.with_suffix(".1").read_text()


def test_two_processes_killed_inside_an_epoch_go_on_to_the_same_bits(tmp_path):
    assert share(tmp_path / "whole")[0] == [0, 0]
    assert 9 in share(tmp_path / "cut", die)[0]
    state = torch.load(tmp_path / "cut" / "arch_stage.pt", weights_only=True)
    assert (state["epoch"], state["step"]) == (1, 16)
    assert share(tmp_path / "cut")[0] == [0, 0]
    same(tmp_path / "whole", tmp_path / "cut", checkpoints)


def test_a_loss_that_is_not_finite_in_one_process_ends_both_with_the_diagnosis(tmp_path):
    codes, said = share(tmp_path / "run", spoil)
    assert codes == [1, 1]
    assert "FloatingPointError: got loss nan" in said
    assert [row["kind"] for row in runlog.read(tmp_path / "run")] == ["run", "stopped"]
