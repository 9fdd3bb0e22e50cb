"""The folder of a run: its config, its record and the last checkpoints of each stage.

What makes a run resumable stands here, and nothing of the method. Read ``RunFolder`` first. Every
file is whole or absent, whenever the process is killed: it is written beside its place, forced to
the disk, and renamed; the checkpoint before the last one is kept.
"""

import contextlib
import dataclasses
import io
import json
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dnal_mini.config import MEANS, PATHS, SearchConfig
from dnal_mini.data.imageset import ImageSet
from dnal_mini.gating import gates
from dnal_mini.runs import runlog
from dnal_mini.runs.origin import describe_run
from dnal_mini.training.position import Position

Row = dict[str, Any]


STAGES = ("weight_stage", "baseline", "arch_stage", "fine_tune")


AFTER_STAGE_1 = {
    "name", "arch_epochs", "fine_tune_epochs", "fine_tune_lr", "fine_tune_schedule", "baseline",
    "arch_lr", "gate_price", "price_per", "target_macs", "objective", "delta_form", "delta_max",
    "threshold", "freeze_classifier", "bn_mode", "floor", "residual", "arch_weight_decay",
    "target_by", "gates_from", "tuned_from",
}  # fmt: skip


AFTER_STAGE_2 = {
    "name", "fine_tune_epochs", "fine_tune_lr", "fine_tune_schedule", "baseline", "residual",
    "tuned_from",
}  # fmt: skip


BASELINE = {"arch_epochs", "fine_tune_epochs", "fine_tune_lr", "fine_tune_schedule", "baseline"}


class RunFolder:
    """The files of one run: config, record, and the last checkpoints of each stage.

    A context: while it is open, the folder is locked and no other process can write to it.
    ``writes=False`` makes one that only reads, for the further processes of a run.
    Raises: ValueError if the folder holds another run, is not empty, is being written by another
    process, or cannot be written.
    """

    def __init__(
        self,
        out: str | Path,
        config: SearchConfig,
        data: ImageSet,
        on_row: Callable[[Row], None] | None = None,
        writes: bool = True,
    ) -> None:
        self.path, self.config, self.on_row, self.writes = Path(out), config, on_row, writes
        self.record = runlog.RunLog(self.path / runlog.FILE_NAME)
        self._lock: int | None = None
        self._saved_at = time.monotonic()
        if not writes:
            return
        if not (self.path / "config.json").exists():
            self._create(_described(config, data))
        if finished(self.path, config) is None:
            self._lock = _locked(self.path)
            try:
                self._begin(_described(config, data))
            except BaseException:
                self.close()
                raise

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Unlock the folder."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _create(self, about: Row) -> None:
        """Make the folder as a whole, with stage 1 of another run if asked for."""
        config = self.config
        settings = dataclasses.asdict(config)
        source = Path(config.weights_from)
        taken = _stages_of(source, config) if config.weights_from else []
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self.path.exists() and any(self.path.iterdir()):
                raise ValueError(f"got {self.path}, which is not empty; need a new folder (--out)")
            part = Path(tempfile.mkdtemp(prefix=f".{self.path.name}.", dir=self.path.parent))
            try:
                record = runlog.RunLog(part / runlog.FILE_NAME)
                record.append("run", **about)
                if taken:
                    _take_over(source, part, record, taken)
                write_whole(part / "config.json", json.dumps(settings, indent=1).encode())
                part.chmod(0o777 & ~_umask())
                part.rename(self.path)  # onto nothing or an empty folder: else OSError
            finally:
                shutil.rmtree(part, ignore_errors=True)
        except OSError as error:
            raise ValueError(
                f"got {self.path}, which cannot be written ({error.strerror}); need another --out"
            ) from error
        self._is_new = True

    _is_new = False

    def _begin(self, about: Row) -> None:
        """Note that the run goes on; a record that lost its first line gets it back."""
        rows = self._rows()
        if self._is_new:
            for row in rows:
                self._show(row)
        elif not rows:
            self.write("run", **about)
        else:
            self.write("resume", **describe_run(self.config.device))

    def write(self, kind: str, **fields: Any) -> Row:
        """Append a row to the record and show it to ``on_row``."""
        if not self.writes:
            return {"kind": kind} | fields
        row = self.record.append(kind, **fields)
        self._show(row)
        return row

    def _show(self, row: Row) -> None:
        if self.on_row:
            self.on_row(row)

    def log(self, rows: Iterable[Row]) -> None:
        """Write every row of a stage as it comes, unless the record has it from an earlier time."""
        for row in rows:
            if self.writes and _key(row) not in map(_key, self._rows()):
                self.write(**row)

    def has(self, kind: str) -> bool:
        """True if the record holds a row of a kind."""
        return any(row["kind"] == kind for row in self._rows())

    @property
    def last(self) -> Row:
        """The last row of the record."""
        return self._rows()[-1]

    def rows(self, kind: str) -> list[Row]:
        """All rows of a kind."""
        return [row for row in self._rows() if row["kind"] == kind]

    def _rows(self) -> list[Row]:
        return runlog.read(self.record.path) if self.record.path.exists() else []

    def seconds(self) -> dict[str, float]:
        """Seconds per stage, added up over its epochs."""
        totals = dict.fromkeys(STAGES, 0.0)
        for row in runlog.epochs(self.record.path):
            totals[row["stage"]] = totals.get(row["stage"], 0.0) + row["seconds"]
        return totals

    # checkpoints

    def checkpoint(
        self,
        stage: str,
        epoch: int,
        net: nn.Module,
        optimizer: torch.optim.Optimizer,
        rows: list[Row] | None = None,
        place: Position | None = None,
        is_last: bool = False,
    ) -> None:
        """Write the state of a stage after ``epoch`` whole epochs, and ``place`` inside the next.

        ``rows``: what the record says of the last epoch; should the record lack them after a
        crash, they are written from here. The checkpoint before this one is kept.
        """
        if not self.writes:
            return
        state = {
            "stage": stage,
            "epoch": epoch,
            "step": place.step if place else 0,
            "delta": next((float(gate.delta) for gate in gates(net).values()), None),
            "gate_price": (rows or [{}])[0].get("gate_price", self.config.gate_price),
            "lr": optimizer.param_groups[0]["lr"],
            "schedule": {k: v for k, v in vars(self.config).items() if k.endswith("_schedule")},
            "net": net.state_dict(),
            "optimizer": None if is_last else optimizer.state_dict(),
            "place": vars(place) if place else None,
            "rows": json.dumps(runlog.plain(rows or [])),
        }
        buffer = io.BytesIO()
        torch.save(state, buffer)
        path = self.path / f"{stage}.pt"
        try:
            write_whole(path, buffer.getbuffer(), keep=self.path / f"{stage}.before.pt")
        except OSError as error:
            raise ValueError(
                f"got {error.strerror} for {path} ({buffer.tell()} bytes); need room for it; do "
                f"free some and resume: nothing is lost up to the checkpoint before"
            ) from error

        self._saved_at = time.monotonic()

    def checkpoint_age_s(self) -> float:
        """Seconds since the last checkpoint, or since the folder was opened."""
        return time.monotonic() - self._saved_at

    def restore(
        self, stage: str, net: nn.Module, optimizer: torch.optim.Optimizer
    ) -> tuple[int, Position | None, list[Row]]:
        """Load the last whole checkpoint of a stage.

        Returns its whole epochs (0 if there is none), the place inside the next one, and the rows
        of its last epoch.
        """
        state = self._last_state(stage, next(net.parameters()).device)
        if state is None:
            return 0, None, []
        try:
            net.load_state_dict(state["net"])
        except RuntimeError as error:
            raise ValueError(
                f"got {self.path / stage}.pt of another network; need this run's; remove it"
            ) from error
        if state["optimizer"]:
            optimizer.load_state_dict(state["optimizer"])
        place = Position(**state["place"]) if state.get("place") else None
        return int(state["epoch"]), place, json.loads(state.get("rows", "[]"))

    def forget(self, stage: str) -> None:
        """Remove the checkpoints of a stage that nobody will need again."""
        if self.writes:
            for name in (f"{stage}.pt", f"{stage}.before.pt"):
                (self.path / name).unlink(missing_ok=True)

    def _last_state(self, stage: str, device: torch.device) -> Row | None:
        """The newest checkpoint of a stage that can be read; a damaged one is told."""
        paths = [self.path / f"{stage}.pt", self.path / f"{stage}.before.pt"]
        paths = [path for path in paths if path.exists()]
        for path in paths:
            try:
                return _load(path, device)
            except ValueError as error:
                if path == paths[-1]:
                    raise
                told = str(error).partition(";")[0]
                warnings.warn(f"{told}; went on from the one before", stacklevel=2)
        return None


def finished(out: str | Path, config: SearchConfig) -> Row | None:
    """The result of the run in a folder; None if it has none, or there is no run.

    Raises: ValueError if the folder holds a run with other settings. A setting that is newer than
    the run counts as its default there.
    """
    path = Path(out)
    if not (path / "config.json").exists():
        return None
    differ = _differ(path, dataclasses.asdict(config))
    if differ:
        n, (theirs, ours) = min(differ.items())
        raise ValueError(
            f"got {path}, which holds a run with {n}={theirs!r}, "
            f"not {ours!r}; need the same settings, or another folder (--out)"
        )
    record = path / runlog.FILE_NAME
    rows = runlog.read(record) if record.exists() else []
    return next((row for row in rows if row["kind"] == "result"), None)


def write_whole(path: Path, content: bytes | memoryview, keep: Path | None = None) -> None:
    """Write a file so that it is whole or as before, whatever happens; ``keep``: its old self."""
    part = path.with_name(path.name + ".part")
    try:
        with part.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        with contextlib.suppress(OSError):
            part.unlink()
        raise
    if keep and path.exists():
        keep.unlink(missing_ok=True)
        try:
            os.link(path, keep)  # so that ``path`` itself is never absent
        except OSError:  # a file system without hard links
            shutil.copyfile(path, keep)
    part.replace(path)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _key(row: Row) -> tuple:
    """What makes a row the same as one that a resumed run yields again."""
    return row["kind"], row.get("stage"), row.get("epoch"), row.get("text"), row.get("price_asked")


def _described(config: SearchConfig, data: ImageSet) -> Row:
    """The first row of a record: settings without paths, images, versions, device."""
    settings = dataclasses.asdict(config)
    public = {n: Path(v).name if n in PATHS and v else v for n, v in settings.items()}
    images = {"name": data.name, "train": len(data.train), "val": len(data.val)}
    about = describe_run(config.device)
    return {"format": runlog.FORMAT, "config": public, "data": images, **about}


def _differ(folder: Path, settings: Row) -> dict[str, tuple[Any, Any]]:
    """Settings of the run in ``folder`` that differ, by name: (theirs, ours); no means."""
    theirs = {field.name: field.default for field in dataclasses.fields(SearchConfig)}
    theirs |= json.loads((folder / "config.json").read_text())
    names = {*theirs, *settings} - {*MEANS}
    pairs = {name: (theirs.get(name), settings.get(name)) for name in names}
    return {name: (a, b) for name, (a, b) in pairs.items() if a != b}


def _stages_of(source: Path, config: SearchConfig) -> list[str]:
    """Finished stages of another run that this run would repeat exactly."""
    joint = config.optimisation == "joint"
    names = ("joint_stage",) if joint else ("weight_stage", "baseline", "arch_stage")
    try:
        differ = set(_differ(source, dataclasses.asdict(config)))
        files = {stage: source / f"{stage}.pt" for stage in names}
        done = {stage: _load(p)["epoch"] if p.exists() else 0 for stage, p in files.items()}
    except (OSError, ValueError) as error:
        raise ValueError(f"got weights_from {source} ({error}); need a run's folder") from error
    whole = {stage for stage in names if done[stage] == config.epochs(stage)}
    free = AFTER_STAGE_2 | {"target_macs", "target_by"} if joint else AFTER_STAGE_1
    if differ - free or names[0] not in whole:
        why = ", ".join(sorted(differ - free)) or "it is not finished"
        raise ValueError(f"got weights_from {source} with another stage 1: {why}; train anew")
    whole -= {"baseline"} if differ & BASELINE else set()
    whole -= {"arch_stage"} if differ - AFTER_STAGE_2 else set()
    return [stage for stage in names if stage in whole]


def _take_over(source: Path, part: Path, record: runlog.RunLog, taken: list[str]) -> None:
    """Copy finished stages of another run, and what its record says of them."""
    (origin, *_) = runlog.read(source / runlog.FILE_NAME)
    made = {key: origin[key] for key in ("commit", "versions", "device", "created")}
    record.append("taken_over", stages=taken, source=source.name, **made)
    for stage in taken:
        write_whole(part / f"{stage}.pt", (source / f"{stage}.pt").read_bytes())
        for row in runlog.epochs(source / runlog.FILE_NAME):
            if row["stage"] == stage:
                record.append(**row | {"taken_over": True})


def _locked(folder: Path) -> int | None:
    """An open file that locks the folder for this process, until it ends, however it ends."""
    try:
        import fcntl
    except ImportError:  # no such locks on this system
        return None
    lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(lock)
        raise ValueError(
            f"got {folder}, which another process is writing; need one at a time; "
            "do wait for it, or choose another folder (--out)"
        ) from error
    except OSError:  # a file system without locks
        os.close(lock)
        return None
    return lock


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _load(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """A checkpoint; tensors and plain values only, no pickled code."""
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # torch raises several kinds for a damaged file
        raise ValueError(
            f"got {path}, which cannot be read; remove it to train the stage anew"
        ) from error
