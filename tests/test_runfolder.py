"""Folders of runs: taken over, refused, damaged."""

import dataclasses
import json

import pytest

from dnal_mini import runlog
from dnal_mini.config import SearchConfig
from dnal_mini.search import run

CONFIG = SearchConfig(
    name="toy",
    data="toy",
    val=32,
    model="vgg16",
    width=0.07,
    weight_epochs=1,
    arch_epochs=3,
    fine_tune_epochs=2,
    batch=64,
    arch_lr=5.0,
    gate_price=1e-3,
    precision="float32",
    channels_last=False,
)


def changed(**fields) -> SearchConfig:
    return dataclasses.replace(CONFIG, **fields)


def test_stage_one_can_be_taken_over_by_a_run_at_another_price(tmp_path):
    run(CONFIG, tmp_path / "first")
    dearer = changed(gate_price=2e-3)
    alone = run(dearer, tmp_path / "alone")
    taken = run(
        dataclasses.replace(dearer, weights_from=str(tmp_path / "first")), tmp_path / "taken"
    )
    assert taken["fine_tuned_accuracy"] == alone["fine_tuned_accuracy"]
    assert taken["macs"] == alone["macs"]
    rows = runlog.read(tmp_path / "taken" / "record.jsonl")
    assert rows[0]["config"]["weights_from"] == "first"
    assert [row["stage"] for row in rows if row.get("taken_over")] == ["weight_stage"] + [
        "baseline"
    ] * 5
    origin = runlog.read(tmp_path / "first" / "record.jsonl")[0]
    assert rows[1]["kind"] == "taken_over"
    assert rows[1]["created"] == origin["created"]
    other = dataclasses.replace(dearer, seed=1, weights_from=str(tmp_path / "first"))
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
    settings = dataclasses.asdict(changed(seed=3))
    (tmp_path / "other" / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="seed=3, not 0"):
        run(CONFIG, tmp_path / "other")


def test_a_damaged_checkpoint_is_named(tmp_path):
    run(changed(baseline=False), tmp_path / "run")
    record = tmp_path / "run" / "record.jsonl"
    record.write_text("".join(record.read_text().splitlines(keepends=True)[:-1]))  # no result
    path = tmp_path / "run" / "arch_stage.pt"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"arch_stage\.pt, which cannot be read"):
        run(changed(baseline=False), tmp_path / "run")
