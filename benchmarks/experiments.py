"""The runs behind the chapters on behaviour: gates across delta, order, joint, settings, controls.

    python benchmarks/experiments.py --data-dir FOLDER --runs DIR [--jobs 2] [NAME_BEGINS ...]

Every run is on CIFAR-10 with three seeds (the microscope: one) and one thread, and leaves a record
in ``results/``; a call again goes on where the last one stopped. ``plan`` lists them all: read it
first. ``--list`` prints them. Hours on a core; prints one JSON line per finished run.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from dnal_mini import recipes
from dnal_mini.config import Budget, SearchConfig
from dnal_mini.data.imageset import Split
from dnal_mini.gating import add_gates, gates, set_gates
from dnal_mini.measure import microscope
from dnal_mini.runs import runlog
from dnal_mini.runs.runfolder import RunFolder
from dnal_mini.search.driver import run
from dnal_mini.search.inputs import build, load_data, placed
from dnal_mini.search.stages import arch_stage
from dnal_mini.training.stage import Session

RESULTS = Path(__file__).parents[1] / "results"
SEEDS = (0, 1, 2)
PRICES = (3e-4, 1e-3, 3e-3)
LOOKED_AT = 2048  # training images that the microscope measures the pulls on


@dataclass(frozen=True)
class Job:
    """One run: its record is ``results/<folder>/<name>-seed<seed>.jsonl``.

    ``parent``: the job whose finished stages it takes over. ``like``: the job whose share of MACs
    becomes its target; ``compute_of_like`` sets its epochs so that both cost the same.
    """

    folder: str
    name: str
    config: SearchConfig
    parent: str = ""
    like: str = ""
    compute_of_like: bool = False
    kind: Literal["run", "gates", "look"] = "run"

    @property
    def key(self) -> str:
        return f"{self.folder}/{self.name}-seed{self.config.seed}"

    @property
    def record(self) -> Path:
        return RESULTS / f"{self.key}.jsonl"


def plan(seeds: tuple[int, ...] = SEEDS) -> dict[str, Job]:
    """Every run, by key, in the order in which they are started."""
    jobs: list[Job] = []
    for seed in seeds:
        base = recipes.vgg16_mini().replace(seed=seed)
        jobs += _network("vgg16", base) + _settings(base) + _controls(base)
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


def _controls(base: SearchConfig) -> list[Job]:
    """Other ways to a network of the same MACs: rules, and training from scratch."""
    key, jobs = f"base/vgg16-seed{base.seed}", []
    whole = base.weight_epochs + base.method.arch_epochs + base.fine_tune_epochs
    longer = base.method.arch_epochs + base.fine_tune_epochs
    for rule in ("random", "uniform", "l1-norm"):
        ruled = base.replace(method=rule, budget=Budget(macs=0.5))
        jobs.append(Job("controls", rule, ruled, key, like=key))
        longer_too = ruled.replace(fine_tune_epochs=longer)
        jobs.append(Job("controls", f"{rule}-longer", longer_too, key, like=key))
    scratch = base.replace(tuned_from="scratch", fine_tune_epochs=whole)
    narrow = scratch.replace(method="uniform", budget=Budget(macs=0.5))
    same = base.replace(tuned_from="scratch")
    return [
        *jobs,
        Job("controls", "scratch", scratch, key),
        Job("controls", "uniform-scratch", narrow, key, like=key),
        Job("controls", "scratch-compute", same, key, like=key, compute_of_like=True),
    ]


def settled(job: Job) -> SearchConfig:
    """The config of a job once the run that it is like is known."""
    if not job.like:
        return job.config
    result = runlog.read(RESULTS / f"{job.like}.jsonl")[-1]
    share = result["macs"][1] / result["macs"][0]
    if not job.compute_of_like:
        return job.config.replace(budget=Budget(macs=share))
    like = job.config  # forward and backward are 3 passes, without weight gradients 2
    passes = 3 * like.weight_epochs + 2 * like.method.arch_epochs
    epochs = round(passes / 3 / share + like.fine_tune_epochs)
    return job.config.replace(fine_tune_epochs=epochs)


def run_job(job: Job, runs: Path, data_dir: str) -> None:
    """Run a job in ``runs`` and put its record in its place."""
    parent = str(runs / job.parent) if job.parent else ""
    config = settled(job).replace(data_dir=data_dir, weights_from=parent)
    out = runs / job.key
    if job.kind == "look":
        _look_through(config, out)
    else:
        run(config, out, until="gates" if job.kind == "gates" else None)
    job.record.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(out / runlog.FILE_NAME, job.record)


def _look_through(config: SearchConfig, out: Path) -> None:
    """An architecture stage that is measured before its first epoch and after each."""
    shutil.rmtree(out, ignore_errors=True)
    data = load_data(config)
    net = add_gates(placed(build(config, data), config, data), config.order)
    feed = config.method_stages()[0].feed
    some = Split(data.train.images[:LOOKED_AT], data.train.labels[:LOOKED_AT])

    def seen(epoch: int) -> dict[str, Any]:
        found = microscope.look(net, some, data, feed, batch=config.batch)
        layers = microscope.summary(found, config.method.gate_price)
        for name, gate in found.items():
            layers[name]["s"] = [float(f"{value:.4g}") for value in gate["s"]]
            if epoch == 0:
                layers[name]["pulls"] = [float(f"{value:.3g}") for value in gate["pull"]]
        return {"epoch": epoch, "delta": float(next(iter(gates(net).values())).delta)} | {
            "images": LOOKED_AT,
            "layers": layers,
        }

    with RunFolder(out, config, data) as folder:
        folder.restore("weight_stage", net, torch.optim.SGD(net.parameters()))
        folder.forget("arch_stage")  # taken over where only the looking is new: do it again
        set_gates(net, mode="soft", delta=1.0)
        folder.write("look", **seen(0))
        for row in arch_stage(net, data, config, Session(folder, checkpoint_s=config.checkpoint_s)):
            folder.log([row])
            if row["kind"] == "epoch":
                folder.write("look", **seen(row["epoch"]))


def run_all(jobs: list[Job], every: dict[str, Job], words: list[str], at_a_time: int) -> int:
    """Start jobs in processes of their own, parents first; returns how many failed."""
    todo = [job for job in jobs if not job.record.exists()]
    failed: set[str] = set()
    running: dict[Future[tuple[int, str, float]], Job] = {}
    with ThreadPoolExecutor(at_a_time) as pool:
        while todo or running:
            for job in list(todo):
                needs = [every[key] for key in (job.parent, job.like) if key]
                if any(need.key in failed for need in needs):
                    failed.add(job.key)
                    todo.remove(job)
                elif len(running) < at_a_time and all(need.record.exists() for need in needs):
                    todo.remove(job)
                    running[pool.submit(_in_process, job, words)] = job
            if todo and not running:
                print(json.dumps({"needs_other_runs_first": [job.key for job in todo]}))
                return len(todo) + len(failed)
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                _report(future, running.pop(future), failed)
    return len(failed)


def _in_process(job: Job, words: list[str]) -> tuple[int, str, float]:
    start = time.perf_counter()
    command = [sys.executable, __file__, "--one", job.key, *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.returncode, done.stderr[-2000:], time.perf_counter() - start


def _report(future: "Future[tuple[int, str, float]]", job: Job, failed: set[str]) -> None:
    code, text, seconds = future.result()
    row: dict[str, Any] = {"job": job.key, "seconds": round(seconds, 1)}
    if code:
        failed.add(job.key)
        row |= {"failed": code, "text": text}
    elif (last := runlog.read(job.record)[-1])["kind"] == "result":
        row |= {"macs": last["macs"][1] / last["macs"][0], "tuned": last["fine_tuned_accuracy"]}
    print(json.dumps(row), flush=True)


def main(arguments: list[str] | None = None) -> int:
    """Exit code: 0, or 1 if a run failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("begins", nargs="*", help="run only jobs whose key begins so")
    parser.add_argument("--data-dir", default="", help="folder with train/<class>/, test/<class>/")
    parser.add_argument("--runs", type=Path, default=Path("runs/experiments"))
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--list", action="store_true", help="print the runs and do nothing")
    options = parser.parse_args(arguments)
    every = plan()
    if options.one:
        torch.set_num_threads(1)
        run_job(every[options.one], options.runs, options.data_dir)
        return 0
    begins = tuple(options.begins) or ("",)
    jobs = [job for job in every.values() if job.key.startswith(begins)]
    if options.list:
        for job in jobs:
            print(json.dumps({"job": job.key, "kind": job.kind, "config": job.config.settings()}))
        return 0
    words = ["--data-dir", options.data_dir, "--runs", str(options.runs)]
    return int(run_all(jobs, every, words, options.jobs) > 0)


if __name__ == "__main__":
    sys.exit(main())
