"""Training and evaluation: one visible loop, used by every stage, on one device or many.

``fit`` is the loop. It yields one row per epoch and prints nothing; what is trained is decided
outside, by ``only_training`` and by the optimiser it is given. The data set lives on the device as
one uint8 tensor, and nothing inside an epoch waits for the device.
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from dnal_mini.data.augment import augment, normalise
from dnal_mini.data.imageset import ImageSet, Split
from dnal_mini.training.devices import (
    ASK_EVERY,
    agreed,
    mean_over_processes,
    share_of_batch,
    wrapped,
)
from dnal_mini.training.position import Position, generator_states, own_randomness
from dnal_mini.training.schedules import Schedule

if TYPE_CHECKING:
    from lightning_fabric import Fabric

Progress = Callable[[Iterable, str], Iterable]


@contextmanager
def only_training(net: nn.Module, parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Freeze every other parameter of ``net`` inside the block."""
    chosen = {id(parameter) for parameter in parameters}
    before = [(parameter, parameter.requires_grad) for parameter in net.parameters()]
    for parameter, _ in before:
        parameter.requires_grad_(id(parameter) in chosen)
    try:
        yield
    finally:
        for parameter, flag in before:
            parameter.requires_grad_(flag)


def as_input(images: Tensor, data: ImageSet, dtype: torch.dtype, channels_last: bool) -> Tensor:
    """uint8 images as the network takes them: normalised, in ``dtype``."""
    x = normalise(images, data.mean, data.std, dtype)
    return x.contiguous(memory_format=torch.channels_last) if channels_last else x


def fit(
    net: nn.Module,
    data: ImageSet,
    optimizer: torch.optim.Optimizer,
    epochs: int,
    lr: Schedule,
    *,
    first_epoch: int = 1,
    place: Position | None = None,
    batch: int = 128,
    seed: object = 0,
    augmented: Callable[[Tensor, torch.Generator], Tensor] | None = augment,
    reset_momentum: bool = False,
    bn_mode: Literal["batch", "running"] = "batch",
    label_smoothing: float = 0.0,
    before_epoch: Callable[[int], None] | None = None,
    price: Callable[[], Tensor] | None = None,
    dtype: torch.dtype = torch.float32,
    channels_last: bool = False,
    compiled: bool = False,
    fabric: "Fabric | None" = None,
    progress: Progress | None = None,
    keep: Callable[[Position], None] | None = None,
    keep_every_s: float = math.inf,
    stopping: Callable[[], bool] | None = None,
) -> Iterator[dict[str, Any]]:
    """Train for epochs ``first_epoch..epochs`` and yield a row of numbers after each.

    ``lr`` maps the share of the stage that is done to a learning rate, per step; a parameter group
    of the optimiser may multiply it by its "lr_scale". ``price`` is
    added to the mean cross-entropy of each batch. ``augmented`` changes each batch of uint8 images.
    ``reset_momentum`` empties the optimiser's buffers before every epoch, as the authors' scripts
    do by making a new optimiser. Order of images, crops, flips and dropout depend on ``seed`` and
    the epoch only. The last, incomplete batch of an epoch is left out. ``compiled``: the training
    step goes through torch.compile.

    Inside an epoch ``keep(place)`` is called every ``keep_every_s`` seconds and when ``stopping()``
    says so, then KeyboardInterrupt is raised; ``place`` takes such an epoch up again. ``fabric``
    (from ``start_processes``): each process takes its part of every batch, BatchNorm takes its
    statistics over all of them.

    Row: epoch, epochs, loss (cross-entropy, nats), price (nats), train_accuracy, val_accuracy,
    lr (of the last step), seconds, images_per_s (of the training part).
    Raises: ValueError if a batch is larger than the training set or cannot be shared evenly;
    FloatingPointError, with what was not finite, if the loss is not.
    """
    steps = steps_of(len(data.train), batch, fabric.world_size if fabric else 1)
    numerics: dict[str, Any] = {"dtype": dtype, "channels_last": channels_last}
    with wrapped(net, optimizer, compiled, fabric) as (model, stepper):
        loop = _Loop(
            model, data, stepper, lr, epochs, steps, batch, seed, augmented, price,
            label_smoothing, dtype, channels_last, fabric, progress, keep, keep_every_s, stopping,
        )  # fmt: skip
        for epoch in range(first_epoch, epochs + 1):
            if fabric and keep and agreed(stopping, ASK_EVERY - 1, fabric):
                raise KeyboardInterrupt(f"stopped before epoch {epoch}")
            begin = place if place and place.epoch == epoch else None
            start = time.perf_counter() - (begin.seconds if begin else 0)
            if before_epoch:
                before_epoch(epoch)
            if reset_momentum and not begin:
                optimizer.state.clear()
            net.train()
            if bn_mode == "running":
                _norms_to_eval(net)
            trace = loop.train(epoch, begin, start)
            rate = optimizer.param_groups[0]["lr"]
            _check_finite(net, trace, epoch, rate)
            loss, paid, correct = mean_over_processes(trace.mean(0), fabric).tolist()
            train_s = time.perf_counter() - start
            accuracy = evaluate(net, data.val, data, fabric=fabric, **numerics)
            yield {
                "epoch": epoch,
                "epochs": epochs,
                "loss": loss,
                "price": paid,
                "train_accuracy": correct,
                "val_accuracy": accuracy,
                "lr": rate,
                "seconds": time.perf_counter() - start,
                "images_per_s": steps * batch / train_s,
            }


@dataclass
class _Loop:
    """The steps of one epoch, and what they need; see ``fit``."""

    model: nn.Module
    data: ImageSet
    optimizer: torch.optim.Optimizer
    lr: Schedule
    epochs: int
    steps: int
    batch: int
    seed: object
    augmented: Callable[[Tensor, torch.Generator], Tensor] | None
    price: Callable[[], Tensor] | None
    label_smoothing: float
    dtype: torch.dtype
    channels_last: bool
    fabric: "Fabric | None"
    progress: Progress | None
    keep: Callable[[Position], None] | None
    keep_every_s: float
    stopping: Callable[[], bool] | None

    def train(self, epoch: int, begin: Position | None, start: float) -> Tensor:
        """One epoch, or the rest of it from ``begin`` on; returns the trace of this process."""
        train, device = self.data.train, self.data.train.images.device
        exact = torch.float64 if self.dtype is torch.float64 else torch.float32
        trace = torch.zeros(self.steps, 3, dtype=exact)
        trace = (begin.trace if begin else trace).to(device)
        todo: Iterable = range(begin.step if begin else 0, self.steps)
        if self.progress:
            todo = self.progress(todo, f"epoch {epoch}/{self.epochs}")
        kept_at = time.perf_counter()
        with own_randomness(device, self.seed, epoch, self.fabric, begin) as draw:
            order = torch.randperm(len(train), generator=draw)[: self.steps * self.batch]
            order = order.to(device).view(self.steps, self.batch)
            if begin:
                draw.set_state(begin.draws.cpu())
            for step in todo:
                rate = self.lr((epoch - 1 + step / self.steps) / self.epochs)
                for group in self.optimizer.param_groups:
                    group["lr"] = rate * group.get("lr_scale", 1.0)
                images, labels = train.images[order[step]], train.labels[order[step]]
                images = self.augmented(images, draw) if self.augmented else images
                mine = share_of_batch(self.batch, self.fabric)
                trace[step] = self.step(images[mine], labels[mine])
                if self.keep and step + 1 < self.steps:
                    stop = agreed(self.stopping, step, self.fabric)
                    late = not self.fabric and time.perf_counter() > kept_at + self.keep_every_s
                    if (stop or late) and bool(trace.isfinite().all()):
                        spent, states = time.perf_counter() - start, generator_states(self.fabric)
                        self.keep(
                            Position(epoch, step + 1, spent, trace.cpu(), draw.get_state(), states)
                        )
                        kept_at = time.perf_counter()
                    if stop:
                        raise KeyboardInterrupt(f"stopped in epoch {epoch} after step {step + 1}")
        return trace

    def step(self, images: Tensor, labels: Tensor) -> Tensor:
        """One step of gradient descent; returns (loss, price, share correct) on the device."""
        x = as_input(images, self.data, self.dtype, self.channels_last)
        with autocast(x.device, self.dtype):
            logits = self.model(x)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        loss = F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
        paid = self.price() if self.price else torch.zeros_like(loss)
        self.optimizer.zero_grad(set_to_none=True)
        total = loss + paid
        total.backward() if self.fabric is None else self.fabric.backward(total)
        self.optimizer.step()
        correct = (logits.detach().argmax(1) == labels).to(loss.dtype).mean()
        return torch.stack([loss.detach(), paid.detach(), correct])


def steps_of(images: int, batch: int, processes: int = 1) -> int:
    """Steps of an epoch. Raises ValueError if a batch is too large or cannot be shared evenly."""
    if batch > images:
        raise ValueError(f"got batch {batch}; need at most {images} (train images)")
    if batch % processes:
        raise ValueError(
            f"got batch {batch} for {processes} processes; need a multiple; do change one of them"
        )
    return images // batch


def _check_finite(net: nn.Module, trace: Tensor, epoch: int, rate: float) -> None:
    """Raise a diagnosis if the loss or the price of a step was not finite."""
    wrong = (~trace.isfinite().all(1)).nonzero().flatten()
    if len(wrong) == 0:
        return
    step = int(wrong[0])
    before = f"{float(trace[step - 1, 0]):.3g}" if step else "nothing"
    names = [n for n, p in net.named_parameters() if not bool(p.isfinite().all())]
    where = f"{names[0]} and {len(names) - 1} more" if names else "no parameter"
    raise FloatingPointError(
        f"got loss {float(trace[step, 0])}, price {float(trace[step, 1])} in epoch {epoch}, "
        f"step {step + 1} (loss before it: {before}; learning rate {rate:g}; not finite now: "
        f"{where}); need finite numbers; do lower the learning rate"
    )


def _norms_to_eval(net: nn.Module) -> None:
    """Let every BatchNorm use its running statistics."""
    for module in net.modules():
        if isinstance(module, _BatchNorm):
            module.eval()


def autocast(device: torch.device, dtype: torch.dtype) -> contextlib.AbstractContextManager:
    """Mixed precision for convolutions and linear layers; nothing for float32 and float64."""
    if dtype in (torch.float32, torch.float64):
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype)


@torch.inference_mode()
def evaluate(
    net: nn.Module,
    split: Split,
    data: ImageSet,
    *,
    batch: int = 500,
    dtype: torch.dtype = torch.float32,
    channels_last: bool = False,
    fabric: "Fabric | None" = None,
) -> float:
    """Accuracy in [0, 1] over every image of a split, in eval mode; the mode is put back after.

    Many processes take whole batches in turns, so that each image counts once and each batch is
    computed as by one process.
    """
    modes = [(module, module.training) for module in net.modules()]
    net.eval()
    rank, processes = (fabric.global_rank, fabric.world_size) if fabric else (0, 1)
    correct = torch.zeros((), dtype=torch.long, device=split.images.device)
    for start in range(rank * batch, len(split), processes * batch):
        images, labels = split.images[start : start + batch], split.labels[start : start + batch]
        with autocast(images.device, dtype):
            logits = net(as_input(images, data, dtype, channels_last))
        correct += (logits.argmax(1) == labels).sum()
    for module, mode in modes:
        module.training = mode
    if fabric:
        distributed.all_reduce(correct)
    return int(correct) / len(split)
