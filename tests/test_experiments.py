"""The plan of the experiments: whole, settled before it is run, and each kind of run works."""

import dataclasses
import json
from collections import Counter

import experiments
import jobs
import pytest

from dnal_mini.config import Budget
from dnal_mini.refused import Refused
from dnal_mini.runs import runlog

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
    every = experiments.plan()
    base = every["base/vgg16-seed0"].config.settings() | {"baseline": "none"}
    for job in every.values():
        if job.folder == "ablations" and job.name not in ("scripts", "code-price-matched"):
            new = job.config.settings()
            differ = {name for name in new if new[name] != base[name]} - {"seed"}
            assert len(differ - {"delta_max"}) == 1, job.key


def test_equal_compute_counts_three_passes_for_weights_and_two_for_gates(tmp_path):
    every, place = experiments.plan(), jobs.Place(tmp_path, tmp_path)
    job = every["controls/scratch-compute-seed0"]
    (tmp_path / "base").mkdir()
    made = {"versions": {"torch": "2"}, "device": {"name": "a card"}}
    begun = {"kind": "run", "config": every[job.like].config.settings(), **made}
    lines = [json.dumps(row) for row in (begun, {"kind": "result", "macs": [1000, 250]})]
    (tmp_path / f"{job.like}.jsonl").write_text("\n".join(lines) + "\n")
    config = jobs.settled(job, place, every)
    spent = 3 * 6 * 1000 + 2 * 8 * 1000 + 3 * 6 * 250  # weights, gates, fine-tuning
    assert config.fine_tune_epochs == round(spent / (3 * 250))
    like = jobs.settled(every["controls/random-seed0"], place, every)
    assert like.budget == Budget(macs=0.25)
    assert like.weights_from == str(tmp_path / job.like)
    with pytest.raises(Refused, match="before base/vgg16-seed1, whose MACs are its target"):
        jobs.settled(every["controls/random-seed1"], place, every)


@pytest.mark.parametrize("key", ["microscope/vgg16-price0.001", "order/vgg16-half-gates"])
def test_stage_two_is_looked_at_with_the_weights_of_the_base(tmp_path, key):
    place = jobs.Place(tmp_path / "runs", tmp_path / "results")
    every = experiments.plan()
    base, job = small(every["base/vgg16-seed0"]), small(every[f"{key}-seed0"])
    if "half" in key:
        job = dataclasses.replace(job, config=job.config.replace(arch_lr=1e-12))
    for one in (base, job):
        jobs.carried_out(one, place, every)
    rows, whole = (runlog.read(place.record(one)) for one in (job, base))
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
