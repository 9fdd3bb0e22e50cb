"""Layers that a forward calls as functions, with parameters of its own."""

import pytest
import torch
from small_nets import assert_same_function
from torch import Tensor, nn
from torch.nn import functional as F

from dnal_mini.pruning.analysis import prepare
from dnal_mini.pruning.netfile import load, save
from dnal_mini.pruning.pruner import prune

SHAPE = (3, 9, 7)


class Bare(nn.Module):
    """Two convolutions, a norm and a linear layer, all of them functions."""

    def __init__(self, double_read: bool = False) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(11, 3, 3, 3))
        self.scale, self.shift = nn.Parameter(torch.rand(11) + 0.5), nn.Parameter(torch.rand(11))
        self.register_buffer("mean", torch.randn(11))
        self.register_buffer("variance", torch.rand(11) + 0.5)
        self.second = nn.ParameterDict({"w": torch.randn(5, 11, 1, 1), "b": torch.randn(5)})
        self.head = nn.Parameter(torch.randn(4, 5))
        self.double_read = double_read

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(x, self.first, padding=1)
        x = F.batch_norm(x, self.mean, self.variance, self.scale, self.shift, self.training)
        x = F.relu(x)
        x = F.relu(F.conv2d(x, self.second["w"], self.second["b"]))
        out = F.linear(x.mean((2, 3)), self.head)
        return out + self.scale.sum() if self.double_read else out


def closed(net: Bare, *channels: int) -> Bare:
    """What closed gates leave behind."""
    with torch.no_grad():
        net.scale[list(channels)] = net.shift[list(channels)] = 0
    return net.double().eval()


@pytest.mark.parametrize("residual", ["scatter", "tie"])
def test_functions_get_smaller_parameters_and_keep_the_function(residual):
    net = closed(Bare(), 1, 4, 10)
    small = prune(net, SHAPE, residual)
    assert type(small.module) is Bare
    assert small.module.first.shape == (8, 3, 3, 3)
    assert small.module.mean.shape == small.module.shift.shape == (8,)
    assert small.module.second["w"].shape == (5, 8, 1, 1)
    assert small.report.walls == []
    assert_same_function(net, small, SHAPE)
    assert net.first.shape == (11, 3, 3, 3)


def test_an_unneeded_output_goes_with_its_bias():
    net = closed(Bare())
    with torch.no_grad():
        net.head[:, 3] = 0
    small = prune(net, SHAPE)
    assert small.module.second["b"].shape == (4,)
    assert_same_function(net, small, SHAPE)


def test_a_parameter_that_is_read_twice_is_a_wall():
    net = closed(Bare(double_read=True), 1, 4)
    small = prune(net, SHAPE)
    assert small.module.first.shape[0] == 11
    assert any("batch_norm" in wall for wall in small.report.walls)
    assert small.certificate <= 1e-12


def test_the_file_of_such_a_net_loads(tmp_path):
    small = prune(closed(Bare(), 0, 5), SHAPE)
    save(small, tmp_path / "net.safetensors")
    back = load(tmp_path / "net.safetensors", lambda: Bare().double())
    x = torch.randn(2, *SHAPE).double()
    torch.testing.assert_close(back.module.eval()(x), small.module.eval()(x), rtol=0, atol=0)


def test_the_graph_knows_where_the_parameters_are():
    bare = prepare(Bare().eval(), SHAPE).meta["bare"]
    assert bare["first_layer"] == {"weight": "first"}
    assert bare["second_w_layer"] == {"weight": "second.w", "bias": "second.b"}
    assert set(bare["scale_layer"].values()) == {"mean", "variance", "scale", "shift"}
