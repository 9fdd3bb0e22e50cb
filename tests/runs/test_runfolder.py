"""Folders of runs: taken over, refused, damaged."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from small_runs import CONFIG, Stop, changed, copy_of, stopped_at, told
from systems import device
from torch import nn

from dnal_mini.data.sources import toy_images
from dnal_mini.gating import add_gates
from dnal_mini.methods.dnal import DNAL
from dnal_mini.refused import Refused
from dnal_mini.runs import checkpoint, runlog
from dnal_mini.runs.checkpoint import load_state
from dnal_mini.runs.reopen import settings_in
from dnal_mini.runs.runfolder import RunFolder
from dnal_mini.search.driver import run

DATA = toy_images(val=32)


def test_stage_one_can_be_taken_over_by_a_run_at_another_price(finished, tmp_path):
    copy_of(finished, tmp_path / "first")
    dearer = changed(gate_price=2e-3)
    alone = run(dearer, tmp_path / "alone")
    taken = run(dearer.replace(weights_from=str(tmp_path / "first")), tmp_path / "taken")
    assert taken["fine_tuned_accuracy"] == alone["fine_tuned_accuracy"]
    assert taken["macs"] == alone["macs"]
    rows = runlog.read(tmp_path / "taken" / "record.jsonl")
    assert rows[0]["config"]["weights_from"] == "first"
    assert [row["stage"] for row in rows if row.get("taken_over")] == [
        "weight_stage", "baseline", "baseline"
    ]  # fmt: skip
    origin = runlog.read(tmp_path / "first" / "record.jsonl")[0]
    assert rows[1]["kind"] == "taken_over"
    assert rows[1]["created"] == origin["created"]
    other = dearer.replace(seed=1, weights_from=str(tmp_path / "first"))
    with pytest.raises(ValueError, match="another stage 1: seed"):
        run(other, tmp_path / "refused")
    assert not (tmp_path / "refused").exists()


def test_a_folder_of_another_run_is_refused(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("mine")
    with pytest.raises(ValueError, match="not empty"):
        run(CONFIG, tmp_path / "full")
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["letter.txt"]
    (tmp_path / "other").mkdir()
    settings = changed(seed=3).settings()
    (tmp_path / "other" / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="seed=3, not 0"):
        run(CONFIG, tmp_path / "other")


def without_result(folder: Path) -> None:
    """As if the run had been stopped before its last row."""
    record = folder / "record.jsonl"
    record.write_text("".join(record.read_text().splitlines(keepends=True)[:-1]))


def halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_a_damaged_checkpoint_is_told_and_the_one_before_it_taken(finished, tmp_path):
    _, whole = copy_of(finished, tmp_path / "run")
    losses = [row["loss"] for row in runlog.epochs(tmp_path / "run")]
    without_result(tmp_path / "run")
    halve(tmp_path / "run" / "arch_stage.pt")
    with pytest.warns(UserWarning, match=r"arch_stage\.pt, which cannot be read; went on from"):
        again = run(CONFIG, tmp_path / "run")
    assert again["fine_tuned_accuracy"] == whole["fine_tuned_accuracy"]
    assert [row["loss"] for row in runlog.epochs(tmp_path / "run")] == losses
    without_result(tmp_path / "run")
    for name in ("arch_stage.pt", "arch_stage.before.pt"):
        halve(tmp_path / "run" / name)
    with (
        pytest.warns(UserWarning, match="went on from the one before"),
        pytest.raises(ValueError, match=r"before\.pt, which cannot be read; remove it"),
    ):
        run(CONFIG, tmp_path / "run")


def test_a_bit_that_flips_in_a_checkpoint_is_told(finished, tmp_path):
    path = copy_of(finished, tmp_path / "run")[0] / "fine_tune.pt"
    whole = path.read_bytes()
    epochs = load_state(path)["epoch"]
    path.write_bytes(whole[: whole.index(checkpoint.SUM)])  # as older versions wrote it
    assert load_state(path)["epoch"] == epochs
    for place in range(1000, len(whole), len(whole) // 20):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        with pytest.raises(ValueError, match=r"fine_tune\.pt, which cannot be read"):
            load_state(path)


def failing(error: Exception):
    def acquire(*_: object, **__: object) -> None:
        raise error

    return acquire


@pytest.mark.parametrize("error", [OSError(errno.ENOLCK, "No locks"), NotImplementedError("flock")])
def test_a_file_system_without_locks_is_told_and_written_to(tmp_path, monkeypatch, error):
    monkeypatch.setattr("filelock.BaseFileLock.acquire", failing(error))
    with (
        pytest.warns(UserWarning, match=r"got .*, whose file system has no locks; let one process"),
        RunFolder(tmp_path / "run", CONFIG, DATA) as folder,
    ):
        folder.write("note")
    assert runlog.read(tmp_path / "run")[-1]["kind"] == "note"


def test_a_lock_that_may_not_be_written_is_no_lack_of_locks(tmp_path, monkeypatch):
    denied = PermissionError(errno.EACCES, "Permission denied", "lock")
    monkeypatch.setattr("filelock.BaseFileLock.acquire", failing(denied))
    with pytest.raises(PermissionError):
        RunFolder(tmp_path / "run", CONFIG, DATA)


def test_a_folder_is_free_again_when_it_is_closed_and_locked_once_at_a_time(tmp_path):
    folder = RunFolder(tmp_path / "run", CONFIG, DATA)
    with folder, pytest.raises(Refused, match="which another process is writing; need one"):
        RunFolder(tmp_path / "run", CONFIG, DATA)
    RunFolder(tmp_path / "run", CONFIG, DATA).close()


def test_where_folders_cannot_be_opened_a_file_is_written_whole_all_the_same(tmp_path, monkeypatch):
    path = tmp_path / "a.pt"
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", failing(PermissionError(13, "Permission denied", "folder")))
        patch.setattr(os, "name", "nt")
        checkpoint.write_whole(path, b"one")
        checkpoint.write_whole(path, b"three", keep=path.with_suffix(".before"))
    assert path.read_bytes() == b"three"
    assert path.with_suffix(".before").read_bytes() == b"one"


def test_a_record_that_was_cut_is_whole_again_after_resuming(finished, tmp_path):
    copy_of(finished, tmp_path / "run")
    record = tmp_path / "run" / "record.jsonl"
    rows = runlog.read(record)
    lines = record.read_bytes().splitlines(keepends=True)
    cut = next(n for n, row in enumerate(rows) if row.get("stage") == "fine_tune") + 1
    record.write_bytes(b"".join(lines[:cut]) + lines[cut][:20])
    with pytest.warns(UserWarning, match=f"line {cut + 1} is cut short"):
        run(CONFIG, tmp_path / "run")
    kept = [row for row in runlog.read(record) if row["kind"] != "resume"]
    assert [told(row) for row in kept] == [told(row) for row in rows]


def test_a_full_disk_is_one_line_and_nothing_is_lost(finished, tmp_path):
    folder = tmp_path / "run"

    def fill(row):
        if row.get("stage") == "arch_stage" and row["epoch"] == 1:
            (folder / "arch_stage.pt.part").symlink_to(device("/dev/full"))

    with pytest.raises(ValueError, match=r"got No space left on device for .*; need room"):
        run(CONFIG, folder, on_row=fill)
    assert not (folder / "arch_stage.pt.part").exists()
    result = run(CONFIG, folder)
    assert told(result) == told(runlog.read(finished)[-1])


def test_another_clock_and_another_host_change_nothing(finished, tmp_path, monkeypatch):
    with pytest.raises(Stop):
        run(CONFIG, tmp_path / "cut", on_row=stopped_at("arch_stage", 1))
    monkeypatch.setattr("time.time", lambda: 0.0)  # back in 1970
    monkeypatch.setattr("socket.gethostname", lambda: "elsewhere")
    monkeypatch.setattr("platform.node", lambda: "elsewhere")
    assert told(run(CONFIG, tmp_path / "cut")) == told(runlog.read(finished)[-1])


def test_a_field_that_is_newer_than_the_run_counts_as_its_default(finished, tmp_path):
    folder, result = copy_of(finished, tmp_path / "run")
    path = folder / "config.json"
    settings = json.loads(path.read_text())
    del settings["label_smoothing"]
    path.write_text(json.dumps(settings))
    assert run(CONFIG, tmp_path / "run") == result
    assert run(changed(devices=2, checkpoint_s=7.0), tmp_path / "run") == result  # means only
    with pytest.raises(ValueError, match=r"label_smoothing=0\.0, not 0\.1"):
        run(changed(label_smoothing=0.1), tmp_path / "run")


def test_a_loss_that_is_not_finite_stops_the_run_with_a_diagnosis(tmp_path):
    wild = changed(weight_epochs=3, weight_lr=1e30, baseline="none")
    with pytest.raises(FloatingPointError, match=r"epoch 1, step \d+ .*not finite now: .*weight"):
        run(wild, tmp_path / "run")
    rows = runlog.read(tmp_path / "run")
    assert [row["kind"] for row in rows] == ["run", "stopped"]
    assert "do lower the learning rate" in rows[-1]["text"]


def test_a_folder_half_made_is_not_seen(tmp_path, monkeypatch):
    def broken(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("dnal_mini.runs.runfolder.write_whole", broken)
        with pytest.raises(ValueError, match="cannot be written"):
            run(CONFIG, tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


# --- folders of older versions -----------------------------------------------------------------

OLD = Path(__file__).parents[1] / "files" / "old_run"


def test_a_run_that_an_older_version_began_goes_on(tmp_path):
    shutil.copytree(OLD, tmp_path / "run")
    config, trained = settings_in(tmp_path / "run"), []
    assert (config.method, config.baseline) == (
        DNAL(arch_epochs=2, arch_lr=5.0, gate_price=1e-3), "none",
    )  # fmt: skip
    before = runlog.epochs(OLD)
    result = run(config, tmp_path / "run", on_row=trained.append)
    epochs = [(row["stage"], row["epoch"]) for row in trained if row["kind"] == "epoch"]
    assert epochs == [("arch_stage", 2), ("fine_tune", 1)]
    assert runlog.epochs(tmp_path / "run")[: len(before)] == before
    assert result["macs"][1] < result["macs"][0]


def test_settings_that_no_version_has_are_told(tmp_path):
    shutil.copytree(OLD, tmp_path / "run")
    path = tmp_path / "run" / "config.json"
    path.write_text(path.read_text().replace('"gate_price"', '"gate_prize"'))
    with pytest.raises(ValueError, match="got field 'gate_prize'; need gate_price"):
        settings_in(tmp_path / "run")


@pytest.mark.parametrize("order", ["conv-bn-ss-relu", "conv-bn-relu-ss"])
def test_a_checkpoint_under_older_names_of_gates_and_norms_is_read(tmp_path: Path, order: str):
    """Older versions had a norm inside a gated one, and a gate behind an activation beside it."""
    layers = [nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 4, 1)]
    net = add_gates(nn.Sequential(nn.Sequential(*layers)), order)
    for tensor in net.state_dict().values():
        tensor.copy_(torch.rand(tensor.shape) * 9)
    late, old = order == "conv-bn-relu-ss", {}
    for name, tensor in net.state_dict().items():
        if ".gate." in name:
            name = name.replace(".gate.", "_gate.") if late else name
        elif name.startswith("0.1.") and not late:
            name = name.replace("0.1.", "0.1.norm.")
        old[name] = tensor
    assert old.keys() != net.state_dict().keys()
    torch.save({"net": old, "epoch": 1}, tmp_path / "old.pt")
    found = load_state(tmp_path / "old.pt")["net"]
    torch.testing.assert_close(found, dict(net.state_dict()), rtol=0, atol=0)
