"""Rules that choose channels without a search: what every search has to be compared with.

Each gives every gated channel a value and has no setting; how many stay is the budget's business,
so that a rule and a search can be compared at the same cost.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dnal_mini.gating import gates
from dnal_mini.graph.layer import CONVS
from dnal_mini.layers.scaled_sigmoid import ScaledSigmoid
from dnal_mini.methods.contract import Method, Subject, Values
from dnal_mini.refused import Refused


@dataclass(frozen=True)
class Control(Method):
    """A rule: all channels that the budget leaves are alive."""

    needs_budget: ClassVar[bool] = True

    def alive(self, subject: Subject) -> Values:
        """All channels."""
        every = gates(subject.net).items()
        return {name: torch.ones_like(gate.s, dtype=torch.bool) for name, gate in every}


@dataclass(frozen=True)
class Random(Control):
    """Normal numbers, so that layers keep about the same share, by chance."""

    name: ClassVar[str] = "random"

    def values(self, subject: Subject) -> Values:
        """A draw by the run's seed."""
        draw = torch.Generator().manual_seed(subject.seed)
        found = gates(subject.net).items()
        return {name: torch.randn(len(gate.s), generator=draw) for name, gate in found}


@dataclass(frozen=True)
class Uniform(Control):
    """Evenly spaced numbers in random order, so that all layers keep the same share."""

    name: ClassVar[str] = "uniform"

    def values(self, subject: Subject) -> Values:
        """Ranks in (-1/2, 1/2), in an order drawn by the run's seed."""
        draw = torch.Generator().manual_seed(subject.seed)
        counts = {name: len(gate.s) for name, gate in gates(subject.net).items()}
        return {
            name: (torch.randperm(count, generator=draw) + 0.5) / count - 0.5
            for name, count in counts.items()
        }


@dataclass(frozen=True)
class L1Norm(Control):
    """The sum of the absolute weights of a channel's filter, over the mean of its layer.

    Source: Li et al. 2017 [li2017filters].
    Differs: there each layer is given its share by hand; here all layers are ranked together.
    """

    name: ClassVar[str] = "l1-norm"

    def values(self, subject: Subject) -> Values:
        """The norm of each filter divided by its layer's mean, minus 1."""
        found = filter_norms(subject.net)
        return {name: (norms / norms.mean() - 1).cpu() for name, norms in found.items()}


def filter_norms(net: nn.Module) -> dict[str, Tensor]:
    """Sum of absolute weights of the filter that makes each gated channel, by gate: (channels,).

    Raises: ValueError for a gate without a convolution of its width in front of it.
    """
    made_by = filters(net).items()
    return {name: conv.weight.detach().abs().flatten(1).sum(1) for name, conv in made_by}


def filters(net: nn.Module) -> dict[str, Any]:
    """The convolution whose filters make the channels of each gate, by gate.

    The one that ran last before the gate's BatchNorm, in the order in which modules are defined;
    this is so in all networks of ours.
    Raises: ValueError for a gate without a convolution of its width in front of it.
    """
    found: dict[str, Any] = {}
    last: Any = None
    for name, module in net.named_modules():
        if isinstance(module, CONVS) and module.weight is not None:
            last = module
        elif isinstance(module, ScaledSigmoid):
            count = len(module.s)
            if last is None or last.out_channels != count:
                raise Refused(f"got gate {name} without a convolution of {count} channels")
            found[name] = last
    return found
