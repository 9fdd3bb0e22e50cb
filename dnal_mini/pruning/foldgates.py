"""From a gated network to a plain one that computes the same: every gate goes into a layer."""

from collections import Counter
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dnal_mini.gating import gates, site_of
from dnal_mini.graph.cache import captured
from dnal_mini.graph.capture import Capture, replace_everywhere
from dnal_mini.graph.copies import copied
from dnal_mini.graph.inputs import Given, taken_by
from dnal_mini.graph.layer import CONVS, NORMS
from dnal_mini.graph.ops import is_activation, name_of
from dnal_mini.graph.places import like
from dnal_mini.layers.channelmap import ChannelMap
from dnal_mini.layers.gated_norm import Gated, GatedFirst, GatedLate, take_gate, takes_gain, times
from dnal_mini.layers.mapped import put_map
from dnal_mini.layers.mixed import parts
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


def drop_and_tell(
    net: nn.Module, absorb: bool = False, what: Given | None = None
) -> tuple[nn.Module, dict[str, dict]]:
    """``drop_gates``, and what it put in that a net without gates lacks, by qualified name.

    {"source", "stride"} of a ChannelMap, in the place of a gate or as LAYER.scatter behind a
    layer or LAYER.gather in front of it; {"affine": true} of a norm that got gamma and beta.
    """
    net = copied(net)
    plain = [m for m in net.modules() if isinstance(m, _BatchNorm) and not m.affine]
    takers, told = _takers(net, absorb, what), {}
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


def _takers(net: nn.Module, absorb: bool, what: Given | None) -> dict[str, nn.Module]:
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
    for name, taker in _producers(net, others, absorb, what).items() if others else ():
        if taker not in borrowed:
            takers[name] = net.get_submodule(taker)
    return takers


def lent(net: nn.Module) -> set[str]:
    """Modules that share a parameter with another module, by all their names."""
    owners: dict[nn.Parameter, set[nn.Module]] = {}
    for module in net.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(parameter, set()).add(module)
    sharing = {m for modules in owners.values() if len(modules) > 1 for m in modules}
    return {n for n, m in net.named_modules(remove_duplicate=False) if m in sharing}


def _can_take(layer: Any, absorb: bool) -> bool:
    """True if gamma and beta, or weight and bias, times the gains do what a layer's gate does."""
    exact = parts(type(layer))[0] in (*NORMS, *CONVS)  # another may have an activation in it
    passes = not absorb or getattr(layer, "follows", "relu") in HOMOGENEOUS
    if isinstance(layer, GatedLate) and not (exact and passes):
        return False
    return takes_gain(layer) or (exact and isinstance(layer, _BatchNorm) and not layer.affine)


def _producers(
    net: nn.Module, others: dict[str, str], homogeneous: bool, what: Given | None
) -> dict[str, str]:
    """By gate, the layer whose output reaches it alone, past activations that keep 0.

    ``homogeneous``: past those only that keep any positive factor (ReLU and its leaky kin). A
    gate has none if others read the layer, or it is called again.
    """
    trial = copied(net)
    for name, site in others.items():
        gate: Any = net.get_submodule(name)
        stand_in = ChannelMap(range(len(gate.s))).to(gate.s.device)
        layer = trial.get_submodule(site)
        if isinstance(layer, Gated):
            take_gate(layer)
            put_map(layer, "gather", stand_in)
        else:
            replace_everywhere(trial, layer, stand_in)
    inputs = taken_by(trial, what)
    if inputs is None:
        return {}
    graph, found = captured(trial, inputs), {}
    calls = Counter(layer.name for layer in graph.layers.values())
    at = {layer.module: node for node, layer in graph.layers.items() if calls[layer.name] == 1}
    for name, site in others.items():
        gated = site if site == name else f"{site}.gather"
        before = _producer(at[gated], graph, homogeneous) if gated in at else None
        if before is not None and before in at.values():
            found[name] = graph.layers[before].module
    return found


def _producer(gate: fx.Node, graph: Capture, homogeneous: bool) -> fx.Node | None:
    """The norm or convolution that a gate reads, past activations that keep zero."""
    node = gate.all_input_nodes[0]
    while is_activation(node) and len(node.users) == 1 and len(node.all_input_nodes) == 1:
        zero = like(node, torch.zeros(1), *node.args[1:], **node.kwargs)
        if bool(zero.any()) or (homogeneous and name_of(node) not in HOMOGENEOUS):
            return None
        node = node.all_input_nodes[0]
    layer = graph.layers.get(node)
    fits = layer is not None and layer.kind in ("norm", "conv") and layer.module
    return node if fits and len(node.users) == 1 else None


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
