"""How far a cut network is from the whole one, and against what.

Read ``certified``. A difference is small only against how much the output varies with the image:
a network that adds 1e10 to everything would hide any mistake behind its size.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dnal_mini.gating import set_gates
from dnal_mini.graph.capture import evaluating
from dnal_mini.graph.copies import copied
from dnal_mini.graph.exact import as_exact_as
from dnal_mini.graph.outputs import tensors_in
from dnal_mini.refused import Refused

TOLERANCE = 1e-8  # largest difference against the spread of the output, in float64


HARDLY = 1e-3  # spread against size of an output below which statistics are settled first


ROUNDING = 512  # units in the last place of the largest number that deep networks gather


MAGNIFIED = 256  # times that, where norms divide by the spread of what hardly varies in a batch


@dataclass(frozen=True)
class Trial:
    """One comparison of two networks on random images."""

    image_shape: tuple[int, ...]
    batch: int
    mode: str  # eval; train: norms with batch statistics; settled: eval behind one such pass
    absolute: float  # largest difference of any number of any output
    relative: float  # the same against the spread of that output over the images
    share: float  # that spread against the largest number of the output, the smallest of all


def certified(full: nn.Module, small: nn.Module, image_shape: Sequence[int]) -> list[Trial]:
    """Comparisons of two networks: other sizes, batches and modes, as far as the whole one runs.

    The first is of the size that was cut for, in eval mode. A network whose output hardly varies
    (fresh weights, statistics of nothing) is compared again with settled statistics.

    Raises: ValueError if they differ by more than ``TOLERANCE`` and what rounding explains.
    """
    shape = tuple(image_shape)
    first = _compare(full, small, shape, 2, "eval")
    if first is None:
        raise Refused(f"got image_shape {shape}, which fails; need one that the net takes")
    others = (_compare(full, small, other, 3, "eval") for other in _other_sizes(shape))
    other = next(filter(None, others), None)
    trained = other.image_shape if other else shape
    found = [first, other, _compare(full, small, trained, 4, "train")]
    if 0 < first.share < HARDLY:  # a dead net has nothing to settle
        pair = _settled(full, shape), _settled(small, shape)
        found.append(_compare(*pair, shape, 2, "settled"))
    return [trial for trial in found if trial is not None]


def _other_sizes(shape: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """Smaller and larger images, odd ones: where strides and pools round."""
    channels, *sides = shape
    for share in (0.5, 0.75, 1.25) if sides else ():
        yield (channels, *(int(side * share) // 2 * 2 + 1 for side in sides))


def _compare(
    full: nn.Module, small: nn.Module, shape: tuple[int, ...], batch: int, mode: str
) -> Trial | None:
    """One trial; None if the whole network does not take such images.

    Raises: ValueError if the networks differ, or the cut one does not run.
    """
    like = next((p for p in full.parameters() if p.is_floating_point()), torch.zeros(()))
    draw = torch.Generator().manual_seed(batch)
    images = torch.randn(batch, *shape, generator=draw, dtype=torch.float64).to(like)
    try:
        expected = outputs(full, images, mode == "train")
    except Exception:  # the user's forward wants another size, or a larger batch
        return None
    where = f"in {mode} mode on images of {shape}"
    try:
        found = outputs(small, images, mode == "train")
    except Exception as error:  # the same forward, with smaller layers
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise Refused(f"got a cut net that fails {where} ({reason}); do report it") from error
    absolute, relative, share = 0.0, 0.0, 1.0
    for a, b in zip(expected, found, strict=True):
        if a.shape != b.shape or not a.numel():
            raise Refused(f"got outputs of other shapes {where}; do report it")
        apart, size = float((a - b).abs().max()), float(a.abs().max())
        spread = float((a - a[:1]).abs().max()) if len(a) == batch else size
        units = ROUNDING if mode == "eval" else ROUNDING * MAGNIFIED
        rounding = units * torch.finfo(like.dtype).eps * size
        if not apart <= TOLERANCE * spread + rounding and like.dtype == torch.float64:
            raise Refused(
                f"got outputs that differ by {apart / (spread or size):.1e} of what varies with "
                f"the image, {where}; need {TOLERANCE:.0e}"
            )
        absolute = max(absolute, apart)
        relative = max(relative, apart / (spread or size or 1.0))
        share = min(share, spread / size if size else 1.0)
    return Trial(shape, batch, mode, absolute, relative, share)


@torch.no_grad()
def outputs(net: nn.Module, images: Tensor, batch_statistics: bool = False) -> list[Tensor]:
    """All tensors that a net returns, in float64, run in eval mode; it is left as it was.

    ``batch_statistics``: its norms in train mode.
    """
    if batch_statistics:
        net = copied(net)
    with evaluating(net), as_exact_as(net):
        for module in net.modules():
            if isinstance(module, _BatchNorm):
                module.train(batch_statistics)
        output = net(images.clone())
    return [tensor.double() for tensor in tensors_in(output)]


@torch.no_grad()
def largest_difference(
    net: nn.Module, small: nn.Module, image_shape: Sequence[int], batch: int = 4, seed: int = 0
) -> tuple[float, float]:
    """Largest |hard-gated - pruned| output on random images in float64, eval mode.

    Returns the absolute difference and the same relative to the largest |output|; all tensors of
    a tuple or dict are compared.
    """
    full, cut = (copied(n).cpu().double() for n in (net, small))
    set_gates(full, mode="hard")
    draw = torch.Generator().manual_seed(seed)
    images = torch.randn(batch, *image_shape, generator=draw, dtype=torch.float64)
    pairs = list(zip(outputs(full, images), outputs(cut, images), strict=True))
    absolute = max(float((a - b).abs().max()) for a, b in pairs)
    return absolute, absolute / max(*(float(a.abs().max()) for a, _ in pairs), 1e-300)


def _settled(net: nn.Module, shape: Sequence[int]) -> nn.Module:
    """A copy whose norms have the statistics of one batch, so that its output follows the image."""
    net = copied(net)
    for module in net.modules():
        if isinstance(module, _BatchNorm):
            module.momentum = 1.0
    like = next((p for p in net.parameters() if p.is_floating_point()), torch.zeros(()))
    draw = torch.Generator().manual_seed(1)
    images = torch.randn(8, *shape, generator=draw, dtype=torch.float64).to(like)
    with torch.no_grad(), evaluating(net), as_exact_as(net):
        for module in net.modules():
            if isinstance(module, _BatchNorm):
                module.train()
        net(images)
    return net
