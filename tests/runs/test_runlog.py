"""Run records: what is written is read back, a crash costs one line, tables say what rows say."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dnal_mini.runs import origin, runlog, tables
from dnal_mini.runs.runlog import RunLog

CONFIG = {"name": "digits", "model": "vgg16", "seed": 3, "gate_price": 5e-4}
RESULT = {
    "test_images": 359,
    "dense_accuracy": 0.9777,
    "dense_is": "trained as long",
    "weight_stage_accuracy": 0.9611,
    "hard_accuracy": 0.9555,
    "pruned_accuracy": 0.9554,
    "fine_tuned_accuracy": 0.9722,
    "params": [940_000, 117_500],
    "macs": [20_000_000, 5_000_000],
    "latency_s": {"dense": {"median_s": 0.003}, "pruned": {"median_s": 0.002}, "batch": 1},
    "seconds": {"weight_stage": 30.0, "total": 90.0},
}


def written(path: Path, *epochs: tuple[str, int, float], result: dict | None = None, **config):
    """A record with one row per (stage, epoch, val accuracy) and, if given, a result."""
    log = RunLog(path)
    log.append("run", format=1, config=CONFIG | config, commit=None, device={"name": "a CPU"})
    for stage, epoch, accuracy in epochs:
        log.append("epoch", stage=stage, epoch=epoch, epochs=7, loss=0.5, val_accuracy=accuracy)
    if result:
        log.append("result", **result)
    return path


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.floats(allow_nan=False, width=64),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


@given(field=values)
def test_plain_values_survive_json(field: object):
    def finite(value: object) -> object:
        if isinstance(value, float) and not math.isfinite(value):
            return None
        if isinstance(value, list):
            return [finite(item) for item in value]
        return {k: finite(v) for k, v in value.items()} if isinstance(value, dict) else value

    assert json.loads(json.dumps(runlog.plain(field), allow_nan=False)) == finite(field)


def test_a_row_is_read_back_as_append_returned_it(tmp_path: Path):
    log = RunLog(tmp_path / "record.jsonl")
    first = log.append(
        "epoch",
        loss=torch.tensor(0.25),
        counts=torch.tensor([1, 2, 3]),
        kept=np.float32(0.5),
        path=Path("a/b"),
        text="Schritt fünf\nzwei Zeilen",
    )
    second = log.append("warning", epoch=np.int64(5))
    assert runlog.read(tmp_path) == [first, second]
    assert first == {
        "kind": "epoch",
        "loss": 0.25,
        "counts": [1, 2, 3],
        "kept": 0.5,
        "path": "a/b",
        "text": "Schritt fünf\nzwei Zeilen",
    }


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, torch.tensor(math.nan)])
def test_numbers_that_json_lacks_are_written_as_null(tmp_path: Path, value: object):
    RunLog(tmp_path / "r.jsonl").append("epoch", loss=value)
    assert (tmp_path / "r.jsonl").read_text().startswith('{"kind": "epoch", "loss": null, ')


def test_a_value_without_json_form_is_refused_and_nothing_is_written(tmp_path: Path):
    with pytest.raises(ValueError, match="got a object for a record; need"):
        RunLog(tmp_path / "r.jsonl").append("epoch", thing=object())
    assert list(tmp_path.iterdir()) == []


def test_rows_are_on_the_disk_when_the_process_dies(tmp_path: Path):
    code = (
        "import os, sys; from dnal_mini.runs.runlog import RunLog; log = RunLog(sys.argv[1])\n"
        "for epoch in (1, 2, 3): log.append('epoch', stage='arch_stage', epoch=epoch)\n"
        "os._exit(9)"
    )
    path = tmp_path / "r.jsonl"
    done = subprocess.run([sys.executable, "-c", code, str(path)], check=False)
    assert done.returncode == 9
    assert [row["epoch"] for row in runlog.read(path)] == [1, 2, 3]


@pytest.mark.parametrize("cut", [1, 5, 40])
def test_a_cut_last_line_is_dropped_with_a_warning_and_mended_by_the_next_row(
    tmp_path: Path, cut: int
):
    path = written(tmp_path / "r.jsonl", ("weight_stage", 1, 0.5), ("weight_stage", 2, 0.6))
    whole = runlog.read(path)
    path.write_bytes(path.read_bytes()[: -1 - cut])
    with pytest.warns(UserWarning, match="line 3 is cut short"):
        assert runlog.read(path) == whole[:2]
    row = RunLog(path).append("resume")
    assert runlog.read(path) == [*whole[:2], row]


def test_a_last_line_that_lacks_only_its_break_is_kept(tmp_path: Path):
    path = written(tmp_path / "r.jsonl", ("weight_stage", 1, 0.5))
    whole = runlog.read(path)
    path.write_bytes(path.read_bytes()[:-1])
    assert runlog.read(path) == whole
    row = RunLog(path).append("resume")
    assert runlog.read(path) == [*whole, row]


@pytest.mark.parametrize("broken", [b'{"kind": "epo', b"", b"17", b'{"epoch": 3}', b"\xff\xfe"])
def test_a_broken_middle_line_is_named(tmp_path: Path, broken: bytes):
    path = written(tmp_path / "r.jsonl", ("weight_stage", 1, 0.5), ("weight_stage", 2, 0.6))
    lines = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([lines[0], broken, lines[2]]) + b"\n")
    with pytest.raises(ValueError, match=r"got no JSON row in line 2 of .*r\.jsonl; need .*; do"):
        runlog.read(path)


@pytest.mark.parametrize(("old", "new"), [(b"0.6,", b"0.7,"), (b'"sum"', b'"sun"'), (b"2", b"3")])
def test_a_row_that_was_changed_is_told_by_its_line(tmp_path: Path, old: bytes, new: bytes):
    path = written(tmp_path / "r.jsonl", ("weight_stage", 1, 0.5), ("weight_stage", 2, 0.6))
    lines = path.read_bytes().splitlines(keepends=True)
    assert old in lines[2]
    path.write_bytes(b"".join([*lines[:2], lines[2].replace(old, new, 1)]))
    with pytest.raises(ValueError, match=r"got another checksum .* line 3 of .*; need .*; do"):
        runlog.read(path)


def test_a_record_of_an_older_version_has_no_checksums_and_goes_on_with_them(tmp_path: Path):
    path, old = tmp_path / "r.jsonl", {"kind": "epoch", "stage": "arch_stage", "epoch": 1}
    path.write_text(json.dumps(old) + "\n")
    new = RunLog(path).append("epoch", stage="arch_stage", epoch=2)
    assert runlog.read(path) == [old, new]
    assert ["sum" in json.loads(line) for line in path.read_text().splitlines()] == [False, True]


def test_a_missing_record_and_another_format_are_told(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"got no run record at .*; need .*; do"):
        runlog.read(tmp_path)
    RunLog(tmp_path / "record.jsonl").append("run", format=3)
    with pytest.raises(ValueError, match=r"got record format 3 .* need format 1"):
        runlog.read(tmp_path)


def test_of_epochs_written_twice_the_last_counts_in_the_place_of_the_first(tmp_path: Path):
    path = written(
        tmp_path / "r.jsonl",
        ("weight_stage", 1, 0.1),
        ("weight_stage", 2, 0.2),
        ("arch_stage", 1, 0.3),
        ("weight_stage", 2, 0.7),  # the run was resumed after weight epoch 1
        ("arch_stage", 1, 0.8),
    )
    found = [(row["stage"], row["epoch"], row["val_accuracy"]) for row in runlog.epochs(path)]
    assert found == [("weight_stage", 1, 0.1), ("weight_stage", 2, 0.7), ("arch_stage", 1, 0.8)]


def test_the_table_has_the_rows_of_one_kind(tmp_path: Path):
    pytest.importorskip("pandas")
    path = written(tmp_path / "r.jsonl", ("weight_stage", 1, 0.1), ("arch_stage", 1, 0.2))
    RunLog(path).append("warning", stage="arch_stage", epoch=1, text="layer 5 is collapsing")
    assert runlog.table(path)["val_accuracy"].tolist() == [0.1, 0.2]
    assert runlog.table(path, "warning")["text"].tolist() == ["layer 5 is collapsing"]
    assert len(runlog.table(path, "result")) == 0


def test_describe_run_names_the_versions_that_are_running():
    found = origin.describe_run()
    assert found["versions"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert found["versions"]["numpy"] == np.__version__
    assert found["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["device"]["threads"] == torch.get_num_threads()
    assert found["device"]["cpu_count"] == os.cpu_count()
    assert found["created"].endswith("+00:00")


def git(folder: Path, *arguments: str) -> str:
    name = ("-c", "user.name=n", "-c", "user.email=e@example.org")
    command = ["git", "-C", str(folder), *name, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_the_commit_is_that_of_the_checkout_and_dirt_is_flagged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    package = tmp_path / "repository" / "package"
    package.mkdir(parents=True)
    (package / "runs").mkdir()
    (package / "runlog.py").write_text("first = 1\n")
    monkeypatch.setattr(origin, "__file__", str(package / "runs" / "origin.py"))

    def described() -> tuple[str | None, bool | None]:
        found = origin.describe_run()
        return found["commit"], found["dirty"]

    assert described() == (None, None)  # no repository
    git(package.parent, "init", "--quiet")
    (package.parent / "other.txt").write_text("another project\n")
    git(package.parent, "add", "other.txt")
    git(package.parent, "commit", "--quiet", "-m", "other")
    assert described() == (None, None)  # a repository that does not track the package
    git(package.parent, "add", ".")
    git(package.parent, "commit", "--quiet", "-m", "package")
    assert described() == (git(package.parent, "rev-parse", "HEAD"), False)
    (package.parent / "other.txt").write_text("a result, not code\n")
    assert described()[1] is False
    (package / "runlog.py").write_text("first = 2\n")
    assert described()[1] is True


def test_summary_gives_shares_and_speedup(tmp_path: Path):
    path = written(tmp_path / "r.jsonl", ("fine_tune", 7, 0.9), result=RESULT)
    found = tables.summary(path)
    assert found["finished"]
    assert found["macs_kept"] == 5 / 20
    assert found["params_kept"] == 117_500 / 940_000
    assert found["speedup"] == 0.003 / 0.002
    assert found["fine_tuned_accuracy"] == 0.9722
    assert (found["name"], found["seed"], found["gate_price"]) == ("digits", 3, 5e-4)


def test_summary_of_an_unfinished_run_tells_how_far_it_came(tmp_path: Path):
    found = tables.summary(written(tmp_path / "r.jsonl", ("arch_stage", 5, 0.9)))
    assert not found["finished"]
    assert (found["stage"], found["epoch"], found["epochs"]) == ("arch_stage", 5, 7)
    assert found["macs_kept"] is None
    assert found["dense_accuracy"] is None


def test_a_record_without_its_first_row_is_refused(tmp_path: Path):
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(ValueError, match=r"got a record of 0 rows .*; need .*; do"):
        tables.summary(tmp_path / "empty.jsonl")


def test_results_are_sorted_by_macs_and_unfinished_runs_come_last(tmp_path: Path):
    records = [
        written(tmp_path / "open.jsonl", ("arch_stage", 5, 0.9), seed=11),
        written(tmp_path / "small.jsonl", result=RESULT | {"macs": [20_000_000, 1_500_000]}),
        written(tmp_path / "large.jsonl", result=RESULT | {"macs": [20_000_000, 13_000_000]}),
        written(tmp_path / "new.jsonl"),
    ]
    lines = tables.results_table(records).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[:4]]
    assert {len(line) for line in cells} == {11}
    assert cells[0][:3] == ["recipe", "gate price", "seed"]
    assert cells[2] == [
        *("digits", "0.0005", "3", "97.77", "95.54", "97.22", "65.0", "13.00", "0.12", "1.50"),
        "1.5",
    ]
    assert cells[3][6:8] == ["7.5", "1.50"]
    assert lines[5] == "- digits, gate price 0.0005, seed 11: not finished (arch_stage, epoch 5)"
    assert lines[6] == "- digits, gate price 0.0005, seed 3: not finished (no epoch yet)"


def test_plain_tables_fit_a_screen_and_their_columns_align(tmp_path: Path):
    big = RESULT | {"params": [14_990_922, 12_345_678], "macs": [313_463_808, 187_654_321]}
    path = written(
        tmp_path / "r.jsonl", ("arch_stage", 5, 0.9), result=big, name="resnet56_cifar10"
    )
    final = tables.final_table(path)
    texts = [final, tables.results_table([path], markdown=False), tables.epochs_table(path)]
    assert all(len(line) <= 80 for text in texts for line in text.splitlines())
    header, accuracy, *_ = final.splitlines()[-5:]
    for title, value in (("dense", "97.77%"), ("pruned", "95.54%"), ("fine-tuned", "97.22%")):
        assert header.index(title) + len(title) == accuracy.index(value) + len(value)


def test_the_final_table_gives_each_ratio(tmp_path: Path):
    final = tables.final_table(written(tmp_path / "r.jsonl", result=RESULT))
    accuracy, params, macs, latency = (line.split() for line in final.splitlines()[-4:])
    assert accuracy[2:] == ["97.77%", "95.54%", "97.22%"]
    assert params[1:] == ["940,000", "117,500", "117,500", "8.00x", "fewer"]
    assert macs[-2:] == ["4.00x", "fewer"]
    assert latency[3:] == ["3.000", "ms", "2.000", "ms", "2.000", "ms", "1.50x", "faster"]


def test_an_unfinished_run_has_no_final_table_but_a_line(tmp_path: Path):
    text = tables.final_table(written(tmp_path / "r.jsonl", ("arch_stage", 5, 0.9)))
    assert text == "digits, gate price 0.0005, seed 3: not finished (arch_stage, epoch 5)"


def test_an_epoch_line_shows_what_the_row_has_and_a_dash_for_null():
    row = {"stage": "arch_stage", "epoch": 3, "epochs": 7, "loss": None, "val_accuracy": 0.8125}
    line = tables.epoch_line(row | {"delta": 21.54, "kept": 0.5})
    assert line == "arch_stage 3/7  delta 21.54  loss -  val 81.2%  kept 50.0%"


def test_the_epochs_table_leaves_out_figures_that_no_row_has(tmp_path: Path):
    path = written(tmp_path / "r.jsonl", ("weight_stage", 1, 0.5), ("fine_tune", 2, 0.75))
    lines = [line.split() for line in tables.epochs_table(path).splitlines()]
    assert lines == [
        ["stage", "loss", "val"],
        ["weight_stage", "1/7", "0.5000", "50.0%"],
        ["fine_tune", "2/7", "0.5000", "75.0%"],
    ]


def test_a_report_names_the_dense_network_only_where_there_is_one(tmp_path: Path):
    joint = RESULT | {"dense_is": None, "dense_accuracy": None, "weight_stage_accuracy": None}
    texts = [
        " ".join(tables.final_table(written(tmp_path / name, result=result)).split())
        for name, result in (("a.jsonl", RESULT | {"dense_is": "baseline"}), ("b.jsonl", joint))
    ]
    assert "after the weight stage 96.11%, with hard gates 95.55%; the dense network" in texts[0]
    assert "Test accuracy with hard gates 95.55%. dense" in texts[1]
