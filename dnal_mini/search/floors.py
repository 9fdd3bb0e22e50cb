"""What keeps a network alive: layers that must not close as a whole."""

import math
from collections.abc import Mapping

import torch
from torch import nn

from dnal_mini.gating import gates, site_of
from dnal_mini.graph.copies import copied
from dnal_mini.methods.contract import Values
from dnal_mini.pruning.analysis import facts_of
from dnal_mini.pruning.foldgates import drop_gates
from dnal_mini.pruning.prepare import prepare, tensors_of


def collapse_floors(net: nn.Module, image_shape: tuple[int, ...], floor: float) -> dict[str, int]:
    """Channels that each vital gate must leave open, by gate name: at least 1.

    A gate is vital if the network's output no longer depends on its input once all of its
    channels are closed: every gate of a plain chain, none of a residual branch.
    """
    opened = copied(net)
    for gate in gates(opened).values():
        torch.nn.init.constant_(gate.s, math.inf)
    floors = {}
    plain = drop_gates(opened)
    graph, tensors = prepare(plain, image_shape), tensors_of(plain)
    for name, gate in gates(net).items():
        dead = facts_of(graph, tensors, zeroed={site_of(net, name)}, forward_only=True)
        if dead.output_is_constant():
            floors[name] = max(1, math.ceil(floor * len(gate.s)))
    return floors


def keep_alive(
    masks: Values, values: Values, floors: Mapping[str, int]
) -> tuple[Values, dict[str, int]]:
    """Masks with the channels of highest value opened where a vital layer is under its floor.

    Also the number of channels opened, by name: so a layer never closes as a whole without a word.
    """
    kept, opened = dict(masks), {}
    for name, mask in masks.items():
        missing = floors.get(name, 0) - int(mask.sum())
        if missing > 0:
            closed = values[name].masked_fill(mask, -math.inf)
            kept[name] = mask.clone()
            kept[name][closed.topk(missing).indices] = True
            opened[name] = missing
    return kept, opened
