"""A norm and its gate in one place: the gate costs nothing when it is folded into the affine."""

from torch import Tensor, nn
from torch.func import functional_call

from dnal_mini.layers.scaled_sigmoid import ScaledSigmoid


class GatedNorm(nn.Module):
    """A BatchNorm2d and its gate in the BatchNorm's place.

    With the gate after the norm, ``p * (gamma * x + beta) = (p * gamma) * x + p * beta``: the gate
    costs nothing when it is folded into the affine. ``folded=False`` runs the two layers one after
    the other instead; both give the same values and gradients.
    """

    fx_leaf = True

    def __init__(self, norm: nn.BatchNorm2d, gate: ScaledSigmoid, gate_first: bool = False) -> None:
        super().__init__()
        self.norm, self.gate = norm, gate
        self.gate_first = gate_first
        self.folded = not gate_first and norm.affine

    def forward(self, x: Tensor) -> Tensor:
        if self.gate_first:
            return self.norm(self.gate(x))
        gain = self.gate.gain()
        if gain is None or not self.folded:
            return self.gate(self.norm(x))
        affine = {"weight": gain * self.norm.weight, "bias": gain * self.norm.bias}
        return functional_call(self.norm, affine, (x,))
