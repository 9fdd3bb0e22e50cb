"""The words for operations: what kind of thing each of aten's operations does to channels.

Read ``kind_of``. An operation that is in no table is a wall: all that touches it is left alone.
"""

import operator
from typing import Any

import torch
from torch import fx

from dnal_mini.layers.channelmap import channel_map

ACTIVATIONS = {
    "relu", "relu6", "leaky_relu", "silu", "gelu", "elu", "hardswish", "hardsigmoid", "hardtanh",
    "selu", "celu", "mish", "softplus", "sigmoid", "tanh", "prelu",
}  # fmt: skip


CONV_DIMS = {"conv1d": 1, "conv2d": 2, "conv3d": 3}  # dimensions of an image


TRANSPOSED_DIMS = {"conv_transpose1d": 1, "conv_transpose2d": 2, "conv_transpose3d": 3}


MOVE = {
    "flatten", "unflatten", "reshape", "view", "_unsafe_view", "transpose", "permute", "t",
    "numpy_T", "cat", "concat", "concatenate", "chunk", "split", "split_with_sizes", "tensor_split",
    "squeeze", "unsqueeze", "narrow", "select", "slice", "stack", "movedim", "moveaxis", "swapaxes",
    "swapdims", "flip", "roll", "clone", "contiguous", "detach", "alias", "lift_fresh_copy",
    "expand", "repeat", "unbind", "getitem", "channel_shuffle", "native_channel_shuffle",
    "pixel_shuffle", "pixel_unshuffle", "positive", "view_as", "reshape_as", "expand_as",
    "tile", "broadcast_to",
}  # fmt: skip


POOL = {
    "max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d",
    "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "adaptive_max_pool1d",
    "adaptive_max_pool2d", "adaptive_max_pool3d", "upsample_nearest1d", "upsample_nearest2d",
    "upsample_nearest3d", "_upsample_nearest_exact1d", "_upsample_nearest_exact2d",
    "_upsample_nearest_exact3d", "upsample_linear1d", "upsample_bilinear2d", "upsample_bicubic2d",
    "upsample_trilinear3d",
}  # fmt: skip


MEAN = {"mean", "sum", "amax", "amin"}


DROPOUT = {"dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout"}


SAME = ACTIVATIONS | DROPOUT | {
    "abs", "neg", "exp", "sqrt", "square", "pow", "clamp", "clip", "clamp_min", "clamp_max", "to",
    "_to_copy", "rrelu", "log_sigmoid", "softsign", "hardshrink", "softshrink", "threshold",
    "rsqrt", "reciprocal", "log", "log1p", "erf", "sin", "cos", "sign", "round", "floor", "ceil",
}  # fmt: skip


JOIN = {"add", "sub", "subtract", "mul", "multiply", "div", "divide", "true_divide", "maximum",
        "minimum", "rsub"}  # fmt: skip


SUMS = {"add", "sub", "subtract"}


TIMES = {"mul", "multiply"}


DIVISIONS = {"div", "divide", "true_divide"}


PAD = {"pad", "constant_pad_nd"}


WORDS = {
    name: word
    for word, names in (
        ("conv", CONV_DIMS), ("transposed", TRANSPOSED_DIMS), ("linear", ("linear",)),
        ("norm", ("batch_norm",)), ("move", MOVE), ("pool", POOL), ("mean", MEAN), ("same", SAME),
        ("join", JOIN), ("pad", PAD),
    )
    for name in names
}  # fmt: skip


LAYERS = ("conv", "transposed", "linear", "norm")


def name_of(node: fx.Node) -> str:
    """Plain name of an operation of aten, in place or not; "" for what is none of its own."""
    target: Any = node.target
    if target is operator.getitem:
        return "getitem"
    schema = getattr(target, "_schema", None)
    if schema is None or not schema.name.startswith("aten::"):
        return ""
    name = schema.name.removeprefix("aten::")
    return name.rstrip("_") if not name.startswith("__") else name


def kind_of(node: fx.Node) -> str:
    """The word for what a node does; what its arguments allow is seen later.

    "scale" is a multiplication with a parameter, or PReLU: see ``layer.layer_at``.
    """
    if node.op in ("placeholder", "output"):
        return node.op
    if node.target is channel_map:
        return "map"
    name = name_of(node)
    if name == "prelu":
        return "scale"
    return WORDS.get(name, "wall")


def arguments(node: fx.Node) -> dict[str, Any]:
    """All arguments of an operation of aten by name, defaults too."""
    target: Any = node.target
    schema = target._schema.arguments
    given = dict(zip((a.name for a in schema), node.args, strict=False)) | dict(node.kwargs)
    return {a.name: given.get(a.name, a.default_value) for a in schema}


def in_place(node: fx.Node) -> bool:
    """True if the operation overwrites its first input."""
    schema = getattr(node.target, "_schema", None)
    if schema is None or not schema.arguments:
        return False
    alias = schema.arguments[0].alias_info
    return alias is not None and alias.is_write


def is_random(node: fx.Node) -> bool:
    """True if an operation draws random numbers: dropout that is on, noise."""
    tags = getattr(node.target, "tags", ())
    if torch.Tag.nondeterministic_seeded not in tags:
        return False
    given = arguments(node)
    chances = [given[name] for name in ("p", "dropout_p", "dropout") if name in given]
    return bool(given.get("train", given.get("training", True))) and 0 not in chances


def is_activation(node: fx.Node) -> bool:
    """True if a node is an elementwise activation."""
    return node.op == "call_function" and name_of(node) in ACTIVATIONS
