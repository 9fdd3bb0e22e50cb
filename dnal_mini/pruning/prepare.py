"""The traced network, made ready for the analysis: both modes in one graph, shapes, names."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx, nn

from dnal_mini.graph.capture import evaluating, trace
from dnal_mini.graph.ops import in_place, kind_of
from dnal_mini.pruning.provenance import BATCH
from dnal_mini.refused import Refused


def graphs_of_both_modes(net: nn.Module) -> list[fx.GraphModule]:
    """Graphs that call every module that eval mode calls, best first.

    A forward that calls more in train mode (an auxiliary classifier) gives two: with and without.

    Raises: ValueError if each mode calls a module that the other does not, or for a forward that
    torch.fx cannot trace.
    """
    modes = [(module, module.training) for module in net.modules()]
    graphs = []
    try:
        for training in (False, True):
            for module, _ in modes:
                module.training = training
            graphs.append(trace(net))
    finally:
        for module, training in modes:
            module.training = training
    called = [{str(n.target) for n in g.graph.nodes if n.op == "call_module"} for g in graphs]
    if called[0] >= called[1]:
        return graphs[:1]
    if called[1] > called[0]:
        first = min(called[1] - called[0]).split(".")[0]
        note = f"{first} is called in train mode only, and takes no such image: left as it is"
        graphs[0].meta["left_out"] = note
        return graphs[::-1]
    only = min(called[0] - called[1])
    raise Refused(
        f"got a {type(net).__name__} that calls {only} in eval mode only and others in train mode "
        "only; need a forward that calls the same modules in both, or at least more in train mode"
    )


def settle_in_place(graph: fx.GraphModule) -> set[fx.Node]:
    """Let everyone who reads a tensor after it was overwritten read the result instead.

    Returns nodes that are overwritten through a view and read afterwards: to be left alone.
    """
    order = {node: place for place, node in enumerate(graph.graph.nodes)}
    written = set()
    for node in graph.graph.nodes:
        if not (node.args and isinstance(node.args[0], fx.Node) and in_place(node, graph)):
            continue
        base = node.args[0]
        for user in [u for u in base.users if order[u] > order[node]]:
            user.replace_input_with(base, node)
        while kind_of(base, graph) == "move" and base.all_input_nodes:
            base = base.all_input_nodes[0]
            if any(order[user] > order[node] for user in base.users):
                written.add(base)
    return written


def called_again(graph: fx.GraphModule) -> dict[str, list[fx.Node]]:
    """Modules that are called more than once, by name."""
    calls: dict[str, list[fx.Node]] = {}
    for node in graph.graph.nodes:
        if node.op == "call_module":
            calls.setdefault(str(node.target), []).append(node)
    return {name: nodes for name, nodes in calls.items() if len(nodes) > 1}


def lent(net: nn.Module) -> set[str]:
    """Modules that share a parameter with another module, by all their names."""
    owners: dict[nn.Parameter, set[nn.Module]] = {}
    for module in net.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(parameter, set()).add(module)
    sharing = {m for modules in owners.values() if len(modules) > 1 for m in modules}
    return {n for n, m in net.named_modules(remove_duplicate=False) if m in sharing}


class _Shapes(fx.Interpreter):
    """Runs a graph and stores the shape of every tensor in its node."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self.extra_traceback = False

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, torch.Tensor) and n.op != "output":
            n.meta["shape"] = tuple(result.shape)
        return result


def measure_shapes(graph: fx.GraphModule, image_shape: Sequence[int]) -> None:
    """Store the shape of every tensor in its node, by running images through in eval mode.

    Raises: ValueError with the forward's own reason if it does not take such images.
    """
    first = next(graph.parameters(), torch.zeros(()))
    try:
        with torch.no_grad(), evaluating(graph):
            _Shapes(graph).run(torch.zeros(BATCH, *image_shape).to(first))
    except Exception as error:  # whatever the user's forward raises on such an image
        reason = str(error).strip().splitlines()[0]
        raise Refused(f"got image_shape {tuple(image_shape)}, which fails: {reason}") from error


def shape_of(node: fx.Node) -> tuple[int, ...]:
    """Shape of the tensor that a node returns, () if it returns anything else."""
    return node.meta.get("shape", ())


def call(node: fx.Node, graph: fx.GraphModule, args: Any, kwargs: Any) -> Any:
    """Run a node's operation on given arguments."""
    if node.op == "call_module":
        return graph.get_submodule(str(node.target))(*args, **kwargs)
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    assert callable(node.target)
    return node.target(*args, **kwargs)


def attribute(graph: fx.GraphModule, name: str) -> Any:
    """What a get_attr node reads."""
    parent, _, last = name.rpartition(".")
    return getattr(graph.get_submodule(parent), last)


def modules_around(node: fx.Node) -> list[str]:
    """Qualified names of the modules in whose forward a node runs, outermost first."""
    paths = [path for path, _ in node.meta.get("nn_module_stack", {}).values()]
    own = str(node.target) if node.op == "call_module" else None
    return [path for path in paths if path and path != own]


def call_of(node: fx.Node, name: str) -> str | None:
    """Which call of the module ``name`` a node runs in: a module may be called again."""
    stack = node.meta.get("nn_module_stack", {})
    return next((key for key, (path, _) in stack.items() if path == name), None)


def place_of(node: fx.Node) -> str:
    """Qualified name of the module whose forward calls this node; "forward" for the whole net."""
    return (modules_around(node) or ["forward"])[-1]


def describe(node: fx.Node, graph: fx.GraphModule) -> str:
    """Operation and module, for the reader of a report."""
    if node.op == "call_module":
        return f"{type(graph.get_submodule(str(node.target))).__name__} {node.target}"
    name = getattr(node.target, "__name__", str(node.target))
    attributes = [str(n.target) for n in node.all_input_nodes if n.op == "get_attr"]
    with_numbers = f" with {', '.join(attributes)}" if attributes else ""
    return f"{name}{with_numbers} in {place_of(node)}"
