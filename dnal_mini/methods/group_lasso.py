"""Group lasso: a price on the length of all that makes a channel; what is not needed becomes 0."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dnal_mini.gating import set_gates, site_of, weight_parameters
from dnal_mini.methods.contract import Method, Subject, Values
from dnal_mini.methods.controls import filters
from dnal_mini.refused import Refused
from dnal_mini.training.stage import Stage, Work

RAMP = 0.2  # of the epochs, in which the price rises to its height


@dataclass(frozen=True)
class GroupLasso(Method):
    """Loss + group_price * sum of sqrt(size) * length over the groups, by proximal steps.

    A group is a filter with its bias and with the scale and shift of its norm: a channel whose
    group is 0 is 0 for every image, so that cutting it changes nothing. A step of gradient descent
    on the loss is followed by ``shrunk`` groups; one that is 0 stays 0.

    Source: Wen et al. 2016, sec. 3, filters [wen2016structured]; the weight of a group and the
    step: Yuan and Lin 2006, sec. 2 [yuan2006group].
    Differs: they take filters alone and subgradients, which reach 0 by a threshold; behind a norm
    the length of a filter alone says nothing. It goes on from the weights of stage 1. A layer that
    would take the network with it keeps its strongest groups, as many as its floor.
    """

    lasso_epochs: int = 20
    """Epochs of the stage under the price; weights are trained, too."""
    lasso_lr: float = 0.05
    """Learning rate of that stage, constant."""
    group_price: float = 1e-3
    """Loss (nats) per unit of a group's length times the root of its size."""

    name: ClassVar[str] = "group-lasso"
    strength: ClassVar[str] = "group_price"
    ranges: ClassVar[Mapping[str, tuple[float, float]]] = {
        "lasso_epochs": (1, math.inf), "lasso_lr": (1e-12, math.inf), "group_price": (0, math.inf),
    }  # fmt: skip

    def stages(self, weights: Stage) -> tuple[Stage, ...]:
        """Weights under the price, gates off, without weight decay."""
        stage = replace(weights, name="lasso_stage", epochs=self.lasso_epochs, lr=self.lasso_lr)
        return (replace(stage, schedule="constant", weight_decay=0.0, price=self.group_price),)

    def work(self, stage: Stage, subject: Subject) -> Work:
        """Gradient descent on cross-entropy, and behind each step ``shrunk`` groups."""
        net, groups, price = subject.net, groups_of(subject.net), [0.0]
        alive = {name: rows_of(parts).any(1) for name, parts in groups.items()}
        set_gates(net, mode="off")

        def ramp(epoch: int) -> None:
            price[0] = stage.price * min(1.0, epoch / (RAMP * stage.epochs))

        def shrink(rate: float) -> None:
            for name, parts in groups.items():
                by = shrunk(rows_of(parts), rate * price[0], subject.floors.get(name, 0))
                by *= alive[name]  # what momentum has moved goes back to 0
                alive[name] = by > 0
                for part in parts:
                    part.data.mul_(by.view(-1, *[1] * (part.dim() - 1)))

        return Work(
            groups=({"params": list(weight_parameters(net))},),
            before_epoch=ramp,
            after_step=shrink,
            measure=lambda: {"open": sum(int(mask.sum()) for mask in alive.values())},
        )

    def values(self, subject: Subject) -> Values:
        """The length of each group over the root of its size."""
        every = groups_of(subject.net).items()
        return {name: rows_of(parts).square().mean(1).sqrt().cpu() for name, parts in every}

    def alive(self, subject: Subject) -> Values:
        """Groups that are not 0."""
        return {name: value > 0 for name, value in self.values(subject).items()}


def rows_of(parts: Sequence[Tensor]) -> Tensor:
    """All numbers of a gate's groups: (channels, size of a group)."""
    return torch.cat([part.detach().reshape(len(part), -1) for part in parts], 1)


def shrunk(rows: Tensor, step: float, floor: int = 0) -> Tensor:
    """By what each group is multiplied: the minimum of 1/2 |x - w|^2 + step * sqrt(size) * |x|.

    rows: (groups, size), one group w a row -> (groups,), in [0, 1]. ``floor``: so many of the
    longest stay as they are where they would become 0. A group of zeros stays.

    Source: Yuan and Lin 2006, sec. 2 [yuan2006group].
    """
    lengths = rows.norm(dim=1)
    factors = (1 - step * math.sqrt(rows.shape[1]) / lengths.clamp(min=1e-30)).clamp(min=0)
    if floor:
        best = lengths.topk(floor).indices
        factors[best] = torch.where(factors[best] > 0, factors[best], 1.0)
    return factors


def groups_of(net: nn.Module) -> dict[str, list[Any]]:
    """The tensors that make the channels of each gate, along their first axis, by gate.

    Raises: ValueError for a convolution that makes the channels of two gates.
    """
    found: dict[str, list[Any]] = {}
    made_by = filters(net)
    if twice := [name for name, conv in made_by.items() if list(made_by.values()).count(conv) > 1]:
        raise Refused(
            f"got {twice[0]} and {twice[1]}, whose channels one convolution makes; need one for "
            "each gate; do take another method, or leave gates out: add_gates(net, where=)"
        )
    for name, conv in made_by.items():
        site: Any = net.get_submodule(site_of(net, name))
        layers = [conv, site] if isinstance(site, _BatchNorm) else [conv]
        parts = [part for layer in layers for part in (layer.weight, layer.bias)]
        found[name] = [part for part in parts if part is not None]
    return found
