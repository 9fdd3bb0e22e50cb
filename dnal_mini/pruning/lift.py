"""Layers that a forward calls as functions: ``F.conv2d(x, self.weight)`` as a layer of the graph.

Only the traced graph changes. The user's forward goes on reading the parameters where they are, so
the surgery can make those smaller, but it cannot put anything in front of such a layer or behind.
"""

import inspect
from collections import Counter
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

CONVS: dict[Any, Any] = {F.conv1d: nn.Conv1d, F.conv2d: nn.Conv2d, F.conv3d: nn.Conv3d}


CONV_NAMES = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")


def adopt(graph: fx.GraphModule) -> None:
    """Turn such calls into calls of modules that hold the same parameters, in place.

    ``graph.meta["bare"]`` then says where a module's parameters really are:
    {module name: {"weight": qualified name, ...}}. Numbers that are read twice are left alone.
    """
    bare: dict[str, dict[str, str]] = {}
    graph.meta["bare"] = bare
    reads = Counter(str(n.target) for n in graph.graph.nodes if n.op == "get_attr")
    called = {str(n.target) for n in graph.graph.nodes if n.op == "call_module"}
    for node in list(graph.graph.nodes):
        if node.op != "call_function" or node.target not in (*CONVS, F.linear, F.batch_norm):
            continue
        given = _arguments(node)
        nodes = {k: v for k, v in given.items() if k != "input" and isinstance(v, fx.Node)}
        places = {k: str(v.target) for k, v in nodes.items() if _is_own(v, reads, called)}
        if set(nodes) != set(places) or "weight" not in places:
            continue
        layer = _layer(node, given, {k: _read(graph, name) for k, name in places.items()})
        if layer is None:
            continue
        name = places["weight"].replace(".", "_") + "_layer"
        graph.add_submodule(name, layer)
        with graph.graph.inserting_before(node):
            new = graph.graph.call_module(name, (given["input"],))
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
        graph.graph.erase_node(node)
        for value in nodes.values():
            graph.graph.erase_node(value)
        bare[name] = places


def _arguments(node: fx.Node) -> dict[str, Any]:
    """Arguments of a call by name."""
    if node.target is F.batch_norm:
        return dict(inspect.signature(F.batch_norm).bind(*node.args, **node.kwargs).arguments)
    return dict(zip(CONV_NAMES, node.args, strict=False)) | dict(node.kwargs)


def _is_own(value: fx.Node, reads: Counter[str], called: set[str]) -> bool:
    """True for a parameter or buffer that is read here and nowhere else."""
    name = str(value.target)
    alone = value.op == "get_attr" and reads[name] == 1 and len(value.users) == 1
    return alone and name.rpartition(".")[0] not in called


def _read(graph: fx.GraphModule, name: str) -> Any:
    parent, _, last = name.rpartition(".")
    return getattr(graph.get_submodule(parent), last)


def _layer(node: fx.Node, given: dict[str, Any], own: dict[str, Any]) -> nn.Module | None:
    """A layer with the given parameters; None if the call does something else besides."""
    weight: Tensor = own["weight"]
    layer: Any = None
    if not all(isinstance(tensor, Tensor) for tensor in own.values()):
        return None
    if node.target is F.linear and weight.dim() == 2:
        layer = nn.Linear(weight.shape[1], weight.shape[0], "bias" in own, device="meta")
    elif node.target in CONVS and given.get("groups", 1) == 1:
        options: dict[str, Any] = {"bias": "bias" in own, "device": "meta"}
        options |= {k: given[k] for k in CONV_NAMES[3:6] if k in given}
        layer = CONVS[node.target](weight.shape[1], len(weight), weight.shape[2:], **options)
    elif node.target is F.batch_norm and len(own) == 4:
        layer = nn.SyncBatchNorm(len(weight), eps=given.get("eps", 1e-5), device="meta")  # any dims
        layer.num_batches_tracked = torch.tensor(1)
    for name, tensor in own.items() if layer is not None else ():
        setattr(layer, name, tensor)
    return layer
