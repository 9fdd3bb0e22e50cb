"""How far a cut network is from the whole one, and against what.

Read ``certified``. A difference is small only against how much the output varies with the image:
a network that adds 1e10 to everything would hide any mistake behind its size.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dnal_mini.gating import set_gates
from dnal_mini.graph.capture import evaluating
from dnal_mini.graph.copies import copied
from dnal_mini.graph.exact import as_exact_as
from dnal_mini.graph.inputs import Given, Inputs, again, drawn, like, resized, told
from dnal_mini.graph.outputs import tensors_in
from dnal_mini.refused import Refused

TOLERANCE = 1e-8  # largest difference against the spread of the output, in float64


HARDLY = 1e-3  # spread against size of an output below which statistics are settled first


ROUNDING = 512  # units in the last place of the largest number that deep networks gather


LARGE = 128  # pixels of a side, above which the second size is a quarter and not half


MAGNIFIED = 256  # times that, where norms divide by the spread of what hardly varies in a batch


@dataclass(frozen=True)
class Trial:
    """One comparison of two networks on random images, or on what else their forward takes."""

    image_shape: tuple[int, ...]
    batch: int
    mode: str  # eval; train: norms with batch statistics; settled: eval behind one such pass
    absolute: float  # largest difference of any number of any output
    relative: float  # the same against the spread of that output over the images
    share: float  # that spread against the largest number of the output, the smallest of all


def certified(
    full: nn.Module, small: nn.Module, image_shape: Given, expected: list[Tensor] | None = None
) -> list[Trial]:
    """Comparisons of two networks: other sizes, batches and modes, as far as the whole one runs.

    The first is of the size that was cut for, in eval mode, against ``outputs`` of the whole one,
    if they are ``expected`` already. A network whose output hardly varies (fresh weights,
    statistics of nothing) is compared again with settled statistics.

    Raises: ValueError if they differ by more than ``TOLERANCE`` and what rounding explains.
    """
    first = _compare(full, small, image_shape, None, "eval", expected)
    if first is None:
        raise Refused(f"got {told(image_shape)}, which fails; need one that the net takes")
    found: list[Trial | None] = [first]
    others = [resized(image_shape, share) for share in _shares(first.image_shape)]
    for size in (*(other for other in others if other is not None), image_shape):
        if other := _compare(full, small, size, first.batch + 1, "eval"):
            found += [other, _compare(full, small, size, first.batch + 2, "train")]
            break
    else:  # one batch size alone
        found.append(_compare(full, small, image_shape, None, "train"))
    if 0 < first.share < HARDLY:  # a dead net has nothing to settle
        pair = _settled(full, image_shape), _settled(small, image_shape)
        found.append(_compare(*pair, image_shape, None, "settled"))
    return [trial for trial in found if trial is not None]


def _shares(shape: tuple[int, ...]) -> tuple[float, ...]:
    """Smaller and larger images, odd ones: where strides and pools round. Large ones cost time."""
    return (0.25, 0.5, 0.75, 1.25) if max(shape[1:], default=0) > LARGE else (0.5, 0.75, 1.25)


def _compare(
    full: nn.Module,
    small: nn.Module,
    size: Given,
    batch: int | None,
    mode: str,
    expected: list[Tensor] | None = None,
) -> Trial | None:
    """One trial; None if the whole network does not take such images.

    Raises: ValueError if the networks differ, or the cut one does not run.
    """
    images = drawn(size, like(full), batch or 0, batch)
    try:
        expected = outputs(full, images, mode == "train") if expected is None else expected
    except Exception:  # the user's forward wants another size, or a larger batch
        return None
    count, *shape = next(x.shape for x in images if isinstance(x, Tensor))
    where = f"in {mode} mode on {told(size)}"
    try:
        found = outputs(small, images, mode == "train")
    except Exception as error:  # the same forward, with smaller layers
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise Refused(f"got a cut net that fails {where} ({reason}); do report it") from error
    absolute, relative, share = 0.0, 0.0, 1.0
    for a, b in zip(expected, found, strict=True):
        if a.shape != b.shape or not a.numel():
            raise Refused(f"got outputs of other shapes {where}; do report it")
        apart, largest = float((a - b).abs().max()), float(a.abs().max())
        spread = float((a - a[:1]).abs().max()) if len(a) == count else largest
        units = ROUNDING if mode == "eval" else ROUNDING * MAGNIFIED
        exact = like(full).dtype
        rounding = units * torch.finfo(exact).eps * largest
        if not apart <= TOLERANCE * spread + rounding and exact == torch.float64:
            raise Refused(
                f"got outputs that differ by {apart / (spread or largest):.1e} of what varies with "
                f"the image, {where}; need {TOLERANCE:.0e}"
            )
        absolute = max(absolute, apart)
        relative = max(relative, apart / (spread or largest or 1.0))
        share = min(share, spread / largest if largest else 1.0)
    return Trial(tuple(shape), count, mode, absolute, relative, share)


@torch.no_grad()
def outputs(net: nn.Module, inputs: Sequence[Any], batch_statistics: bool = False) -> list[Tensor]:
    """All tensors that a net returns, in float64, run in eval mode; it is left as it was.

    ``batch_statistics``: its norms in train mode.
    """
    with evaluating(net), _keeping_buffers(net), as_exact_as(net):
        for module in net.modules():
            if isinstance(module, _BatchNorm):
                module.train(batch_statistics)
        output = net(*again(inputs))
    return [tensor.detach().double() for tensor in tensors_in(output)]


@contextmanager
def _keeping_buffers(net: nn.Module) -> Iterator[None]:
    """Inside the block running statistics may move; afterwards they are what they were."""
    own = [
        (m, name, b, b.clone())
        for m in net.modules()
        for name, b in m._buffers.items()
        if b is not None
    ]
    try:
        yield
    finally:
        for module, name, buffer, before in own:
            buffer.copy_(before)
            module._buffers[name] = buffer


@torch.no_grad()
def largest_difference(
    net: nn.Module, small: nn.Module, image_shape: Given, batch: int | None = 4, seed: int = 0
) -> tuple[float, float]:
    """Largest |hard-gated - pruned| output on random images in float64, eval mode.

    Returns the absolute difference and the same relative to the largest |output|; all tensors of
    a tuple or dict are compared.
    """
    full, cut = (copied(n).cpu().double() for n in (net, small))
    set_gates(full, mode="hard")
    inputs = drawn(image_shape, like(full), seed, batch)
    pairs = list(zip(outputs(full, inputs), outputs(cut, inputs), strict=True))
    absolute = max(float((a - b).abs().max()) for a, b in pairs)
    return absolute, absolute / max(*(float(a.abs().max()) for a, _ in pairs), 1e-300)


def _settled(net: nn.Module, shape: Given) -> nn.Module:
    """A copy whose norms have the statistics of one batch, so that its output follows the image."""
    net = copied(net)
    for module in net.modules():
        if isinstance(module, _BatchNorm):
            module.momentum = 1.0
    with torch.no_grad(), evaluating(net), as_exact_as(net):
        for module in net.modules():
            if isinstance(module, _BatchNorm):
                module.train()
        net(*drawn(shape, like(net), 1, None if isinstance(shape, Inputs) else 8))
    return net
