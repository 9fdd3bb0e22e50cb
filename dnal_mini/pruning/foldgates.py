"""From a gated network to a plain one that computes the same: every gate goes into a layer."""

import copy
from typing import Any

import torch
from torch import Tensor, fx, nn

from dnal_mini.graph.capture import replace_module, trace
from dnal_mini.graph.ops import is_activation, is_changed
from dnal_mini.layers.channelmap import ChannelMap
from dnal_mini.layers.gated_norm import GatedNorm
from dnal_mini.layers.scaled_sigmoid import ScaledSigmoid
from dnal_mini.pruning.prepare import lent
from dnal_mini.refused import Refused


def drop_gates(net: nn.Module, absorb: bool = False) -> nn.Module:
    """A copy without SS layers that computes what the hard-gated network computes, exactly.

    A closed gate becomes gamma = beta = 0 in its BatchNorm, or a zero filter in front of it; where
    there is neither, or others use the same numbers, a ``ChannelMap`` puts zeros there. An open
    gate counts as 1, or with ``absorb`` as its p: gamma and beta are multiplied by it.

    Raises: ValueError, with ``absorb`` only, for a gate whose p fits into no layer.
    """
    return drop_and_tell(net, absorb)[0]


def drop_and_tell(net: nn.Module, absorb: bool = False) -> tuple[nn.Module, dict[str, dict]]:
    """``drop_gates``, and what it put in that a net without gates lacks, by qualified name.

    {"scatter" or "gather": a ChannelMap's source} behind a norm or in front of it, {"source",
    "stride"} of one in the place of a gate, {"affine": true} for a norm that got gamma and beta.
    """
    net = copy.deepcopy(net)
    put_in: dict[str, dict[str, Any]] = {}
    plain = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d) and not m.affine]
    graph, places = trace(net), Places(net)
    calls = [n for n in graph.graph.nodes if n.op == "call_module"]
    nodes = {str(n.target): n for n in calls}
    common = lent(net) | {str(n.target) for n in calls if n is not nodes[str(n.target)]}
    owned = {m.gate for m in net.modules() if isinstance(m, GatedNorm)}
    for module, names in places.names.items():
        gate = module.gate if isinstance(module, GatedNorm) else module
        if not isinstance(gate, ScaledSigmoid) or module in owned:
            continue
        gain = gate.is_open.to(gate.s) * (gate.p if absorb else 1)
        norm = module.norm if isinstance(module, GatedNorm) else nn.Identity()
        behind = isinstance(module, GatedNorm) and not module.gate_first
        layer: nn.Module | None
        if behind:
            layer = None if common & {f"{name}.norm" for name in names} else norm
        else:
            node = next((nodes[name] for name in names if name in nodes), None)
            layer = _producer(node, graph, common, homogeneous=absorb)
        new = _without_gate(norm, layer, gain, names[0], behind)
        places.replace(module, new)
        if isinstance(new, nn.Sequential):
            zeros: Any = new[int(behind)]
            put_in[names[0]] = {"scatter" if behind else "gather": zeros.source.tolist()}
        elif isinstance(new, ChannelMap):
            put_in[names[0]] = {"source": new.source.tolist(), "stride": 1}
    affine = [n for n, m in net.named_modules() if any(m is p for p in plain) and m.affine]
    return net, put_in | {name: {"affine": True} for name in affine}


def strip_gates(net: nn.Module) -> None:
    """Take all SS layers out of a network, in place, whatever they do."""
    places = Places(net)
    for module in sorted(places.names, key=lambda module: isinstance(module, GatedNorm)):
        if isinstance(module, GatedNorm):
            places.replace(module, module.norm)
        elif isinstance(module, ScaledSigmoid):
            places.replace(module, nn.Identity())


def _without_gate(
    norm: nn.Module, layer: nn.Module | None, gain: Tensor, name: str, behind: bool
) -> nn.Module:
    """What takes a gate's place: the norm alone if a layer can take the gate's factors."""
    if layer is not None:
        _scale(layer, gain)
        return norm
    if not bool(((gain == 0) | (gain == 1)).all()):
        raise Refused(f"got gate {name} with p < 1 and no layer to take it; need absorb=False")
    if bool((gain == 1).all()):
        return norm
    places = torch.arange(len(gain), device=gain.device).masked_fill(gain == 0, -1)
    zeros = ChannelMap(places).to(gain.device)
    if isinstance(norm, nn.Identity):
        return zeros
    return nn.Sequential(norm, zeros) if behind else nn.Sequential(zeros, norm)


class Places:
    """All names of every module, to replace a shared one under each of them."""

    def __init__(self, net: nn.Module) -> None:
        self.net = net
        self.names: dict[nn.Module, list[str]] = {}
        for name, module in net.named_modules(remove_duplicate=False):
            self.names.setdefault(module, []).append(name)

    def replace(self, old: nn.Module, new: nn.Module) -> None:
        """Put ``new`` wherever ``old`` is."""
        for name in self.names[old]:
            replace_module(self.net, name, new)


def _producer(
    gate: fx.Node | None, graph: fx.GraphModule, common: set[str], homogeneous: bool
) -> nn.Module | None:
    """The BatchNorm or convolution whose output reaches a gate, past activations that keep 0.

    ``homogeneous``: past those only that keep any positive factor (ReLU and its leaky kin). None
    if there is no such layer, or if others read it, call it or share its numbers.
    """
    if gate is None or str(gate.target) in common:
        return None
    node = gate.all_input_nodes[0]
    while is_activation(node, graph) and len(node.users) == 1 and len(node.all_input_nodes) == 1:
        if node.op == "call_module":
            activation = graph.get_submodule(str(node.target))
            name = type(activation).__name__.lower()
            zero = torch.zeros(1, dtype=next(iter(activation.parameters()), torch.zeros(())).dtype)
            keeps_zero = name != "prelu" and float(activation(zero).detach()) == 0
        else:
            name = str(getattr(node.target, "__name__", node.target)).rstrip("_")
            keeps_zero = name not in ("sigmoid", "softplus", "hardsigmoid")
        if not keeps_zero or (homogeneous and name not in ("relu", "leaky_relu", "leakyrelu")):
            return None
        node = node.all_input_nodes[0]
    if node.op != "call_module" or len(node.users) != 1 or str(node.target) in common:
        return None
    layer = graph.get_submodule(str(node.target))
    return layer if type(layer) in (nn.BatchNorm2d, nn.Conv2d) and not is_changed(layer) else None


@torch.no_grad()
def _scale(layer: Any, gain: Tensor) -> None:
    """Multiply a layer's output channels by a factor each, in place."""
    if isinstance(layer, nn.BatchNorm2d):
        make_affine(layer, gain)
    layer.weight.mul_(gain.reshape(-1, *[1] * (layer.weight.dim() - 1)))
    if layer.bias is not None:
        layer.bias.mul_(gain)


def make_affine(norm: Any, like: Tensor) -> None:
    """Give a norm that has none gamma = 1 and beta = 0, with the dtype of ``like``, in place."""
    if not norm.affine:
        norm.affine = True
        norm.weight = nn.Parameter(like.new_ones(norm.num_features))
        norm.bias = nn.Parameter(like.new_zeros(norm.num_features))
