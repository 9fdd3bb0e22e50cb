"""The full-size runs on CIFAR-10, the most telling first, in whatever minutes a machine is lent.

    python benchmarks/full_runs.py --data-dir FOLDER --device cuda --minutes 9 --out DIR

``wanted`` lists them: published rows of three networks with three seeds, controls at equal MACs,
the ratios that rivals report, the paper's own epochs, and the runs behind three of its figures. The
first minute or less goes to a self-check of the device (``self_check.py``), which says how many
runs fit side by side and how long an epoch takes; then the run of the highest value per second of
those that fit into the time comes first. Stage 1 is trained once for each seed.

In time, or on SIGTERM or Ctrl-C, all is saved. The same command goes on: from the runs in ``--out``
on the same machine, and from the records there and in ``results/full`` on any. What happened is in
``--out/full_runs.jsonl``, finished records in ``--out/records``, apart by card and torch.

Needs torch, numpy, pillow, safetensors and scikit-learn, and no installation: the checkout is
enough. A rehearsal: ``--train-images 2000 --epochs 1``. ``--list`` prints the runs.
"""

import argparse
import contextlib
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(1, str(Path(__file__).parents[1]))  # a checkout that is not installed

import torch
from experiments import controls
from jobs import Job, Place
from packed import Means, Outcome, Worth, pack
from self_check import EPOCH, check

from dnal_mini import recipes
from dnal_mini.config import Budget, SearchConfig
from dnal_mini.refused import Refused
from dnal_mini.runs import runlog
from dnal_mini.runs.origin import describe_run
from dnal_mini.runs.runlog import Row, RunLog
from dnal_mini.runs.signals import terminable
from dnal_mini.search.inputs import load_data, settled
from dnal_mini.training.devices import pick_device

RESULTS = Path(__file__).parents[1] / "results" / "full"
SEEDS = {0: 1.0, 1: 0.7, 2: 0.6}  # what the record of a further seed is worth
PRICES = (1e-4, 2e-4, 5e-5, 3e-4, 1e-5, 4e-4, 5e-4)  # the paper's, from the knee outwards
FADE = 0.93  # each further price is worth so much of the one before
RATIOS = {"resnet56": (2.57, 2.13, 4.1), "vgg16": (3.0,)}  # what DepGraph and PPSM report
CHECK_S, CHECK_SHARE = 45.0, 0.15  # the self-check takes no more, of all the time
SAVING_S = 15.0  # at the end: steps are ended, checkpoints written
START_S = 10.0  # of a run: images, capture, cut, test
EPOCH_S = {"vgg16": 2.0, "resnet56": 8.0, "mobilenetv2": 8.0}  # until the self-check knows better


def wanted() -> list[Job]:
    """Every run, parents first."""
    fast = {config.model: config for config in (recipe() for recipe in recipes.FAST)}
    paper = {config.model: config for config in (recipe() for recipe in recipes.PAPER)}
    jobs: list[Job] = []
    for value, (net, config) in zip((100, 60, 40), fast.items(), strict=True):
        jobs += _priced(f"{net}_fast", config, SEEDS, value)
    for seed, worth in SEEDS.items():
        like, shared = (f"vgg16_fast/{name}-seed{seed}" for name in ("price0.0001", "shared"))
        every = controls(fast["vgg16"].replace(seed=seed), like, shared, "vgg16_controls")
        jobs += [replace(job, value=40 * worth) for job in every]
    for net, ratios in RATIOS.items():
        jobs += _at_ratios(f"{net}_best", _best(paper[net]), ratios)
    for net, config in paper.items():
        jobs += _priced(f"{net}_paper", config, {0: 1.0}, 60)
    for net in ("vgg16", "mobilenetv2"):
        jobs += _figures(net, fast[net].replace(baseline="none"))
    return jobs


def _priced(folder: str, config: SearchConfig, seeds: dict[int, float], value: float) -> list[Job]:
    """A published series: each price with each seed, behind a stage 1 for each seed."""
    jobs = []
    for seed, worth in seeds.items():
        base = config.replace(seed=seed)
        shared = Job(folder, "shared", base, kind="weights", value=0.0)
        jobs.append(shared)
        for k, price in enumerate(PRICES):
            priced, gain = base.replace(gate_price=price), value * worth * FADE**k
            jobs.append(Job(folder, f"price{price:.4g}", priced, shared.key, value=gain))
    return jobs


def _best(paper: SearchConfig) -> SearchConfig:
    """Our best recipe: what makes ``_fast`` good, in three times its epochs."""
    fast = recipes.RECIPES[f"{paper.name}_fast"]().settings()
    names = ("weight_schedule", "fine_tune_schedule", "weight_lr", "fine_tune_lr", "nesterov",
             "label_smoothing", "weight_decay")  # fmt: skip
    epochs = {"weight_epochs": 60, "arch_epochs": 12, "fine_tune_epochs": 60}
    return paper.replace(**{name: fast[name] for name in names}, **epochs)


def _at_ratios(folder: str, config: SearchConfig, ratios: Sequence[float]) -> list[Job]:
    jobs = []
    for seed, worth in SEEDS.items():
        base = config.replace(seed=seed)
        shared = Job(folder, "shared", base, kind="weights", value=0.0)
        jobs.append(shared)
        for ratio in ratios:
            cut = base.replace(budget=Budget(macs=1 / ratio))
            jobs.append(Job(folder, f"ratio{ratio:g}", cut, shared.key, value=80 * worth))
    return jobs


def _figures(net: str, base: SearchConfig) -> list[Job]:
    """Gates across delta, the orders of the layer, and joint optimisation; seed 0."""
    folder, like = f"{net}_figures", f"{net}_fast/price0.0001-seed0"
    joint = Job(folder, "joint", base.replace(optimisation="joint", gate_price=1e-4), value=8.0)
    matched = joint.config.replace(target_by="shift")
    looks = [
        Job(folder, f"look{price:.4g}", base.replace(gate_price=price), f"{net}_fast/shared-seed0",
            kind="look", value=6.0)
        for price in (1e-4, 3e-4)
    ]  # fmt: skip
    orders = [
        Job(folder, order, base.replace(order=order, gate_price=1e-4), value=8.0)
        for order in ("conv-bn-relu-ss", "conv-ss-bn-relu")
    ]
    return [*looks, *orders, joint, Job(folder, "joint-matched", matched, joint.key, like, value=8)]


def seconds_of(job: Job, epoch_s: dict[str, float]) -> float:
    """What a job takes by itself: its epochs, at the speed of its net on this device."""
    stages = {stage.name: stage.epochs for stage in job.config.stages()}
    if job.kind == "look":
        stages.pop("fine_tune", 0)
    if job.kind == "weights":
        epochs = stages["weight_stage"] + stages.get("baseline", 0)
    else:
        epochs = sum(stages.values())
        if job.parent:
            epochs -= stages.get("baseline", 0) + stages.get("weight_stage", 0)
    images = job.config.train_images or EPOCH
    return START_S + max(1, epochs) * epoch_s[job.config.model] * images / EPOCH


def worth_of(jobs: Sequence[Job], place: Place, epoch_s: dict[str, float], end: float) -> Worth:
    """Value per second of a job, for ``packed.pack``; a parent counts with the best behind it.

    What would not end in time comes last.
    """
    behind: dict[str, list[Job]] = {}
    for job in jobs:
        behind.setdefault(job.parent, []).append(job)

    def worth(job: Job) -> float:
        own = seconds_of(job, epoch_s)
        ways = [(job.value, own)]
        for child in behind.get(job.key, []):
            if place.record(child) is None:
                ways.append((child.value, own + seconds_of(child, epoch_s)))
        left = end - time.monotonic()
        fit = [value / seconds for value, seconds in ways if seconds <= left]
        return max(fit, default=min(-s for _, s in ways))

    return worth


def folder_of(card: str, torch_version: str) -> Path:
    """Where the runs of a card and a torch go, apart from those of others."""
    name = "".join(letter if letter.isalnum() else "-" for letter in card.lower())
    return Path(f"{name}-torch{torch_version.partition('+')[0]}")


def self_check(log: "Log", options: argparse.Namespace, out: Path) -> Row:
    """The row of the device's self-check: once for each card and torch, if there is time for it."""
    path = out / "self_check.jsonl"
    if path.exists() and (rows := runlog.read(path)):
        return rows[-1]
    seconds = min(CHECK_S, CHECK_SHARE * 60 * options.minutes)
    if seconds < 10:
        log.write("left_out", what="self-check", why=f"{options.minutes:g} minutes are too few")
        return {}
    row = check(options.device, seconds, options.width)
    out.mkdir(parents=True, exist_ok=True)
    kind = row.pop("kind")
    return RunLog(path).append(kind, **row)


class Log:
    """What happened: rows in a file and on the screen; a full disk does not stop the runs."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = RunLog(path)

    def write(self, kind: str, **fields: Any) -> None:
        row = {"kind": kind} | fields
        try:
            row = self.file.append(kind, **fields)
        except OSError as error:
            row |= {"not_written": error.strerror}
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(row), flush=True)


def rehearsed(job: Job, options: argparse.Namespace) -> Job:
    """The job on the device and images of this call, smaller where that was asked for."""
    config = job.config.replace(data_dir=options.data_dir, device=options.device)
    if options.data != "cifar10":
        config = config.replace(data=options.data, data_dir="", val=32)
    if options.train_images:
        config = config.replace(train_images=options.train_images)
    if options.width != 1.0:
        config = config.replace(width=options.width)
    if options.epochs:
        stages = ("weight_epochs", "fine_tune_epochs")
        config = config.replace(**dict.fromkeys(stages, options.epochs))
        if "arch_epochs" in config.settings():
            config = config.replace(arch_epochs=options.epochs)
    return replace(job, config=config)


def go(options: argparse.Namespace) -> int:
    """Everything, within the minutes; the exit code. Raises: ValueError for images of no use."""
    if not options.minutes > 0 or options.jobs < 0:
        got = f"--minutes {options.minutes:g} --jobs {options.jobs}"
        raise Refused(f"got {got}; need minutes above 0, and jobs from 0 on")
    saved_s = min(SAVING_S, 0.1 * 60 * options.minutes)
    until = time.monotonic() + 60 * options.minutes - saved_s
    every = {job.key: job for job in (rehearsed(job, options) for job in wanted())}
    begins = tuple(options.only) or ("",)
    jobs = [job for job in every.values() if job.key.startswith(begins)]
    if options.list:
        for job in jobs:
            print(json.dumps({"job": job.key, "kind": job.kind, "value": round(job.value, 1)}))
        return 0
    if not jobs:
        raise Refused(f"got {' '.join(begins)}, with which no run begins; see --list")
    first = settled(jobs[0].config)
    log = Log(options.out / "full_runs.jsonl")
    load_data(first.replace(device="cpu"))  # decoded once, for all; what is wrong is told here
    pick_device(options.device)
    card = describe_run(options.device)["device"]["name"]
    apart = folder_of(card, torch.__version__)
    here = options.out.absolute() / "runs" / apart
    row = self_check(log, options, options.out / "records" / apart)
    epoch_s = EPOCH_S | {
        net: found["weight_s"]
        for net, found in row.get("epochs", {}).items()
        if isinstance(found, dict)
    }
    at_a_time = options.jobs or row.get("together", {}).get("best", 1)
    records = sorted({*RESULTS.glob("*"), *(options.out / "records").glob("*")})
    place = Place(here, options.out.absolute() / "records" / apart, tuple(records))
    done = sum(place.record(job) is not None for job in jobs)
    log.write("call", card=card, torch=torch.__version__, minutes=options.minutes, jobs=at_a_time,
              epoch_s=epoch_s, wanted=len(jobs), done=done)  # fmt: skip
    threads = max(1, torch.get_num_threads() // at_a_time)
    came_to = pack(
        jobs, every, place, Means(at_a_time, threads, until, saved_s),
        worth=worth_of(jobs, place, epoch_s, until),
        tell=lambda row: log.write(**told(row, every, place)),
    )  # fmt: skip
    why = "all is done"
    if came_to.left:
        late = time.monotonic() >= until
        why = "the time is up; the same command goes on" if late else "what they need has no record"
    return ended(log, came_to, why)


def ended(log: Log, came_to: Outcome, why: str) -> int:
    """Say how a call ended; 1 if runs failed."""
    counts = {name: len(getattr(came_to, name)) for name in ("done", "failed", "left")}
    log.write("end", why=why, **counts)
    return int(bool(came_to.failed))


def told(row: Row, every: dict[str, Job], place: Place) -> Row:
    """A row of the queue; of a finished run also MACs and accuracies."""
    path = place.record(every[row["job"]]) if row["kind"] == "done" else None
    if path is None or (last := runlog.read(path)[-1])["kind"] != "result":
        return row
    accuracy = {"dense": last["dense_accuracy"], "tuned": last["fine_tuned_accuracy"]}
    return row | {"macs_ratio": round(last["macs_ratio"], 3)} | accuracy


def main(arguments: list[str] | None = None) -> int:
    """Exit code: 0; 1 if a run failed; 2 for what cannot be started; 130 for a signal."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("only", nargs="*", help="run only jobs whose key begins so")
    parser.add_argument("--data-dir", default="", help="folder with train/<class>/, test/<class>/")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--minutes", type=float, default=math.inf, help="all of it, from now on")
    parser.add_argument("--jobs", type=int, default=0, help="side by side; 0: as the check finds")
    parser.add_argument("--out", type=Path, default=Path("runs/full"))
    parser.add_argument("--train-images", type=int, default=0, help="for a rehearsal")
    parser.add_argument("--epochs", type=int, default=0, help="of each stage, for a rehearsal")
    parser.add_argument("--width", type=float, default=1.0, help="of the nets, for a rehearsal")
    parser.add_argument("--data", default="cifar10", help="toy: drawn images, for a rehearsal")
    parser.add_argument("--list", action="store_true", help="print the runs and do nothing")
    options = parser.parse_args(arguments)
    try:
        with terminable():
            return go(options)
    except KeyboardInterrupt:
        Log(options.out / "full_runs.jsonl").write(
            "end", why="a signal", text="all is saved; the same command goes on"
        )
        return 130
    except (Refused, OSError) as error:
        print(f"full_runs: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
