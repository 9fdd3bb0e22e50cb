"""One run of many, known by its key: what it starts from, what it is like, where its record goes.

Read ``Job`` and ``carried_out``. Which runs there are say ``experiments.py`` and ``full_runs.py``;
``packed.py`` runs them side by side.
"""

import contextlib
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from dnal_mini.config import PATHS, Budget, SearchConfig
from dnal_mini.data.imageset import Split
from dnal_mini.gating import add_gates, gates, set_gates
from dnal_mini.measure import microscope
from dnal_mini.refused import Refused
from dnal_mini.runs import runlog
from dnal_mini.runs.origin import describe_run
from dnal_mini.runs.runfolder import RunFolder
from dnal_mini.runs.runlog import Row
from dnal_mini.search.driver import run
from dnal_mini.search.inputs import build, load_data, placed
from dnal_mini.search.stages import arch_stage
from dnal_mini.training.stage import Progress, Session

LOOKED_AT = 2048  # training images that the microscope measures the pulls on


@dataclass(frozen=True)
class Job:
    """One run: its folder and its record are called ``<folder>/<name>-seed<seed>``.

    ``parent``: the job whose finished stages it takes over. ``like``: the job whose share of MACs
    becomes its target; ``compute_of_like`` sets its epochs so that both cost the same. ``kind``:
    weights ends after stage 1 and its twin, gates before the cut; look measures stage 2 on its
    way. ``value``: what its record is worth among others.
    """

    folder: str
    name: str
    config: SearchConfig
    parent: str = ""
    like: str = ""
    compute_of_like: bool = False
    kind: Literal["run", "weights", "gates", "look"] = "run"
    value: float = 1.0

    @property
    def key(self) -> str:
        return f"{self.folder}/{self.name}-seed{self.config.seed}"


@dataclass(frozen=True)
class Place:
    """Where the folders of runs are and where records go; ``others``: records from before."""

    runs: Path
    records: Path
    others: tuple[Path, ...] = ()

    def record(self, job: Job) -> Path | None:
        """The record of a job that has been done, on whatever machine; None if it has not.

        One with other settings is none, nor one whose stage 1 another torch has trained.
        """
        for folder in (self.records, *self.others):
            path = folder / f"{job.key}.jsonl"
            if path.is_file() and is_of(path, job):
                return path
        return None


def is_of(path: Path, job: Job) -> bool:
    """True for a whole record of this job, all of it by one torch on one kind of device."""
    with contextlib.suppress(ValueError, KeyError, TypeError):  # damaged, or of another kind
        rows = runlog.read(path)
        (begun, *_) = [row for row in rows if row["kind"] == "run"] or [{}]
        (taken, *_) = [row for row in rows if row["kind"] == "taken_over"] or [begun]
        if job.kind == "run" and not any(row["kind"] == "result" for row in rows):
            return False
        told, wanted = SearchConfig.of(begun["config"]).settings(), job.config.settings()
        free = {*PATHS, "device"}
        if job.like:  # known only once the run that it is like is known
            free.add("fine_tune_epochs" if job.compute_of_like else "budget")
        same = all(told[name] == wanted[name] for name in wanted.keys() - free)
        return same and _made_by(begun) == _made_by(taken)
    return False


def _made_by(row: Row) -> tuple[str, str]:
    """The torch and the card of a row that says what a run was made with."""
    return row["versions"]["torch"], row["device"]["name"]


def settled(job: Job, place: Place, every: dict[str, Job]) -> SearchConfig:
    """The config of a job, with the folder that it takes stages over from, and its target.

    Raises: ValueError if the run that it is like has not been done.
    """
    config = job.config
    if job.parent:
        config = config.replace(weights_from=str(place.runs / job.parent))
    if not job.like:
        return config
    path = place.record(every[job.like])
    if path is None:
        raise Refused(
            f"got {job.key} before {job.like}, whose MACs are its target; need its record"
        )
    result = runlog.read(path)[-1]
    share = result["macs"][1] / result["macs"][0]
    if not job.compute_of_like:
        return config.replace(budget=Budget(macs=share))
    # forward and backward are 3 passes, without weight gradients 2
    passes = 3 * config.weight_epochs + 2 * config.method.arch_epochs
    epochs = round(passes / 3 / share + config.fine_tune_epochs)
    return config.replace(fine_tune_epochs=epochs)


def carried_out(
    job: Job,
    place: Place,
    every: dict[str, Job],
    on_row: Callable[[Row], None] | None = None,
    progress: Progress | None = None,
) -> Row:
    """Run a job, put its record in its place unless one is there, and return its last row.

    Raises: what ``dnal_mini.run`` raises; ValueError if what it would take over was trained by
    another torch or on another card.
    """
    config, out = settled(job, place, every), place.runs / job.key
    if config.weights_from and not (out / "config.json").exists():
        _check_parent(Path(config.weights_from), config.device)
    if job.kind == "look":
        last = _look_through(config, out, on_row)
    else:
        until = {"gates": "gates", "weights": "weights"}.get(job.kind)
        last = run(config, out, progress, on_row, until)
    if place.record(job) is None:
        record = place.records / f"{job.key}.jsonl"
        record.parent.mkdir(parents=True, exist_ok=True)
        part = record.with_suffix(".part")
        shutil.copyfile(out / runlog.FILE_NAME, part)
        part.replace(record)
    return last


def _check_parent(source: Path, device: str) -> None:
    """Raises: ValueError for stages of another torch or another card, which make no fair row."""
    (begun, *_) = runlog.read(source / runlog.FILE_NAME)
    theirs, ours = _made_by(begun), _made_by(describe_run(device))
    if theirs != ours:
        raise Refused(
            f"got stage 1 in {source}, made by torch {theirs[0]} on {theirs[1]}; need {ours[0]} on "
            f"{ours[1]}; do take another --out, or remove that folder"
        )


def _look_through(
    config: SearchConfig, out: Path, on_row: Callable[[Row], None] | None = None
) -> Row:
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

    with RunFolder(out, config, data, on_row) as folder:
        folder.restore("weight_stage", net, torch.optim.SGD(net.parameters()))
        folder.forget("arch_stage")  # taken over where only the looking is new: do it again
        set_gates(net, mode="soft", delta=1.0)
        folder.write("look", **seen(0))
        for row in arch_stage(net, data, config, Session(folder, checkpoint_s=config.checkpoint_s)):
            folder.log([row])
            if row["kind"] == "epoch":
                folder.write("look", **seen(row["epoch"]))
        return folder.last
