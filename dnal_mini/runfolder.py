"""The folder of a run: its config, its record and the last checkpoint of each stage.

What makes a run resumable stands here, and nothing of the method. Read ``RunFolder`` first.
"""

import dataclasses
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dnal_mini import runlog
from dnal_mini.config import SearchConfig
from dnal_mini.data import ImageSet

Row = dict[str, Any]
STAGES = ("weight_stage", "baseline", "arch_stage", "fine_tune")
PATHS = ("data_dir", "weights_from")  # say where, not what: left out of records and comparisons
AFTER_STAGE_1 = {
    "name", "arch_epochs", "fine_tune_epochs", "fine_tune_lr", "baseline", "arch_lr", "gate_price",
    "objective", "delta_form", "delta_max", "threshold", "freeze_classifier", "bn_mode", "floor",
    "residual",
}  # fmt: skip
BASELINE = {"arch_epochs", "fine_tune_epochs", "fine_tune_lr", "baseline"}


class RunFolder:
    """The files of one run: config, record, and the last checkpoint of each stage.

    Raises: ValueError if the folder holds another run, is not empty, or cannot be written.
    """

    def __init__(
        self,
        out: str | Path,
        config: SearchConfig,
        data: ImageSet,
        on_row: Callable[[Row], None] | None = None,
    ) -> None:
        self.path, self.config, self.on_row = Path(out), config, on_row
        self.record = runlog.RunLog(self.path / runlog.FILE_NAME)
        settings = dataclasses.asdict(config)
        if (self.path / "config.json").exists():
            self._check_same(settings)
        else:
            self._create(settings, data)

    def _check_same(self, settings: Row) -> None:
        """Refuse to go on with another config."""
        theirs = json.loads((self.path / "config.json").read_text())
        names = sorted(n for n in {*theirs, *settings} if theirs.get(n) != settings.get(n))
        names = [name for name in names if name not in PATHS]
        if names:
            n = names[0]
            raise ValueError(
                f"got {self.path}, which holds a run with {n}={theirs.get(n)!r}, "
                f"not {settings.get(n)!r}; need the same settings, or another folder (--out)"
            )
        if not self.result:
            self.write("resume", **runlog.describe_run(self.config.device))

    def _create(self, settings: Row, data: ImageSet) -> None:
        """Make the folder, take over stage 1 if asked to, and begin the record."""
        source = Path(self.config.weights_from)
        taken = self._stages_of(source, settings) if self.config.weights_from else []
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if any(self.path.iterdir()):
                raise ValueError(f"got {self.path}, which is not empty; need a new folder (--out)")
            self._replace("config.json", json.dumps(settings, indent=1).encode())
        except OSError as error:
            raise ValueError(
                f"got {self.path}, which cannot be written ({error.strerror}); need another --out"
            ) from error
        public = {n: Path(v).name if n in PATHS and v else v for n, v in settings.items()}
        images = {"name": data.name, "train": len(data.train), "val": len(data.val)}
        about = runlog.describe_run(self.config.device)
        self.write("run", format=runlog.FORMAT, config=public, data=images, **about)
        if taken:
            (origin, *_) = runlog.read(source / runlog.FILE_NAME)
            made = {key: origin[key] for key in ("commit", "versions", "device", "created")}
            self.write("taken_over", stages=taken, source=source.name, **made)
        for stage in taken:
            self._replace(f"{stage}.pt", (source / f"{stage}.pt").read_bytes())
            for row in runlog.epochs(source / runlog.FILE_NAME):
                if row["stage"] == stage:
                    self.write(**row, taken_over=True)

    def _stages_of(self, source: Path, settings: Row) -> list[str]:
        """Finished stages of another run that this run would repeat exactly."""
        try:
            theirs = json.loads((source / "config.json").read_text())
            done = {s: _load(source / f"{s}.pt")["epoch"] for s in STAGES[:2]}
        except (OSError, ValueError) as error:
            raise ValueError(f"got weights_from {source} ({error}); need a run's folder") from error
        differ = {n for n in settings if settings[n] != theirs.get(n)} - {*PATHS}
        if differ - AFTER_STAGE_1 or done["weight_stage"] != self.config.weight_epochs:
            why = ", ".join(sorted(differ - AFTER_STAGE_1)) or "it is not finished"
            raise ValueError(f"got weights_from {source} with another stage 1: {why}; train anew")
        whole = done["baseline"] == self.config.epochs("baseline") and not differ & BASELINE
        return ["weight_stage", "baseline"] if whole else ["weight_stage"]

    def write(self, kind: str, **fields: Any) -> Row:
        """Append a row to the record and show it to ``on_row``."""
        row = self.record.append(kind, **fields)
        if self.on_row:
            self.on_row(row)
        return row

    def log(self, rows: Iterable[Row]) -> None:
        """Write every row of a stage, as it comes."""
        for row in rows:
            self.write(**row)

    def has(self, kind: str) -> bool:
        """True if the record holds a row of a kind."""
        return any(row["kind"] == kind for row in self._rows())

    @property
    def result(self) -> Row | None:
        """The result row, None if the run is not finished."""
        return next((row for row in self._rows() if row["kind"] == "result"), None)

    def _rows(self) -> list[Row]:
        return runlog.read(self.record.path) if self.record.path.exists() else []

    def seconds(self) -> dict[str, float]:
        """Seconds per stage, added up over its epochs."""
        totals = dict.fromkeys(STAGES, 0.0)
        for row in runlog.epochs(self.record.path):
            totals[row["stage"]] += row["seconds"]
        return totals

    def checkpoint(
        self, stage: str, epoch: int, net: nn.Module, optimizer: torch.optim.Optimizer
    ) -> None:
        """Write the state of a stage; the old one is there until the new one is whole."""
        last = epoch == self.config.epochs(stage)
        state = {"stage": stage, "epoch": epoch, "net": net.state_dict()}
        state["optimizer"] = None if last else optimizer.state_dict()
        part = self.path / f"{stage}.pt.part"
        torch.save(state, part)
        part.replace(self.path / f"{stage}.pt")

    def restore(self, stage: str, net: nn.Module, optimizer: torch.optim.Optimizer) -> int:
        """Load the last checkpoint of a stage, if there is one; returns its epoch, else 0."""
        path = self.path / f"{stage}.pt"
        if not path.exists():
            return 0
        state = _load(path, next(net.parameters()).device)
        try:
            net.load_state_dict(state["net"])
        except RuntimeError as error:
            raise ValueError(
                f"got {path} of another network; need this run's; remove it"
            ) from error
        if state["optimizer"]:
            optimizer.load_state_dict(state["optimizer"])
        return int(state["epoch"])

    def _replace(self, name: str, content: bytes) -> None:
        part = self.path / f"{name}.part"
        part.write_bytes(content)
        part.replace(self.path / name)


def _load(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """A checkpoint; tensors and plain values only, no pickled code."""
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # torch raises several kinds for a damaged file
        raise ValueError(
            f"got {path}, which cannot be read; remove it to train the stage anew"
        ) from error
