"""An exported graph in fewer words: what a reader of the graph need not know twice."""

from typing import Any

import torch
from torch import fx, nn

from dnal_mini.graph.ops import in_place, kind_of, name_of
from dnal_mini.layers.channelmap import ChannelMap, channel_map

ATEN = torch.ops.aten


REGIONS = {
    "wrap_with_autocast",
    "wrap_with_set_grad_enabled",
}  # with torch.autocast(...), no_grad()


def without_regions(module: Any) -> fx.Graph:
    """The graph of a GraphModule with what runs in another precision or without gradient in line.

    Which channels an operation reads does not depend on that.
    """
    graph = module.graph
    for node in list(graph.nodes):
        if getattr(node.target, "__name__", "") not in REGIONS:
            continue
        first = next(at for at, x in enumerate(node.args) if isinstance(x, fx.Node))
        held, *given = node.args[first:]
        results = _in_line(without_regions(module.get_submodule(held.target)), graph, node, given)
        for user in list(node.users):  # each takes one result
            user.replace_all_uses_with(results[user.args[1]])
            graph.erase_node(user)
        for each in (node, held):
            graph.erase_node(each)
    return graph


def _in_line(inner: fx.Graph, graph: fx.Graph, before: fx.Node, given: list[Any]) -> Any:
    """Copy the nodes of a graph in front of a node of another; returns what its output was."""
    known, arguments, results = {}, iter(given), None
    with graph.inserting_before(before):
        for node in inner.nodes:
            if node.op == "placeholder":
                known[node] = next(arguments)
            elif node.op == "output":
                results = fx.node.map_arg(node.args[0], known.__getitem__)
            else:
                known[node] = graph.node_copy(node, known.__getitem__)
    return results


def channel_maps(graph: fx.Graph, net: nn.Module) -> None:
    """One node for the operations of each call of a ChannelMap, in place."""
    calls: dict[tuple[str, str], list[fx.Node]] = {}
    for node in graph.nodes:
        stack = list(node.meta.get("nn_module_stack", {}).items())
        if node.op == "call_function" and stack:
            key, (path, _) = stack[-1]
            if isinstance(net.get_submodule(path), ChannelMap):
                calls.setdefault((key, path), []).append(node)
    for (_, path), nodes in calls.items():
        module: Any = net.get_submodule(path)
        x, last = nodes[0].all_input_nodes[0], nodes[-1]
        with graph.inserting_after(last):
            source = tuple(module.source.tolist())
            new = graph.call_function(channel_map, (x, source, module.stride))
        new.meta = dict(last.meta) | {"map": path}
        last.replace_all_uses_with(new)
        for node in reversed(nodes):
            graph.erase_node(node)


def as_products(graph: fx.Graph) -> None:
    """Write every einsum of two tensors as a product and a sum over what is contracted."""
    for node in list(graph.nodes):
        if node.op != "call_function" or name_of(node) != "einsum" or len(node.args[1]) != 2:
            continue
        formula = str(node.args[0]).replace(" ", "")
        left, arrow, out = formula.partition("->")
        parts = left.split(",")
        if not arrow or "." in formula or any(len(set(p)) != len(p) for p in (*parts, out)):
            continue
        order = [*out, *sorted(set(left) - {",", *out})]
        with graph.inserting_before(node):
            pairs = zip(node.args[1], parts, strict=True)
            aligned = [_aligned(graph, x, letters, order, node) for x, letters in pairs]
            new = _call(graph, ATEN.mul.Tensor, tuple(aligned), node)
            if len(order) > len(out):
                dims = list(range(len(out), len(order)))
                new = _call(graph, ATEN.sum.dim_IntList, (new, dims), node)
        node.replace_all_uses_with(new)
        graph.erase_node(node)


SPREADS = {"expand", "expand_as", "broadcast_to", "repeat", "tile"}


def without_lookers(graph: fx.Graph) -> None:
    """Leave out what others do anyway, and reads of a tensor that only look what it is.

    ``x * y.expand_as(x)`` is ``x * y`` for a ``y`` of one channel; ``type_as`` reads no number.
    """
    nodes: list[Any] = list(graph.nodes)
    for node in nodes:
        name = name_of(node) if node.op == "call_function" else ""
        if name == "type_as" or (name == "to" and isinstance(node.args[1], fx.Node)):
            x, dtype = node.args[0], node.meta["val"].dtype
            with graph.inserting_before(node):
                node.replace_all_uses_with(_call(graph, ATEN.to.dtype, (x, dtype), node))
        elif name in SPREADS:
            for user in [u for u in node.users if _spreads(u, node)]:
                user.replace_input_with(node, node.args[0])
        if (name in SPREADS or name in ("type_as", "to")) and not node.users:
            graph.erase_node(node)


def _spreads(join: Any, node: Any) -> bool:
    """True for an operation of two tensors that spreads the one channel of ``node``'s by itself."""
    small, shape = node.args[0].meta["val"].shape, node.meta["val"].shape
    others = [x for x in join.all_input_nodes if x is not node]
    if kind_of(join) != "join" or len(others) != 1 or len(small) != len(shape) or len(shape) < 2:
        return False
    if not small[1] == 1 < shape[1]:
        return False
    both = torch.broadcast_shapes(small, others[0].meta["val"].shape)
    return both == join.meta["val"].shape


def _aligned(
    graph: fx.Graph, x: fx.Node, letters: str, order: list[str], where: fx.Node
) -> fx.Node:
    """A tensor with an axis for each letter of ``order``, of size 1 where it has none."""
    axes = [letters.index(c) for c in order if c in letters]
    if axes != sorted(axes):
        x = _call(graph, ATEN.permute.default, (x, axes), where)
    for place, letter in enumerate(order):
        if letter not in letters:
            x = _call(graph, ATEN.unsqueeze.default, (x, place), where)
    return x


def _call(graph: fx.Graph, target: Any, args: tuple, like: fx.Node) -> fx.Node:
    """A new node with its result's shape; the rest of what is known of ``like``."""
    new = graph.call_function(target, args)
    values = fx.node.map_arg(args, lambda n: n.meta["val"])
    new.meta = dict(like.meta) | {"val": target(*values)}
    return new


def settle_in_place(graph: fx.Graph) -> set[fx.Node]:
    """Let everyone who reads a tensor after it was overwritten read the result instead.

    Returns nodes that are overwritten through a view and read afterwards: to be left alone.
    """
    order = {node: place for place, node in enumerate(graph.nodes)}
    written = set()
    for node in graph.nodes:
        if not (in_place(node) and node.args and isinstance(node.args[0], fx.Node)):
            continue
        base = node.args[0]
        for user in [u for u in base.users if order[u] > order[node]]:
            user.replace_input_with(base, node)
        while kind_of(base) == "move" and base.all_input_nodes:
            base = base.all_input_nodes[0]
            if any(order[user] > order[node] for user in base.users):
                written.add(base)
    return written
