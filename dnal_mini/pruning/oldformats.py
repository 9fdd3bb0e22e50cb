"""Specs and tensors of older files, as this version writes them."""

from collections.abc import Mapping
from itertools import chain
from typing import Any

from torch import Tensor, fx, nn

from dnal_mini.graph.capture import evaluating
from dnal_mini.graph.layer import TRANSPOSED
from dnal_mini.graph.ops import ACTIVATIONS
from dnal_mini.layers.channelmap import ChannelMap

Spec = dict[str, Any]
Tensors = dict[str, Tensor]


def renewed(net: nn.Module, spec: Spec, tensors: Tensors) -> tuple[nn.Module, Spec, Tensors]:
    """What a file of format 1 to 4 holds, in format 4; ``net`` is what it is to cut.

    Formats 1 to 3 had a layer in an ``nn.Sequential`` with its ChannelMap, {"gather", "scatter"},
    and made a ``torch.fx.GraphModule`` of a net with gates behind its activations.
    """
    if spec.get("builder") == "GraphModule" and not isinstance(net, fx.GraphModule):
        net = _as_graph(net, spec["modules"])
    if spec["format"] < 3:
        spec = _in_format_3(spec, net)
    if spec["format"] == 3:
        modules: dict[str, dict[str, Any]] = {}
        for name, entry in spec["modules"].items():
            maps = {role: entry[role] for role in ("gather", "scatter") if role in entry}
            if rest := {key: value for key, value in entry.items() if key not in maps}:
                modules[name] = rest
            for role, source in maps.items():
                modules[f"{name}.{role}"] = {"source": source, "stride": 1}
            old = f"{name}.{int('gather' in maps)}." if maps else f"{name}."
            tensors = {
                f"{name}.{key.removeprefix(old)}" if key.startswith(old) else key: tensor
                for key, tensor in tensors.items()
            }
        spec = spec | {"format": 4, "modules": modules}
    return net, spec, tensors


def _in_format_3(spec: Spec, net: nn.Module) -> Spec:
    """The spec of a file of format 1 or 2 in format 3.

    They named a layer, not its tensors: {"out", "in"} with {"columns"} for each of "in", {"of"}
    for parameters elsewhere; {"zeros", "stride"} where a branch ended.
    """
    layers = dict(net.named_modules(remove_duplicate=False))
    keep: dict[str, dict[str, Any]] = {}
    modules: dict[str, dict[str, Any]] = {}
    for name, old in spec["modules"].items():
        layer = layers.get(name, nn.Identity())
        inputs, columns = old.get("in"), old.get("columns", 1)
        if inputs is not None:
            inputs = [i * columns + column for i in inputs for column in range(columns)]
        elif spec["format"] == 1 and getattr(layer, "groups", 1) > 1:
            inputs = old.get("out")  # a depthwise layer was cut by its outputs alone
        tensors, entry = _tables_of(name, layer, old.get("out"), inputs, old.get("of"))
        entry |= {key: old[key] for key in ("gather", "scatter", "bias", "gone") if key in old}
        if "zeros" in old:
            entry |= {"source": [-1] * old["zeros"], "stride": old["stride"]}
        elif "source" in old:
            entry |= {"source": old["source"], "stride": getattr(layer, "stride", 1)}
        keep |= tensors
        modules |= {name: entry} if entry else {}
    certificate = spec["certificate"]
    if spec["format"] == 1:
        certificate = {"absolute": certificate}
    return spec | {"format": 3, "keep": keep, "modules": modules, "certificate": certificate}


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, ChannelMap) or super().is_leaf_module(m, module_qualified_name)


def _as_graph(net: nn.Module, modules: dict[str, Any]) -> fx.GraphModule:
    """A net as a graph, with a place NAME_gate behind the activation that alone follows NAME."""
    with evaluating(net):
        graph = _Tracer().trace(net)
    traced = fx.GraphModule(net, graph)
    traced.training = net.training
    for norm in list(graph.nodes):
        name = f"{norm.target}_gate"
        if norm.op != "call_module" or name not in modules:
            continue
        users = list(norm.users)
        called = users[0].target
        if users[0].op == "call_module":
            called = type(net.get_submodule(str(called))).__name__.lower()
        known = getattr(called, "__name__", called) in ACTIVATIONS
        site = users[0] if len(users) == 1 and known else norm
        traced.add_submodule(name, nn.Identity())
        with graph.inserting_after(site):
            gate = graph.call_module(name)
        site.replace_all_uses_with(gate)
        gate.args = (site,)
    traced.recompile()
    return traced


def _tables_of(
    name: str,
    layer: Any,
    out: list[int] | None = None,
    inputs: list[int] | None = None,
    tensors: Mapping[str, str] | None = None,
) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """What stays of a layer as a spec says it: its part of "keep", its entry in "modules".

    ``out``, ``inputs``: its channels and the positions of its full input that stay, in their new
    order, None for all. ``tensors``: their qualified names by role, where they are not its own.
    """
    own = chain(layer.named_parameters(recurse=False), layer.named_buffers(recurse=False))
    tensors = tensors or {role: f"{name}.{role}" for role, tensor in own if tensor.dim()}
    keep: dict[str, dict[str, Any]] = {}
    entry: dict[str, Any] = {}
    if inputs is not None and getattr(layer, "groups", 1) > 1:
        entry["inputs"], inputs = inputs, None
    if out is not None and not tensors:
        entry["num_features"] = len(out)
    for role, tensor in tensors.items():
        turned = role == "weight" and isinstance(layer, TRANSPOSED)
        axes = {str(int(turned)): out, str(int(not turned)): inputs if role == "weight" else None}
        if stays := {axis: index for axis, index in axes.items() if index is not None}:
            keep[tensor] = stays
    return keep, entry
