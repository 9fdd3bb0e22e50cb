"""Which channels stay: the live and needed ones, and the dead ones that others hold in place.

The user's forward code stays as it is. So a dead channel must stay where a sum adds it to a live
one, where ``chunk`` would no longer cut in the right place, where groups would become unequal.
``settle`` finds the smallest such set by letting channels in until nothing changes; then it walks
the forward code once more with the narrow widths (``Walk``), on shadows, and sees whether every
channel still arrives where it is expected. Where one does not, the channels concerned all stay,
and the settling starts again. With every channel kept the forward code fits, so this ends.
"""

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx

from dnal_mini.graph.ops import SUMS, arguments, name_of
from dnal_mini.graph.places import describe
from dnal_mini.pruning.branches import find_dead_branches
from dnal_mini.pruning.facts import GONE, HELD, NEEDED, TIED, WALL, Analysis, Keeps
from dnal_mini.pruning.replay import Misfit, Walk
from dnal_mini.pruning.weights import WEIGHTS
from dnal_mini.refused import Refused


def settle(analysis: Analysis, residual: str, min_channels: int = 1, round_to: int = 1) -> Keeps:
    """The smallest set of channels with which the forward code still works."""
    why = {node: facts.kept.to(torch.uint8) for node, facts in analysis.facts.items()}
    keeps = Keeps(why, residual, min_channels, round_to)
    for node in _held_whole(analysis):
        _pin(node, keeps)
    keeps.scatters = set(_branch_ends(analysis, keeps))
    while True:
        _let_in(analysis, keeps)
        try:
            Walk(analysis, keeps).run()
            return keeps
        except Misfit as misfit:
            _give_way(misfit, analysis, keeps)


def _give_way(misfit: Misfit, analysis: Analysis, keeps: Keeps) -> None:
    """Tie a branch that was to be scattered, else keep all channels that meet at a node."""
    node = misfit.node
    if node not in keeps.full and analysis.facts.get(node) and analysis.facts[node].blocks:
        keeps.full.add(node)
        return
    scattered = [n for n in node.all_input_nodes if _end_of(n, analysis) in keeps.scatters]
    if scattered:
        keeps.scatters -= {_end_of(n, analysis) for n in scattered}
        return
    for tensors in (list(_tensors_behind(node, analysis)), list(keeps.why)):
        before = _count(keeps)
        for tensor in tensors:
            _pin(tensor, keeps)
        if _count(keeps) > before:
            break  # the second time round all tensors: nothing was left to give at this place
    else:
        raise Refused(
            f"got {analysis.name(node)}, which does not fit the widths it was made for "
            f"({misfit}); need a forward that does the same each time"
        )
    note = f"{describe(node, analysis.graph.tensors)} takes no other width: {misfit}"
    analysis.walls.setdefault(node, note)


def _count(keeps: Keeps) -> int:
    """Channels that stay, over all tensors."""
    return sum(int(keeps.mask(node).sum()) for node in keeps.why)


def _tensors_behind(node: fx.Node, analysis: Analysis) -> Iterator[fx.Node]:
    """A node and the tensors that it reads, also by their sizes."""
    stack = [node, *node.all_input_nodes]
    while stack:
        n = stack.pop()
        if n in analysis.facts:
            yield n
        else:
            stack += n.all_input_nodes


def _pin(node: fx.Node, keeps: Keeps) -> None:
    keeps.why[node][keeps.why[node] == GONE] = WALL


def _held_whole(analysis: Analysis) -> Iterator[fx.Node]:
    """Tensors that walls, inputs and outputs of the network hold as they are."""
    fixed = {
        name
        for name, calls in analysis.shared.items()
        if any(n not in analysis.facts or analysis.facts[n].inputs is None for n in calls)
    }  # a layer called again, once in a way that its weights cannot be followed
    for node in analysis.graph.nodes:
        facts = analysis.facts.get(node)
        whole = node.op in ("placeholder", "output") or node in analysis.walls
        if facts is not None and (facts.kind in (*WEIGHTS, "norm", "scale")):
            whole |= analysis.layer(node).name in fixed
        blind = facts is not None and facts.kind in WEIGHTS and facts.inputs is None
        if blind:  # its input is not laid out along an axis: it is read as it is
            whole |= analysis.layer(node).groups > 1
        if whole and facts is not None:
            yield node
        if whole or blind:
            yield from (n for n in node.all_input_nodes if n in analysis.facts)


def _branch_ends(analysis: Analysis, keeps: Keeps) -> Iterator[fx.Node]:
    """Modules at the end of a residual branch: they may keep fewer channels than the sum."""
    for node, facts in analysis.facts.items():
        if facts.kind != "join" or len(dict(facts.sources)) != 2:
            continue  # not a sum of two different tensors
        if name_of(node) not in SUMS or arguments(node).get("alpha", 1) != 1:
            continue
        for operand, at in facts.sources:
            end = _end_of(operand, analysis)
            if end is None or len(at.unique()) != len(at) or not _comes_from_conv(end, analysis):
                continue
            if keeps.residual == "scatter" or not bool(keeps.mask(end).any()):
                yield end


def _end_of(node: fx.Node, analysis: Analysis) -> fx.Node | None:
    """The last layer of a branch, in front of operations that go channel by channel."""
    while node not in analysis.graph.layers:
        facts = analysis.facts.get(node)
        if facts is None or facts.kind not in ("same", "pool") or len(node.users) != 1:
            return None
        node = facts.sources[0][0]
    alone = len(node.users) == 1 and analysis.can_wrap(node)
    return node if alone and node not in analysis.walls else None


def _comes_from_conv(node: fx.Node, analysis: Analysis) -> bool:
    """True if a narrower tensor here makes a convolution smaller."""
    while len(node.users) == 1 and node in analysis.facts:
        kind = analysis.facts[node].kind
        if kind == "conv" and analysis.layer(node).groups == 1:
            return True
        if kind not in ("norm", "pool", "same", "scale", "conv") or node in analysis.walls:
            return False
        node = node.all_input_nodes[0]
    return False


def _let_in(analysis: Analysis, keeps: Keeps) -> None:
    """Let dead channels in until every channel that stays has what it must lie beside."""
    nodes = list(analysis.facts)
    while True:
        before = _count(keeps)
        for node in (*nodes, *reversed(nodes)):
            _tie(node, analysis, keeps)
        for calls in analysis.shared.values():
            _tie_calls(calls, analysis, keeps)
        for node in nodes:
            _equal_blocks(analysis.facts[node].blocks, node, analysis.values[node], keeps)
            if analysis.facts[node].kind in WEIGHTS:
                _groups(node, analysis, keeps)
                _round(node, analysis, keeps)
        if before == _count(keeps):
            find_dead_branches(analysis, keeps)
            if not _revive(analysis, keeps):
                return


def _enter(target: Tensor, at: Tensor, reasons: Tensor) -> None:
    """Let channels ``at`` in for the given reasons, where they are not there yet."""
    reasons = torch.where(reasons == NEEDED, TIED, reasons)
    new = (reasons != GONE) & (at >= 0)
    new &= target[at.clamp(min=0)] == GONE
    target[at[new]] = reasons[new]


def _tie(node: fx.Node, analysis: Analysis, keeps: Keeps) -> None:
    """What goes through channel by channel is there on both sides; a ChannelMap can choose."""
    facts, own = analysis.facts[node], keeps.why[node]
    if facts.kind == "map":
        return
    for source, at in facts.sources:
        there = keeps.why[source]
        if len(at.unique()) == len(at) or facts.kind != "join":  # else it is broadcast
            _enter(own, torch.arange(len(own)), there[at.clamp(min=0)].masked_fill(at < 0, GONE))
        if source not in keeps.scatters:
            _enter(there, at, own)
    if facts.kind == "pad":
        ((_, at),) = facts.sources
        own[(at < 0) & (own == GONE)] = HELD


def _tie_calls(calls: list[fx.Node], analysis: Analysis, keeps: Keeps) -> None:
    """A layer that is called again has one width for all of its calls."""
    if any(n not in analysis.facts or analysis.facts[n].inputs is None for n in calls):
        return
    for first, second in itertools.permutations(calls, 2):
        _enter(keeps.why[second], torch.arange(len(keeps.why[second])), keeps.why[first])
        (x, at), (y, to) = (_reads(n, analysis) for n in (first, second))
        _enter(keeps.why[y], to, keeps.why[x][at])


def _reads(node: fx.Node, analysis: Analysis) -> tuple[fx.Node, Tensor]:
    """The tensor a layer reads and the channel at each of its positions."""
    at = analysis.facts[node].inputs
    assert at is not None
    return next(n for n in node.all_input_nodes if n in analysis.facts), at


def _equal_blocks(blocks: list[Tensor], node: fx.Node, shadow: Any, keeps: Keeps) -> None:
    """As many channels of one block as of every other."""
    if not blocks:
        return
    why = keeps.why[node]
    parts = isinstance(shadow, tuple)  # chunk counts its parts
    if node not in keeps.full and not parts:  # rows that are dead as a whole may go, if they can
        blocks = [block for block in blocks if bool((why[block] != GONE).any())]
    most = max((int((why[block] != GONE).sum()) for block in blocks), default=0)
    for block in blocks:
        _fill(why, block, most)


def _fill(why: Tensor, among: Tensor, count: int, liked: Tensor | None = None) -> None:
    """Let dead ones of some channels in until ``count`` are there: liked ones, then the first."""
    missing = count - int((why[among] != GONE).sum())
    if missing > 0:
        dead = among[why[among] == GONE]
        if liked is not None:
            dead = torch.cat([dead[liked[dead]], dead[~liked[dead]]])
        why[dead[:missing]] = HELD


def _liked(node: fx.Node, analysis: Analysis, keeps: Keeps) -> Tensor | None:
    """Channels of a branch that its sum has anyway: they cost the trunk nothing."""
    while node not in keeps.scatters:
        after = next(iter(node.users), node)
        if len(node.users) != 1 or after not in analysis.facts:
            return None
        if analysis.facts[after].kind not in ("norm", "same", "scale", "pool"):
            return None
        node = after
    user = next(iter(node.users))
    (at,) = (at for source, at in analysis.facts[user].sources if source is node)
    liked = torch.zeros(len(keeps.why[node]), dtype=torch.bool)
    liked[at[keeps.mask(user) & (at >= 0)]] = True
    return liked


def _groups(node: fx.Node, analysis: Analysis, keeps: Keeps) -> None:
    """Groups of a convolution stay of equal size; a group that is dead on both sides goes."""
    facts, groups = analysis.facts[node], analysis.layer(node).groups
    if groups == 1 or facts.inputs is None:
        return
    x, at = _reads(node, analysis)
    outs = torch.arange(len(facts.state)).reshape(groups, -1)
    ins = at.reshape(groups, -1)
    own, there = keeps.why[node], keeps.why[x]
    alive = (own[outs] != GONE).any(1) | (there[ins] != GONE).any(1)
    for why, members in ((own, outs), (there, ins)):
        most = max(1, int((why[members[alive]] != GONE).sum(1).max())) if bool(alive.any()) else 0
        for members_of_one in members[alive]:
            _fill(why, members_of_one, most)


def _round(node: fx.Node, analysis: Analysis, keeps: Keeps) -> None:
    """Widths in multiples of ``round_to`` and of at least ``min_channels``."""
    why = keeps.why[node]
    count = int((why != GONE).sum())
    if count == 0:
        return
    wanted = max(count, keeps.min_channels)
    wanted = -(-wanted // keeps.round_to) * keeps.round_to
    _fill(why, torch.arange(len(why)), min(wanted, len(why)), _liked(node, analysis, keeps))


def _revive(analysis: Analysis, keeps: Keeps) -> bool:
    """No tensor can be empty: a dead one that is still read keeps a channel. True if one had to."""
    for node in reversed(list(analysis.facts)):
        if bool(keeps.mask(node).any()) or node in keeps.idle:
            continue
        total = len(keeps.why[node])
        count = min(keeps.min_channels, total)
        _fill(keeps.why[node], torch.arange(total), count)
        reader = next(iter(node.users), node)
        what = f"the input of {describe(reader, analysis.graph.tensors)}"
        keeps.notes.append(f"all dead: {what} keeps {count} of {total} channels")
        return True
    return False
