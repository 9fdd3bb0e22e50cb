"""Residual branches that add nothing: which operations go with them, and what size they leave.

Read ``find_dead_branches``. A branch goes as a whole only where the size that its dead layers
would have given is known for images of every size; else one dead channel of each layer stays.
"""

from collections.abc import Iterator

from torch import fx

from dnal_mini.graph.ops import arguments, name_of
from dnal_mini.graph.places import call_of, modules_around, shape_of
from dnal_mini.pruning.facts import ZERO, Analysis, Keeps
from dnal_mini.pruning.provenance import Shadow

Dead = tuple[str, set[fx.Node], fx.Node, fx.Node]  # module, its nodes, what they read, their last


def find_dead_branches(analysis: Analysis, keeps: Keeps) -> None:
    """Fill in ``keeps.emptied``, ``blocks`` and ``idle``."""
    keeps.emptied, keeps.blocks, keeps.idle = {}, {}, set()
    for end in (node for node in analysis.facts if node in keeps.scatters):
        if bool(keeps.mask(end).any()) or not bool(keeps.mask(next(iter(end.users))).any()):
            continue
        for name, idle, start, last in (
            *_dead_blocks(end, analysis),
            _dead_chain(end, analysis, keeps),
        ):
            stride = stride_between(start, last, analysis)
            if stride is None or not isinstance(analysis.values.get(start), Shadow):
                continue
            keeps.emptied[last] = stride
            keeps.idle |= idle
            if name:
                keeps.blocks[last] = name
            break


def _dead_blocks(end: fx.Node, analysis: Analysis) -> Iterator[Dead]:
    """Modules, largest first, that read one tensor and hand out a dead one and nothing else."""
    tail = set(_behind(end, analysis))
    for name in modules_around(end):
        if name == analysis.layer(end).module:
            break  # not a block but the end alone
        inside = {n for n in analysis.graph.nodes if name in modules_around(n)}
        read = {n for node in inside for n in node.all_input_nodes} - inside
        read -= analysis.graph.tensors.keys()
        handed = {n for n in inside for user in n.users if user not in inside}
        again = any(call_of(n, name) != call_of(end, name) for n in inside)
        if len(read) == 1 == len(handed) and handed <= tail and not again:
            (start,), (last,) = read, handed
            yield name, inside, start, last


def _behind(end: fx.Node, analysis: Analysis) -> Iterator[fx.Node]:
    """The end of a branch, and what goes channel by channel behind it and stays zero."""
    yield end
    while len(end.users) == 1 and (after := next(iter(end.users))) in analysis.facts:
        facts = analysis.facts[after]
        if facts.kind not in ("same", "pool") or bool((facts.state != ZERO).any()):
            return
        end = after
        yield end


def _dead_chain(end: fx.Node, analysis: Analysis, keeps: Keeps) -> Dead:
    """The operations of a dead branch, one after the other, and the tensor that enters it."""
    chain, node = {end}, end.all_input_nodes[0]
    while (
        node in analysis.facts
        and len(node.users) == 1
        and len([n for n in node.all_input_nodes if n in analysis.facts]) == 1
        and node not in analysis.walls
        and not bool(keeps.mask(node).any())
        and (analysis.can_wrap(node) or analysis.facts[node].kind == "same")
    ):
        chain.add(node)
        node = node.all_input_nodes[0]
    return "", chain, node, end


def stride_between(start: fx.Node, end: fx.Node, analysis: Analysis) -> int | None:
    """The stride that turns images of any size at ``start`` into those at ``end``.

    None if there is none: every ``stride``-th pixel, beginning with the first, as a convolution
    takes them that is padded by half of its kernel.
    """
    strides: dict[fx.Node, int | None] = {start: 1}
    nodes = analysis.graph.nodes
    for node in nodes[nodes.index(start) + 1 : nodes.index(end) + 1]:
        strides[node] = _stride(node, strides, analysis)
    stride, dims = strides.get(end), len(shape_of(end))
    fits = bool(stride) and len(shape_of(start)) == dims > 2
    return stride if fits and (stride == 1 or dims == 4) else None


ANY = 0  # the stride of an image of one pixel, which a sum spreads over any other


def _stride(node: fx.Node, strides: dict[fx.Node, int | None], analysis: Analysis) -> int | None:
    """The stride of a node's result against the start; None if its size is not that simple."""
    facts = analysis.facts.get(node)
    before = {strides.get(n) for n in node.all_input_nodes if n in analysis.facts}
    if facts is None or not before or None in before or len(before - {ANY}) > 1:
        return None
    now = max(s for s in before if s is not None)
    is_pixel = set(shape_of(node)[2:]) == {1}
    match facts.kind:
        case "norm" | "same" | "scale" | "join":
            return now
        case "map":
            return now * int(analysis.layer(node).given["stride"])
        case "mean":
            return ANY if is_pixel else None
        case "conv" | "pool":
            if now == ANY:
                return ANY if is_pixel else None
            if name_of(node).startswith("adaptive"):
                return ANY if set(arguments(node)["output_size"]) == {1} else None
            step = _step(node) if name_of(node).startswith(("conv", "max_pool", "avg_pool")) else 0
            return now * step or None
        case "move":
            return now if shape_of(node.all_input_nodes[0])[2:] == shape_of(node)[2:] else None
    return None


def _step(node: fx.Node) -> int:
    """The stride of a window over images of any size; 0 if it is not padded by half of itself."""
    given, dims = arguments(node), len(shape_of(node)) - 2
    kernel = given.get("kernel_size") or list(given["weight"].meta["val"].shape[2:])
    steps = given["stride"] or (kernel if "kernel_size" in given else [1])
    spread, pads = given.get("dilation") or [1], given["padding"]
    kernel, steps, spread = (list(v) * (dims // len(v)) for v in (kernel, steps, spread))
    if len(set(steps)) > 1 or given.get("ceil_mode") or isinstance(pads, str):
        return int(pads == "same")
    pads = list(pads) * (dims // len(pads))
    windows = zip(pads, spread, kernel, strict=True)
    return steps[0] if all(2 * p == d * (k - 1) for p, d, k in windows) else 0
