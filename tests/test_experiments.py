"""The plan of the experiments: whole, settled before it is run, and each kind of run works."""

import dataclasses
import json
from collections import Counter
from pathlib import Path

import pytest
from test_benchmarks import load

from dnal_mini.config import Budget, SearchConfig
from dnal_mini.runs import runlog

experiments = load("experiments")
TINY = {
    "data": "toy", "val": 32, "train_images": 0, "width": 0.07, "weight_epochs": 1,
    "arch_epochs": 2, "fine_tune_epochs": 1, "batch": 32, "arch_lr": 5.0,
    "precision": "float32", "channels_last": False,
}  # fmt: skip


def small(job):
    return dataclasses.replace(job, config=job.config.replace(**TINY))


def test_parents_come_first_and_share_what_is_taken_over():
    seen: set[str] = set()
    for key, job in experiments.plan().items():
        needs = {need for need in (job.parent, job.like) if need}
        assert needs <= seen, key
        for need in needs:
            assert experiments.plan()[need].config.seed == job.config.seed
        seen.add(key)


def test_every_comparison_has_three_seeds():
    names = Counter((job.folder, job.name) for job in experiments.plan().values())
    fewer = {name for (_, name), count in names.items() if count != 3}
    assert all("price" in name for name in fewer), "only the microscope looks at one seed"
    assert len(names) > 30


def test_one_setting_differs_from_the_base_at_a_time():
    jobs = experiments.plan()
    base = jobs["base/vgg16-seed0"].config.settings() | {"baseline": "none"}
    for job in jobs.values():
        if job.folder == "ablations" and job.name not in ("scripts", "code-price-matched"):
            new = job.config.settings()
            differ = {name for name in new if new[name] != base[name]} - {"seed"}
            assert len(differ - {"delta_max"}) == 1, job.key


def test_equal_compute_counts_three_passes_for_weights_and_two_for_gates(tmp_path, monkeypatch):
    monkeypatch.setattr(experiments, "RESULTS", tmp_path)
    job = experiments.plan()["controls/scratch-compute-seed0"]
    (tmp_path / "base").mkdir()
    row = {"kind": "result", "macs": [1000, 250]}
    (tmp_path / f"{job.like}.jsonl").write_text(json.dumps(row) + "\n")
    config = experiments.settled(job)
    spent = 3 * 6 * 1000 + 2 * 8 * 1000 + 3 * 6 * 250  # weights, gates, fine-tuning
    assert config.fine_tune_epochs == round(spent / (3 * 250))
    like = experiments.settled(experiments.plan()["controls/random-seed0"])
    assert like.budget == Budget(macs=0.25)


@pytest.mark.parametrize("key", ["microscope/vgg16-price0.001", "order/vgg16-half-gates"])
def test_stage_two_is_looked_at_with_the_weights_of_the_base(tmp_path, monkeypatch, key):
    monkeypatch.setattr(experiments, "RESULTS", tmp_path / "results")
    jobs = experiments.plan()
    base, job = small(jobs["base/vgg16-seed0"]), small(jobs[f"{key}-seed0"])
    if "half" in key:
        job = dataclasses.replace(job, config=job.config.replace(arch_lr=1e-12))
    for one in (base, job):
        experiments.run_job(one, tmp_path / "runs", "")
    rows, whole = runlog.read(job.record), runlog.read(base.record)
    arch = [row for row in runlog.epochs(rows) if row["stage"] == "arch_stage"]
    assert len(arch) == 2
    if job.kind == "look":
        same = [row for row in runlog.epochs(whole) if row["stage"] == "arch_stage"]
        assert [row["loss"] for row in arch] == [row["loss"] for row in same], "looking is free"
        looks = [row for row in rows if row["kind"] == "look"]
        assert [row["epoch"] for row in looks] == [0, 1, 2]
        first = next(iter(looks[0]["layers"].values()))
        assert set(first["s"]) == {0.0}
        assert len(first["pulls"]) == len(first["s"])
    else:
        assert all(row["undecided"] == 1 for row in arch), "no gate has moved"


def test_a_failed_run_is_told_and_does_not_stop_the_others(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(experiments, "RESULTS", tmp_path)
    jobs = [
        experiments.Job("base", "one", SearchConfig().replace(name="digits")),
        experiments.Job(
            "order", "two", SearchConfig().replace(name="digits"), parent="base/one-seed0"
        ),
    ]

    def fails(job, words):
        return 1, "no data", 0.1

    monkeypatch.setattr(experiments, "_in_process", fails)
    assert experiments.run_all(jobs, {job.key: job for job in jobs}, [], 2) == 2
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert told == [{"job": "base/one-seed0", "seconds": 0.1, "failed": 1, "text": "no data"}]
    assert not list(Path(tmp_path).iterdir())
