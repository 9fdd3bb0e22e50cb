"""What could be cut from a network, told before anything is trained or cut. Read ``analyse``.

One channel of every gate is taken as closed, all at once, and the pruner is asked what becomes of
it; nothing is cut.
"""

import copy
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dnal_mini.gating import add_gates, gates
from dnal_mini.pruning import analysis
from dnal_mini.pruning.foldgates import drop_gates
from dnal_mini.pruning.keepsets import settle
from dnal_mini.pruning.plan import Report, plan

# Why a closed channel stays: a word, what a row says, what the summary says of one and of more.
WHY = {
    TIED: ("tied", "a sum adds it to one that stays", "is tied to others", "are tied to others"),
    WALL: ("walled", "by a wall or the output", "stands at a wall", "stand at a wall"),
    HELD: ("held", "goes with one of every block", "is held by blocks", "are held by blocks"),
    CONSTANT: ("constant", "zero becomes a constant", "leaves a constant", "leave a constant"),
    NEEDED: ("no gate", "nothing closes it", "has no gate", "have no gate"),
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
        for word, _, one, more in WHY.values():
            parts += [f"{count[word]} {one if count[word] == 1 else more}"] if count[word] else []
        wide = min(44, max([len(row["layer"]) for row in self.layers] + [len("layer")]))
        lines = ["; ".join(parts), f"{'layer':{wide}}  channels  a closed channel"]
        reasons = {word: f"stays: {word}, {reason}" for word, reason, *_ in WHY.values()}
        for row in self.layers:
            name = row["layer"] if len(row["layer"]) <= wide else "…" + row["layer"][1 - wide :]
            lines.append(f"{name:{wide}}{row['channels']:10}  {reasons.get(row['why'], 'goes')}")
        return "\n".join([*lines, *(f"wall: {wall}" for wall in self.walls)])


@torch.no_grad()
def analyse(net: nn.Module, image_shape: Sequence[int] = (3, 32, 32)) -> Preview:
    """What ``prune`` could cut from a network, what not, and why; the argument is left alone.

    Gates that were trained count as they stand (hard), others as open; a network without gates is
    asked as ``add_gates`` would gate it. In each gate channel 0 is then closed.

    Raises: ValueError if the net cannot be traced or does not take such an image.
    """
    gated = copy.deepcopy(net) if gates(net) else _gated(net)
    every = gates(gated).values()
    trained = any(bool(gate.s.any()) for gate in every)
    for gate in () if trained else every:
        gate.s.fill_(torch.inf)
    rows, _ = _told(gated, image_shape)
    for gate in every:
        gate.s[0] = -torch.inf
    closed, walls = _told(gated, image_shape)
    layers = [
        {"layer": name, "channels": left, "can_go": not why, "why": why}
        for (name, left, _), (_, _, why) in zip(rows, closed, strict=True)
    ]
    return Preview(layers, walls)


def _gated(net: nn.Module) -> nn.Module:
    """The network with gates, if there is anything in it to gate."""
    try:
        return add_gates(net)
    except ValueError:  # no BatchNorm: all that prune would do is find what is dead already
        return net


def _told(
    gated: nn.Module, image_shape: Sequence[int]
) -> tuple[list[tuple[str, int, str]], list[str]]:
    """Name of every layer, channels that stay, and why channel 0 does ("": it goes); the walls."""
    facts_of_all = analysis.analyse(drop_gates(gated), image_shape)
    keeps = settle(facts_of_all, "scatter")
    rows = []
    for node, facts in facts_of_all.facts.items():
        if facts.kind in WEIGHTS:
            left = 0 if node in keeps.idle else int(keeps.mask(node).sum())
            rows.append((str(node.target), left, _why(node, facts_of_all, keeps)))
    return rows, list(facts_of_all.walls.values())


def _why(node: fx.Node, found: Analysis, keeps: Keeps) -> str:
    """The word of ``WHY`` for channel 0 of a layer, judged behind its norm and activation."""
    ends = [node]
    while len(ends[-1].users) == 1 and ends[-1] not in keeps.scatters:
        (user,) = ends[-1].users
        if user not in found.facts or found.facts[user].kind not in ("norm", "same", "scale"):
            break
        ends.append(user)
    reason = int(keeps.why[ends[-1]][0])
    if reason == NEEDED and any(found.facts[end].state[0] == ZERO for end in ends):
        return WHY[CONSTANT][0]
    return "" if reason == GONE else WHY[reason][0]
