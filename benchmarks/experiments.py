"""The runs behind the chapters on behaviour: gates across delta, order, joint, settings, controls.

    python benchmarks/experiments.py --data-dir FOLDER --runs DIR [--jobs 2] [NAME_BEGINS ...]

Every run is on CIFAR-10 with three seeds (the microscope: one) and one thread, and leaves a record
in ``results/``; a call again goes on where the last one stopped. ``plan`` lists them all: read it
first. ``--list`` prints them. Hours on a core; prints one JSON line per finished run.
"""

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from jobs import Job, Place
from packed import Means, pack

from dnal_mini import recipes
from dnal_mini.config import Budget, SearchConfig
from dnal_mini.runs import runlog
from dnal_mini.runs.runlog import Row

RESULTS = Path(__file__).parents[1] / "results"
SEEDS = (0, 1, 2)
PRICES = (3e-4, 1e-3, 3e-3)


def plan(seeds: tuple[int, ...] = SEEDS) -> dict[str, Job]:
    """Every run, by key, in the order in which they are started."""
    jobs: list[Job] = []
    for seed in seeds:
        base = recipes.vgg16_mini().replace(seed=seed)
        jobs += _network("vgg16", base) + _settings(base)
        jobs += controls(base, f"base/vgg16-seed{seed}")
        jobs += _network("mobilenetv2", recipes.mobilenetv2_mini().replace(seed=seed))
    jobs.sort(key=lambda job: FIRST.index(job.folder))
    return {job.key: job for job in jobs}


FIRST = ("base", "microscope", "joint", "order", "controls", "ablations")


def _network(net: str, base: SearchConfig) -> list[Job]:
    """The base run of a network, its gates across delta, the orders, and joint optimisation."""
    key = f"base/{net}-seed{base.seed}"
    jobs = [Job("base", net, base.replace(baseline="all-epochs" if net == "vgg16" else "none"))]
    if base.seed == SEEDS[0]:
        jobs += [
            Job("microscope", f"{net}-price{price:g}", base.replace(gate_price=price), key)
            for price in PRICES
        ]
        jobs[1:] = [replace(job, kind="look") for job in jobs[1:]]
    for order in ("conv-bn-relu-ss", "conv-ss-bn-relu"):
        jobs.append(Job("order", f"{net}-{order}", base.replace(order=order)))
    for head in (True, False):  # gates stay at 1/2: what of stage 2 has nothing to do with gates?
        still = base.replace(arch_lr=1e-12, gate_price=0.0, freeze_classifier=head)
        name = f"{net}-half-gates{'' if head else '-head-trained'}"
        jobs.append(Job("order", name, still, key, kind="gates"))
    joint = base.replace(optimisation="joint")
    jobs.append(Job("joint", net, joint))
    matched = joint.replace(target_by="shift")
    jobs.append(Job("joint", f"{net}-matched", matched, jobs[-1].key, like=key))
    as_long = base.replace(fine_tune_epochs=base.method.arch_epochs + base.fine_tune_epochs)
    jobs.append(Job("joint", f"{net}-sequential-longer", as_long, key))  # weights: as many epochs
    return jobs


def _settings(base: SearchConfig) -> list[Job]:
    """One setting changed at a time; and the authors' scripts, who change five."""
    scripts: dict[str, Any] = {
        "objective": "code",
        "delta_form": "code",
        "threshold": 0.9,
        "freeze_classifier": False,
        "reset_momentum": True,
    }
    changes: dict[str, dict[str, Any]] = {
        "price3e-4": {"gate_price": 3e-4},
        "price3e-3": {"gate_price": 3e-3},
        "code-price": {"objective": "code"},
        "scripts": scripts,
        "constant-delta": {"delta_form": "constant"},
        "running-norms": {"bn_mode": "running"},
        "linear-delta": {"delta_form": "linear"},
        "code-delta": {"delta_form": "code"},
        "constant-delta30": {"delta_form": "constant", "delta_max": 30.0},
        "reset-momentum": {"reset_momentum": True},
        "arch-decay": {"arch_weight_decay": base.weight_decay},
        "head-trained": {"freeze_classifier": False},
        "threshold0.9": {"threshold": 0.9},
    }
    key = f"base/vgg16-seed{base.seed}"
    jobs = [
        # momentum is emptied in every stage, so that these do not share the first one
        Job("ablations", name, base.replace(**new), "" if "reset_momentum" in new else key)
        for name, new in changes.items()
    ]
    code = base.replace(objective="code", gate_price=3e-3)
    return [*jobs, Job("ablations", "code-price-matched", code, key, like=key)]


def controls(base: SearchConfig, key: str, parent: str = "", folder: str = "controls") -> list[Job]:
    """Other ways to a network of the MACs of run ``key``: rules, and training from scratch.

    ``parent``: the job that has their first stage, if it is not that run.
    """
    parent, jobs = parent or key, []
    whole = base.weight_epochs + base.method.arch_epochs + base.fine_tune_epochs
    longer = base.method.arch_epochs + base.fine_tune_epochs
    for rule in ("random", "uniform", "l1-norm"):
        ruled = base.replace(method=rule, budget=Budget(macs=0.5))
        jobs.append(Job(folder, rule, ruled, parent, like=key))
        longer_too = ruled.replace(fine_tune_epochs=longer)
        jobs.append(Job(folder, f"{rule}-longer", longer_too, parent, like=key))
    scratch = base.replace(tuned_from="scratch", fine_tune_epochs=whole)
    narrow = scratch.replace(method="uniform", budget=Budget(macs=0.5))
    same = base.replace(tuned_from="scratch")
    return [
        *jobs,
        Job(folder, "scratch", scratch, parent),
        Job(folder, "uniform-scratch", narrow, parent, like=key),
        Job(folder, "scratch-compute", same, parent, like=key, compute_of_like=True),
    ]


def told(row: Row, place: Place, every: dict[str, Job]) -> Row:
    """A row of the queue, with what a finished run came to."""
    path = place.record(every[row["job"]]) if row["kind"] == "done" else None
    if path is None or (last := runlog.read(path)[-1])["kind"] != "result":
        return row
    return row | {"macs": last["macs"][1] / last["macs"][0], "tuned": last["fine_tuned_accuracy"]}


def main(arguments: list[str] | None = None) -> int:
    """Exit code: 0, or 1 if a run failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("begins", nargs="*", help="run only jobs whose key begins so")
    parser.add_argument("--data-dir", default="", help="folder with train/<class>/, test/<class>/")
    parser.add_argument("--runs", type=Path, default=Path("runs/experiments"))
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after so many")
    parser.add_argument("--list", action="store_true", help="print the runs and do nothing")
    options = parser.parse_args(arguments)
    here = {"data_dir": options.data_dir}
    every = {key: replace(job, config=job.config.replace(**here)) for key, job in plan().items()}
    begins = tuple(options.begins) or ("",)
    jobs = [job for job in every.values() if job.key.startswith(begins)]
    if options.list:
        for job in jobs:
            print(json.dumps({"job": job.key, "kind": job.kind, "config": job.config.settings()}))
        return 0
    place = Place(options.runs.absolute(), RESULTS)
    try:
        came_to = pack(
            jobs, every, place,
            Means(options.jobs, until=time.monotonic() + 60 * options.minutes),
            tell=lambda row: print(json.dumps(told(row, place, every)), flush=True),
        )  # fmt: skip
    except KeyboardInterrupt:
        print(json.dumps({"kind": "stopped", "text": "the same command goes on"}), flush=True)
        return 130
    return int(bool(came_to.failed))


if __name__ == "__main__":
    sys.exit(main())
