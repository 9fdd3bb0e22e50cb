"""Every norm that can be folded into the layer before it is: a network for inference."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from dnal_mini.gating import gates
from dnal_mini.graph.capture import replace_everywhere
from dnal_mini.graph.copies import copied
from dnal_mini.graph.inputs import Given, given, taken_by
from dnal_mini.graph.layer import CONVS, NORMS, TRANSPOSED
from dnal_mini.graph.observed import norms_behind, same
from dnal_mini.layers.hollow import Hollow, hollow
from dnal_mini.layers.mixed import parts
from dnal_mini.refused import Refused

LAYERS = (*CONVS, *TRANSPOSED, nn.Linear)


HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def deploy(
    net: nn.Module, image_shape: Sequence[int] | None = None, *, example_inputs: Any = None
) -> nn.Module:
    """A copy for inference, in eval mode: each BatchNorm folded into the layer before it.

    Folded is a BatchNorm with running statistics that directly follows a convolution (any
    dimension, grouped, transposed) or a linear layer, if nobody else reads what the layer puts
    out and both are called once: running the net on images shows it, by default on images of a
    usual size that it takes. The norm becomes an ``nn.Identity``; class and forward code stay.
    Everything else is left as it is: layers with hooks or parametrizations, classes derived from
    torch's own, a linear layer whose output is more than (batch, features).
    The copy has been compared with the net on such images. Where the forward code looks at its
    norms, a folded one keeps its class without tensors, or is left unfolded.

    Raises: ValueError for a net with gates, or images that the net does not take.
    Example:
        >>> net = dnal.models.resnet56(width=0.25)
        >>> count = lambda net: sum(isinstance(m, torch.nn.BatchNorm2d) for m in net.modules())
        >>> count(net), count(dnal.deploy(net))
        (55, 0)
    """
    return fold(net, given(net, image_shape, example_inputs))


def fold(net: nn.Module, what: Given | None) -> nn.Module:
    """``deploy``."""
    refuse_gates(net)
    layers = [name for name, module in net.named_modules() if _is_ours(module, LAYERS, "scatter")]
    inputs = taken_by(net, what)
    if inputs is None:
        raise Refused("got a net that takes no image of a usual size; need image_shape; do give it")
    pairs = norms_behind(net, inputs, layers)
    pairs = {a: b for a, b in pairs.items() if _is_ours(net.get_submodule(b), NORMS, "gather")}
    for leave in (_nothing, hollow):
        small = _folded(net, pairs, leave)
        if same(net, small, inputs):
            return small
    for layer in list(pairs):  # something reads the numbers of a norm, or of a layer
        if not same(net, _folded(net, {layer: pairs[layer]}, hollow), inputs):
            del pairs[layer]
    return _folded(net, pairs, hollow)


def refuse_gates(net: nn.Module) -> None:
    """Raises: ValueError for what is no network, or one with gates."""
    if count := len(gates(net)):
        raise Refused(f"got a net with {count} gates; need one without; do prune it first")


def _is_ours(module: Any, kinds: tuple[type, ...], between: str) -> bool:
    """True for a layer of torch's that nothing changes, with no ChannelMap of that role."""
    if parts(type(module))[0] not in kinds or getattr(module, "running_mean", module) is None:
        return False
    watched = isinstance(module, Hollow) or any(getattr(module, hooks) for hooks in HOOKS)
    return not (watched or "forward" in vars(module) or hasattr(module, between))


def _folded(
    net: nn.Module, pairs: Mapping[str, str], leave: Callable[[nn.Module], nn.Module]
) -> nn.Module:
    """A copy with norms folded into layers; ``leave`` makes of each norm what is left of it."""
    net = copied(net).eval()
    for layer, name in pairs.items():
        norm = net.get_submodule(name)
        _fold(net.get_submodule(layer), norm)
        replace_everywhere(net, norm, leave(norm))
    return net


def _nothing(norm: nn.Module) -> nn.Module:
    """What stands in a norm's place: what was behind it, if anything was."""
    return getattr(norm, "scatter", nn.Identity())


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
