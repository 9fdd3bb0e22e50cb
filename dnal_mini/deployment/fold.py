"""Every norm that can be folded into the layer before it is: a network for inference."""

import copy
from collections import Counter
from typing import Any

import torch
from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from dnal_mini.gating import gates
from dnal_mini.graph.capture import replace_module, trace
from dnal_mini.graph.ops import CONVS, NORMS, TRANSPOSED, is_activation
from dnal_mini.refused import Refused

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def deploy(net: nn.Module) -> nn.Module:
    """A copy for inference, in eval mode: each BatchNorm folded into the layer before it.

    Folded is a BatchNorm with running statistics that directly follows a convolution (any
    dimension, grouped, transposed) or a linear layer, if nobody else reads what the layer puts
    out and both are called once. The norm becomes an ``nn.Identity``; class and forward code stay.
    Everything else is left as it is: layers with hooks or parametrizations, classes derived from
    torch's own, a linear layer whose output may be more than (batch, features).

    Raises: ValueError for a net with gates or one that torch.fx cannot trace.
    Example:
        >>> net = dnal.models.resnet56(width=0.25)
        >>> count = lambda net: sum(isinstance(m, torch.nn.BatchNorm2d) for m in net.modules())
        >>> count(net), count(dnal.deploy(net))
        (55, 0)
    """
    refuse_gates(net)
    net = copy.deepcopy(net).eval()
    graph = trace(net)
    nodes = list(graph.graph.nodes)
    calls = Counter(id(_module(node, graph)) for node in nodes if node.op == "call_module")
    attributes = {**dict(graph.named_parameters()), **dict(graph.named_buffers())}
    read = {id(attributes.get(str(node.target))) for node in nodes if node.op == "get_attr"}
    for node in nodes:
        pair = _foldable(node, graph)
        if pair is None or any(calls[id(module)] > 1 for module in pair):
            continue
        layer, norm = pair
        tensors = (*layer.parameters(), *norm.parameters(), *norm.buffers())
        if read.isdisjoint(map(id, tensors)):
            _fold(layer, norm)
            for name, module in list(net.named_modules(remove_duplicate=False)):
                if module is norm:
                    replace_module(net, name, nn.Identity())
    return net


def refuse_gates(net: nn.Module) -> None:
    if count := len(gates(net)):
        raise Refused(f"got a net with {count} gates; need one without; do prune it first")


def _module(node: fx.Node, graph: fx.GraphModule) -> Any:
    return graph.get_submodule(str(node.target)) if node.op == "call_module" else None


def _foldable(node: fx.Node, graph: fx.GraphModule) -> tuple[Any, Any] | None:
    """The layer and the norm that read each other's tensor and nobody else's, if node is a norm."""
    norm = _module(node, graph)
    if type(norm) not in NORMS or norm.running_mean is None or len(node.all_input_nodes) != 1:
        return None
    before = node.all_input_nodes[0]
    layer = _module(before, graph)
    if type(layer) not in (*CONVS, *TRANSPOSED, nn.Linear) or len(before.users) > 1:
        return None
    if type(layer) is nn.Linear and not _is_matrix(before, graph):
        return None
    watched = any(getattr(m, hooks) for m in (layer, norm) for hooks in HOOKS)
    changed = any("forward" in vars(module) for module in (layer, norm))
    return None if watched or changed else (layer, norm)


def _is_matrix(node: fx.Node, graph: fx.GraphModule) -> bool:
    """True if a tensor surely is (batch, features): a norm then counts the last dimension."""
    keeps_rank = (nn.Linear, nn.Dropout, nn.Identity, *NORMS)
    while isinstance(_module(node, graph), keeps_rank) or is_activation(node, graph):
        node = node.all_input_nodes[0]
    module = _module(node, graph)
    if isinstance(module, nn.Flatten):
        return (module.start_dim, module.end_dim) == (1, -1)
    arguments = (*node.args[1:], *node.kwargs.values())
    match getattr(node.target, "__name__", node.target):
        case "flatten":
            return arguments in ((1,), (1, -1))
        case "mean":
            return arguments in (((2, 3),), ([2, 3],), ((-2, -1),), ([-2, -1],))
        case "view" | "reshape":
            return node.op == "call_method" and len(arguments) == 2
    return False


@torch.no_grad()
def _fold(layer: Any, norm: Any) -> None:
    """Scale a layer's filters and shift its bias by what the norm does in eval mode, in place."""
    weight, grouped = layer.weight, isinstance(layer, TRANSPOSED)
    if grouped:  # (inputs, outputs / groups, ...) -> (inputs / groups, outputs, ...)
        weight = weight.unflatten(0, (layer.groups, -1)).transpose(0, 1).flatten(1, 2)
    statistics = (norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias)
    folded, bias = fuse_conv_bn_weights(weight, layer.bias, *statistics, transpose=grouped)
    if grouped:
        folded = folded.unflatten(1, (layer.groups, -1)).transpose(0, 1).flatten(0, 1)
    layer.weight = nn.Parameter(folded.detach(), layer.weight.requires_grad)
    layer.bias = nn.Parameter(bias.detach(), layer.weight.requires_grad)
