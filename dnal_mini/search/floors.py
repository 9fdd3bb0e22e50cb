"""What keeps a network alive: layers that must not close as a whole."""

import copy
import math
from collections.abc import Iterator, Mapping

import torch
from torch import nn

from dnal_mini.gating import gates
from dnal_mini.pruning.analysis import facts_of, prepare
from dnal_mini.pruning.foldgates import drop_gates
from dnal_mini.runs.runlog import Row


def collapse_floors(
    net: nn.Module, image_shape: tuple[int, int, int], floor: float
) -> dict[str, int]:
    """Channels that each vital gate must leave open, by gate name: at least 1.

    A gate is vital if the network's output no longer depends on its input once all of its
    channels are closed: every gate of a plain chain, none of a residual branch.
    """
    opened = copy.deepcopy(net)
    for gate in gates(opened).values():
        torch.nn.init.constant_(gate.s, math.inf)
    floors = {}
    if isinstance(net, torch.fx.GraphModule):
        sites = {name: name.removesuffix("_gate") for name in gates(net)}
    else:
        sites = {name: name.removesuffix(".gate") for name in gates(net)}
    graph = prepare(drop_gates(opened), image_shape)
    for name, gate in gates(net).items():
        dead = facts_of(graph, zeroed={sites[name]}, forward_only=True)
        if dead.output_is_constant():
            floors[name] = max(1, math.ceil(floor * len(gate.s)))
    return floors


def collapse_warnings(row: Row, floors: dict[str, int]) -> Iterator[Row]:
    """A row of kind "warning" for the vital layers that are at their floor or closed."""
    low = [
        f"{name} ({row['layers'][name]['open']} of {row['layers'][name]['channels']} open)"
        for name, floor in floors.items()
        if row["layers"][name]["open"] <= floor
    ]
    if low:
        why = "held at the floor, or the layer would close as a whole; a lower gate_price helps"
        text = f"{why}: {', '.join(low)}"
        yield {"kind": "warning", "stage": row["stage"], "epoch": row["epoch"], "text": text}


@torch.no_grad()
def keep_alive(net: nn.Module, floors: dict[str, int]) -> dict[str, int]:
    """Open the gates with the largest s where a vital layer has fewer open than its floor.

    Changes ``net``; returns the number of gates opened by name. So a layer never closes as a
    whole without a word: the names go into the record.
    """
    opened = {}
    for name, gate in gates(net).items():
        missing = floors.get(name, 0) - int(gate.is_open.sum())
        if missing > 0:
            closed = gate.s.masked_fill(gate.is_open, -math.inf)
            certain = (30 + abs(math.log(gate.threshold / (1 - gate.threshold)))) / gate.delta
            gate.s[closed.topk(missing).indices] = certain
            opened[name] = missing
    return opened


@torch.no_grad()
def hold_floors(net: nn.Module, floors: Mapping[str, int], margin: float = 1e-3) -> None:
    """Keep at least ``floors[name]`` gates of a layer at s >= 0 by shifting its s, in place.

    If the k-th largest s of a layer has fallen below 0, all of them are raised until it is at
    ``margin``. A common shift is what a lower price for this layer would have done: which of
    its channels are the better ones does not change.

    Differs: not in the paper, where a layer can close as a whole and take the network with it.
    """
    for name, gate in gates(net).items():
        if name in floors:
            kth = gate.s.topk(floors[name]).values[-1]
            gate.s.add_(torch.where(kth < 0, margin - kth, 0.0))
