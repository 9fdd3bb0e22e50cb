"""What a stage of training is: settings that are made once and never changed on the way.

``Stage`` says how long, how fast and what for; ``Work`` what a method does inside it beside
cross-entropy; ``Feed`` how images reach the network. ``loop.fit`` carries them out.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from dnal_mini.training.devices import Precision, pick_dtype
from dnal_mini.training.schedules import SCHEDULES, ScheduleName

if TYPE_CHECKING:
    from lightning_fabric import Fabric

Row = dict[str, Any]
Progress = Callable[[Iterable, str], Iterable]


@dataclass(frozen=True)
class Feed:
    """How images reach the network: ``batch`` of them a step, cropped, mirrored, in a precision."""

    batch: int = 128
    crop: int = 4
    flip: bool = True
    precision: Precision = "float32"
    channels_last: bool = False
    compiled: bool = False

    def dtype(self, device: torch.device) -> torch.dtype:
        """What convolutions compute in on a device."""
        return pick_dtype(self.precision, device)


@dataclass(frozen=True)
class Stage:
    """One stage of a run: its rows, checkpoints and resumption go by its ``name``.

    ``lr`` is the highest learning rate, ``schedule`` how it goes. ``price`` (nats) multiplies the
    penalty of the ``Work``. ``after``: the stage whose network it starts from, "" for none.
    ``settings``: names of the run's settings that matter here and in no stage before, so that
    another run with the same ones (and the same stages before) may take this one over.
    ``seed``: of order, crops, flips and dropout, each epoch its own.
    """

    name: str
    epochs: int
    lr: float
    schedule: ScheduleName = "constant"
    trains: Literal["weights", "gates", "both"] = "weights"
    price: float = 0.0
    after: str = ""
    settings: frozenset[str] = frozenset()
    seed: str = "0"
    feed: Feed = Feed()
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 0.0
    label_smoothing: float = 0.0
    bn_mode: Literal["batch", "running"] = "batch"
    reset_momentum: bool = False

    def rate(self, done: float) -> float:
        """Learning rate when a share ``done`` of the stage, in [0, 1), is behind."""
        return SCHEDULES[self.schedule](self.lr)(done)


@dataclass(frozen=True)
class Work:
    """What a stage does beside cross-entropy; none of it changes the stage.

    ``groups``: parameter groups for SGD, all that is trained; all else is frozen. A group may
    multiply the learning rate by its "lr_scale". ``penalty()`` is a scalar with gradient, in units
    of ``Stage.price``. ``before_epoch(epoch)`` and ``after_step(rate)`` may change the network,
    ``measure()`` adds to an epoch's row, ``remark(row)`` gives further rows. ``runs``: what is run
    in place of the network, on the network's own numbers.
    """

    groups: tuple[Mapping[str, Any], ...] = ()
    penalty: Callable[[], Tensor] | None = None
    before_epoch: Callable[[int], None] | None = None
    after_step: Callable[[float], None] | None = None
    measure: Callable[[], Row] | None = None
    remark: Callable[[Row], Iterable[Row]] | None = None
    runs: nn.Module | None = None

    def optimizer(self, stage: Stage) -> torch.optim.Optimizer:
        """SGD over the groups with the stage's momentum and weight decay, each unless its own."""
        return torch.optim.SGD(
            [dict(group) for group in self.groups],
            lr=0.0,
            momentum=stage.momentum,
            weight_decay=stage.weight_decay,
            nesterov=stage.nesterov,
            foreach=True,
        )

    def trained(self) -> list[nn.Parameter]:
        """All parameters of all groups."""
        return [parameter for group in self.groups for parameter in group["params"]]


@dataclass(frozen=True)
class Session:
    """What surrounds a run: where it is kept, how it is shown, whether to stop, its devices.

    ``folder``: a ``runs.runfolder.RunFolder``; ``progress(steps, text)`` wraps the steps of each
    epoch; ``stopping()`` is asked at every step; ``devices``: from ``start_processes``.
    """

    folder: Any = None
    progress: Progress | None = None
    stopping: Callable[[], bool] | None = None
    devices: "Fabric | None" = None
    checkpoint_s: float = field(default=math.inf)
