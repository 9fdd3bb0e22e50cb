"""What one channel costs: the MACs that are gone when it is closed, measured by pruning."""

import math

import torch
from torch import nn

from dnal_mini.gating import gates, set_gates
from dnal_mini.graph.copies import copied
from dnal_mini.measure.cost import cost
from dnal_mini.pruning.foldgates import drop_gates
from dnal_mini.pruning.pruner import cut_net


def macs_weights(net: nn.Module, image_shape: tuple[int, int, int]) -> dict[str, float]:
    """What one channel of each gate costs in MACs, by gate name; 1 on average over all channels.

    Measured, not derived: one channel of the gate is closed in a copy, the copy is pruned, and
    the MACs that are gone are counted.

    Differs: not in the paper, where every gate has the same price.
    """
    opened = copied(net)
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
