"""The SS layer: one learnable soft switch per channel. Its ``forward`` is the idea of the book."""

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from dnal_mini.refused import need_number, need_word

Mode = Literal["off", "soft", "hard"]


class ScaledSigmoid(nn.Module):
    """Soft switch per channel: ``x * sigmoid(delta * s)``.

    Input and output: (batch, channels, ...), for images with height and width. ``mode`` is a word:
    "off" is the identity (gain 1), "soft" multiplies by ``p = sigmoid(delta * s)``,
    "hard" multiplies by 1 where ``p > threshold`` and by 0 elsewhere. ``s`` starts at 0, where
    p = 0.5 for every delta.

    Source: Guo et al. 2022, eq. 1-4 [guo2022dnal].
    Differs: the paper's binary function is ``s > 0``, our default ``threshold = 0.5``; the authors'
    scripts keep a channel where ``p > 0.9``: pass ``threshold=0.9`` to have theirs.
    Example:
        >>> gate = dnal.ScaledSigmoid(3)
        >>> gate.s.data = torch.tensor([-1.0, 0.1, 2.0])
        >>> for delta in (1.0, 10.0, 100.0):
        ...     dnal.set_gates(gate, delta=delta)
        ...     print([round(p, 2) for p in gate.p.tolist()])
        [0.27, 0.52, 0.88]
        [0.0, 0.73, 1.0]
        [0.0, 1.0, 1.0]
    """

    delta: Tensor  # steepness, a scalar without gradient

    def __init__(self, channels: int, threshold: float = 0.5) -> None:
        super().__init__()
        need_number("channels", channels, 1, whole=True)
        need_number("threshold", threshold, 0, 1, ends=False)
        self.s = nn.Parameter(torch.zeros(channels))
        self.register_buffer("delta", torch.tensor(1.0))
        self.mode: Mode = "off"
        self.threshold = threshold

    @property
    def p(self) -> Tensor:
        """Soft gate ``sigmoid(delta * s)`` per channel, whatever the mode: (channels,)."""
        return torch.sigmoid(self.delta * self.s)

    @property
    def is_open(self) -> Tensor:
        """Hard decision per channel, a boolean (channels,); ``s = 0`` counts as closed."""
        return self.p > self.threshold

    def gain(self) -> Tensor | None:
        """Factor per channel in the present mode: (channels,), or None when off."""
        need_word("gate mode", self.mode, get_args(Mode))
        if self.mode == "off":
            return None
        return self.p if self.mode == "soft" else self.is_open.to(self.s)

    def forward(self, x: Tensor) -> Tensor:
        gain = self.gain()
        return x if gain is None else x * gain.reshape(-1, *[1] * (x.dim() - 2)).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{len(self.s)}, mode={self.mode!r}"
