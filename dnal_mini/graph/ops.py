"""The SS layer: one learnable soft switch per channel, and how to put it into any CNN.

Read ``ScaledSigmoid`` first: its three-line ``forward`` is the whole idea. ``add_gates`` puts it
into a copy of a network, ``delta_schedule`` makes the switch steeper, ``gate_price`` charges for
open gates. This file knows nothing about training, pruning or particular networks.
"""

import operator
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from dnal_mini.layers.channelmap import ChannelMap

ACTIVATIONS = {
    "relu", "relu_", "relu6", "leaky_relu", "silu", "gelu", "elu", "hardswish", "hardsigmoid",
    "hardtanh", "selu", "celu", "mish", "softplus", "sigmoid", "tanh", "prelu",
}  # fmt: skip


CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


POOLS = (
    nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d,
    nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d,
    nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d,
    nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d,
)  # fmt: skip


PADS = (
    nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d, nn.ConstantPad1d, nn.ConstantPad2d,
    nn.ConstantPad3d, nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReflectionPad3d,
    nn.ReplicationPad1d, nn.ReplicationPad2d, nn.ReplicationPad3d,
    nn.CircularPad1d, nn.CircularPad2d, nn.CircularPad3d,
)  # fmt: skip


MOVERS = (nn.Flatten, nn.Unflatten, nn.Identity, nn.ChannelShuffle, nn.PixelShuffle,
          nn.PixelUnshuffle)  # fmt: skip


DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)


MOVE = {
    "flatten", "unflatten", "reshape", "view", "transpose", "permute", "cat", "concat",
    "concatenate", "chunk", "split", "tensor_split", "squeeze", "unsqueeze", "narrow", "select",
    "stack", "movedim", "moveaxis", "swapaxes", "swapdims", "flip", "roll", "clone", "contiguous",
    "detach", "expand", "unbind", "getitem", "channel_shuffle", "pixel_shuffle",
    "pixel_unshuffle", "positive", "identity", "view_as", "reshape_as", "expand_as",
}  # fmt: skip


POOL = {
    "max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d",
    "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "adaptive_max_pool1d",
    "adaptive_max_pool2d", "adaptive_max_pool3d", "interpolate", "upsample",
}  # fmt: skip


MEAN = {"mean", "sum", "amax", "amin"}


SAME = ACTIVATIONS | {
    "abs", "neg", "exp", "sqrt", "square", "pow", "clamp", "clip", "clamp_min", "clamp_max",
    "float", "double", "half", "bfloat16", "to", "type_as", "dropout", "dropout1d", "dropout2d",
    "dropout3d", "feature_dropout", "stochastic_depth", "logsigmoid", "softsign", "tanhshrink",
    "softshrink", "hardshrink", "threshold", "rsqrt", "reciprocal", "log", "log1p", "erf", "sin",
    "cos", "sign", "round", "floor", "ceil",
}  # fmt: skip


JOIN = {
    "add", "sub", "subtract", "mul", "multiply", "div", "divide", "truediv", "true_divide",
    "iadd", "isub", "imul", "itruediv", "maximum", "minimum", "rsub",
}  # fmt: skip


TIMES = {"mul", "multiply", "imul"}


NUMBER = {"size", "dim", "ndimension", "numel", "len", "int", "floordiv", "mod", "eq", "ne", "lt",
          "le", "gt", "ge", "_assert", "is_floating_point"}  # fmt: skip


RANDOM = {"dropout", "dropout1d", "dropout2d", "dropout3d", "feature_dropout", "stochastic_depth"}


OWN_PLACES: tuple[Any, ...] = (torch, F, operator, torch.Tensor, torch._C._nn)


def name_of(node: fx.Node) -> str:
    """Plain name of a function or method; "" for a function that only looks like torch's own."""
    if node.op == "call_method":
        return str(node.target).rstrip("_")
    target: Any = node.target
    name = getattr(target, "__name__", "")
    if target is len or target is getattr:
        return name
    if name == "stochastic_depth" and target.__module__.startswith("torchvision.ops"):
        return name
    for place in OWN_PLACES:
        if getattr(place, name, None) is target:
            return name.rstrip("_") if name != "_assert" else name
    return ""


def kind_of(node: fx.Node, graph: fx.GraphModule) -> str:
    """The word for a node that calls something; what its arguments allow is seen later."""
    if node.op in ("placeholder", "output"):
        return node.op
    if node.op == "get_attr":
        return "wall"
    if node.op == "call_module":
        return _module_kind(graph.get_submodule(str(node.target)))
    name = name_of(node)
    if name == "getattr":
        return "number" if node.args[1] in ("shape", "ndim", "dtype", "device") else "wall"
    for kind, names in (
        ("move", MOVE), ("pool", POOL), ("mean", MEAN), ("same", SAME), ("join", JOIN),
        ("number", NUMBER), ("pad", {"pad"}),
    ):  # fmt: skip
        if name in names:
            return kind
    return "wall"


def _module_kind(module: nn.Module) -> str:
    """Exact types only: a subclass may do anything. So may hooks and parametrized weights."""
    changed = (
        module._forward_hooks or module._forward_pre_hooks or parametrize.is_parametrized(module)
    )
    kind = type(module)
    if changed:
        return "wall"
    if kind in CONVS:
        return "conv"
    if kind in TRANSPOSED:
        return "transposed" if module.groups == 1 else "wall"
    if kind is nn.PReLU:
        return "scale"
    for word, kinds in (
        ("linear", (nn.Linear,)), ("norm", NORMS), ("map", (ChannelMap,)), ("move", MOVERS),
        ("pool", POOLS), ("pad", PADS), ("same", DROPOUTS),
    ):  # fmt: skip
        if kind in kinds:
            return word
    is_torchs = kind.__module__.startswith("torch.nn.")
    return "same" if is_torchs and kind.__name__.lower() in SAME else "wall"


def is_changed(module: nn.Module) -> bool:
    """True if hooks, parametrized weights or a forward put in its place change what it does."""
    hooks = bool(module._forward_hooks) or bool(module._forward_pre_hooks)
    return hooks or "forward" in vars(module) or parametrize.is_parametrized(module)


def in_place(node: fx.Node, graph: fx.GraphModule) -> bool:
    """True if the operation overwrites its first input."""
    if node.op == "call_module":
        return bool(getattr(graph.get_submodule(str(node.target)), "inplace", False))
    if node.op not in ("call_function", "call_method"):
        return False
    name = str(getattr(node.target, "__name__", node.target))
    inplace = node.kwargs.get("inplace", False) or (name.endswith("_") and name[:1] != "_")
    return bool(inplace) or name in ("iadd", "isub", "imul", "itruediv")


def is_activation(node: fx.Node, root: nn.Module) -> bool:
    """True if an fx node is an elementwise activation, as a module, a function or a method."""
    if node.op == "call_module":
        module = root.get_submodule(str(node.target))
        return type(module).__name__.lower() in ACTIVATIONS
    return getattr(node.target, "__name__", node.target) in ACTIVATIONS
