"""How layers with weights pass channels on, and which constants can move into their bias."""

from typing import Any

import torch
from torch import Tensor, fx

from dnal_mini.graph.ops import kind_of
from dnal_mini.pruning.facts import CONSTANT, FIXED, LIVE, ZERO, Analysis, known, pick
from dnal_mini.pruning.operands import single
from dnal_mini.pruning.prepare import shape_of
from dnal_mini.pruning.provenance import SPOTS, Broken, Shadow, fresh

WEIGHTS = ("conv", "transposed", "linear")


def usable(shadow: Any, module: Any, kind: str) -> bool:
    """True if the positions of a tensor are those that a layer's weights are made for."""
    if not isinstance(shadow, Shadow) or shadow.keys is None:
        return False
    if len(shadow.keys.unique()) != len(shadow.keys):
        return False
    dims = len(shadow.shape)
    digit = type(module).__name__[-2]
    match kind:
        case "linear":
            return shadow.axis == dims - 1
        case "norm":
            allowed = {"1": (2, 3), "2": (4,), "3": (5,)}.get(digit, (2, 3, 4, 5))
            return shadow.axis == 1 and dims in allowed
        case "conv" | "transposed":
            return shadow.axis == 1 and dims == int(digit) + 2 and shadow.plain
        case _:
            return shadow.axis == 1 and shadow.plain


def blocks_of(module: Any, kind: str) -> Tensor:
    """Weight as (groups, outputs per group, inputs per group, entries)."""
    weight = module.weight.detach().cpu()
    if kind == "transposed":
        weight = weight.transpose(0, 1)
    groups = getattr(module, "groups", 1)
    return weight.reshape(groups, len(weight) // groups, weight.shape[1], -1)


def keeps_constants(module: Any, kind: str) -> bool:
    """True if a constant image stays constant: nothing is padded with zeros or spread out."""
    if kind == "linear":
        return True
    pads = module.padding
    padded = any(k > 1 for k in module.kernel_size) and pads == "same"
    padded |= not isinstance(pads, str) and any(p != 0 for p in pads)
    return kind == "conv" and (not padded or module.padding_mode != "zeros")


def constant_part(module: Any, kind: str, positions: Tensor, value: Tensor) -> Tensor:
    """What constants ``value`` at the given input positions add to each output; float64."""
    weight = blocks_of(module, kind)
    if len(weight) > 1:
        sums = weight.sum(3, dtype=torch.float64)
        return (sums * (value * positions).reshape(len(weight), 1, -1)).sum(2).flatten()
    found = positions.nonzero()[:, 0]
    return weight[0].index_select(1, found).sum(2, dtype=torch.float64) @ value[found]


def weights_rule(node: fx.Node, analysis: Analysis) -> None:
    """Convolution, transposed convolution, linear: zero if only zeros come in."""
    module, kind, shape = analysis.module(node), kind_of(node, analysis.graph), shape_of(node)
    x, source = node.all_input_nodes[0], analysis.values[node.all_input_nodes[0]]
    axis = len(shape) - 1 if kind == "linear" else 1
    shadow = fresh(shape[axis], shape, axis)
    if not usable(source, module, kind):
        analysis.add(node, kind, shadow, torch.full((shape[axis],), LIVE))
        return
    at = source.channels
    state, value, steady = pick(analysis.facts[x], at)
    uses = (blocks_of(module, kind) != 0).any(3)
    groups, _, width = uses.shape
    highest = (uses.to(torch.uint8) * state.reshape(groups, 1, width)).amax(2).flatten()
    unsteady = (uses & ~steady.reshape(groups, 1, width)).any(2).flatten()
    if not keeps_constants(module, kind):  # what is not 0 meets the padding at the border
        meets = (uses & (value != 0).reshape(groups, 1, width)).any(2).flatten()
        highest[(highest == CONSTANT) & meets] = FIXED
    total = constant_part(module, kind, state == CONSTANT, value)
    if module.bias is not None:
        total += module.bias.detach().double().cpu()
    highest, total = known(highest, total)
    analysis.add(node, kind, shadow, highest, total, ~unsteady, inputs=at)


def affine(norm: Any) -> tuple[Tensor, Tensor]:
    """gamma and beta of a BatchNorm in float64; ones and zeros if it has none."""
    if not norm.affine:
        count = norm.num_features
        return torch.ones(count, dtype=torch.float64), torch.zeros(count, dtype=torch.float64)
    return norm.weight.detach().double().cpu(), norm.bias.detach().double().cpu()


def norm_rule(node: fx.Node, analysis: Analysis) -> None:
    """BatchNorm: gamma = 0 leaves beta; a constant leaves a constant that depends on the mode.

    A channel with gamma = beta = 0 is zero in eval and in train mode: this is a closed gate.
    A constant that comes in leaves beta in train mode, and something else in eval mode.
    """
    (x, shadow), norm = single(node, analysis), analysis.module(node)
    if not usable(shadow, norm, "norm"):
        raise Broken("channels are not along axis 1")
    at = shadow.channels
    state, value, steady = pick(analysis.facts[x], at)
    gamma, beta = affine(norm)
    closed = gamma == 0
    if norm.running_mean is None:
        state[~closed & (state < FIXED)] = FIXED
    else:
        mean, variance = norm.running_mean.double().cpu(), norm.running_var.double().cpu()
        value = beta + gamma * (value - mean) / torch.sqrt(variance + norm.eps)
    state[closed] = torch.where(beta == 0, ZERO, CONSTANT)[closed].to(torch.uint8)
    state, value = known(state, torch.where(closed, beta, value))
    steady = closed | (steady & (state >= FIXED))
    out = Shadow(shadow.shape, torch.arange(len(at)) * SPOTS, 1)
    analysis.add(node, "norm", out, state, value, steady, [(x, at)], inputs=at)


def map_rule(node: fx.Node, analysis: Analysis) -> None:
    """ChannelMap: its own list of sources."""
    (x, shadow), module = single(node, analysis), analysis.module(node)
    if not usable(shadow, module, "map") or str(node.target) in analysis.shared:
        raise Broken("channels are not along axis 1")
    source = module.source.cpu()
    at = shadow.channels[source.clamp(min=0)].masked_fill(source < 0, -1)
    state, value, steady = pick(analysis.facts[x], at)
    out = fresh(len(source), shape_of(node))
    analysis.add(node, "map", out, state, value, steady, [(x, at)], inputs=source)
