"""Which gates stay so that the pruned net has the wanted number of MACs."""

import copy
import math

import torch
from torch import nn

from dnal_mini.config import SearchConfig
from dnal_mini.gating import arch_parameters, gates, set_gates
from dnal_mini.measure.cost import cost
from dnal_mini.pruning.foldgates import drop_gates
from dnal_mini.pruning.pruner import cut_net
from dnal_mini.search.floors import collapse_floors, keep_alive


def macs_weights(net: nn.Module, image_shape: tuple[int, int, int]) -> dict[str, float]:
    """What one channel of each gate costs in MACs, by gate name; 1 on average over all channels.

    Measured, not derived: one channel of the gate is closed in a copy, the copy is pruned, and
    the MACs that are gone are counted.

    Differs: not in the paper, where every gate has the same price.
    """
    opened = copy.deepcopy(net)
    set_gates(opened, mode="hard")
    for gate in gates(opened).values():
        nn.init.constant_(gate.s, math.inf)
    whole = cost(drop_gates(opened), image_shape).macs
    saved = {}
    for name, gate in gates(opened).items():
        with torch.no_grad():
            gate.s[0] = -math.inf
        saved[name] = whole - cost(cut_net(opened, image_shape)[0], image_shape).macs
        nn.init.constant_(gate.s, math.inf)
    channels = {name: len(gate.s) for name, gate in gates(net).items()}
    total = sum(saved[name] * channels[name] for name in saved)
    return {name: saved[name] * sum(channels.values()) / total for name in saved}


def share_of_macs(net: nn.Module, image_shape: tuple[int, int, int], config: SearchConfig) -> float:
    """MACs of the net pruned as its gates stand now, over those of the dense one, in (0, 1]."""
    decided = copy.deepcopy(net)
    keep_alive(decided, collapse_floors(decided, image_shape, config.floor))
    set_gates(decided, mode="hard")
    small = cut_net(decided, image_shape, config.residual)[0]
    for gate in gates(decided).values():
        nn.init.constant_(gate.s, math.inf)
    return cost(small, image_shape).macs / cost(drop_gates(decided), image_shape).macs


@torch.no_grad()
def meet_target(net: nn.Module, image_shape: tuple[int, int, int], config: SearchConfig) -> float:
    """Shift all s by one amount, so that the pruned net comes nearest to ``config.target_macs``.

    Changes ``net``; returns the shift. All gates are ranked by s and as many are opened as the
    target allows. A common shift is what a slightly other price would have done, without the luck
    that a new search brings. It costs accuracy, either way, that fine-tuning has to win back: the
    gates have been trained for each other.

    Differs: not in the paper.
    """
    every = torch.cat([gate.s for gate in gates(net).values()]).double().sort(descending=True)[0]
    gate = next(iter(gates(net).values()))
    edge = math.log(gate.threshold / (1 - gate.threshold)) / float(gate.delta)
    shares: dict[int, float] = {}

    def shifted(count: int) -> tuple[float, nn.Module]:
        """The shift that opens ``count`` gates, and a copy of the net with it."""
        shift = edge - float(every[count - 1 : count + 1].mean())
        copied = copy.deepcopy(net)
        for s in arch_parameters(copied):
            s.add_(shift)
        return shift, copied

    low, high = 1, len(every) - 1
    while low < high:
        middle = (low + high) // 2
        shares[middle] = share_of_macs(shifted(middle)[1], image_shape, config)
        low, high = (middle + 1, high) if shares[middle] < config.target_macs else (low, middle)
    shares[low] = share_of_macs(shifted(low)[1], image_shape, config)
    best = min(shares, key=lambda count: abs(shares[count] - config.target_macs))
    shift = shifted(best)[0]
    for s in arch_parameters(net):
        s.add_(shift)
    return shift
