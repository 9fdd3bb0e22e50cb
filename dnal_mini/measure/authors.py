"""The paper's and the authors' forms where they differ from ours, for comparison only.

``printed_gate_gradient`` is a formula as printed, ``masked_rule`` the weights that the authors'
scripts cut, ``authors_counting`` and ``masked_counting`` what they count.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dnal_mini.gating import gates
from dnal_mini.graph.copies import copied
from dnal_mini.layers.scaled_sigmoid import ScaledSigmoid
from dnal_mini.measure.cost import layer_calls, layer_row, layer_table
from dnal_mini.refused import Refused


class AuthorsCount(NamedTuple):
    """The two numbers of the paper's result tables, see ``authors_counting``."""

    flops: int
    params: int


def authors_counting(net: nn.Module, image_shape: Sequence[int] = (3, 32, 32)) -> AuthorsCount:
    """FLOPs and parameters in the convention of the paper's tables, for comparison with them only.

    ``flops``: MACs of convolutions and linear layers (1 multiply-add = 1), plus 1 per output
    channel of a convolution (their batch norm, not multiplied by the pixels), plus 1 per bias.
    ``params``: weights and biases of convolutions and linear layers, plus 2 per output channel of
    a convolution. BatchNorm1d and gates do not count.

    Source: the summary script of the authors' repository [guo2022dnal]; gives the printed 313.47 M
    and 14.99 M (VGG16), 125.49 M and 0.85 M (ResNet56), 91.17 M and 2.30 M (MobileNetV2).
    Differs: their script leaves out the norms of ResNet50's shortcuts; here every convolution
    counts alike.
    Raises: ValueError as ``layer_table`` does.
    """
    flops, params = 0, 0
    counted: set[nn.Module] = set()
    for name, layer, output in layer_calls(net, image_shape):
        if not isinstance(layer, nn.Conv2d | nn.Linear):
            continue
        row = layer_row(name, layer, output)
        channels = layer.out_channels if isinstance(layer, nn.Conv2d) else 0
        biases = 0 if layer.bias is None else layer.bias.numel()
        flops += int(row["macs"]) + channels + biases
        if layer not in counted:
            counted.add(layer)
            params += int(row["params"]) + 2 * channels
    return AuthorsCount(flops, params)


BESIDE = ("shortcut", "downsample")  # convolutions of a skip: the scripts' rule passes them by


def printed_gate_gradient(s: Tensor, delta: float) -> Tensor:
    """The factor from dL/dp to dL/ds as the paper prints it: ``delta^2 s (1 - delta s)``.

    The right one is ``delta p (1 - p)``: in print, p has been replaced by ``delta s``.

    Source: Guo et al. 2022, eq. 6, read from a garbled print [guo2022dnal].
    """
    return delta**2 * s * (1 - delta * s)


def masked_rule(net: nn.Module, beside: Sequence[str] = BESIDE) -> dict[str, Tensor]:
    """Which weights the authors' scripts keep in a gated net: a boolean mask per layer name.

    A closed gate cuts the filter of the convolution before it, in the order of the modules, the
    filter before that one too if it is depthwise, and the inputs of the next convolution or of the
    linear layer. Skips are not looked at, so that the function may change where there are any.
    ``beside``: layers with such a word in their name keep all weights.

    Source: the pruning step of the authors' scripts [guo2022dnal]. ``prune`` is ours: exact.
    Raises: ValueError if a gate and the convolution behind it have different widths.
    """
    layers = [
        (name, module)
        for name, module in net.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear | ScaledSigmoid)
    ]
    masks = {
        name: torch.ones_like(module.weight, dtype=torch.bool)
        for name, module in layers
        if not isinstance(module, ScaledSigmoid)
    }
    layers = [(name, module) for name, module in layers if not any(w in name for w in beside)]
    for place, (name, gate) in enumerate(layers):
        if not isinstance(gate, ScaledSigmoid):
            continue
        closed = ~gate.is_open
        before = [(n, m) for n, m in layers[:place] if isinstance(m, nn.Conv2d)]
        masks[before[-1][0]][closed] = False
        if before[-1][1].groups > 1:
            masks[before[-2][0]][closed] = False
        after = next(n for n, m in layers[place:] if not isinstance(m, ScaledSigmoid))
        repeats = masks[after].shape[1] // len(closed)  # pixels of a channel that was flattened
        if repeats * len(closed) != masks[after].shape[1]:
            raise Refused(f"got {len(closed)} gates {name} before {after}; need equal widths")
        masks[after][:, closed.repeat_interleave(repeats)] = False
    return masks


@torch.no_grad()
def masked_copy(net: nn.Module, beside: Sequence[str] = BESIDE) -> nn.Module:
    """A copy of a gated net whose weights are 0 where ``masked_rule`` cuts them."""
    masked = copied(net)
    for name, mask in masked_rule(net, beside).items():
        masked.get_submodule(name).weight.mul_(mask)  # type: ignore[operator]
    return masked


def masked_counting(
    net: nn.Module, image_shape: Sequence[int] = (3, 32, 32), beside: Sequence[str] = BESIDE
) -> AuthorsCount:
    """``authors_counting`` of a gated net over the weights that ``masked_rule`` keeps.

    With all gates open it is ``authors_counting``; in a plain chain that of the pruned net.

    Source: the summary script of the authors' repository [guo2022dnal].
    Raises: ValueError as ``masked_rule`` and ``layer_table`` do.
    """
    flops, params = 0, 0
    masks = masked_rule(net, beside)
    for row in layer_table(net, image_shape):
        if row["name"] not in masks:
            continue
        mask, layer = masks[str(row["name"])], net.get_submodule(str(row["name"]))
        weights, outputs = int(mask.sum()), int(mask.flatten(1).any(1).sum())
        biases = 0 if layer.bias is None else outputs
        norms = outputs if isinstance(layer, nn.Conv2d) else 0
        flops += weights * int(row["height"]) * int(row["width"]) + norms + biases
        params += weights + 2 * norms + biases
    return AuthorsCount(flops, params)


def open_share(net: nn.Module) -> float:
    """Share of all gates of a net that are open, in [0, 1]."""
    every = torch.cat([gate.is_open for gate in gates(net).values()])
    return float(every.double().mean())
