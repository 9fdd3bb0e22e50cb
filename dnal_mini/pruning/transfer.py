"""What each kind of operation does to channels: one rule per word of ``graph/ops.py``.

A rule stores how a node's channels come from those of its inputs and in which state they are. It
raises ``Broken`` (or whatever the operation itself raises) where the operation is used in a way
that the rule does not cover; the node is then a wall. The functions on shadows are used again
with the widths of the pruned network (``keepsets.py``).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from dnal_mini.graph.ops import DIVISIONS, DROPOUT, TIMES, arguments, name_of
from dnal_mini.graph.places import like, shape_of
from dnal_mini.pruning.facts import CONSTANT, FIXED, LIVE, ZERO, Analysis, Unknown, known, pick
from dnal_mini.pruning.operands import on_values, single
from dnal_mini.pruning.provenance import SPOTS, Broken, Shadow, fresh, read, rows_of_blocks
from dnal_mini.pruning.weights import map_rule, norm_rule, scale_rule, weights_rule


def _same_rule(node: fx.Node, analysis: Analysis) -> None:
    """Elementwise on one tensor: a known value goes through the very operation."""
    x, shadow = single(node, analysis)
    facts, name = analysis.facts[x], name_of(node)
    state, value, steady = facts.state.clone(), facts.value, facts.steady.clone()
    learned = [v for n in node.all_input_nodes if isinstance(v := analysis.values[n], Tensor)]
    if any(isinstance(analysis.values[n], Unknown) for n in node.all_input_nodes):
        raise Broken("an unknown number")
    if any(numbers.numel() != 1 for numbers in learned):
        raise Broken("numbers per channel that are not a layer's")
    if learned and name != "prelu":  # only 0 times a learned number is sure to stay what it is
        state[~((state >= FIXED) | ((state == ZERO) & (name in TIMES)))] = FIXED
    elif name in DROPOUT:
        steady &= state != CONSTANT
    else:
        state, value = known(state, on_values(node, analysis, {x: value}))
    if not bool(value.isfinite().all()):
        raise Broken("not finite at a constant")
    if len(shape_of(node)) != len(shadow.shape):
        raise Broken("numbers with more axes")
    _channelwise(node, analysis, "same", shadow, state, value, steady)


def _channelwise(
    node: fx.Node,
    analysis: Analysis,
    kind: str,
    shadow: Shadow,
    state: Tensor,
    value: Tensor,
    steady: Tensor,
) -> None:
    """Store facts of an operation whose channel j is made of channel j."""
    x = next(n for n in node.all_input_nodes if n in analysis.facts)
    analysis.add(node, kind, shadow, state, value, steady, [(x, torch.arange(len(state)))])


def _pool_rule(node: fx.Node, analysis: Analysis) -> None:
    """Pooling and interpolation: a constant stays one unless a padded mean meets the border."""
    (x, shadow), name = single(node, analysis), name_of(node)
    values = node.meta["val"]
    several = isinstance(values, tuple | list)  # a maximum, and where it stood
    shape = tuple(values[0].shape) if several else shape_of(node)
    dims = int(name[-2]) + 2 if name[-1] == "d" and name[-2].isdigit() else len(shadow.shape)
    if shadow.keys is None or shadow.axis != 1 or not 3 <= dims == len(shadow.shape) == len(shape):
        raise Broken("channels are not along axis 1")
    facts = analysis.facts[x]
    state = facts.state.clone()
    if name.startswith("avg_pool") and any(arguments(node)["padding"]):
        state[state == CONSTANT] = FIXED
    if several and any(user.args[1:] != (0,) for user in node.users):
        state.fill_(LIVE)  # where a maximum stood is another number
    value = facts.value.masked_fill(state >= FIXED, 0)
    out: Any = shadow.resized(shape)
    out = (out,) * len(values) if several else out
    _channelwise(node, analysis, "pool", out, state, value, facts.steady)


def mean_of(node: fx.Node, shadow: Shadow) -> Shadow:
    """The shadow that a mean over pixels leaves.

    Raises: Broken if it runs over images or channels.
    """
    given, count = arguments(node), len(shadow.shape)
    dims = given.get("dim")
    if shadow.keys is None or not dims:
        raise Broken("a mean over images or channels")
    dims = {d % count for d in ([dims] if isinstance(dims, int) else dims)}
    if dims & {0, shadow.axis}:
        raise Broken("a mean over images or channels")
    if given["keepdim"]:
        shape = tuple(1 if d in dims else size for d, size in enumerate(shadow.shape))
        return Shadow(shape, shadow.keys, shadow.axis)
    shape = tuple(size for d, size in enumerate(shadow.shape) if d not in dims)
    return Shadow(shape, shadow.keys, shadow.axis - sum(d < shadow.axis for d in dims))


def _mean_rule(node: fx.Node, analysis: Analysis) -> None:
    x, shadow = single(node, analysis)
    out = mean_of(node, shadow)
    facts = analysis.facts[x]
    state = facts.state.clone()
    if name_of(node) == "sum":
        state[state == CONSTANT] = FIXED  # times the number of pixels: not followed
    value = facts.value.masked_fill(state >= FIXED, 0)
    _channelwise(node, analysis, "mean", out, state, value, facts.steady)


def padding_of(node: fx.Node, shadow: Shadow) -> tuple[int, int, str, float]:
    """Channels added in front and behind, what pixels are padded with ("" for none), its value.

    Raises: Broken if images are added, or channels cut off or mirrored.
    """
    given = arguments(node)
    pads, mode, fill = list(given["pad"]), given.get("mode", "constant"), given["value"]
    pairs = list(zip(pads[::2], pads[1::2], strict=True))
    own = len(shadow.shape) - 1 - shadow.axis
    before, after = pairs[own] if len(pairs) > own else (0, 0)
    pixels = any(pair != (0, 0) for place, pair in enumerate(pairs) if place != own)
    if len(pairs) >= len(shadow.shape) or min(before, after) < 0:
        raise Broken("images are padded, or channels cut off")
    if before + after and mode != "constant":
        raise Broken("channels are mirrored")
    return before, after, mode if pixels else "", float(fill or 0)


def _pad_rule(node: fx.Node, analysis: Analysis) -> None:
    x, shadow = single(node, analysis)
    if not shadow.plain:
        raise Broken("channels are not along one axis")
    before, after, mode, fill = padding_of(node, shadow)
    at = torch.cat([torch.full((before,), -1), shadow.channels, torch.full((after,), -1)])
    state, value, steady = pick(analysis.facts[x], at)
    state, value = known(state, torch.where(at < 0, fill, value))
    if mode == "constant":
        meets = (at >= 0) & (state < FIXED) & ((value != fill) | ~steady)  # in either mode
        state[meets], value[meets] = FIXED, 0
    out = fresh(len(at), shape_of(node), shadow.axis)
    analysis.add(node, "pad", out, state, value, steady, [(x, at)])


def pairs_of(x: Shadow, y: Shadow, width: int) -> tuple[Tensor, Callable[[Tensor], Shadow]]:
    """Which channel of x meets which of y, as ``x * width + y``; and the result's shadow by name.

    Raises: Broken if the tensors do not fit each other.
    """
    shape = tuple(torch.broadcast_shapes(x.shape, y.shape))
    if x.keys is not None and y.keys is not None and len(x.shape) == len(y.shape):
        longer, shorter = (x, y) if len(x.keys) >= len(y.keys) else (y, x)
        assert longer.keys is not None
        assert shorter.keys is not None
        alone = len(shorter.keys) == 1 and shorter.shape[longer.axis] == 1
        if alone or (x.axis == y.axis and len(x.keys) == len(y.keys)):
            spots = longer.keys % SPOTS
            pairs = x.channels * width + y.channels
            return pairs, lambda named: Shadow(shape, named * SPOTS + spots, longer.axis)
    a, b = torch.broadcast_tensors(x.codes(), y.codes())
    pairs = a // SPOTS * width + b // SPOTS
    return pairs, lambda named: read(named * SPOTS + torch.maximum(a % SPOTS, b % SPOTS))


def _join_rule(node: fx.Node, analysis: Analysis) -> None:
    """Elementwise on two tensors: add, sub, mul, div, maximum."""
    operands = [n for n in node.args if isinstance(n, fx.Node) and n in analysis.facts]
    tensors = [n for n in node.all_input_nodes if n in analysis.facts]
    if len(operands) == 1 == len(tensors):
        return _same_rule(node, analysis)
    if len(operands) != 2 or len(tensors) != len(node.all_input_nodes):
        raise Broken("not two tensors")
    x, y = operands
    a, b = analysis.values[x], analysis.values[y]
    if not (isinstance(a, Shadow) and isinstance(b, Shadow)):
        raise Broken("a tuple")
    width = len(analysis.facts[y].state)
    pairs, result = pairs_of(a, b, width)
    met = in_order(pairs)
    sources = [(x, met // width), (y, met % width)]
    (sx, vx, tx), (sy, vy, ty) = (pick(analysis.facts[n], at) for n, at in sources)
    name, state, steady = name_of(node), torch.maximum(sx, sy), tx & ty
    if name in DIVISIONS:
        state[(sy != CONSTANT) & (state < FIXED)] = FIXED
        state[(sy >= FIXED) | (sx >= FIXED)] = LIVE
        vy = torch.where(sy == CONSTANT, vy, 1.0)
    value = on_values(node, analysis, {x: vx, y: vy} if x is not y else {x: vx})
    state, value = known(state, value)
    if name in TIMES:
        zero = (sx == ZERO) | (sy == ZERO)
        state[zero], value[zero], steady[zero] = ZERO, 0, True
    shadow = result(places_of(pairs, met))
    analysis.add(node, "join", shadow, state, value, steady, sources)


def in_order(found: Tensor) -> Tensor:
    """The different entries in order of appearance."""
    entries, at = found.flatten().unique(return_inverse=True)
    first = torch.full((len(entries),), found.numel())
    first.scatter_reduce_(0, at, torch.arange(found.numel()), "amin")
    return entries[first.argsort()]


def places_of(wanted: Tensor, among: Tensor) -> Tensor:
    """Where each wanted entry stands in a list of different ones; -1 if it does not."""
    ascending = among.sort()
    at = torch.searchsorted(ascending.values, wanted.contiguous()).clamp(max=len(among) - 1)
    return torch.where(ascending.values[at] == wanted, ascending.indices[at], -1)


def moved(
    node: fx.Node, analysis: Analysis, values: dict[fx.Node, Any], given: tuple | None = None
) -> tuple[Any, list[tuple[fx.Node, int]]]:
    """Run an operation that moves elements on codes instead of numbers.

    ``given``: its arguments, where they are not the node's own. Returns what it returned, and
    ``(input node, first code's channel)`` for every tensor read.
    """
    read_from: list[tuple[fx.Node, int]] = []
    total = 0

    def codes(n: fx.Node) -> Any:
        nonlocal total
        value = values[n]
        if isinstance(value, Tensor | Unknown):
            raise Broken("numbers that are not a layer's")
        start, total = total, total + len(analysis.facts[n].state)
        read_from.append((n, start))
        parts = value if isinstance(value, tuple) else (value,)
        coded = tuple(part.codes() + start * SPOTS for part in parts)
        return coded if isinstance(value, tuple) else coded[0]

    args: Any = map_arg(node.args if given is None else given, codes)
    kwargs: Any = map_arg(node.kwargs, codes)
    if name_of(node) in VIEWS:  # the codes need not lie in memory as the numbers did
        return args[0].reshape(args[1]), read_from
    return like(node, *args, **kwargs), read_from


VIEWS = {"view", "reshape", "_unsafe_view"}


def _move_rule(node: fx.Node, analysis: Analysis) -> None:
    """Whatever moves elements and changes none: look where the codes have gone."""
    result, read_from = moved(node, analysis, analysis.values)
    total = sum(len(analysis.facts[n].state) for n, _ in read_from)
    if isinstance(result, tuple | list):
        parts = tuple(read(part) for part in result)
        found = torch.arange(total)
        blocks = [part.channels.unique() for part in parts]
        shadow: Any = parts
    else:
        whole = read_or_raw(result)
        found = in_order(whole.channels)
        shadow = whole.relabelled(places_of(torch.arange(total), found))
        if shadow.plain and len(shadow.keys.unique()) != len(shadow.keys):
            raise Broken("a channel stands at two places")
        made_here = all(
            isinstance(v := analysis.values[n], Shadow) and v.raw is None for n, _ in read_from
        )
        blocks = rows_of_blocks(shadow) if made_here else []  # a grid that is only turned: no
    sources = []
    for n, start in read_from:
        own = found - start
        inside = (own >= 0) & (own < len(analysis.facts[n].state))
        sources.append((n, own.masked_fill(~inside, -1)))
    states = [pick(analysis.facts[n], at) for n, at in sources]
    state = torch.stack([s for s, _, _ in states]).amax(0)  # -1 picks zero: the others decide
    value = torch.stack([v for _, v, _ in states]).sum(0)
    steady = torch.stack([t for _, _, t in states]).all(0)
    analysis.add(node, "move", shadow, state, value, steady, sources, blocks=blocks)


def read_or_raw(codes: Tensor) -> Shadow:
    """A shadow even for a tensor on its way: five axes, images and channels in another order."""
    try:
        return read(codes)
    except Broken:
        return Shadow(tuple(codes.shape), None, raw=codes)


RULES: dict[str, Callable[[fx.Node, Analysis], None]] = {
    "conv": weights_rule,
    "transposed": weights_rule,
    "linear": weights_rule,
    "norm": norm_rule,
    "scale": scale_rule,
    "map": map_rule,
    "same": _same_rule,
    "pool": _pool_rule,
    "mean": _mean_rule,
    "pad": _pad_rule,
    "join": _join_rule,
    "move": _move_rule,
}
