"""Checkpoints of stages: whole or absent, whenever the process is killed.

A file is written beside its place, forced to the disk and renamed; the one before is kept. Behind
what ``torch.save`` wrote stands a checksum of it, which ``torch.load`` does not look at. Read
``Checkpoints``.
"""

import contextlib
import hashlib
import io
import json
import os
import shutil
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dnal_mini.gating import gates
from dnal_mini.refused import Refused
from dnal_mini.runs.runlog import Row, plain
from dnal_mini.training.position import Position
from dnal_mini.training.stage import Stage

SUM = b"\nsha256 of the bytes before this line: "  # then 32 bytes; older versions end without


class Checkpoints:
    """The last two checkpoints of each stage in a folder; ``writes=False``: only read."""

    def __init__(self, path: Path, writes: bool = True) -> None:
        self.path, self.writes = path, writes
        self._saved_at = time.monotonic()

    def checkpoint(
        self,
        stage: Stage,
        epoch: int,
        net: nn.Module,
        optimizer: torch.optim.Optimizer,
        rows: list[Row] | None = None,
        place: Position | None = None,
    ) -> None:
        """Write the state of a stage after ``epoch`` whole epochs, and ``place`` inside the next.

        ``rows``: what the record says of the last epoch; should the record lack them after a
        crash, they are written from here. The checkpoint before this one is kept.
        """
        if not self.writes:
            return
        state = {
            "stage": stage.name,
            "epoch": epoch,
            "step": place.step if place else 0,
            "delta": next((float(gate.delta) for gate in gates(net).values()), None),
            "price": stage.price,
            "lr": optimizer.param_groups[0]["lr"],
            "schedule": stage.schedule,
            "net": net.state_dict(),
            "optimizer": None if epoch == stage.epochs else optimizer.state_dict(),
            "place": vars(place) if place else None,
            "rows": json.dumps(plain(rows or [])),
        }
        buffer = io.BytesIO()
        torch.save(state, buffer)
        buffer.write(SUM + hashlib.sha256(buffer.getbuffer()).digest())
        path = self.path / f"{stage.name}.pt"
        try:
            write_whole(path, buffer.getbuffer(), keep=self.path / f"{stage.name}.before.pt")
        except OSError as error:
            raise Refused(
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
            raise Refused(
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
                return load_state(path, device)
            except ValueError as error:
                if path == paths[-1]:
                    raise
                told = str(error).partition(";")[0]
                warnings.warn(f"{told}; went on from the one before", stacklevel=2)
        return None


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
    if os.name == "posix":  # Windows opens no folder, and needs not: it keeps a journal of names
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def load_state(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """A checkpoint; tensors and plain values only, no pickled code.

    Raises: ValueError for a file that is cut, or is not what was written.
    """
    try:
        content = memoryview(path.read_bytes())
        state, told = content[:-32], content[-32:]
        if state[-len(SUM) :] == SUM and hashlib.sha256(state[: -len(SUM)]).digest() != told:
            raise Refused("got another checksum")
        found = torch.load(io.BytesIO(content), map_location=device, weights_only=True)
    except Exception as error:  # torch raises several kinds for a damaged file
        raise Refused(
            f"got {path}, which cannot be read; remove it to train the stage anew"
        ) from error
    if "net" in found:
        found["net"] = _renamed(found["net"])
    return found


def _renamed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a gated net that an older version named: NAME.norm.weight, NAME_gate.s."""
    gated = {name.removesuffix(".gate.s") for name in state if name.endswith(".gate.s")}
    new = {}
    for name, tensor in state.items():
        owner, _, last = name.rpartition(".")
        if owner.endswith(".norm") and owner.removesuffix(".norm") in gated:
            owner = owner.removesuffix(".norm")
        elif owner.endswith("_gate") and last in ("s", "delta"):
            owner = f"{owner.removesuffix('_gate')}.gate"
        new[f"{owner}.{last}".lstrip(".")] = tensor
    return new
