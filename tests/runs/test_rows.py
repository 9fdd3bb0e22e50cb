"""Odd records: whatever stands in a row, a report is made or ends in one line that says what."""

import json
from pathlib import Path

import pytest
from systems import device, pipe

from dnal_mini.cli.commands import main
from dnal_mini.config import SearchConfig
from dnal_mini.runs import runlog

RESULT = {
    "dense_accuracy": 0.9777, "pruned_accuracy": 0.9554, "fine_tuned_accuracy": 0.9722,
    "hard_accuracy": 0.95, "params": [940_000, 117_500], "macs": [20_000_000, 5_000_000],
    "seconds": {"total": 60.0}, "latency_s": {
        "dense": {"median_s": 0.02}, "pruned": {"median_s": 0.01}, "batch": 1,
    },
}  # fmt: skip
EPOCH = {"stage": "weight_stage", "epoch": 1, "epochs": 1, "loss": 1.5, "seconds": 0.5}


def lines(**changes: dict) -> list[str]:
    """A whole record, without checksums as an editor leaves it; ``changes`` by kind."""
    rows = {
        "run": {"format": 2, "config": SearchConfig().settings(), "device": {"name": "cpu"}},
        "epoch": EPOCH,
        "result": RESULT,
    }
    made = [{"kind": kind} | row | changes.get(kind, {}) for kind, row in rows.items()]
    return [json.dumps(row) + "\n" for row in made]


def with_setting(**changes: object) -> dict:
    return {"config": SearchConfig().settings() | changes}


ODD: dict[str, tuple[dict, str]] = {
    "accuracy of a text": ({"result": {"fine_tuned_accuracy": "99"}}, "fine_tuned_accuracy '99'"),
    "accuracy of 99": ({"result": {"dense_accuracy": 99}}, "dense_accuracy 99 in line 3"),
    "accuracy below 0": ({"result": {"hard_accuracy": -0.5}}, "hard_accuracy -0.5"),
    "accuracy of a list": ({"result": {"pruned_accuracy": [0.5]}}, "pruned_accuracy [0.5]"),
    "accuracy of a bool": ({"result": {"dense_accuracy": True}}, "dense_accuracy True"),
    "no MACs": ({"result": {"macs": []}}, "macs [] in line 3"),
    "one count of MACs": ({"result": {"macs": [5]}}, "macs [5]"),
    "MACs of nothing": ({"result": {"macs": [0, 0]}}, "macs [0, 0]"),
    "MACs of texts": ({"result": {"macs": ["2", "1"]}}, "macs ['2', '1']"),
    "MACs of null": ({"result": {"macs": None}}, "macs None"),
    "MACs of 10**400": ({"result": {"macs": [10**400, 1]}}, "macs [1000"),
    "params of a dict": ({"result": {"params": {}}}, "params {}"),
    "negative params": ({"result": {"params": [5, -5]}}, "params [5, -5]"),
    "seconds of a text": ({"result": {"seconds": "long"}}, "seconds 'long'"),
    "seconds of texts": ({"result": {"seconds": {"total": "1"}}}, "seconds {'total': '1'}"),
    "latency of a number": ({"result": {"latency_s": 5}}, "latency_s 5"),
    "latency without nets": ({"result": {"latency_s": {"dense": 0.1}}}, "latency_s {'dense'"),
    "latency of a text": (
        {"result": {"latency_s": {"dense": {"median_s": "1"}}}}, "latency_s {'dense'"
    ),
    "price of a text": ({"result": {"gate_price": "cheap"}}, "gate_price 'cheap'"),
    "config of null": ({"run": {"config": None}}, "config None in line 1"),
    "config of a list": ({"run": {"config": [1]}}, "config [1]"),
    "config of a text": ({"run": {"config": "x"}}, "config 'x'"),
    "name of a number": ({"run": with_setting(name=5)}, "name"),
    "seed of a text": ({"run": with_setting(seed="0")}, "seed"),
    "seed of a list": ({"run": with_setting(seed=[0])}, "seed"),
    "price of a list": ({"run": with_setting(gate_price=[1])}, "gate_price"),
    "budget of a text": ({"run": with_setting(budget="0.3")}, "budget"),
    "budget of texts": ({"run": with_setting(budget={"macs": "0.3"})}, "budget"),
    "method of a number": ({"run": with_setting(method=5)}, "method"),
    "device of a text": ({"run": {"device": "cpu"}}, "device 'cpu'"),
    "commit of a number": ({"run": {"commit": 5}}, "commit 5"),
    "format of a text": ({"run": {"format": "2"}}, "record format 2"),
    "format of later": ({"run": {"format": 99}}, "record format 99"),
    "stage of a list": ({"epoch": {"stage": []}}, "stage [] in line 2"),
    "epoch of a text": ({"epoch": {"epoch": "1"}}, "epoch '1'"),
    "epoch of null": ({"epoch": {"epoch": None}}, "epoch None"),
    "loss of a text": ({"epoch": {"loss": "low"}}, "loss 'low'"),
    "loss of a dict": ({"epoch": {"loss": {}}}, "loss {}"),
    "seconds of null": ({"epoch": {"seconds": None}}, "seconds None"),
    "share of a text": ({"epoch": {"kept": "all"}}, "kept 'all'"),
}  # fmt: skip


def told(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """The one line that the command ends in."""
    assert main(["report", *map(str, words)]) == 2
    out = capsys.readouterr()
    assert out.out == ""
    (line,) = out.err.splitlines()
    assert line.startswith("dnal: got ")
    assert "; need " in line
    return line


def test_the_record_itself_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "a.jsonl").write_text("".join(lines()))
    assert main(["report", str(tmp_path / "a.jsonl"), "--epochs"]) == 0
    assert "97.22%" in capsys.readouterr().out


@pytest.mark.parametrize("what", ODD)
def test_an_odd_field_is_named_with_its_line(
    what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    changes, words = ODD[what]
    (tmp_path / "a.jsonl").write_text("".join(lines(**changes)))
    (tmp_path / "b.jsonl").write_text("".join(lines()))
    for more in ([], ["--epochs"], [tmp_path / "b.jsonl"]):
        line = told(capsys, tmp_path / "a.jsonl", *more)
        assert words in line
        assert "a.jsonl" in line


@pytest.mark.parametrize("kind", ["run", "epoch", "result"])
def test_any_field_may_be_missing_or_null(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """A table with a dash, or one line: never a fault."""
    path, other = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    other.write_text("".join(lines()))
    for text in lines():
        row = json.loads(text)
        if row["kind"] != kind:
            continue
        for name in sorted({*row} - {"kind"}):
            for odd in ({k: v for k, v in row.items() if k != name}, row | {name: None}):
                rows = [json.loads(line) for line in lines()]
                rows = [odd if r["kind"] == kind else r for r in rows]
                path.write_text("".join(json.dumps(r) + "\n" for r in rows))
                for words in ([path, "--epochs"], [path, other]):
                    code = main(["report", *map(str, words)])
                    err = capsys.readouterr().err
                    assert (code, err.count("\n")) in ((0, 0), (2, 1)), (name, err)


TEXTS: dict[str, tuple[bytes, str]] = {
    "rows that are lists": (b"[1]\n[2]\n", "no JSON row in line 1"),
    "rows that are numbers": (b"5\n", "no JSON row in line 1"),
    "a kind of a number": (b'{"kind": 5}\n', "no JSON row in line 1"),
    "NaN": (b'{"kind": "result", "macs": NaN}\n', "no JSON row in line 1"),
    "infinity": (b'{"kind": "epoch", "loss": 1e999}\n', "loss inf in line 1"),
    "bytes": (bytes(range(256)), "no JSON row in line 1"),
    "deep": (b"[" * 100_000 + b"\n", "no JSON row in line 1"),
    "a number of 5,000 digits": (b'{"kind": ' + b"9" * 5000 + b"}\n", "no JSON row in line 1"),
    "empty": (b"", "a record of 0 rows"),
    "empty lines": (b"\n\n", "no JSON row in line 1"),
    "a result alone": (lines()[2].encode(), "without the row of its run"),
    "an unknown kind": (b'{"kind": "other"}\n', "without the row of its run"),
}  # fmt: skip


@pytest.mark.timeout(30)
@pytest.mark.parametrize("what", TEXTS)
def test_what_is_no_record_is_told(what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    content, words = TEXTS[what]
    (tmp_path / "a.jsonl").write_bytes(content)
    assert words in told(capsys, tmp_path / "a.jsonl")


@pytest.mark.timeout(30)
def test_a_pipe_or_a_device_is_no_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for path in (pipe(tmp_path / "pipe"), device("/dev/zero"), tmp_path):
        assert "no run record at" in told(capsys, path)


def test_rows_with_a_right_checksum_are_looked_at_too(tmp_path: Path):
    log = runlog.RunLog(tmp_path / "a.jsonl")
    log.append("run", config={})
    log.append("result", macs=[2, 1], params=[], fine_tuned_accuracy=0.5)
    with pytest.raises(ValueError, match=r"got params \[\] in line 2 of .*; need .*; do"):
        runlog.read(tmp_path / "a.jsonl")
