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
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from dnal_mini.facts import Analysis, Facts
from dnal_mini.graphs import call_of, describe, modules_around, shape_of
from dnal_mini.rules import WEIGHTS, mean_of, moved, number, others, padding_of, pairs_of, places_of
from dnal_mini.shadow import SPOTS, Broken, Shadow, held, read

GONE, NEEDED, TIED, WALL, HELD = 0, 1, 2, 3, 4  # why a channel is there
REASONS = ("gone", "needed", "tied", "walled", "held")


@dataclass
class Keeps:
    """Why each channel of each tensor stays (0: it goes), and how the channels that stay lie."""

    why: dict[fx.Node, Tensor]  # (channels,), uint8: GONE, NEEDED, TIED, WALL or HELD
    residual: str
    min_channels: int = 1
    round_to: int = 1
    scatters: set[fx.Node] = field(default_factory=set)  # branch ends that may keep a subset
    emptied: dict[fx.Node, int] = field(default_factory=dict)  # dead branch ends: their stride
    blocks: dict[fx.Node, str] = field(default_factory=dict)  # modules that go with such an end
    idle: set[fx.Node] = field(default_factory=set)  # nodes of dead branches: nobody reads them
    inside: dict[fx.Node, Tensor] = field(default_factory=dict)  # input positions, as they lie
    outside: dict[fx.Node, Tensor] = field(default_factory=dict)  # own channels, as they lie
    notes: list[str] = field(default_factory=list)

    def mask(self, node: fx.Node) -> Tensor:
        """Channels of a node's result that stay: bool."""
        return self.why[node] != GONE


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


REFUSALS = (Broken, RuntimeError, TypeError, ValueError, LookupError, AttributeError)


class Misfit(Exception):
    """The forward code does not fit the narrow widths at ``node``."""

    def __init__(self, node: fx.Node, reason: str) -> None:
        super().__init__(reason)
        self.node = node


def _give_way(misfit: Misfit, analysis: Analysis, keeps: Keeps) -> None:
    """Tie a branch that was to be scattered, else keep all channels that meet at a node."""
    node = misfit.node
    scattered = [n for n in node.all_input_nodes if _end_of(n, analysis) in keeps.scatters]
    if scattered:
        keeps.scatters -= {_end_of(n, analysis) for n in scattered}
        return
    before = {n: keeps.mask(n).clone() for n in keeps.why}
    for tensor in _tensors_behind(node, analysis):
        _pin(tensor, keeps)
    if all(torch.equal(before[n], keeps.mask(n)) for n in keeps.why):
        for tensor in keeps.why:  # nothing left to give at this place: keep all
            _pin(tensor, keeps)
    note = f"{describe(node, analysis.graph)} takes no other width: {misfit}"
    analysis.walls.setdefault(node, note)


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
    for node in analysis.graph.graph.nodes:
        facts = analysis.facts.get(node)
        whole = node.op in ("placeholder", "output") or node in analysis.walls
        if facts is not None and (facts.kind in (*WEIGHTS, "norm", "scale")):
            whole |= str(node.target) in fixed
        blind = facts is not None and facts.kind in WEIGHTS and facts.inputs is None
        if blind:  # its input is not laid out along an axis: it is read as it is
            whole |= getattr(analysis.module(node), "groups", 1) > 1
        if whole and facts is not None:
            yield node
        if whole or blind:
            yield from (n for n in node.all_input_nodes if n in analysis.facts)


# --- branches --------------------------------------------------------------------------------


def _branch_ends(analysis: Analysis, keeps: Keeps) -> Iterator[fx.Node]:
    """Modules at the end of a residual branch: they may keep fewer channels than the sum."""
    for node, facts in analysis.facts.items():
        if facts.kind != "join" or len(facts.sources) != 2:
            continue
        if getattr(node.target, "__name__", str(node.target)).strip("_") not in ADDITIONS:
            continue
        for operand, at in facts.sources:
            end = _end_of(operand, analysis)
            if end is None or len(at.unique()) != len(at) or not _comes_from_conv(end, analysis):
                continue
            if keeps.residual == "scatter" or not bool(keeps.mask(end).any()):
                yield end


ADDITIONS = {"add", "iadd", "sub", "isub"}


def _end_of(node: fx.Node, analysis: Analysis) -> fx.Node | None:
    """The last module of a branch, in front of functions that go channel by channel."""
    while node.op != "call_module":
        facts = analysis.facts.get(node)
        if facts is None or facts.kind not in ("same", "pool") or len(node.users) != 1:
            return None
        node = facts.sources[0][0]
    alone = len(node.users) == 1 and str(node.target) not in analysis.shared
    return node if alone and node not in analysis.walls else None


def _comes_from_conv(node: fx.Node, analysis: Analysis) -> bool:
    """True if a narrower tensor here makes a convolution smaller."""
    while len(node.users) == 1 and node in analysis.facts:
        kind = analysis.facts[node].kind
        if kind == "conv" and analysis.module(node).groups == 1:
            return True
        if kind not in ("norm", "pool", "same", "scale", "conv") or node in analysis.walls:
            return False
        node = node.all_input_nodes[0]
    return False


# --- letting in ------------------------------------------------------------------------------


def _let_in(analysis: Analysis, keeps: Keeps) -> None:
    """Let dead channels in until every channel that stays has what it must lie beside."""
    nodes = list(analysis.facts)
    while True:
        before = sum(int(keeps.mask(node).sum()) for node in nodes)
        for node in (*nodes, *reversed(nodes)):
            _tie(node, analysis, keeps)
        for calls in analysis.shared.values():
            _tie_calls(calls, analysis, keeps)
        for node in nodes:
            _equal_blocks(analysis.facts[node].blocks, node, keeps)
            if analysis.facts[node].kind in WEIGHTS:
                _groups(node, analysis, keeps)
                _round(node, analysis, keeps)
        if before == sum(int(keeps.mask(node).sum()) for node in nodes):
            _find_dead_branches(analysis, keeps)
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
    return node.all_input_nodes[0], at


def _equal_blocks(blocks: list[Tensor], node: fx.Node, keeps: Keeps) -> None:
    """As many channels of one block as of every other."""
    if not blocks:
        return
    why = keeps.why[node]
    most = max(int((why[block] != GONE).sum()) for block in blocks)
    for block in blocks:
        _fill(why, block, most)


def _fill(why: Tensor, among: Tensor, count: int) -> None:
    """Let the first dead ones of some channels in until ``count`` of them are there."""
    missing = count - int((why[among] != GONE).sum())
    if missing > 0:
        why[among[why[among] == GONE][:missing]] = HELD


def _groups(node: fx.Node, analysis: Analysis, keeps: Keeps) -> None:
    """Groups of a convolution stay of equal size; a group that is dead on both sides goes."""
    facts, module = analysis.facts[node], analysis.module(node)
    groups = getattr(module, "groups", 1)
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
    _fill(why, torch.arange(len(why)), min(wanted, len(why)))


def _find_dead_branches(analysis: Analysis, keeps: Keeps) -> None:
    """Branches that add nothing and can be left out as a whole."""
    keeps.emptied, keeps.blocks, keeps.idle = {}, {}, set()
    for end in keeps.scatters:
        if bool(keeps.mask(end).any()) or not bool(keeps.mask(next(iter(end.users))).any()):
            continue
        for name, idle, start in (*_dead_blocks(end, analysis), _dead_chain(end, analysis, keeps)):
            stride = stride_between(shape_of(start), shape_of(end))
            if stride is None or not isinstance(analysis.values.get(start), Shadow):
                continue
            keeps.emptied[end] = stride
            keeps.idle |= idle
            if name:
                keeps.blocks[end] = name
            break


def _dead_blocks(end: fx.Node, analysis: Analysis) -> Iterator[tuple[str, set[fx.Node], fx.Node]]:
    """Modules, largest first, that read one tensor and hand out a dead one and nothing else."""
    for name in modules_around(end):
        inside = {n for n in analysis.graph.graph.nodes if name in modules_around(n)}
        read = {n for node in inside for n in node.all_input_nodes} - inside
        handed = {n for n in inside for user in n.users if user not in inside}
        calls = sum(call_of(n, name) != call_of(end, name) for n in inside)
        if len(read) == 1 and handed == {end} and calls == 0:
            yield name, inside, *read


def _dead_chain(
    end: fx.Node, analysis: Analysis, keeps: Keeps
) -> tuple[str, set[fx.Node], fx.Node]:
    """The operations of a dead branch, one after the other, and the tensor that enters it."""
    chain, node = {end}, end.all_input_nodes[0]
    while (
        len(node.users) == 1
        and len(node.all_input_nodes) == 1
        and node not in analysis.walls
        and not bool(keeps.mask(node).any())
        and _can_idle(node, analysis)
    ):
        chain.add(node)
        node = node.all_input_nodes[0]
    return "", chain, node


def _can_idle(node: fx.Node, analysis: Analysis) -> bool:
    """True if an operation may be left out, or left alone because it keeps any shape."""
    alone = node.op == "call_module" and str(node.target) not in analysis.shared
    return alone or analysis.facts[node].kind == "same"


def stride_between(before: tuple[int, ...], after: tuple[int, ...]) -> int | None:
    """Stride that turns images of one size into those of another; None if there is none."""
    if len(before) != len(after) or len(before) < 3:
        return None
    stride = max(1, round(before[2] / after[2]))
    fits = all((b + stride - 1) // stride == a for b, a in zip(before[2:], after[2:], strict=True))
    return stride if fits and (stride == 1 or len(before) == 4) else None


def _revive(analysis: Analysis, keeps: Keeps) -> bool:
    """No tensor can be empty: a dead one that is still read keeps a channel. True if one had to."""
    for node in reversed(list(analysis.facts)):
        if bool(keeps.mask(node).any()) or node in keeps.idle:
            continue
        total = len(keeps.why[node])
        count = min(keeps.min_channels, total)
        _fill(keeps.why[node], torch.arange(total), count)
        reader = next(iter(node.users), node)
        what = f"the input of {describe(reader, analysis.graph)}"
        keeps.notes.append(f"all dead: {what} keeps {count} of {total} channels")
        return True
    return False


# --- the narrow walk -------------------------------------------------------------------------


class Walk:
    """The forward code with the narrow widths, on shadows: how the channels that stay lie."""

    def __init__(self, analysis: Analysis, keeps: Keeps) -> None:
        self.analysis, self.keeps = analysis, keeps
        self.values: dict[fx.Node, Any] = {}
        self.values.update({n: v for n, v in analysis.values.items() if isinstance(v, Tensor)})

    def run(self) -> None:
        """Fill ``keeps.inside`` and ``keeps.outside``.

        Raises: Misfit where the forward code does not fit.
        """
        self.keeps.inside, self.keeps.outside = {}, {}
        for node in self.analysis.graph.graph.nodes:
            if node in self.keeps.idle:
                self._leave_out(node)
                continue
            try:
                self._step(node)
            except (
                Broken,
                RuntimeError,
                TypeError,
                ValueError,
                LookupError,
                AttributeError,
            ) as error:
                reason = str(error).strip().splitlines()
                raise Misfit(node, reason[0] if reason else type(error).__name__) from error
        for calls in self.analysis.shared.values():
            self._same_for_all(calls)

    def _same_for_all(self, calls: list[fx.Node]) -> None:
        """A layer that is called again finds the same channels in the same order."""
        facts = self.analysis.facts
        layers = [n for n in calls if n in facts and facts[n].inputs is not None]
        for lying in (self.keeps.inside, self.keeps.outside):
            found = [lying[n] for n in layers if n in lying]
            if any(not torch.equal(other, found[0]) for other in found[1:]):
                raise Misfit(calls[-1], "it is called again with other channels")

    def _leave_out(self, node: fx.Node) -> None:
        """A node of a dead branch: its end emits zeros, the others whatever they read."""
        if node in self.keeps.emptied:
            self._emit(node)

    def _step(self, node: fx.Node) -> None:
        facts = self.analysis.facts.get(node)
        if node.op == "output" or node in self.analysis.walls:
            for n in node.all_input_nodes:
                self._must_be_whole(n)
            self.values[node] = self.analysis.values.get(node)
        elif facts is None:
            if node.op != "get_attr":
                self.values[node] = number(node, self.analysis.graph, self.values)
        else:
            if facts.given != () and facts.given != others(node, self.values):
                raise Broken("a number that depends on the width is part of the result")
            self._lay(node, facts)
            if node in self.keeps.scatters:
                self._emit(node)

    def _must_be_whole(self, node: fx.Node) -> None:
        """Raises: Broken if a tensor or a number is not what it is in the full network."""
        full, narrow = self.analysis.values.get(node), self.values.get(node)
        if isinstance(full, Tensor):
            return
        for a, b in zip(_parts(full), _parts(narrow), strict=True):
            if isinstance(a, Shadow):
                if a.shape != b.shape or not torch.equal(a.codes(), b.codes()):
                    raise Broken("a wall reads it")
            elif a is not b and a != b:
                raise Broken("a wall reads a width")

    def _lay(self, node: fx.Node, facts: Facts) -> None:
        """The narrow shadow of a node; for layers also which positions of the weights stay."""
        kept = self.keeps.mask(node).nonzero()[:, 0]
        full = self.analysis.values[node]
        match facts.kind:
            case "placeholder":
                shadow: Any = full
            case "conv" | "transposed" | "linear":
                self._positions(node, facts)
                shadow = held(kept, self._shape_after(node, full), full.axis)
            case "map":
                source = self._single(node)
                self.keeps.inside[node] = _places(source.channels, facts.sources[0][1][kept])
                shadow = held(kept, full.shape)
            case "norm" | "scale":
                source = self._single(node)
                positions = self._positions(node, facts)
                shadow = Shadow(source.shape, positions * SPOTS, 1)
            case "same":
                shadow = self._named(self._single(node), facts.sources[0][1], len(facts.state))
            case "pool":
                shadow = self._single(node).resized(full.shape)
            case "mean":
                shadow = mean_of(node, self._single(node), self.values)
            case "pad":
                shadow = self._padded(node, facts)
            case "join":
                shadow = self._joined(node, facts)
            case _:
                shadow = self._moved(node, facts)
        self.values[node] = shadow
        if isinstance(shadow, Shadow):
            self.keeps.outside[node] = shadow.channels
            there = torch.zeros_like(self.keeps.mask(node))
            there[shadow.channels.flatten()] = True
            if not torch.equal(there, self.keeps.mask(node)):
                raise Broken("other channels arrive than those that stay")

    def _shape_after(self, node: fx.Node, full: Shadow) -> tuple[int, ...]:
        if self.analysis.facts[node].kind == "linear":
            source = self.values[node.all_input_nodes[0]]
            return (*source.shape[:-1], full.shape[-1])
        return full.shape

    def _single(self, node: fx.Node) -> Shadow:
        source = next(n for n in node.all_input_nodes if n in self.analysis.facts)
        shadow = self.values[source]
        assert isinstance(shadow, Shadow)
        return shadow

    def _positions(self, node: fx.Node, facts: Facts) -> Tensor:
        """Positions of a layer's full input that are there, in the order in which they lie."""
        source = self._single(node)
        if facts.inputs is None:
            self._must_be_whole(node.all_input_nodes[0])
            return torch.arange(0)
        before = self.analysis.values[node.all_input_nodes[0]]
        if source.keys is None or source.axis != before.axis:
            raise Broken("channels lie along another axis")
        places = {code: place for place, code in enumerate(before.keys.tolist())}
        found = [places.get(code, -1) for code in source.keys.tolist()]
        if min(found) < 0:
            raise Broken("an input arrives that the layer does not know")
        groups = getattr(self.analysis.module(node), "groups", 1)
        if groups > 1:
            width = len(before.keys) // groups
            members = torch.bincount(torch.tensor(found) // width)
            if found != sorted(found) or len(members[members > 0].unique()) > 1:
                raise Broken("groups of unequal size")
        self.keeps.inside[node] = torch.tensor(found)
        return self.keeps.inside[node]

    def _named(self, source: Shadow, at: Tensor, count: int) -> Shadow:
        """The same shadow in the names of the node that it goes through."""
        labels = torch.full((int(max(source.channels.max(), at.max())) + 1,), -1)
        labels[at[at >= 0]] = torch.arange(count)[at >= 0]
        return source.relabelled(labels)

    def _padded(self, node: fx.Node, facts: Facts) -> Shadow:
        source = self._single(node)
        ((_, at),) = facts.sources
        before, after, _, _ = padding_of(node, self.analysis, source, self.values)
        inner = self._named(source, at, len(at)).channels
        edges = (at < 0).nonzero()[:, 0]
        if before + after != len(edges):
            raise Broken("padded by another number of channels")
        channels = torch.cat([edges[:before], inner, edges[before:]])
        return held(channels, shape_of(node), source.axis)

    def _joined(self, node: fx.Node, facts: Facts) -> Shadow:
        (x, ax), (y, ay) = facts.sources
        width = len(self.analysis.facts[y].state)
        pairs, result = pairs_of(self.values[x], self.values[y], width)
        named = places_of(pairs, ax * width + ay)
        if bool((named < 0).any()):
            raise Broken("channels meet that do not belong together")
        return result(named)

    def _moved(self, node: fx.Node, facts: Facts) -> Any:
        result, read_from = moved(node, self.analysis, self.values)
        total = sum(len(self.analysis.facts[n].state) for n, _ in read_from)
        labels = torch.full((total,), -1)
        for (_, start), (_, at) in zip(read_from, facts.sources, strict=True):
            labels[start + at[at >= 0]] = torch.arange(len(at))[at >= 0]
        if not isinstance(result, tuple | list):
            return self._like(node, result).relabelled(labels)
        full = self.analysis.values[node]
        parts = tuple(read(part).relabelled(labels) for part in result)
        if len(parts) != len(full):
            raise Broken("another number of parts")
        return parts

    def _like(self, node: fx.Node, codes: Tensor) -> Shadow:
        """Read codes as the full network's were read: uniform, or one code per element."""
        full = self.analysis.values[node]
        if full.raw is not None:
            return Shadow(tuple(codes.shape), None, raw=codes)
        shadow = read(codes)
        if shadow.keys is None or len(shadow.keys.unique()) != len(shadow.keys):
            raise Broken("channels are torn apart")
        if len(shadow.keys) == 1:  # one channel has no direction of its own
            return Shadow(shadow.shape, shadow.keys, full.axis)
        return shadow

    def _emit(self, end: fx.Node) -> None:
        """What the end of a branch hands to the sum: its channels at their places, else zeros."""
        user = next(iter(end.users))
        (at,) = (at for source, at in self.analysis.facts[user].sources if source is end)
        channels = at[self.keeps.mask(user)]
        self.values[end] = held(channels, self.analysis.values[end].shape)


def _parts(value: Any) -> tuple:
    return value if isinstance(value, tuple) else (value,)


def _places(held_channels: Tensor, wanted: Tensor) -> Tensor:
    """Where each wanted channel lies; -1 for one that is not there."""
    places = {channel: place for place, channel in enumerate(held_channels.tolist())}
    return torch.tensor([places.get(channel, -1) for channel in wanted.tolist()])
