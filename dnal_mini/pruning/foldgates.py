"""From a gated network to a plain one that computes the same: every gate goes into a layer."""

from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dnal_mini.gating import gates, site_of
from dnal_mini.graph.capture import replace_everywhere, trace
from dnal_mini.graph.copies import copied
from dnal_mini.graph.ops import CONVS, NORMS, is_activation, is_changed
from dnal_mini.layers.channelmap import ChannelMap
from dnal_mini.layers.gated_norm import Gated, GatedFirst, GatedLate, take_gate, takes_gain, times
from dnal_mini.layers.mapped import put_map
from dnal_mini.layers.mixed import parts
from dnal_mini.pruning.prepare import lent
from dnal_mini.refused import Refused

HOMOGENEOUS = ("relu", "leaky_relu", "leakyrelu")  # a factor above 0 passes them


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

    {"source", "stride"} of a ChannelMap, in the place of a gate or as LAYER.scatter behind a
    layer or LAYER.gather in front of it; {"affine": true} of a norm that got gamma and beta.
    """
    net = copied(net)
    plain = [m for m in net.modules() if isinstance(m, _BatchNorm) and not m.affine]
    takers, told = _takers(net, absorb), {}
    for name, gate in gates(net).items():
        gain = gate.is_open.to(gate.s) * (gate.p if absorb else 1)
        site = site_of(net, name)
        layer, taker = net.get_submodule(site), takers.get(name)
        role = "gather" if isinstance(layer, GatedFirst) else "scatter"
        if isinstance(layer, Gated):
            take_gate(layer)
        else:
            replace_everywhere(net, gate, layer := nn.Identity())
        if taker is not None:
            _scale(taker, gain)
        elif not bool(((gain == 0) | (gain == 1)).all()):
            raise Refused(f"got gate {name} with p < 1 and no layer to take it; need absorb=False")
        elif bool((gain == 0).any()):
            places = torch.arange(len(gain), device=gain.device).masked_fill(gain == 0, -1)
            zeros = put_map(layer, role, ChannelMap(places).to(gain.device))
            told[f"{site}.{role}"] = {"source": zeros.source.tolist(), "stride": 1}
    affine = [n for n, m in net.named_modules() if any(m is p for p in plain) and m.affine]
    return net, told | {name: {"affine": True} for name in affine}


def _takers(net: nn.Module, absorb: bool) -> dict[str, nn.Module]:
    """The layer whose numbers can take a gate's factors, by the gate's name, where there is one."""
    takers: dict[str, nn.Module] = {}
    others, borrowed = {}, lent(net)
    for name in gates(net):
        site = site_of(net, name)
        layer = net.get_submodule(site)
        if not isinstance(layer, Gated) or isinstance(layer, GatedFirst):
            others[name] = site
        elif site not in borrowed and _can_take(layer, absorb):
            takers[name] = layer
    if others:
        graph = trace(net)
        calls = [n for n in graph.graph.nodes if n.op == "call_module"]
        nodes = {str(n.target): n for n in calls}
        common = borrowed | {str(n.target) for n in calls if n is not nodes[str(n.target)]}
        for name, site in others.items():
            layer_name = _producer(nodes.get(site), graph, common, homogeneous=absorb)
            if layer_name:
                takers[name] = net.get_submodule(layer_name)
    return takers


def _can_take(layer: Any, absorb: bool) -> bool:
    """True if gamma and beta, or weight and bias, times the gains do what a layer's gate does."""
    exact = parts(type(layer))[0] in (*NORMS, *CONVS)  # another may have an activation in it
    passes = not absorb or getattr(layer, "follows", "relu") in HOMOGENEOUS
    if isinstance(layer, GatedLate) and not (exact and passes):
        return False
    return takes_gain(layer) or (exact and isinstance(layer, _BatchNorm) and not layer.affine)


def _producer(
    gate: fx.Node | None, graph: fx.GraphModule, common: set[str], homogeneous: bool
) -> str | None:
    """Name of the norm or convolution whose output reaches a gate, past activations that keep 0.

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
        if not keeps_zero or (homogeneous and name not in HOMOGENEOUS):
            return None
        node = node.all_input_nodes[0]
    if node.op != "call_module" or len(node.users) != 1 or str(node.target) in common:
        return None
    layer = graph.get_submodule(str(node.target))
    return str(node.target) if type(layer) in (*NORMS, *CONVS) and not is_changed(layer) else None


@torch.no_grad()
def _scale(layer: Any, gain: Tensor) -> None:
    """Multiply a layer's output channels by a factor each, in place."""
    if isinstance(layer, _BatchNorm):
        make_affine(layer, gain)
    for tensor in (layer.weight, layer.bias):
        if tensor is not None:
            tensor.copy_(times(gain, tensor))


def make_affine(norm: Any, like: Tensor) -> None:
    """Give a norm that has none gamma = 1 and beta = 0, with the dtype of ``like``, in place."""
    if not norm.affine:
        norm.affine = True
        norm.weight = nn.Parameter(like.new_ones(norm.num_features))
        norm.bias = nn.Parameter(like.new_zeros(norm.num_features))
