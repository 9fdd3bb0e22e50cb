"""One word for every operation of a captured net, however the user's code calls it."""

import contextlib
import operator
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from dnal_mini.graph.capture import Capture, capture
from dnal_mini.graph.ops import in_place, kind_of, name_of
from dnal_mini.layers.channelmap import ChannelMap


class Calls(nn.Module):
    """One operation, as a module or as a function of x."""

    def __init__(self, operation: Any) -> None:
        super().__init__()
        self.operation = operation

    def forward(self, x: Tensor) -> Any:
        return self.operation(x)


def last_call(operation: Any, *shape: int) -> tuple[fx.Node, Capture]:
    """The last node of ``operation`` before the output, and its graph."""
    graph = capture(Calls(operation).eval(), (torch.rand(2, *(shape or (6, 8, 8))),))
    return [node for node in graph.nodes if node.op != "output"][-1], graph


class Own(nn.Conv2d):
    """A user's own layer: its numbers are known, and nothing can be put around it."""


class ReLU(nn.Module):
    """A user's own layer by a name of torch's."""

    def forward(self, x: Tensor) -> Tensor:
        return x.cumsum(1)


LAYERS = {
    "conv": [
        (nn.Conv1d(6, 5, 1), (6, 8)), (nn.Conv2d(6, 5, 1), ()), (nn.Conv3d(6, 5, 1), (6, 4, 4, 4)),
        (nn.Conv2d(6, 6, 1, groups=3), ()), (Own(6, 6, 1, groups=2), ()),
        (nn.Conv2d(6, 5, 3, padding="same"), ()), (nn.Conv2d(6, 5, 3, 1, 1, bias=False), ()),
        (nn.Conv2d(6, 5, 3, padding=1, padding_mode="reflect"), ()),
    ],
    "transposed": [(nn.ConvTranspose2d(6, 5, 1), ()), (nn.ConvTranspose1d(6, 5, 2), (6, 8))],
    "linear": [(nn.Linear(8, 5), ()), (nn.Linear(6, 5), (6,))],
    "norm": [
        (nn.BatchNorm1d(6), (6,)), (nn.BatchNorm2d(6), ()), (nn.BatchNorm3d(6), (6, 2, 2, 2)),
        (nn.SyncBatchNorm(6), ()), (nn.BatchNorm2d(6, affine=False), ()),
    ],
    "scale": [(nn.PReLU(6), ())],
    "map": [(ChannelMap([1, -1, 0]), ()), (ChannelMap([0], 2), ()), (ChannelMap([5, 4]), ())],
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "layer", "shape"),
    [(kind, *case) for kind, cases in LAYERS.items() for case in cases],
    ids=lambda value: type(value).__name__,
)
def test_a_layer_is_known_with_its_tensors(kind, layer, shape):
    node, graph = last_call(layer, *shape)
    found = graph.layers[node]
    assert found.kind == kind
    named = {f"operation.{name}" for name, _ in layer.named_parameters()}
    assert named <= set(found.roles.values())
    assert found.module == ("" if isinstance(layer, Own) else "operation")
    assert found.groups == getattr(layer, "groups", 1)


def scaled(weight: nn.Parameter, operation: Any) -> nn.Module:
    net = Calls(lambda x: operation(x, net.weight))
    net.weight = weight
    return net.eval()


@pytest.mark.parametrize(
    ("shape", "operation", "axis"),
    [
        ((6, 1, 1), operator.mul, 0), ((1, 6, 1, 1), operator.add, 1), ((8,), operator.mul, 0),
        ((6, 1, 1), lambda x, w: w * x, 0), ((6, 1, 1), operator.truediv, 0),
        ((1, 1), operator.mul, None), ((6, 8, 8), operator.add, None),
        ((6, 1, 1), lambda x, w: x * w.abs(), None),
    ],
)  # fmt: skip
def test_a_bare_parameter_is_a_layer_where_it_has_a_number_for_each_channel(shape, operation, axis):
    graph = capture(scaled(nn.Parameter(torch.rand(shape)), operation), (torch.rand(2, 6, 8, 8),))
    assert [layer.axis for layer in graph.layers.values()] == ([] if axis is None else [axis])


def test_a_layer_called_as_a_function_is_the_same_layer():
    net = Calls(lambda x: F.conv2d(x, net.inner.weight, net.inner.bias, padding=1))
    net.inner = nn.Conv2d(6, 4, 3)
    (layer,) = capture(net.eval(), (torch.rand(2, 6, 8, 8),)).layers.values()
    assert layer.roles == {"weight": "inner.weight", "bias": "inner.bias"}
    assert (layer.module, layer.owner, layer.pads_with_zeros) == ("", "inner", True)


@pytest.mark.parametrize(
    ("operation", "word"),
    [
        (nn.Flatten(), "move"), (nn.ChannelShuffle(2), "move"), (nn.PixelUnshuffle(2), "move"),
        (nn.MaxPool2d(2), "pool"), (nn.AdaptiveAvgPool2d(2), "pool"), (nn.Upsample(2), "pool"),
        (nn.Upsample(scale_factor=2, mode="bilinear"), "pool"), (nn.AvgPool2d(2), "pool"),
        (nn.ReflectionPad2d(1), "pad"), (nn.ConstantPad2d(1, 2.0), "pad"),
        (nn.ZeroPad2d(1), "pad"), (nn.CircularPad2d(1), "pad"), (nn.Dropout2d(), "same"),
        (nn.ReLU6(), "same"), (nn.Hardswish(), "same"), (nn.GELU(), "same"),
        (nn.GroupNorm(1, 6), "wall"), (nn.LayerNorm(8), "wall"), (nn.InstanceNorm2d(6), "wall"),
        (nn.Softmax(1), "wall"), (ReLU(), "wall"),
        (nn.ConvTranspose2d(6, 6, 1, groups=3), "wall"),
        (nn.utils.parametrizations.weight_norm(nn.Conv2d(6, 5, 1)), "wall"),
        (lambda x: F.conv2d(x, torch.ones(1, 6, 1, 1)), "wall"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)  # fmt: skip
def test_what_is_no_layer_goes_by_its_operation(operation, word):
    """G11: groups of a transposed convolution are left alone. So are weights that are computed."""
    node, graph = last_call(operation)
    assert node not in graph.layers
    assert ("wall" if kind_of(node) in ("conv", "transposed") else kind_of(node)) == word


@pytest.mark.parametrize(
    ("operation", "word", "name"),
    [
        (lambda x: torch.relu(x), "same", "relu"), (lambda x: F.relu(x), "same", "relu"),
        (lambda x: x.relu(), "same", "relu"), (lambda x: x.relu_(), "same", "relu"),
        (lambda x: F.relu_(x), "same", "relu"), (lambda x: F.hardtanh(x), "same", "hardtanh"),
        (lambda x: x.clamp(min=0), "same", "clamp"), (lambda x: -x, "same", "neg"),
        (lambda x: x**2, "same", "pow"), (lambda x: x.to(torch.float64), "same", "to"),
        (lambda x: x + 1, "join", "add"), (lambda x: 1 - x, "join", "rsub"),
        (lambda x: torch.mul(x, x), "join", "mul"), (lambda x: x / x, "join", "div"),
        (lambda x: torch.maximum(x, x), "join", "maximum"), (lambda x: x.add_(1), "join", "add"),
        (lambda x: operator.iadd(x, x), "join", "add"), (lambda x: x.mul_(x), "join", "mul"),
        (lambda x: torch.cat([x, x], 1), "move", "cat"), (lambda x: x[:, 1:], "move", "slice"),
        (lambda x: x.chunk(2, 1)[1], "move", "getitem"),
        (lambda x: x.flatten(1), "move", "flatten"),
        (lambda x: torch.permute(x, (0, 2, 1, 3)), "move", "permute"),
        (lambda x: x.mean((2, 3)), "mean", "mean"), (lambda x: torch.sum(x, 2), "mean", "sum"),
        (lambda x: F.max_pool2d(x, 2), "pool", "max_pool2d"),
        (lambda x: F.interpolate(x, scale_factor=2), "pool", "upsample_nearest2d"),
        (lambda x: F.pad(x, (1, 1)), "pad", "pad"), (lambda x: x.softmax(1), "wall", "softmax"),
        (lambda x: torch.cumsum(x, 1), "wall", "cumsum"), (lambda x: x @ x, "wall", "matmul"),
        (lambda x: torch.einsum("nchw,nc->nhwc", x, x.mean((2, 3))), "join", "mul"),
        (lambda x: torch.einsum("nchw,nchw->nc", x, x), "mean", "sum"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_a_function_or_method_goes_by_its_plain_name(operation, word, name):
    node, _ = last_call(operation)
    assert (kind_of(node), name_of(node)) == (word, name)


@pytest.mark.parametrize(
    ("formula", "shapes"),
    [
        ("nchw,nc->nchw", ((2, 6, 3, 4), (2, 6))), ("nchw,nc->nhwc", ((2, 6, 3, 4), (2, 6))),
        ("nchw,nchw->nc", ((2, 6, 3, 4), (2, 6, 3, 4))), ("nchw,cd->ndhw", ((2, 6, 3, 4), (6, 5))),
    ],
)  # fmt: skip
def test_an_einsum_written_as_a_product_and_a_sum_computes_the_same(formula, shapes):
    class Net(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return torch.einsum(formula, x, y)

    inputs = tuple(torch.rand(shape, dtype=torch.float64) for shape in shapes)
    graph = capture(Net().eval(), inputs)
    assert "einsum" not in {name_of(node) for node in graph.nodes}
    again = fx.Interpreter(fx.GraphModule(nn.Module(), graph.graph)).run(*inputs)
    torch.testing.assert_close(again[0], Net()(*inputs))


@pytest.mark.parametrize(
    ("operation", "overwrites"),
    [
        (nn.ReLU(inplace=True), True), (nn.ReLU(), False), (nn.Conv2d(6, 5, 1), False),
        (lambda x: x.relu_(), True), (lambda x: F.relu(x, inplace=True), True),
        (lambda x: F.relu(x, inplace=False), False), (lambda x: x.add_(1), True),
        (lambda x: x + x, False), (lambda x: x.clamp_(0, 1), True),
    ],
)  # fmt: skip
def test_what_overwrites_its_input_is_known(operation, overwrites):
    node, _ = last_call(lambda x: operation(x * 1))
    assert in_place(node) is overwrites


def attended(x: Tensor, chance: float) -> Tensor:
    return F.scaled_dot_product_attention(x, x, x, dropout_p=chance)


@pytest.mark.parametrize(
    ("operation", "draws"),
    [
        (torch.rand_like, True), (lambda x: F.dropout(x, 0.3, True), True),
        (lambda x: F.dropout(x, 0.3, False), False), (lambda x: F.dropout(x, 0.0, True), False),
        (lambda x: attended(x, 0.1), True), (lambda x: attended(x, 0.0), False),
        (lambda x: F.rrelu(x, training=True), True), (F.rrelu, False), (torch.bernoulli, True),
        (nn.Sequential(nn.Flatten(2), nn.GRU(64, 5, 2, dropout=0.3)), False),
    ],
)  # fmt: skip
def test_what_draws_random_numbers_is_refused_and_what_may_but_does_not_is_taken(operation, draws):
    images = (torch.rand(2, 6, 8, 8),)
    refused = pytest.raises(ValueError, match="random numbers in eval mode")
    with refused if draws else contextlib.nullcontext():
        assert capture(Calls(operation).eval(), images).nodes
