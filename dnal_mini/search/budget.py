"""Which channels stay, so that the cut net costs what the budget allows.

Knows values and masks by gate, and no method. Read ``nearest``.
"""

from collections.abc import Callable

import torch
from torch import nn

from dnal_mini.config import Metric
from dnal_mini.gating import gates, set_gates
from dnal_mini.graph.copies import copied
from dnal_mini.measure.cost import cost
from dnal_mini.methods.contract import Values
from dnal_mini.pruning.foldgates import drop_gates
from dnal_mini.pruning.pruner import Residual, cut_net

Share = Callable[[Values], float]


@torch.no_grad()
def impose(net: nn.Module, masks: Values) -> None:
    """Close the channels that are not in the masks and open the others, hard, in place."""
    set_gates(net, mode="hard", delta=1e4, threshold=0.5)
    for name, gate in gates(net).items():
        gate.s.copy_(torch.where(masks[name].to(gate.s.device), 1.0, -1.0))


def share_of(
    net: nn.Module, image_shape: tuple[int, ...], metric: Metric, residual: Residual
) -> Share:
    """A function of masks: what the net cut to them costs, over what it costs whole; in (0, 1]."""
    opened = copied(net)
    impose(opened, {n: torch.ones_like(g.s, dtype=torch.bool) for n, g in gates(net).items()})
    whole = getattr(cost(drop_gates(opened), image_shape), metric)

    def share(masks: Values) -> float:
        impose(opened, masks)
        return getattr(cost(cut_net(opened, image_shape, residual)[0], image_shape), metric) / whole

    return share


def nearest(values: Values, share: Share, wanted: float) -> tuple[Values, float]:
    """The masks that come nearest to the ``wanted`` share, and the value they are cut at.

    All channels of all gates are ranked together and as many stay as the budget allows: what a
    slightly other price would have done, without the luck that a new search brings. It costs
    accuracy, either way, that fine-tuning has to win back: the gates have been trained for each
    other.

    Differs: not in the paper.
    """
    ranked = torch.cat([value.double().cpu() for value in values.values()])
    ranked = ranked.sort(descending=True)[0]

    def cut_at(count: int) -> float:
        return float(ranked[count - 1 : count + 1].mean())

    def masks(count: int) -> Values:
        return {name: value.double() > cut_at(count) for name, value in values.items()}

    shares: dict[int, float] = {}
    low, high = 1, len(ranked) - 1
    while low < high:
        middle = (low + high) // 2
        shares[middle] = share(masks(middle))
        low, high = (middle + 1, high) if shares[middle] < wanted else (low, middle)
    shares[low] = share(masks(low))
    best = min(shares, key=lambda count: abs(shares[count] - wanted))
    return masks(best), cut_at(best)
