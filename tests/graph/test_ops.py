"""One word for every operation of a traced net, and none for what only looks like one."""

import operator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dnal_mini.graph.capture import trace
from dnal_mini.graph.ops import in_place, kind_of, name_of
from dnal_mini.layers.channelmap import ChannelMap


class Calls(nn.Module):
    """One operation, as a module or as a function of x."""

    def __init__(self, operation: Any) -> None:
        super().__init__()
        self.operation, self.numbers = operation, nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Any:
        return self.operation(x)


def last_call(operation: Any):
    """The last node of ``operation`` before the output, and its graph."""
    graph = trace(Calls(operation))
    return [node for node in graph.graph.nodes if node.op != "output"][-1], graph


def sigmoid(x: Tensor) -> Tensor:
    """A user's own function by a name of torch's."""
    return torch.sin(x)


class Own(nn.Conv2d):
    """A user's own layer: may do anything."""

    fx_leaf = True


class ReLU(nn.Module):
    """A user's own layer by a name of torch's."""

    fx_leaf = True

    def forward(self, x: Tensor) -> Tensor:
        return x + 1


def hooked() -> nn.Module:
    layer = nn.Conv2d(3, 5, 1)
    layer.register_forward_hook(lambda module, args, output: output + 1)
    return layer


@pytest.mark.parametrize(
    ("operation", "word"),
    [
        (nn.Conv1d(3, 5, 1), "conv"), (nn.Conv3d(3, 5, 1), "conv"),
        (nn.Conv2d(6, 6, 1, groups=3), "conv"), (nn.ConvTranspose2d(3, 5, 1), "transposed"),
        (nn.ConvTranspose2d(6, 6, 1, groups=3), "wall"), (nn.Linear(3, 5), "linear"),
        (nn.BatchNorm1d(3), "norm"), (nn.BatchNorm2d(3), "norm"), (nn.SyncBatchNorm(3), "norm"),
        (nn.PReLU(3), "scale"), (ChannelMap([1, 0]), "map"), (nn.Flatten(), "move"),
        (nn.Identity(), "move"), (nn.ChannelShuffle(2), "move"), (nn.PixelShuffle(2), "move"),
        (nn.MaxPool2d(2), "pool"), (nn.AdaptiveAvgPool1d(2), "pool"), (nn.Upsample(2), "pool"),
        (nn.ReflectionPad2d(1), "pad"), (nn.ConstantPad1d(1, 2.0), "pad"),
        (nn.Dropout2d(), "same"), (nn.ReLU6(), "same"), (nn.Hardswish(), "same"),
        (nn.Softsign(), "same"), (nn.GroupNorm(1, 3), "wall"), (nn.LayerNorm(3), "wall"),
        (nn.InstanceNorm2d(3), "wall"), (nn.Softmax(1), "wall"), (nn.LSTM(3, 5), "wall"),
        (nn.Bilinear(3, 3, 5), "wall"), (Own(3, 5, 1), "wall"), (ReLU(), "wall"),
        (hooked(), "wall"), (nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 5, 1)), "wall"),
    ],
    ids=lambda value: value if isinstance(value, str) else str(value).split("\n")[0],
)  # fmt: skip
def test_a_module_goes_by_its_exact_type(operation, word):
    """G11: groups of a transposed convolution are left alone."""
    if isinstance(operation, nn.Bilinear):
        node, graph = last_call(lambda x: x)
        graph.add_module("operation", operation)
        node = graph.graph.call_module("operation", (node, node))
    else:
        node, graph = last_call(operation)
    assert kind_of(node, graph) == word


@pytest.mark.parametrize(
    ("operation", "word", "name"),
    [
        (lambda x: torch.relu(x), "same", "relu"), (lambda x: F.relu(x), "same", "relu"),
        (lambda x: x.relu(), "same", "relu"), (lambda x: x.relu_(), "same", "relu"),
        (lambda x: F.relu_(x), "same", "relu"), (lambda x: F.hardtanh(x), "same", "hardtanh"),
        (lambda x: x.clamp(min=0), "same", "clamp"), (lambda x: -x, "same", "neg"),
        (lambda x: x**2, "same", "pow"), (lambda x: x.to(torch.float64), "same", "to"),
        (lambda x: F.dropout(x, 0.5), "same", "dropout"), (lambda x: x + 1, "join", "add"),
        (lambda x: 1 - x, "join", "sub"), (lambda x: torch.mul(x, x), "join", "mul"),
        (lambda x: x / x, "join", "truediv"), (lambda x: torch.maximum(x, x), "join", "maximum"),
        (lambda x: x.add_(1), "join", "add"), (lambda x: x.mul_(x), "join", "mul"),
        (lambda x: torch.cat([x, x], 1), "move", "cat"), (lambda x: x.chunk(2, 1), "move", "chunk"),
        (lambda x: x[:, 1:], "move", "getitem"), (lambda x: x.flatten(1), "move", "flatten"),
        (lambda x: torch.permute(x, (0, 2, 1)), "move", "permute"),
        (lambda x: x.mean((2, 3)), "mean", "mean"), (lambda x: torch.sum(x, 2), "mean", "sum"),
        (lambda x: F.max_pool2d(x, 2), "pool", "max_pool2d"),
        (lambda x: F.adaptive_avg_pool2d(x, 1), "pool", "adaptive_avg_pool2d"),
        (lambda x: F.interpolate(x, scale_factor=2), "pool", "interpolate"),
        (lambda x: F.pad(x, (1, 1)), "pad", "pad"), (lambda x: x.size(1), "number", "size"),
        (lambda x: x.shape, "number", "getattr"), (lambda x: x.size(1) // 2, "number", "floordiv"),
        (lambda x: x.data, "wall", "getattr"), (lambda x: x.softmax(1), "wall", "softmax"),
        (lambda x: torch.cumsum(x, 1), "wall", "cumsum"), (lambda x: x @ x, "wall", "matmul"),
        (lambda x: F.layer_norm(x, (3,)), "wall", "layer_norm"),
        (lambda x: F.conv2d(x, torch.ones(1, 1, 1, 1)), "wall", "conv2d"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_a_function_or_method_goes_by_its_plain_name(operation, word, name):
    node, graph = last_call(operation)
    assert kind_of(node, graph) == word
    assert name_of(node) == name


def test_a_function_that_only_looks_like_torchs_is_a_wall():
    node, graph = last_call(lambda x: x)
    own = graph.graph.call_function(sigmoid, (node,))
    assert name_of(own) == ""
    assert kind_of(own, graph) == "wall"


def test_an_addition_in_place_is_one_by_any_name():
    node, graph = last_call(lambda x: x)
    added = graph.graph.call_function(operator.iadd, (node, node))
    assert (name_of(added), kind_of(added, graph), in_place(added, graph)) == ("iadd", "join", True)


@pytest.mark.parametrize(
    ("operation", "overwrites"),
    [
        (nn.ReLU(inplace=True), True), (nn.ReLU(), False), (nn.Dropout(0.5, inplace=True), True),
        (nn.Conv2d(3, 5, 1), False), (lambda x: x.relu_(), True), (lambda x: F.relu_(x), True),
        (lambda x: F.relu(x, inplace=True), True), (lambda x: F.relu(x, inplace=False), False),
        (lambda x: x.add_(1), True), (lambda x: x.div_(2), True),
        (lambda x: x + x, False), (lambda x: x.clamp_(0, 1), True), (lambda x: x.size(1), False),
    ],
)  # fmt: skip
def test_what_overwrites_its_input_is_known(operation, overwrites):
    node, graph = last_call(operation)
    assert in_place(node, graph) is overwrites
