"""One module that gathers, scatters, pads or empties channels."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dnal_mini.refused import Refused


class ChannelMap(nn.Module):
    """Output channel j is input channel ``source[j]``, or all zeros where ``source[j]`` is -1.

    Input: (n, c, ...); output: (n, len(source), ...). For images every ``stride``-th pixel is
    taken: (n, c, h, w) gives (n, len(source), ceil(h / stride), ceil(w / stride)). One module
    serves as gather, as scatter, as ResNet's parameter-free shortcut, and (all -1) as a branch
    that is gone.

    Source: He et al. 2016, shortcut option A.
    Raises: ValueError for an index under -1 or a stride under 1.
    """

    source: Tensor  # (out channels,), long
    _behind_zero: Tensor

    def __init__(self, source: Sequence[int] | Tensor, stride: int = 1) -> None:
        super().__init__()
        source = torch.as_tensor(source, dtype=torch.long)
        if source.dim() != 1 or len(source) == 0 or int(source.min()) < -1 or stride < 1:
            raise Refused(f"got source {source.tolist()}, stride {stride}; need indices >= -1")
        self.stride = stride
        self.all_there = int(source.min()) >= 0
        self.register_buffer("source", source, persistent=False)
        self.register_buffer("_behind_zero", source + 1, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.stride > 1:
            x = x[:, :, :: self.stride, :: self.stride]
        if self.all_there:
            return x.index_select(1, self.source)
        before = (0, 0) * (x.dim() - 2) + (1, 0)  # a channel of zeros in front: number -1
        return F.pad(x, before).index_select(1, self._behind_zero)

    def extra_repr(self) -> str:
        return f"{int(self.source.max()) + 1}+ -> {len(self.source)}, stride={self.stride}"


def channel_map(x: Tensor, source: Sequence[int], stride: int) -> Tensor:
    """What a ``ChannelMap`` does, as a function."""
    return ChannelMap(source, stride).to(x.device)(x)
