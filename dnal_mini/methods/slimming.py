"""Network slimming: the scale of every norm under an L1 price; small ones go."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dnal_mini.gating import gates, site_of, weight_parameters
from dnal_mini.layers.gated_norm import Gated, GatedLate
from dnal_mini.methods.contract import Method, Subject, Values
from dnal_mini.refused import Refused
from dnal_mini.training.stage import Stage, Work


@dataclass(frozen=True)
class Slimming(Method):
    """L1 on the norms' scales while weights are trained on; a global rank decides.

    Source: Liu et al. 2017, sec. 3 [liu2017slimming].
    Differs: it goes on from the weights of stage 1, as all methods here do, where theirs are
    trained under the price from the start; the shift of a closed channel goes with it.
    """

    slimming_epochs: int = 20
    """Epochs of the stage under the price; weights are trained, too."""
    slimming_lr: float = 0.01
    """Learning rate of that stage, constant."""
    scale_price: float = 1e-4
    """Loss (nats) per unit of the absolute value of a scale."""

    name: ClassVar[str] = "slimming"
    strength: ClassVar[str] = "scale_price"
    ranges: ClassVar[Mapping[str, tuple[float, float]]] = {
        "slimming_epochs": (1, math.inf), "slimming_lr": (1e-12, math.inf),
        "scale_price": (0, math.inf),
    }  # fmt: skip
    needs_budget: ClassVar[bool] = True

    @property
    def searches_strength(self) -> bool:
        """A budget is met by the rank alone, as in the paper."""
        return False

    def stages(self, weights: Stage) -> tuple[Stage, ...]:
        """Weights and scales, gates off."""
        stage = replace(weights, name="sparse_stage", epochs=self.slimming_epochs)
        price = self.scale_price
        return (replace(stage, lr=self.slimming_lr, schedule="constant", price=price),)

    def work(self, stage: Stage, subject: Subject) -> Work:
        """Cross-entropy + scale_price * (sum of |scale| of all gated norms)."""
        scales: list[Tensor] = [norm.weight for _, norm in gated_norms(subject.net)]
        return Work(
            groups=({"params": list(weight_parameters(subject.net))},),
            penalty=lambda: torch.cat([scale.abs() for scale in scales]).sum(),
            measure=lambda: {"mean_scale": float(torch.cat(scales).detach().abs().mean())},
        )

    def values(self, subject: Subject) -> Values:
        """The absolute scale of each channel."""
        return {name: norm.weight.detach().abs() for name, norm in gated_norms(subject.net)}

    def alive(self, subject: Subject) -> Values:
        """Scales that are not 0."""
        return {name: value > 0 for name, value in self.values(subject).items()}


def gated_norms(net: nn.Module) -> Iterator[tuple[str, Any]]:
    """Each gate's name and the BatchNorm in front of it.

    Raises: ValueError for a gate that is not in one place with its norm, or a norm without scale.
    """
    for name in gates(net):
        norm: Any = net.get_submodule(site_of(net, name))
        beside = isinstance(norm, Gated) and not isinstance(norm, GatedLate)
        if not (beside and isinstance(norm, _BatchNorm) and norm.affine):
            raise Refused(
                f"got gate {name} without a norm that has scales; need one: do --order "
                "conv-bn-ss-relu, and norms that are affine"
            )
        yield name, norm
