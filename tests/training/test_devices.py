"""Many processes compute what one does: under torchrun, and started by the command itself."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import two_processes
from processes import dnal, ended, ranks, start
from torch import nn

from dnal_mini.cli.commands import main
from dnal_mini.config import SearchConfig
from dnal_mini.data.sources import toy_images
from dnal_mini.runs import runlog, tables
from dnal_mini.search.driver import run
from dnal_mini.training.devices import from_first, start_processes
from dnal_mini.training.loop import evaluate

pytest.importorskip("lightning_fabric", reason="needs lightning-fabric (extra: devices)")
ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).parents[1].joinpath("two_processes.py")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
pytestmark = pytest.mark.skipif(
    sys.platform == "win32", reason="torchrun needs libuv, which torch for Windows lacks"
)
WORDS = [
    "--data", "toy", "--val", "33", "--width", "0.07", "--weight-epochs", "2", "--arch-epochs", "2",
    "--fine-tune-epochs", "1", "--batch", "64", "--arch-lr", "0.1", "--gate-price", "1e-3",
    "--precision", "float32", "--channels-last", "false",
]  # fmt: skip
COMMAND = [sys.executable, "-m", "dnal_mini", "run", "digits", *WORDS]


def succeed(*words: object) -> str:
    """Run a command in the root of the project; returns its standard output."""
    done = subprocess.run(
        [str(word) for word in words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


STARTED = ["forked", pytest.param("command", marks=pytest.mark.slow)]  # 20 s of imports


@pytest.mark.parametrize("how", STARTED)
def test_two_processes_give_the_losses_weights_and_evaluation_of_one(tmp_path, how):
    assert ended(start(tmp_path / "one.said", two_processes.main, tmp_path / "one.pt")) == [0]
    if how == "command":
        succeed(*TORCHRUN, SCRIPT, tmp_path / "two.pt")
    else:
        said = tmp_path / "two.said"
        assert ended(*ranks(2, said, two_processes.main, tmp_path / "two.pt")) == [0, 0]
    one, two = (torch.load(tmp_path / f"{name}.pt") for name in ("one", "two"))
    torch.testing.assert_close(
        torch.tensor(two["losses"]), torch.tensor(one["losses"]), rtol=1e-10, atol=1e-12
    )
    assert two["accuracy"] == one["accuracy"]
    for name, value in one["net"].items():
        torch.testing.assert_close(two["net"][name], value, rtol=1e-8, atol=1e-10, msg=name)
    assert two["norm"] == "GatedBatchNorm2d"  # its own class again


@pytest.mark.parametrize("how", STARTED)
def test_two_processes_of_the_command_end_as_one_does(tmp_path, how):
    said = tmp_path / "one.said"
    assert ended(dnal(said, "run", "digits", *WORDS, "--out", tmp_path / "one")) == [0]
    words = [*WORDS, "--out", str(tmp_path / "two")]
    if how == "command":  # which starts the second process
        shared = succeed(*COMMAND, "--devices", 2, "--out", tmp_path / "two")
    else:
        assert ended(*ranks(2, tmp_path / "two.said", main, ["run", "digits", *words])) == [0, 0]
        shared = "".join((tmp_path / f"two.{n}").read_text() for n in (0, 1))
    assert shared.count("test accuracy") == said.read_text().count("test accuracy") == 1
    records = [runlog.read(tmp_path / name) for name in ("one", "two")]
    kinds = [[(row["kind"], row.get("stage")) for row in rows] for rows in records]
    assert kinds[0] == kinds[1]  # nobody but the first process writes
    losses = [[row["loss"] for row in runlog.epochs(rows)] for rows in records]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)  # float32: rounding grows
    results = [rows[-1] for rows in records]
    assert results[1]["test_images"] == results[0]["test_images"]
    # a folder of two processes goes on with one
    record = tmp_path / "two" / "record.jsonl"
    record.write_text("".join(record.read_text().splitlines(keepends=True)[:-2]))
    (tmp_path / "two" / "fine_tune.pt").unlink()
    assert ended(dnal(said, "run", "digits", *words)) == [0]
    assert tables.summary(tmp_path / "two")["finished"]


def test_a_signal_to_the_first_of_two_processes_stops_and_saves_both(tmp_path):
    long = ["--weight-epochs", "500", "--checkpoint-s", "0", "--devices", "2"]
    folder = tmp_path / "run"
    at = COMMAND.index("--weight-epochs")  # an option may come once
    command = [*COMMAND[:at], *COMMAND[at + 2 :], *long, "--out", str(folder)]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    while not (folder / "weight_stage.pt").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, complained = process.communicate(timeout=120)
    assert f"continue with: dnal resume {folder}" in complained
    assert "Traceback" not in complained
    epochs = runlog.epochs(folder)
    assert 0 < len(epochs) < 500
    state = torch.load(folder / "weight_stage.pt", weights_only=True)
    assert state["epoch"] == epochs[-1]["epoch"]


def count() -> None:
    """Assert, in each of many processes, that a split is evaluated once, whatever the batches."""
    fabric = start_processes(torch.device("cpu"))
    data = toy_images(train=5, val=33, num_classes=3, image_shape=(3, 4, 4))
    net = nn.Sequential(nn.Flatten(), nn.Linear(48, 3))
    nn.init.zeros_(net[1].weight)
    net[1].bias.data = torch.tensor([0.0, 1.0, 0.0])  # always the second class
    right = int((data.val.labels == 1).sum()) / 33
    sizes = (1, 7, 32, 500)
    found = [evaluate(net, data.val, data, batch=size, devices=fabric) for size in sizes]
    assert found == [right] * 4, (found, right)


def test_the_images_of_a_split_are_counted_once_by_any_number_of_processes(tmp_path):
    said = tmp_path / "count.said"
    assert ended(*ranks(3, said, count)) == [0, 0, 0], said.with_suffix(".0").read_text()


def test_a_batch_that_cannot_be_shared_evenly_is_told(tmp_path):
    words, said = [*WORDS, "--out", str(tmp_path / "run")], tmp_path / "uneven.said"
    assert ended(*ranks(3, said, main, ["run", "digits", *words])) == [2, 2, 2]
    for n in range(3):
        told = said.with_suffix(f".{n}").read_text()
        assert "dnal: got batch 64 for 3 processes; need a multiple" in told
    assert not (tmp_path / "run").exists()


def test_one_process_needs_no_fabric():
    assert start_processes(torch.device("cpu")) is None
    assert from_first(None, lambda: 7) == 7


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"devices": 3}, "got batch 64 for 3 processes; need a multiple"),
        ({"devices": 128, "batch": 64}, "got batch 64 for 128 processes"),
        (
            {"device": "cuda:0" if torch.cuda.is_available() else "cuda", "devices": 64},
            "got device",
        ),
    ],
)
def test_processes_and_devices_that_cannot_be_are_told_before_any_is_started(
    tmp_path, fields, text
):
    config = SearchConfig().replace(data="toy", val=33, batch=64, width=0.07)
    with pytest.raises(ValueError, match=text):
        run(config.replace(**fields), tmp_path / "run")
    assert not (tmp_path / "run").exists()
