"""Training and evaluation: one visible loop, used by every stage.

``fit`` is the loop. It yields one row per epoch and prints nothing; what is trained is decided
outside, by ``only_training`` and by the optimiser it is given. The data set lives on the device as
one uint8 tensor, and nothing inside an epoch waits for the device.
"""

import contextlib
import math
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dnal_mini.data import ImageSet, Split, augment, normalise

Precision = Literal["auto", "float32", "bfloat16"]
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


def pick_device(name: str) -> torch.device:
    """The torch device of a name such as "cpu" or "cuda:0".

    Raises: ValueError if there is no such device here.
    """
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"got device {name!r}, which is not here; need e.g. 'cpu'") from error
    return device


def pick_dtype(precision: Precision, device: torch.device) -> torch.dtype:
    """What convolutions compute in: "auto" is bfloat16 where the hardware multiplies in it."""
    if precision != "auto":
        return getattr(torch, precision)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    return torch.bfloat16 if torch.ops.mkldnn._is_mkldnn_bf16_supported() else torch.float32


def seeded(*words: object) -> torch.Generator:
    """A CPU generator whose seed depends on the words only: a resumed epoch draws the same."""
    return torch.Generator().manual_seed(zlib.crc32("/".join(map(str, words)).encode()))


def constant(lr: float) -> Callable[[float], float]:
    """Learning rate as a function of the share of the stage that is done, in [0, 1)."""
    return lambda done: lr


def cosine(lr: float) -> Callable[[float], float]:
    """From ``lr`` down to 0 along half a cosine."""
    return lambda done: lr * (1 + math.cos(math.pi * done)) / 2


def as_input(images: Tensor, data: ImageSet, dtype: torch.dtype, channels_last: bool) -> Tensor:
    """uint8 images as the network takes them: normalised, in ``dtype``."""
    x = normalise(images, data.mean, data.std, dtype)
    return x.contiguous(memory_format=torch.channels_last) if channels_last else x


def fit(
    net: nn.Module,
    data: ImageSet,
    optimizer: torch.optim.Optimizer,
    epochs: int,
    lr: Callable[[float], float],
    *,
    first_epoch: int = 1,
    batch: int = 128,
    seed: object = 0,
    augmented: Callable[[Tensor, torch.Generator], Tensor] | None = augment,
    reset_momentum: bool = False,
    bn_mode: Literal["batch", "running"] = "batch",
    before_epoch: Callable[[int], None] | None = None,
    price: Callable[[], Tensor] | None = None,
    dtype: torch.dtype = torch.float32,
    channels_last: bool = False,
    progress: Progress | None = None,
) -> Iterator[dict[str, Any]]:
    """Train for epochs ``first_epoch..epochs`` and yield a row of numbers after each.

    ``lr`` maps the share of the stage that is done to a learning rate, per step. ``price`` is
    added to the mean cross-entropy of each batch. ``augmented`` changes each batch of uint8 images.
    ``reset_momentum`` empties the optimiser's
    buffers before every epoch, as the authors' scripts do by making a new optimiser.
    Order of images, crops and flips depend on ``seed`` and the epoch only. The last, incomplete
    batch of an epoch is left out.

    Row: epoch, epochs, loss (cross-entropy, nats), price (nats), train_accuracy, val_accuracy,
    lr (of the last step), seconds, images_per_s (of the training part).
    Raises: ValueError if a batch is larger than the training set; FloatingPointError if the loss
    is not finite.
    """
    steps = len(data.train) // batch
    if steps < 1:
        raise ValueError(f"got batch {batch}; need at most the {len(data.train)} training images")
    for epoch in range(first_epoch, epochs + 1):
        start = time.perf_counter()
        if before_epoch:
            before_epoch(epoch)
        if reset_momentum:
            optimizer.state.clear()
        net.train()
        if bn_mode == "running":
            _norms_to_eval(net)
        draw = seeded(seed, epoch)
        order = torch.randperm(len(data.train), generator=draw)[: steps * batch]
        order = order.to(data.train.images.device).view(steps, batch)
        sums = torch.zeros(3, device=data.train.images.device)  # loss, price, correct
        label = f"epoch {epoch}/{epochs}"
        for step in progress(range(steps), label) if progress else range(steps):
            for group in optimizer.param_groups:
                group["lr"] = lr((epoch - 1 + step / steps) / epochs)
            images, labels = data.train.images[order[step]], data.train.labels[order[step]]
            images = augmented(images, draw) if augmented else images
            sums += _step(
                net, as_input(images, data, dtype, channels_last), labels, optimizer, price, dtype
            )
        loss, paid, correct = (sums / steps).tolist()
        if not math.isfinite(loss):
            raise FloatingPointError(f"got loss {loss} in epoch {epoch}; lower the learning rate")
        train_s = time.perf_counter() - start
        accuracy = evaluate(net, data.val, data, dtype=dtype, channels_last=channels_last)
        yield {
            "epoch": epoch,
            "epochs": epochs,
            "loss": loss,
            "price": paid,
            "train_accuracy": correct / batch,
            "val_accuracy": accuracy,
            "lr": optimizer.param_groups[0]["lr"],
            "seconds": time.perf_counter() - start,
            "images_per_s": steps * batch / train_s,
        }


def _norms_to_eval(net: nn.Module) -> None:
    """Let every BatchNorm use its running statistics."""
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()


def autocast(device: torch.device, dtype: torch.dtype) -> contextlib.AbstractContextManager:
    """Mixed precision for convolutions and linear layers; nothing for float32 and float64."""
    if dtype in (torch.float32, torch.float64):
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype)


def _step(
    net: nn.Module,
    x: Tensor,
    labels: Tensor,
    optimizer: torch.optim.Optimizer,
    price: Callable[[], Tensor] | None,
    dtype: torch.dtype,
) -> Tensor:
    """One step of gradient descent; returns (loss, price, number correct) on the device."""
    with autocast(x.device, dtype):
        logits = net(x).float()
    loss = F.cross_entropy(logits, labels)
    paid = price() if price else torch.zeros_like(loss)
    optimizer.zero_grad(set_to_none=True)
    (loss + paid).backward()
    optimizer.step()
    correct = (logits.detach().argmax(1) == labels).sum()
    return torch.stack([loss.detach(), paid.detach(), correct.to(loss.dtype)])


@torch.inference_mode()
def evaluate(
    net: nn.Module,
    split: Split,
    data: ImageSet,
    *,
    batch: int = 500,
    dtype: torch.dtype = torch.float32,
    channels_last: bool = False,
) -> float:
    """Accuracy in [0, 1] over every image of a split, in eval mode; the mode is put back after."""
    modes = [(module, module.training) for module in net.modules()]
    net.eval()
    correct = torch.zeros((), dtype=torch.long, device=split.images.device)
    for start in range(0, len(split), batch):
        images, labels = split.images[start : start + batch], split.labels[start : start + batch]
        with autocast(images.device, dtype):
            logits = net(as_input(images, data, dtype, channels_last))
        correct += (logits.argmax(1) == labels).sum()
    for module, mode in modes:
        module.training = mode
    return int(correct) / len(split)
