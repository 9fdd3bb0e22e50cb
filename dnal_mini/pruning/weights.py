"""How layers with weights pass channels on, and which constants can move into their bias."""

from typing import Any

import torch
from torch import Tensor, fx

from dnal_mini.graph.layer import Layer
from dnal_mini.graph.ops import DIVISIONS, SUMS, TIMES, name_of
from dnal_mini.graph.places import shape_of
from dnal_mini.pruning.facts import CONSTANT, FIXED, LIVE, ZERO, Analysis, known, pick
from dnal_mini.pruning.operands import on_values, single
from dnal_mini.pruning.provenance import SPOTS, Broken, Shadow, fresh

WEIGHTS = ("conv", "transposed", "linear")


def usable(shadow: Any, layer: Layer) -> bool:
    """True if the positions of a tensor are those that a layer's weights are made for."""
    if not isinstance(shadow, Shadow) or shadow.keys is None:
        return False
    if len(shadow.keys.unique()) != len(shadow.keys):
        return False
    dims = len(shadow.shape)
    match layer.kind:
        case "linear":
            return shadow.axis == dims - 1
        case "conv" | "transposed":
            return shadow.axis == 1 and dims == layer.dims + 2 and shadow.plain
        case _:
            return shadow.axis == 1


def blocks_of(node: fx.Node, analysis: Analysis) -> Tensor:
    """Weight as (groups, outputs per group, inputs per group, entries)."""
    layer, weight = analysis.layer(node), analysis.tensor(node, "weight")
    assert weight is not None
    weight = weight.cpu()
    if layer.kind == "transposed":
        weight = weight.transpose(0, 1)
    return weight.reshape(layer.groups, len(weight) // layer.groups, weight.shape[1], -1)


def keeps_constants(layer: Layer) -> bool:
    """True if a constant image stays constant: nothing is padded with zeros or spread out."""
    return layer.kind == "linear" or (layer.kind == "conv" and not layer.pads_with_zeros)


def constant_part(node: fx.Node, analysis: Analysis, positions: Tensor, value: Tensor) -> Tensor:
    """What constants ``value`` at the given input positions add to each output; float64."""
    weight = blocks_of(node, analysis)
    if len(weight) > 1:
        sums = weight.sum(3, dtype=torch.float64)
        return (sums * (value * positions).reshape(len(weight), 1, -1)).sum(2).flatten()
    found = positions.nonzero()[:, 0]
    return weight[0].index_select(1, found).sum(2, dtype=torch.float64) @ value[found]


def weights_rule(node: fx.Node, analysis: Analysis) -> None:
    """Convolution, transposed convolution, linear: zero if only zeros come in."""
    layer, shape = analysis.layer(node), shape_of(node)
    x, source = node.all_input_nodes[0], analysis.values[node.all_input_nodes[0]]
    axis = len(shape) - 1 if layer.kind == "linear" else 1
    shadow = fresh(shape[axis], shape, axis)
    if not usable(source, layer):
        analysis.add(node, layer.kind, shadow, torch.full((shape[axis],), LIVE))
        return
    at = source.channels
    state, value, steady = pick(analysis.facts[x], at)
    uses = (blocks_of(node, analysis) != 0).any(3)
    groups, _, width = uses.shape
    highest = (uses.to(torch.uint8) * state.reshape(groups, 1, width)).amax(2).flatten()
    unsteady = (uses & ~steady.reshape(groups, 1, width)).any(2).flatten()
    if not keeps_constants(layer):  # what is not 0, in either mode, meets the padding at the border
        meets = (uses & ((value != 0) | ~steady).reshape(groups, 1, width)).any(2).flatten()
        highest[(highest == CONSTANT) & meets] = FIXED
    total = constant_part(node, analysis, state == CONSTANT, value)
    if (bias := analysis.tensor(node, "bias")) is not None:
        total += bias.double().cpu()
    highest, total = known(highest, total)
    analysis.add(node, layer.kind, shadow, highest, total, ~unsteady, inputs=at)


def affine(node: fx.Node, analysis: Analysis, count: int) -> tuple[Tensor, Tensor]:
    """gamma and beta of a BatchNorm in float64; ones and zeros if it has none."""
    gamma, beta = (analysis.tensor(node, role) for role in ("weight", "bias"))
    one, zero = (make(count, dtype=torch.float64) for make in (torch.ones, torch.zeros))
    return (
        one if gamma is None else gamma.double().cpu(),
        zero if beta is None else beta.double().cpu(),
    )


def norm_rule(node: fx.Node, analysis: Analysis) -> None:
    """BatchNorm: gamma = 0 leaves beta; a constant leaves a constant that depends on the mode.

    A channel with gamma = beta = 0 is zero in eval and in train mode: this is a closed gate.
    A constant that comes in leaves beta in train mode, and something else in eval mode.
    """
    (x, shadow), layer = single(node, analysis), analysis.layer(node)
    if not usable(shadow, layer):
        raise Broken("channels are not along axis 1")
    at = shadow.channels
    state, value, steady = pick(analysis.facts[x], at)
    gamma, beta = affine(node, analysis, len(at))
    closed = gamma == 0
    mean, variance = (analysis.tensor(node, f"running_{of}") for of in ("mean", "var"))
    if mean is None or variance is None:
        state[~closed & (state < FIXED)] = FIXED
    else:
        deviation = torch.sqrt(variance.double().cpu() + layer.eps)
        value = beta + gamma * (value - mean.double().cpu()) / deviation
    state[closed] = torch.where(beta == 0, ZERO, CONSTANT)[closed].to(torch.uint8)
    state, value = known(state, torch.where(closed, beta, value))
    steady = closed | (steady & (state >= FIXED))
    out = Shadow(shadow.shape, torch.arange(len(at)) * SPOTS, 1)
    analysis.add(node, "norm", out, state, value, steady, [(x, at)], inputs=at)


def scale_rule(node: fx.Node, analysis: Analysis) -> None:
    """A learned number for each channel: PReLU, or times, plus, minus, over a parameter."""
    (x, shadow), layer = single(node, analysis), analysis.layer(node)
    weight = analysis.tensor(node, "weight")
    assert weight is not None
    name, numbers = name_of(node), weight.double().cpu().flatten()
    axis = 1 if name == "prelu" else len(shadow.shape) - weight.dim() + layer.axis
    if shadow.keys is None or shadow.axis != axis or len(shadow.keys) != len(numbers):
        raise Broken("channels are not along the parameter's axis")
    at = shadow.channels
    state, value, steady = pick(analysis.facts[x], at)
    followed = name in TIMES | SUMS | {"prelu"} or (name in DIVISIONS and node.args[0] is x)
    if shape_of(node) != shadow.shape or len(shadow.shape) < 2 or not followed:
        raise Broken("an operation with a parameter that is not followed")
    if name == "prelu":
        value = torch.where(value > 0, value, numbers * value)
    else:
        (learned,) = (n for n in node.all_input_nodes if n is not x)
        value = on_values(node, analysis, {x: value, learned: numbers})
    if not bool(value.isfinite().all()):
        raise Broken("not finite at a constant")
    state, value = known(state, value)
    if name in TIMES:
        state[numbers == 0], value[numbers == 0], steady[numbers == 0] = ZERO, 0, True
    out = Shadow(shadow.shape, torch.arange(len(at)) * SPOTS, shadow.axis)
    analysis.add(node, "scale", out, state, value, steady, [(x, at)], inputs=at)


def map_rule(node: fx.Node, analysis: Analysis) -> None:
    """ChannelMap: its own list of sources."""
    (x, shadow), layer = single(node, analysis), analysis.layer(node)
    if not (usable(shadow, layer) and shadow.plain) or layer.name in analysis.shared:
        raise Broken("channels are not along axis 1")
    source = torch.tensor(node.args[1])
    at = shadow.channels[source.clamp(min=0)].masked_fill(source < 0, -1)
    state, value, steady = pick(analysis.facts[x], at)
    out = fresh(len(source), shape_of(node))
    analysis.add(node, "map", out, state, value, steady, [(x, at)], inputs=source)
