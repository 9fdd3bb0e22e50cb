"""The captured operations once more, on shadows, with the widths of the pruned network.

It works out how the channels that stay lie in every tensor (no longer in ascending order behind a
channel shuffle), and raises ``Misfit`` where one does not arrive where it is expected. The sizes
in the graph are those of the full network: ``following`` says what they should be if the user's
code works them out from the width; whether it does is seen when the cut network runs.
"""

import itertools
from typing import Any

import torch
from torch import Tensor, fx

from dnal_mini.graph.ops import arguments, name_of
from dnal_mini.graph.places import shape_of
from dnal_mini.pruning.facts import Analysis, Facts, Keeps
from dnal_mini.pruning.provenance import REFUSALS, SPOTS, Broken, Shadow, held, read, rows_of_blocks
from dnal_mini.pruning.transfer import VIEWS, mean_of, moved, padding_of, pairs_of, places_of


class Misfit(Exception):
    """The forward code does not fit the narrow widths at ``node``."""

    def __init__(self, node: fx.Node, reason: str) -> None:
        super().__init__(reason)
        self.node = node


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
        self.keeps.inside, self.keeps.outside, self.keeps.numbers = {}, {}, {}
        for node in self.analysis.graph.nodes:
            if node in self.keeps.idle:
                self._leave_out(node)
                continue
            try:
                self._step(node)
            except REFUSALS as error:
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
            self.values[node] = self.analysis.values.get(node)
        else:
            self._lay(node, facts)
            if node in self.keeps.scatters:
                self._emit(node)

    def _must_be_whole(self, node: fx.Node) -> None:
        """Raises: Broken if a tensor or a number is not what it is in the full network."""
        full, narrow = self.analysis.values.get(node), self.values.get(node)
        if isinstance(full, Tensor):
            return
        for a, b in zip(_parts(full), _parts(narrow), strict=True):
            known = isinstance(a, Shadow)
            if known and (a.shape != b.shape or not torch.equal(a.codes(), b.codes())):
                raise Broken("a wall reads it")

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
                self.keeps.inside[node] = places_of(facts.sources[0][1][kept], source.channels)
                shadow = held(kept, full.shape)
            case "norm" | "scale":
                source = self._single(node)
                positions = self._positions(node, facts)
                shadow = Shadow(source.shape, positions * SPOTS, source.axis)
            case "same":
                shadow = self._named(self._single(node), facts.sources[0][1], len(facts.state))
            case "pool":
                shape = full[0].shape if isinstance(full, tuple) else full.shape
                shadow = self._single(node).resized(shape)
                shadow = (shadow,) * len(full) if isinstance(full, tuple) else shadow
            case "mean":
                shadow = mean_of(node, self._single(node))
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
        shadow = self.values[_reads(node, self.analysis)]
        assert isinstance(shadow, Shadow)
        return shadow

    def _positions(self, node: fx.Node, facts: Facts) -> Tensor:
        """Positions of a layer's full input that are there, in the order in which they lie."""
        source = self._single(node)
        if facts.inputs is None:
            self._must_be_whole(_reads(node, self.analysis))
            return torch.arange(0)
        before = self.analysis.values[_reads(node, self.analysis)]
        if source.keys is None or source.axis != before.axis:
            raise Broken("channels lie along another axis")
        places = {code: place for place, code in enumerate(before.keys.tolist())}
        found = [places.get(code, -1) for code in source.keys.tolist()]
        if min(found) < 0:
            raise Broken("an input arrives that the layer does not know")
        groups = self.analysis.layer(node).groups
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
        before, after, _, _ = padding_of(node, source)
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
        given = following(node, self.analysis, self.keeps)
        self.keeps.numbers[node] = given
        result, read_from = moved(node, self.analysis, self.values, given)
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


def _reads(node: fx.Node, analysis: Analysis) -> fx.Node:
    """The tensor that an operation reads beside its parameters."""
    return next(n for n in node.all_input_nodes if n in analysis.facts)


def _parts(value: Any) -> tuple:
    return value if isinstance(value, tuple) else (value,)


def following(node: fx.Node, analysis: Analysis, keeps: Keeps) -> tuple:
    """The arguments of an operation that moves elements, with sizes that follow the widths."""
    name, full = name_of(node), analysis.values[node]
    if name in VIEWS or name == "expand":
        sizes: Any = list(node.args[1])  # type: ignore[arg-type]
        for axis, size in enumerate(_sizes_left(full, keeps.mask(node))):
            if sizes[axis] != -1 and size is not None:
                sizes[axis] = size
        return (node.args[0], sizes, *node.args[2:])
    if name not in ("slice", "select", "narrow", "split", "split_with_sizes", "unflatten"):
        return node.args
    given = arguments(node)
    (x,) = node.all_input_nodes
    before = analysis.values[x]
    axis = given.get("dim", 0) % len(before.shape)
    if not isinstance(before, Shadow) or before.keys is None or axis != before.axis:
        return node.args
    stays = keeps.mask(x)[before.channels]  # by position along the axis
    left = [0, *stays.cumsum(0).tolist()]  # how many stay in front of each position
    count = len(stays)

    def at(place: int | None) -> int | None:
        if place is None or not -count <= place < count:  # a slice takes what there is
            return place
        return left[place + count if place < 0 else place]

    match name:
        case "slice" if given["step"] == 1:
            return (x, axis, at(given["start"]), at(given["end"]))
        case "select":
            return (x, axis, at(given["index"]))
        case "narrow":
            first, end = given["start"] % count, given["start"] % count + given["length"]
            return (x, axis, at(first), left[end] - left[first])
        case "split_with_sizes":
            ends = torch.tensor([0, *given["split_sizes"]]).cumsum(0).tolist()
            return (x, [left[b] - left[a] for a, b in itertools.pairwise(ends)], axis)
        case "split":
            size = given["split_size"]
            parts = [left[min(a + size, count)] - left[a] for a in range(0, count, size)]
            return (x, max(1, *parts), axis)
        case "unflatten":
            sizes = _sizes_left(full, keeps.mask(node))[axis : axis + len(given["sizes"])]
            pairs = zip(given["sizes"], sizes, strict=True)
            return (x, axis, [a if b is None or a == -1 else b for a, b in pairs])
    return node.args


def _sizes_left(full: Shadow, mask: Tensor) -> list[int | None]:
    """The size of each axis that carries channels when those outside ``mask`` are gone."""
    sizes: list[int | None] = [None] * len(full.shape)
    if full.keys is not None:
        sizes[full.axis] = int(mask[full.channels].sum())
        return sizes
    image = full.raw[0] // SPOTS if full.raw is not None else torch.zeros(())
    varying = [d for d in range(image.dim()) if bool((image != image.narrow(d, 0, 1)).any())]
    blocks = rows_of_blocks(full)
    if len(varying) != 2 or not blocks:
        return sizes
    alive = [int(mask[block].sum()) for block in blocks]
    across = varying[0] if len(blocks) == image.shape[varying[0]] else varying[-1]
    along = varying[-1] if across == varying[0] else varying[0]
    sizes[across + 1] = sum(count > 0 for count in alive)
    spots = image.shape[along] // max(len(block) for block in blocks)
    sizes[along + 1] = max(alive) * spots
    return sizes
