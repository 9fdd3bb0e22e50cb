"""BatchNorm over the batches of many processes, on any device.

A run with many processes then computes what a run with one does. Knows torch.distributed only.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.modules.batchnorm import _BatchNorm


@contextmanager
def synced_norms(net: nn.Module) -> Iterator[None]:
    """Every BatchNorm of ``net`` computes as a ``SyncedNorm`` inside the block.

    What a class derived from torch's does besides, it goes on doing.
    """
    norms = [module for module in net.modules() if isinstance(module, _BatchNorm)]
    classes: list[Any] = [type(norm) for norm in norms]
    for norm, kind in zip(norms, classes, strict=True):
        norm.__class__ = _synced(kind)
    try:
        yield
    finally:
        for norm, kind in zip(norms, classes, strict=True):
            norm.__class__ = kind


@cache
def _synced(kind: Any) -> type:
    """The class whose super().forward, wherever it calls that, is SyncedNorm's."""
    return type(f"Synced{kind.__name__}", (kind, SyncedNorm), {})


class SyncedNorm(_BatchNorm):
    """BatchNorm whose statistics are those of the batches of all processes together.

    On a GPU this is what torch's SyncBatchNorm computes, which does not run on a CPU.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        pass

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training or self.running_mean is None):
            return super().forward(x)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        dims = [d for d in range(x.dim()) if d != 1]
        shape = [-1 if d == 1 else 1 for d in range(x.dim())]
        mean = _MeanOfAll.apply(wide.mean(dims))
        centred = wide - mean.view(shape)
        variance = _MeanOfAll.apply(centred.square().mean(dims))
        if self.training and self.running_mean is not None:
            self._update(mean.detach(), variance.detach(), x.numel() // x.shape[1])
        out = centred * (variance + self.eps).rsqrt().view(shape)
        if self.affine:
            out = out * self.weight.view(shape) + self.bias.view(shape)
        return out.to(x.dtype)

    def _update(self, mean: Tensor, variance: Tensor, count: int) -> None:
        """Running statistics as ``nn.BatchNorm2d`` keeps them; the variance unbiased."""
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        count *= distributed.get_world_size()
        self.num_batches_tracked.add_(1)
        share = self.momentum if self.momentum is not None else 1 / int(self.num_batches_tracked)
        self.running_mean.lerp_(mean.to(self.running_mean), share)
        self.running_var.lerp_((variance * (count / (count - 1))).to(self.running_var), share)


class _MeanOfAll(torch.autograd.Function):
    """The mean of a tensor over all processes; so is its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.detach().clone()
        distributed.all_reduce(x)
        return x / distributed.get_world_size()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return _MeanOfAll.forward(ctx, gradients[0])
