"""What could be cut from a network, told before anything is trained or cut. Read ``analyse``.

Channel 0 of every gate is taken as closed, all at once, and the analysis behind the pruner is
asked what would become of it in each layer.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from dnal_mini.gating import add_gates, check_gates, gate_sites, gates
from dnal_mini.graph.copies import copied
from dnal_mini.graph.inputs import Given, given, taken_by
from dnal_mini.measure.cost import cost_of
from dnal_mini.pruning.facts import REASONS, ZERO, Analysis, Keeps
from dnal_mini.pruning.foldgates import drop_and_tell
from dnal_mini.pruning.pruner import settled
from dnal_mini.pruning.weights import WEIGHTS
from dnal_mini.refused import need_numbers

# Why a closed channel stays: what a row says, what the summary says of one layer and of more.
WHY = {
    "tied": ("a sum adds it to one that stays", "is tied to others", "are tied to others"),
    "walled": ("by a wall or the output", "stands at a wall", "stand at a wall"),
    "held": ("goes with one of every block", "is held by blocks", "are held by blocks"),
    "constant": ("zero becomes a constant", "leaves a constant", "leave a constant"),
    "no gate": ("nothing closes it", "has no gate", "have no gate"),
}


@dataclass(frozen=True)
class Preview:
    """What can be cut and what cannot; JSON-able, and a table when printed.

    ``layers``: one row per convolution or linear layer: ``layer``, ``channels`` (those that are
    left where gates are closed already), ``can_go`` (a bool: a closed channel goes), ``why`` ("",
    or the word of ``WHY``). ``walls``: operations that the analysis does not know.
    """

    layers: list[dict[str, Any]]
    walls: list[str]

    def __str__(self) -> str:
        count = Counter(row["why"] for row in self.layers)
        parts = [f"{count['']} of {len(self.layers)} layers can lose channels"]
        for why, (_, one, more) in WHY.items():
            parts += [f"{count[why]} {one if count[why] == 1 else more}"] if count[why] else []
        wide = min(44, max([5, *(len(row["layer"]) for row in self.layers)]))
        lines = ["; ".join(parts), f"{'layer':{wide}}  channels  a closed channel"]
        for row in self.layers:
            name = row["layer"] if len(row["layer"]) <= wide else "…" + row["layer"][1 - wide :]
            fate = f"stays: {row['why']}, {WHY[row['why']][0]}" if row["why"] else "goes"
            lines.append(f"{name:{wide}}{row['channels']:10}  {fate}")
        return "\n".join([*lines, *(f"wall: {wall}" for wall in self.walls)])


@torch.no_grad()
def analyse(
    net: nn.Module, image_shape: Sequence[int] = (3, 32, 32), *, example_inputs: Any = None
) -> Preview:
    """What ``prune`` could cut from a network, what not, and why; the argument is left alone.

    Gates that were trained count as they stand (hard), others as open; a network without gates is
    asked as ``add_gates`` would gate it. In each gate channel 0 is then closed.

    Raises: ValueError if the net cannot be traced or does not take such an image.
    Example:
        >>> conv, last = torch.nn.Conv2d(3, 8, 3), torch.nn.Conv2d(8, 5, 3)
        >>> print(dnal.analyse(torch.nn.Sequential(conv, torch.nn.BatchNorm2d(8), last)))
        1 of 2 layers can lose channels; 1 has no gate
        layer  channels  a closed channel
        0             8  goes
        2             5  stays: no gate, nothing closes it
    """
    need_numbers(net)
    what: Given = given(net, image_shape, example_inputs)
    cost_of(net, what)  # tells what the net does not take
    if check_gates(net) or not gate_sites(net, None, taken_by(net, what)):
        gated = copied(net)
    else:
        gated = add_gates(net, image_shape=image_shape, example_inputs=example_inputs)
    every, left = gates(gated).values(), {}
    if any(bool(gate.s.any()) for gate in every):
        found, keeps = _settled(gated, what)
        left = {found.name(n): int(keeps.mask(n).sum()) for n in found.facts}
    for gate in every:
        gate.s[:] = gate.s if left else torch.inf
        gate.s[0] = -torch.inf
    found, keeps = _settled(gated, what)
    layers = []
    for node, facts in found.facts.items():
        if facts.kind in WEIGHTS:
            name, why = found.name(node), _why(node, found, keeps)
            row = {"layer": name, "channels": left.get(name, len(facts.state))}
            layers.append(row | {"can_go": not why, "why": why})
    return Preview(layers, list(found.walls.values()))


def _settled(gated: nn.Module, what: Given) -> tuple[Analysis, Keeps]:
    cut = settled(*drop_and_tell(gated, what=what), what)
    return cut.analysis, cut.keeps


def _why(node: fx.Node, found: Analysis, keeps: Keeps) -> str:
    """The word of ``WHY`` for channel 0 of a layer, judged behind its norm and activation."""
    chain = [node]
    while len(chain[-1].users) == 1 and chain[-1] not in keeps.scatters:
        (user,) = chain[-1].users
        if user not in found.facts or found.facts[user].kind not in ("norm", "same", "scale"):
            break
        chain.append(user)
    word = REASONS[int(keeps.why[chain[-1]][0])]
    if word == "needed":
        closed = any(found.facts[each].state[0] == ZERO for each in chain)
        return "constant" if closed else "no gate"
    return "" if word == "gone" else word
