"""Training and evaluation: one visible loop, used by every stage, on one device or many.

``fit`` is the loop. It yields one row per epoch and prints nothing; what is trained is decided
outside, by ``only_training`` and by the optimiser it is given. No step waits for the device, but
those at which a checkpoint is written or many processes ask each other (``devices.agreed``).
"""

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from dnal_mini.data.augment import augment, normalise
from dnal_mini.data.imageset import ImageSet, Part
from dnal_mini.refused import Refused
from dnal_mini.training.devices import (
    ASK_EVERY,
    agreed,
    mean_over_processes,
    share_of_batch,
    wrapped,
)
from dnal_mini.training.position import Position, generator_states, own_randomness
from dnal_mini.training.stage import Feed, Row, Session, Stage, Work

if TYPE_CHECKING:
    from lightning_fabric import Fabric


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
    """Images as the network takes them: normalised if they are uint8, in ``dtype``."""
    ready = images.is_floating_point()
    x = images.to(dtype) if ready else normalise(images, data.mean, data.std, dtype)
    return x.contiguous(memory_format=torch.channels_last) if channels_last else x


def fit(
    net: nn.Module,
    data: ImageSet,
    optimizer: torch.optim.Optimizer,
    stage: Stage,
    work: Work = Work(),  # noqa: B008 - frozen
    session: Session = Session(),  # noqa: B008 - frozen
    start: int | Position = 1,
    keep: Callable[[Position], None] | None = None,
) -> Iterator[Row]:
    """Train for the epochs of a stage, from ``start`` on, and yield a row of numbers after each.

    The loss of a batch is the mean cross-entropy + ``stage.price * work.penalty()``. Order of
    images, crops, flips and dropout depend on ``stage.seed`` and the epoch only. The last,
    incomplete batch of an epoch is left out.

    Inside an epoch ``keep(position)`` is called every ``session.checkpoint_s`` seconds and when
    ``session.stopping()`` says so, then KeyboardInterrupt is raised; given as ``start``, the
    position takes such an epoch up again (not where images are not ``seekable``). The processes of
    ``session.devices`` share a batch and its statistics, and stop and keep together (``agreed``).

    Row: epoch, epochs, loss (cross-entropy, nats), price (nats), train_accuracy, val_accuracy,
    lr (of the last step), seconds, images_per_s (of the training part).
    Raises: ValueError if a batch is larger than the training set or cannot be shared evenly;
    FloatingPointError, with what was not finite, if the loss is not.
    """
    devices, batch, runs = session.devices, stage.feed.batch, work.runs or net
    steps = steps_of(data.train, batch, devices.world_size if devices else 1)
    position, first = (start, start.epoch) if isinstance(start, Position) else (None, start)
    with wrapped(runs, optimizer, stage.feed.compiled, devices) as (model, stepper):
        loop = _Loop(model, data, stepper, stage, work, session, steps, keep)
        for epoch in range(first, stage.epochs + 1):
            if devices and keep and agreed(session.stopping, False, ASK_EVERY - 1, devices)[0]:
                raise KeyboardInterrupt(f"stopped before epoch {epoch}")
            begin = position if position and position.epoch == epoch else None
            began_s = time.perf_counter() - (begin.seconds if begin else 0)
            if work.before_epoch:
                work.before_epoch(epoch)
            if stage.reset_momentum and not begin:
                optimizer.state.clear()
            runs.train()
            if stage.bn_mode == "running":
                _norms_to_eval(runs)
            trace = loop.train(epoch, begin, began_s)
            rate = optimizer.param_groups[0]["lr"]
            _check_finite(net, trace, epoch, rate)
            loss, paid, correct = trace.mean(0).tolist()
            train_s = time.perf_counter() - began_s
            accuracy = evaluate(runs, data.val, data, stage.feed, devices=devices)
            yield {
                "epoch": epoch,
                "epochs": stage.epochs,
                "loss": loss,
                "price": paid,
                "train_accuracy": correct,
                "val_accuracy": accuracy,
                "lr": rate,
                "seconds": time.perf_counter() - began_s,
                "images_per_s": steps * batch / train_s,
            }


@dataclass
class _Loop:
    """The steps of one epoch, and what they need; see ``fit``."""

    model: nn.Module
    data: ImageSet
    optimizer: torch.optim.Optimizer
    stage: Stage
    work: Work
    session: Session
    steps: int
    keep: Callable[[Position], None] | None

    def __post_init__(self) -> None:
        feed = self.stage.feed
        self.device = self.data.train.device
        self.dtype = feed.dtype(self.device)
        self.augment = partial(augment, pad=feed.crop, flip=feed.flip)

    def train(self, epoch: int, begin: Position | None, began_s: float) -> Tensor:
        """One epoch, or the rest of it from ``begin`` on; returns its trace, see ``Position``."""
        stage, devices, batch = self.stage, self.session.devices, self.stage.feed.batch
        done = begin.step if begin else 0  # also: rows of the trace that all processes share
        exact = torch.float64 if self.dtype is torch.float64 else torch.float32
        trace = begin.trace if begin else torch.zeros(self.steps, 3, dtype=exact)
        trace = trace.to(self.device)
        todo: Iterable = range(done, self.steps)
        if self.session.progress:
            todo = self.session.progress(todo, f"{stage.name} epoch {epoch}/{stage.epochs}")
        mine, kept_at = share_of_batch(batch, devices), time.perf_counter()
        seekable = self.data.train.seekable
        with contextlib.ExitStack() as stack:
            randomness = own_randomness(self.device, stage.seed, epoch, devices, begin)
            draw = stack.enter_context(randomness)
            batches = self.data.train.shuffled(batch, draw, done)
            if begin:
                draw.set_state(begin.draws.cpu())
            stack.callback(batches.close)
            for step in todo:
                rate = stage.rate((epoch - 1 + step / self.steps) / stage.epochs)
                for group in self.optimizer.param_groups:
                    group["lr"] = rate * group.get("lr_scale", 1.0)
                images, labels = next(batches)
                if stage.feed.crop or stage.feed.flip:
                    images = self.augment(images, draw)
                trace[step] = self.step(images[mine], labels[mine], rate)
                if self.keep and step + 1 < self.steps:
                    late = time.perf_counter() > kept_at + self.session.checkpoint_s
                    stop, due = agreed(self.session.stopping, late, step, devices)
                    if seekable and (stop or due):
                        done = _share(trace, done, step + 1, devices)
                        states, drawn = generator_states(self.device, devices), draw.get_state()
                        spent = time.perf_counter() - began_s
                        if bool(trace.isfinite().all()):
                            self.keep(Position(epoch, done, spent, trace.cpu(), drawn, states))
                        kept_at = time.perf_counter()
                    if stop:
                        raise KeyboardInterrupt(f"stopped in epoch {epoch} after step {step + 1}")
        _share(trace, done, self.steps, devices)
        return trace

    def step(self, images: Tensor, labels: Tensor, rate: float) -> Tensor:
        """One step of gradient descent; returns (loss, price, share correct) on the device."""
        x = as_input(images, self.data, self.dtype, self.stage.feed.channels_last)
        with autocast(x.device, self.dtype):
            logits = self.model(x)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        loss = F.cross_entropy(logits, labels, label_smoothing=self.stage.label_smoothing)
        penalty = self.work.penalty
        paid = self.stage.price * penalty() if penalty else torch.zeros_like(loss)
        self.optimizer.zero_grad(set_to_none=True)
        total, devices = loss + paid, self.session.devices
        total.backward() if devices is None else devices.backward(total)
        self.optimizer.step()
        if self.work.after_step:
            self.work.after_step(rate)
        correct = (logits.detach().argmax(1) == labels).to(loss.dtype).mean()
        return torch.stack([loss.detach(), paid.detach(), correct])


def steps_of(images: Part, batch: int, processes: int = 1) -> int:
    """Steps of an epoch. Raises ValueError if a batch is too large or cannot be shared evenly."""
    steps = images.steps(batch)
    if not steps:
        raise Refused(f"got batch {batch}; need at most {len(images)} (train images)")
    if batch % processes:
        raise Refused(
            f"got batch {batch} for {processes} processes; need a multiple; do change one of them"
        )
    return steps


def _share(trace: Tensor, done: int, step: int, devices: "Fabric | None") -> int:
    """Make the rows from ``done`` to ``step`` means over all processes; returns ``step``."""
    trace[done:step] = mean_over_processes(trace[done:step], devices)
    return step


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
    split: Part,
    data: ImageSet,
    feed: Feed = Feed(),  # noqa: B008 - frozen
    *,
    batch: int = 500,
    devices: "Fabric | None" = None,
) -> float:
    """Accuracy in [0, 1] over every image of a split, in eval mode; the mode is put back after.

    ``feed``: precision and memory layout. Many processes take whole batches in turns, so that each
    image counts once and each batch is computed as by one process.
    """
    modes = [(module, module.training) for module in net.modules()]
    net.eval()
    dtype = feed.dtype(split.device)
    rank, processes = (devices.global_rank, devices.world_size) if devices else (0, 1)
    counts = torch.zeros(2, dtype=torch.long, device=split.device)  # right, seen
    with contextlib.closing(split.in_order(batch, rank, processes)) as batches:
        for images, labels in batches:
            with autocast(images.device, dtype):
                logits = net(as_input(images, data, dtype, feed.channels_last))
            counts[0] += (logits.argmax(1) == labels).sum()
            counts[1] += len(labels)
    for module, mode in modes:
        module.training = mode
    if devices:
        distributed.all_reduce(counts)
    correct, seen = counts.tolist()
    return correct / seen
