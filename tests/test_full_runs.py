"""The full-size runs: what is wanted, in which order, and that nothing that happens loses a run."""

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import experiments
import full_runs
import pytest
import self_check
from full_runs import folder_of
from jobs import Job, Place, carried_out
from packed import Means, Outcome, pack

from dnal_mini import recipes
from dnal_mini.runs import runlog

FOLDER = Path(full_runs.__file__).parent
TINY = recipes.digits().replace(
    data="toy", val=32, width=0.07, weight_epochs=1, arch_epochs=2, fine_tune_epochs=1,
    baseline="none",
)  # fmt: skip
EPOCH_S = {"vgg16": 2.0, "resnet56": 8.0, "mobilenetv2": 8.0}


# Acts of jobs, for processes of their own: what a job does is written into its name.


def act(job: Job, place: Place, every: dict[str, Job], progress: object) -> None:
    """Leave a record that says when the job was done, unless its name says otherwise."""
    if job.name == "fails":
        raise FloatingPointError("got loss nan in epoch 1")
    if job.name == "killed":
        os.kill(os.getpid(), 9)
    if "large" in job.name:
        busy = place.runs / "busy"
        try:
            busy.mkdir(parents=True)
        except FileExistsError:
            raise MemoryError("beside another") from None
        time.sleep(0.3)
        busy.rmdir()
    if job.name == "greedy":
        raise RuntimeError("CUDA error: out of memory")
    if job.name == "long":
        for _ in progress(range(1000), ""):
            time.sleep(0.05)
    finish(job, place)


def finish(job: Job, place: Place) -> None:
    """A record of a job, and its first stage."""
    record, folder = place.records / f"{job.key}.jsonl", place.runs / job.key
    for each in (record.parent, folder):
        each.mkdir(parents=True, exist_ok=True)
    (folder / "weight_stage.pt").touch()
    made = {"versions": {"torch": "2"}, "device": {"name": "a card"}}
    log = runlog.RunLog(record)
    log.append("run", config=job.config.settings(), **made)
    log.append("result", macs=[100, 50])


def of(*names: str, **more: object) -> list[Job]:
    return [Job("some", name, TINY, **more) for name in names]


def packed(
    tmp_path: Path, jobs: list[Job], at_a_time: int = 2, until: float = math.inf, **more
) -> tuple[Outcome, list]:
    told: list[dict] = []
    every = {job.key: job for job in jobs}
    place, means = Place(tmp_path / "runs", tmp_path / "records"), Means(at_a_time, until=until)
    return pack(jobs, every, place, means, tell=told.append, act=act, **more), told


def test_what_a_job_needs_is_done_before_it_also_if_nobody_asked(tmp_path):
    jobs = of("a") + of("b") + of("c", parent="some/a-seed0", like="some/b-seed0")
    every, told = {job.key: job for job in jobs}, []
    place = Place(tmp_path / "runs", tmp_path / "records")
    came_to = pack(jobs[2:], every, place, Means(1), tell=told.append, act=act)
    assert sorted(came_to.done) == ["some/a-seed0", "some/b-seed0", "some/c-seed0"]
    assert came_to.done[-1] == "some/c-seed0"
    assert not came_to.left


def test_the_best_of_those_whose_parents_are_there_comes_first(tmp_path):
    jobs = of("a", "b") + of("c", parent="some/a-seed0") + of("d", like="some/c-seed0")
    worth = {"a": 1.0, "b": 2.0, "c": 5.0, "d": 9.0}
    came_to, told = packed(tmp_path, jobs, 1, worth=lambda job: worth[job.name])
    assert [row["job"][5] for row in told] == ["b", "a", "c", "d"]
    assert not came_to.left
    assert packed(tmp_path, jobs)[1] == [], "records are there: nothing is done again"


def test_a_parent_whose_folder_is_gone_trains_its_stages_again(tmp_path):
    parent, child = of("a") + of("c", parent="some/a-seed0")
    place = Place(tmp_path / "runs", tmp_path / "records")
    finish(parent, place)
    before = place.record(parent).read_bytes()
    for path in sorted(place.runs.rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    _, told = packed(tmp_path, [parent, child], 1)
    assert [row["job"] for row in told] == ["some/a-seed0", "some/c-seed0"]
    assert place.record(parent).read_bytes() != before, "the act of this test writes always"


def test_a_run_that_fails_stops_no_other_but_those_that_need_it(tmp_path):
    jobs = of("fails", "b") + of("c", parent="some/fails-seed0")
    jobs += of("e", like="some/c-seed0", parent="some/fails-seed0")
    came_to, told = packed(tmp_path, jobs)
    assert came_to.done == ["some/b-seed0"]
    assert came_to.failed == {
        "some/fails-seed0": "got loss nan in epoch 1",
        "some/c-seed0": "not started: some/fails-seed0 failed",
        "some/e-seed0": "not started: some/c-seed0 failed",
    }
    assert {row["job"] for row in told if row["kind"] == "failed"} == {*came_to.failed}


def test_runs_that_find_no_memory_side_by_side_run_one_by_one(tmp_path):
    came_to, told = packed(tmp_path, of("large1", "large2", "large3"), 3)
    assert len(came_to.done) == 3
    assert [row for row in told if row["kind"] == "fewer"], "it is said"
    assert all(row["why"] == "out of memory" for row in told if row["kind"] == "fewer")


def test_a_run_that_finds_no_memory_alone_has_failed(tmp_path):
    came_to, _ = packed(tmp_path, of("greedy", "b"), 1)
    assert came_to.failed == {"some/greedy-seed0": "out of memory"}
    assert came_to.done == ["some/b-seed0"]


@pytest.mark.skipif(sys.platform == "win32", reason="no such signal")
def test_a_process_that_is_killed_is_a_run_that_failed(tmp_path):
    came_to, _ = packed(tmp_path, of("killed", "b"), 1)
    assert came_to.failed == {"some/killed-seed0": "its process ended with code -9"}
    assert came_to.done == ["some/b-seed0"]


def test_in_time_what_runs_is_asked_to_save_and_what_waits_is_left(tmp_path):
    began = time.monotonic()
    came_to, _ = packed(tmp_path, of("long", "b"), 1, until=began + 4)
    assert time.monotonic() < began + 15
    assert came_to.left == ["some/b-seed0", "some/long-seed0"]


# What is wanted.


def test_every_published_row_is_wanted_with_three_seeds_and_parents_come_first():
    jobs = full_runs.wanted()
    keys = [job.key for job in jobs]
    assert len({*keys}) == len(keys)
    for at, job in enumerate(jobs):
        assert {need for need in (job.parent, job.like) if need} <= {*keys[:at]}
    paper = {1e-5, 5e-5, 1e-4, 2e-4, 3e-4, 4e-4, 5e-4}
    for net in ("vgg16", "resnet56", "mobilenetv2"):
        rows = [j.config for j in jobs if j.folder == f"{net}_fast" and j.name != "shared"]
        found = {(config.method.gate_price, config.seed) for config in rows}
        assert found == {(price, seed) for price in paper for seed in (0, 1, 2)}
        whole = {job.config.weight_epochs for job in jobs if job.folder == f"{net}_paper"}
        assert whole == {100}
    ratios = {1 / j.config.budget.macs for j in jobs if j.folder == "resnet56_best" and j.parent}
    assert sorted(round(ratio, 2) for ratio in ratios) == [2.13, 2.57, 4.1]
    controls = {job.name for job in jobs if job.folder == "vgg16_controls"}
    assert {"random", "uniform", "l1-norm", "scratch", "scratch-compute"} <= controls


def test_value_per_second_orders_them_and_what_ends_in_time_comes_first(tmp_path):
    jobs = full_runs.wanted()
    place = Place(tmp_path / "runs", tmp_path / "records")
    now = time.monotonic()
    worth = full_runs.worth_of(jobs, place, EPOCH_S, now + 1e6)
    firsts = sorted((job for job in jobs if not job.parent and not job.like), key=worth)
    assert firsts[-1].key == "vgg16_fast/shared-seed0"
    table = {job.key: job for job in jobs}
    knee, far = (table[f"vgg16_fast/price{p}-seed0"] for p in ("0.0001", "0.0005"))
    assert worth(knee) > worth(far) > 0
    short = full_runs.worth_of(jobs, place, EPOCH_S, now + 100)
    assert short(knee) > 0 > short(table["resnet56_paper/price0.0001-seed0"])
    assert full_runs.seconds_of(knee, EPOCH_S) == full_runs.START_S + 24 * 2.0
    shared = table["vgg16_fast/shared-seed0"]
    assert full_runs.seconds_of(shared, EPOCH_S) == full_runs.START_S + 40 * 2.0


# Records.


def test_a_record_of_other_settings_or_of_two_torches_is_none(tmp_path):
    (job,) = of("a")
    place = Place(tmp_path / "runs", tmp_path / "card1", (tmp_path / "card2",))
    assert place.record(job) is None
    other = dataclasses.replace(place, records=tmp_path / "card2")
    finish(job, other)
    assert place.record(job) == tmp_path / "card2" / "some" / "a-seed0.jsonl"
    assert place.record(dataclasses.replace(job, config=TINY.replace(gate_price=0.5))) is None
    moved = dataclasses.replace(job, config=TINY.replace(data_dir="elsewhere"))
    assert place.record(moved), "where the images are makes no other run"
    path = tmp_path / "card2" / "some" / "a-seed0.jsonl"
    begun, result = runlog.read(path)
    for versions, name in (({"torch": "1"}, "a card"), ({"torch": "2"}, "another card")):
        path.unlink()
        taken = {"kind": "taken_over", "versions": versions, "device": {"name": name}}
        for row in (begun, taken, result):
            runlog.RunLog(path).append(**row)
        assert place.record(job) is None
    path.write_text('{"kind": "benchmark"}\n')
    assert place.record(job) is None, "a record of another kind"
    path.unlink()
    for row in (begun, result):
        runlog.RunLog(path).append(**row)
    assert place.record(job)
    path.write_text(path.read_text()[:-20])
    with pytest.warns(UserWarning, match="is cut short"):
        assert place.record(job) is None


def test_stages_of_another_torch_are_not_taken_over(tmp_path):
    parent = Job("some", "shared", TINY, kind="weights")
    child = Job("some", "price", TINY.replace(gate_price=0.1), parent.key)
    every, place = {j.key: j for j in (parent, child)}, Place(tmp_path / "runs", tmp_path / "r")
    carried_out(parent, place, every)
    path = place.runs / parent.key / "record.jsonl"
    rows = runlog.read(path)
    path.unlink()
    for row in rows:
        if row["kind"] == "run":
            row["versions"]["torch"] = "1.0"
        runlog.RunLog(path).append(**row)
    with pytest.raises(ValueError, match=r"made by torch 1\.0 on"):
        carried_out(child, place, every)
    assert not (place.runs / child.key).exists()


def test_cards_and_torches_are_told_apart():
    assert folder_of("NVIDIA H200", "2.11.0+cu130") == Path("nvidia-h200-torch2.11.0")
    assert folder_of("NVIDIA H200", "2.13.0") != folder_of("NVIDIA H100 80GB", "2.13.0")


# The script.

PAIR = """
import sys
sys.path.insert(0, sys.argv.pop(1))
import full_runs
from jobs import Job
from dnal_mini import recipes
tiny = recipes.digits().replace(weight_epochs=3, arch_epochs=3, fine_tune_epochs=3)
shared = Job("vgg16_fast", "shared", tiny, kind="weights", value=0.0)
priced = Job("vgg16_fast", "price", tiny.replace(gate_price=0.01), shared.key, value=5.0)
if __name__ == "__main__":
    full_runs.wanted = lambda: [shared, priced]
    sys.exit(full_runs.main())
"""


def started(tmp_path: Path, out: Path, *words: str) -> subprocess.Popen:
    script = tmp_path / "pair.py"
    script.write_text(PAIR)
    command = [sys.executable, str(script), str(FOLDER), "--data", "toy", "--width", "0.07"]
    command += ["--minutes", "1", "--jobs", "2", "--out", str(out), *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def weights(out: Path) -> bytes:
    (path,) = out.glob("runs/*/vgg16_fast/price-seed0/small.safetensors")
    return path.read_bytes()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="stopped in another way there")
def test_killed_and_stopped_it_goes_on_to_the_same_weights_and_then_only_reads(tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    said, wrong = started(tmp_path, whole).communicate(timeout=120)
    rows = [json.loads(line) for line in said.splitlines()]
    assert [row["kind"] for row in rows] == ["left_out", "call", "done", "done", "end"]
    assert not wrong
    for way, kind in (("kill", "weight_stage"), ("terminate", "arch_stage")):
        process = started(tmp_path, broken)
        assert begun(broken, kind), "it has got so far"
        getattr(process, way)()
        said, wrong = process.communicate(timeout=60)
        assert process.returncode in (-9, 130)
        assert not wrong
        unlocked(broken)
    assert json.loads(said.splitlines()[-1])["text"] == "all is saved; the same command goes on"
    said, _ = started(tmp_path, broken).communicate(timeout=120)
    assert weights(broken) == weights(whole)


def test_on_a_fresh_machine_it_goes_on_from_records_alone(tmp_path, monkeypatch, capsys):
    """Also what another torch or card has made is done; a record of other settings is not."""
    jobs = of("a", "b", "c")
    monkeypatch.setattr(full_runs, "wanted", lambda: jobs)
    out = tmp_path / "out"
    for job, card in zip(jobs, ("card1", "card2", "card2"), strict=True):
        finish(job, Place(tmp_path, out / "records" / card))
    assert full_runs.main(["--data", "toy", "--minutes", "0.5", "--out", str(out)]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["kind"] for row in rows] == ["left_out", "call", "end"]
    assert (rows[1]["wanted"], rows[1]["done"]) == (3, 3)
    assert rows[2]["why"] == "all is done"
    assert not (out / "runs").exists()


def begun(out: Path, stage: str) -> bool:
    """Wait until a run has ended an epoch of a stage."""
    for _ in range(600):
        for path in out.glob("runs/*/vgg16_fast/*/record.jsonl"):
            text = path.read_text()
            if f'"stage": "{stage}"' in text and '"taken_over": true' not in text.splitlines()[-1]:
                return True
        time.sleep(0.1)
    return False


def unlocked(out: Path) -> None:
    """Wait until the process whose parent was killed has noticed it."""
    from filelock import FileLock

    for path in out.glob("runs/*/vgg16_fast/*/lock"):
        with FileLock(path, timeout=30):
            pass


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--minutes 0", "got --minutes 0 --jobs 0; need minutes above 0"),
        ("--minutes nan", "got --minutes nan"),
        ("--jobs -1", "got --minutes inf --jobs -1"),
        ("--device nonsense", "got device 'nonsense'"),
        ("--data-dir {tmp}/nowhere", "nowhere"),
        ("--data-dir {tmp}/images", "9 classes"),
        ("--width 0", "got width 0"),
        ("--train-images -3", "got train_images -3"),
        ("vgg19_fast", "got vgg19_fast, with which no run begins"),
    ],
)
def test_what_cannot_be_started_is_told_in_one_line(tmp_path, capsys, words: str, says: str):
    from PIL import Image

    for part in ("train", "test"):
        for name in "abcdefghi":
            (tmp_path / "images" / part / name).mkdir(parents=True)
            Image.new("RGB", (32, 32)).save(tmp_path / "images" / part / name / "1.png")
    data = [] if "--data-dir" in words else ["--data", "toy"]
    words = words.format(tmp=tmp_path)
    assert full_runs.main([*words.split(), *data, "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr()
    assert says in said.err
    assert said.err.count("\n") == 1
    assert not list((tmp_path / "out").rglob("runs/*"))


@pytest.mark.parametrize("place", ["load_data", "self_check", "pack"])
def test_a_signal_at_any_moment_ends_in_one_line(tmp_path, capsys, monkeypatch, place: str):
    def comes(*_: object, **__: object) -> None:
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(full_runs, place, comes)
    if place == "pack":
        monkeypatch.setattr(full_runs, "self_check", lambda *_: {})
    assert full_runs.main(["--data", "toy", "--out", str(tmp_path)]) == 130
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["why"] == "a signal"


def test_a_full_disk_stops_no_run_and_is_told(tmp_path, capsys, monkeypatch):
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    log = full_runs.Log(tmp_path / "log.jsonl")
    monkeypatch.setattr(runlog.RunLog, "append", full)
    log.write("done", job="a")
    row = json.loads(capsys.readouterr().out)
    assert row == {"kind": "done", "job": "a", "not_written": "No space left on device"}


# The self-check.


def test_the_self_check_finds_pruned_nets_exact_and_says_how_fast_it_trains(monkeypatch):
    monkeypatch.setattr(self_check, "MODELS", {"vgg16": self_check.MODELS["vgg16"]})
    found = self_check.exact("cpu")["vgg16"]
    assert found.pop("float64") < 1e-9
    assert max(found.values()) < 0.05
    rates = self_check.epochs("cpu", 0.07)["vgg16"]
    assert rates["weight_s"] > 0
    assert rates["arch_s"] > 0


def test_a_stopped_run_ends_with_the_same_bytes():
    assert self_check.resumed("cpu") == {"stopped": 1, "same_bytes": True}


def test_a_part_that_fails_says_why_and_one_without_time_is_left_out():
    end = time.monotonic() + 60
    told = self_check.asked(end, self_check.epochs, "nonsense", 0.1)["failed"]
    assert "nonsense" in told
    assert "\n" not in told
    assert self_check.asked(time.monotonic(), self_check.exact, "cpu") == {}
    found = self_check.check("cpu", 0.0)
    assert found["left_out"] == ["exact", "epochs", "together", "resumed", "compiled"]
    assert found["device"]["type"] == "cpu"


@pytest.mark.slow
def test_the_whole_self_check_runs():
    found = self_check.check("cpu", 300.0, 0.07)
    assert not found["left_out"]
    assert not [part for part in found.values() if isinstance(part, dict) and "failed" in part]
    assert found["together"]["best"] in (1, 2)
    assert found["resumed"]["same_bytes"]


def test_the_experiments_are_run_by_the_same_queue(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(experiments, "plan", lambda: {j.key: j for j in of("a", "b")})
    monkeypatch.setattr(experiments, "RESULTS", tmp_path / "results")
    for name in ("a", "b"):
        finish(*of(name), Place(tmp_path / "runs", tmp_path / "results"))
    assert experiments.main(["--runs", str(tmp_path / "runs")]) == 0
    assert not capsys.readouterr().out, "all is done"
