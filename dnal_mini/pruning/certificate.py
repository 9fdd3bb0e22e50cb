"""How far a cut network is from the whole one, and against what.

Read ``certified``. A difference is small only against how much the output varies with the image:
a network that adds 1e10 to everything would hide any mistake behind its size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from dnal_mini.gating import set_gates
from dnal_mini.graph.capture import evaluating, keeping_buffers
from dnal_mini.graph.copies import copied
from dnal_mini.graph.exact import as_exact_as
from dnal_mini.graph.inputs import Given, Inputs, again, drawn, like, resized, told
from dnal_mini.graph.outputs import tensors_in
from dnal_mini.refused import Refused

TOLERANCE = 1e-8  # largest difference against the spread of the output, in float64


HARDLY = 1e-3  # spread against size of an output below which statistics are settled first


ROUNDING = 512  # units in the last place of the largest number that deep networks gather


LARGE = 128  # pixels of a side, above which the second size is a quarter and not half


NOISE = 64  # times what the whole network makes of a unit in the last place: see ``_noise``


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
    images = drawn(image_shape, like(full), 0)
    expected = outputs(full, images) if expected is None else expected
    rows = _rows(expected, images)
    first = _compare(full, small, image_shape, None, "eval", rows, expected)
    assert first is not None
    found: list[Trial | None] = [first]
    others = [resized(image_shape, share) for share in _shares(first.image_shape)]
    for size in (*(other for other in others if other is not None), image_shape):
        if other := _compare(full, small, size, first.batch + 1, "eval", rows):
            found += [other, _compare(full, small, size, first.batch + 2, "train", rows)]
            break
    else:  # one batch size alone
        found.append(_compare(full, small, image_shape, None, "train", rows))
    if 0 < first.share < HARDLY:  # a dead net has nothing to settle
        found.append(_compare(full, small, image_shape, None, "settled", rows))
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
    rows: list[bool],
    expected: list[Tensor] | None = None,
) -> Trial | None:
    """One trial; None if the whole network does not take such images.

    Nor does one take them that hands out other than ``rows``: ``x.reshape(-1, 360)`` takes pixels
    of one image for those of another rather than fail. Nor one that makes no number of them: but of
    those that it was cut for, in eval mode (``expected``), it has to.

    Raises: ValueError if the networks differ, or the cut one does not run.
    """
    whole = full
    if mode == "settled":
        full, small = _settled(full, size), _settled(small, size)
    images = drawn(size, like(full), batch or 0, batch)
    first = expected is not None
    try:
        expected = outputs(full, images, mode == "train") if expected is None else expected
    except Exception:  # the user's forward wants another size, or a larger batch
        return None
    if _rows(expected, images) != rows:
        return None
    if not first and any(bool(tensor.isnan().any()) for tensor in expected):
        return None  # such as the mean of a map that has no pixel left
    count, *shape = _image_shape(images)
    where = f"in {mode} mode on {told(size)}"
    try:
        found = outputs(small, images, mode == "train")
    except Exception as error:  # the same forward, with smaller layers
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise Refused(f"got a cut net that fails {where} ({reason}); do report it") from error
    absolute, relative, share = 0.0, 0.0, 1.0
    noise = None
    for place, (a, b) in enumerate(zip(expected, found, strict=True)):
        if a.shape != b.shape or not a.numel():
            raise Refused(f"got outputs of other shapes {where}; do report it")
        apart, largest = _largest(_gap(a, b)), _largest(a[a.isfinite()])
        varies = _gap(a, a[:1].expand_as(a))
        spread = _largest(varies[varies.isfinite()]) if rows[place] else largest
        exact = like(full).dtype
        allowed = TOLERANCE * spread + ROUNDING * torch.finfo(exact).eps * largest
        if not apart <= allowed and exact == torch.float64:
            noise = noise or _noise(whole, size, images, mode, expected)
            allowed += NOISE * noise[place]
        if not apart <= allowed and exact == torch.float64:
            raise Refused(
                f"got outputs that differ by {apart / (spread or largest):.1e} of what varies with "
                f"the image, {where}; need {TOLERANCE:.0e}"
            )
        absolute = max(absolute, apart)
        relative = max(relative, apart / (spread or largest or 1.0))
        share = min(share, spread / largest if largest else 1.0)
    return Trial(tuple(shape), count, mode, absolute, relative, share)


def _gap(a: Tensor, b: Tensor) -> Tensor:
    """|a - b|; none between infinities of one sign, such as the logits that a mask rules out."""
    return (a - b).abs().masked_fill(a == b, 0.0)


def _largest(x: Tensor) -> float:
    return float(x.abs().max()) if x.numel() else 0.0


def _image_shape(inputs: Sequence[Any]) -> torch.Size:
    return next(x.shape for x in inputs if isinstance(x, Tensor))


def _rows(results: list[Tensor], inputs: Sequence[Any]) -> list[bool]:
    """Which of a network's outputs have a row for every image."""
    count = _image_shape(inputs)[0]
    return [result.shape[:1] == (count,) for result in results]


class Rounded(TorchDispatchMode):
    """Results of operations, each number off by up to a unit in the last place, at random."""

    def __init__(self) -> None:
        super().__init__()
        self.draw = torch.Generator().manual_seed(0)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        views = any(of.alias_info for of in func._schema.returns)
        return result if views else tree_map_only(Tensor, self._off, result)

    def _off(self, x: Tensor) -> Tensor:
        if not x.is_floating_point():
            return x
        unit = 2 * torch.rand(x.shape, generator=self.draw, dtype=torch.float64) - 1
        return x * (1 + torch.finfo(x.dtype).eps * unit).to(x)


def _noise(
    full: nn.Module, size: Given, images: Sequence[Any], mode: str, expected: list[Tensor]
) -> list[float]:
    """By output, how far a network is from itself if it rounds otherwise.

    Norms divide by the spread of a batch, one after the other: of a channel that is the same for
    every image they make numbers that are rounding and nothing else.

    Source: Monte Carlo arithmetic, Parker 1997 [parker1997monte].
    """
    with Rounded():  # what settles statistics rounds, too
        full = _settled(full, size) if mode == "settled" else full
        other = outputs(full, images, mode == "train")
    pairs = zip(expected, other, strict=True)
    return [_largest(_gap(a, b)) for a, b in pairs]


@torch.no_grad()
def outputs(net: nn.Module, inputs: Sequence[Any], batch_statistics: bool = False) -> list[Tensor]:
    """All tensors that a net returns, in float64, run in eval mode; it is left as it was.

    ``batch_statistics``: its norms in train mode.
    """
    with evaluating(net), keeping_buffers(net), as_exact_as(net):
        for module in net.modules():
            if isinstance(module, _BatchNorm):
                module.train(batch_statistics)
        output = net(*again(inputs))
    return [tensor.detach().double() for tensor in tensors_in(output)]


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
