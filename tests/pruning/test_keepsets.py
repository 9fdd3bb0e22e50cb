"""Which dead channels stay for the sake of others, told by hand; and that the code then fits."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_nets import close, named
from torch import Tensor, nn
from torch.nn import functional as F

from dnal_mini.graph.places import modules_around
from dnal_mini.pruning.analysis import analyse
from dnal_mini.pruning.facts import GONE, HELD, NEEDED, TIED, WALL, Keeps
from dnal_mini.pruning.keepsets import settle
from dnal_mini.pruning.pruner import settled as tried

SHAPE = (3, 8, 6)


class Two(nn.Module):
    """Two convolutions of six channels with norms, and what the test does with them."""

    def __init__(self, middle: Callable[..., Any], groups: int = 1) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 6, 1, bias=False), nn.BatchNorm2d(6)
        self.conv2, self.bn2 = nn.Conv2d(6, 6, 3, padding=1, groups=groups), nn.BatchNorm2d(6)
        self.head, self.middle = nn.Conv2d(6, 4, 1), middle

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.middle(self, x))


def residual(net: Any, x: Tensor) -> Tensor:
    x = F.relu(net.bn1(net.conv1(x)))
    return F.relu(x + net.bn2(net.conv2(x)))


def chain(net: Any, x: Tensor) -> Tensor:
    return F.relu(net.bn2(net.conv2(F.relu(net.bn1(net.conv1(x))))))


def settled(net: nn.Module, how: str = "scatter", **options: int) -> tuple[dict[str, Any], Keeps]:
    """Why each channel is there, by the name of the node."""
    analysis = analyse(net, SHAPE)
    keeps = settle(analysis, how, **options)
    return {name: keeps.why[node].tolist() for name, node in named(analysis).items()}, keeps


def test_a_sum_ties_a_dead_channel_to_a_live_one():
    """G5, G6: with "tie" all members keep the union; with "scatter" the branch keeps its own."""
    net = Two(residual)
    close(net.bn2, 0, 1)
    close(net.bn1, 1, 2)
    tie, keeps = settled(net, "tie")
    assert not keeps.scatters
    assert tie["bn2"] == [TIED, GONE] + [NEEDED] * 4
    assert tie["bn1"] == tie["relu"] == [NEEDED, GONE, TIED] + [NEEDED] * 3
    scatter, keeps = settled(net, "scatter")
    assert [modules_around(node)[-1] for node in keeps.scatters] == ["bn2"]
    assert scatter["bn2"] == [GONE, GONE] + [NEEDED] * 4
    assert [place for place, reason in enumerate(scatter["add"]) if reason == GONE] == [1]


def test_a_network_keeps_its_input_and_its_output():
    net = Two(chain)
    close(net.bn1, 1, 4)
    net.head.weight.data[2] = 0
    net.head.bias.data[2] = 0
    why, _ = settled(net)
    assert why["x"] == [NEEDED] * 3
    assert why["head"] == [NEEDED, NEEDED, WALL, NEEDED]


def test_a_wall_keeps_what_it_reads():
    net = Two(lambda net, x: net.bn2(net.conv2(F.relu(net.bn1(net.conv1(x))).softmax(1))))
    close(net.bn1, 1, 4)
    close(net.bn2, 3)
    why, _ = settled(net)
    assert why["relu"] == [NEEDED, WALL, NEEDED, NEEDED, WALL, NEEDED]
    assert why["bn2"] == [NEEDED] * 3 + [GONE] + [NEEDED] * 2


def test_halves_of_a_chunk_stay_of_equal_length():
    def forward(net: Any, x: Tensor) -> Tensor:
        first, second = net.bn1(net.conv1(x)).chunk(2, 1)
        return torch.cat([second, first], 1)

    net = Two(forward)
    close(net.bn1, 0, 1, 3)  # one of the first half, two of the second left
    why, _ = settled(net)
    assert why["bn1"] == [HELD, GONE, NEEDED, GONE, NEEDED, NEEDED]


def test_groups_stay_of_equal_size():
    """G11: as many of each group as of the fullest."""
    net = Two(chain, groups=3)
    close(net.bn1, 0, 2, 3)
    why, _ = settled(net)
    assert why["relu"] == [HELD, NEEDED, HELD, HELD, NEEDED, NEEDED]


def test_a_depthwise_layer_goes_channel_by_channel():
    """G9, G11."""
    net = Two(chain, groups=6)
    close(net.bn2, 0, 2, 3)
    why, _ = settled(net)
    assert why["conv1"] == why["conv2"] == [GONE, NEEDED, GONE, GONE, NEEDED, NEEDED]


def test_a_layer_called_again_has_one_width():
    def forward(net: Any, x: Tensor) -> Tensor:
        x = net.bn1(net.conv1(x))
        return net.conv2(F.relu(net.bn2(net.conv2(F.relu(x)))))

    net = Two(forward)
    close(net.bn1, 0, 1, 2)
    close(net.bn2, 1, 2, 3)
    net.head.weight.data[:, [1, 5]] = 0
    why, _ = settled(net)
    for name in ("relu", "relu_1", "conv2", "conv2_1"):  # 2 lives at the end: so everywhere
        assert [place for place, reason in enumerate(why[name]) if reason == GONE] == [1]
    assert why["relu"] == [TIED, GONE, TIED, NEEDED, NEEDED, NEEDED]


NUMBERS = {  # code that has a width written down, or makes a number of it
    "view": lambda x: x.view(x.shape[0], 6, 8, 6),
    "slice": lambda x: torch.cat([x[:, 3:], x[:, :3]], 1),
    "split": lambda x: torch.cat(x.split([2, 4], 1)[::-1], 1),
    "div": lambda x: x / x.shape[1],
    "mul": lambda x: x * x.shape[1] ** -0.5,
    "add": lambda x: x + len(x[0]),
}


@pytest.mark.parametrize("operation", NUMBERS)
def test_a_width_in_the_forward_code_keeps_all_of_it(operation):
    """Trying the cut tells that the number does not follow; the report names the operation."""
    net = Two(lambda net, x: NUMBERS[operation](F.relu(net.bn1(net.conv1(x))))).double().eval()
    close(net.bn1, 1, 4)
    cut = tried(net, {}, SHAPE)
    assert cut.module.conv1.out_channels == 6
    assert any(wall.startswith(operation) for wall in cut.report.walls), cut.report.walls
    images = torch.randn(3, *SHAPE, dtype=torch.float64)
    torch.testing.assert_close(cut.module(images[:2]), net(images[:2]), rtol=1e-9, atol=1e-9)


FOLLOWS = {  # code that works the same numbers out of the width
    "view": lambda x: x.view(x.shape[0], -1, 8, 6),
    "sizes": lambda x: x.view(*x.shape[:2], 48).reshape(x.shape),
    "halves": lambda x: torch.cat([x[:, x.shape[1] // 2 :], x[:, : x.shape[1] // 2]], 1),
    "split": lambda x: torch.cat(x.split(x.shape[1] // 2, 1)[::-1], 1),
    "expand": lambda x: x * x.mean((2, 3), keepdim=True).expand(x.shape),
    "ends beyond": lambda x: x[:, :9],
    "starts before": lambda x: x[:, -9:],
}


@pytest.mark.parametrize("operation", FOLLOWS)
def test_a_number_that_follows_the_width_is_no_wall(operation):
    net = Two(lambda net, x: FOLLOWS[operation](F.relu(net.bn1(net.conv1(x))))).double().eval()
    close(net.bn1, 1, 4)
    cut = tried(net, {}, SHAPE)
    assert cut.module.conv1.out_channels == 4
    assert not cut.report.walls


@pytest.mark.parametrize("how", ["scatter", "tie"])
def test_with_every_channel_alive_nothing_is_held(how):
    for groups in (1, 2, 6):
        why, keeps = settled(Two(residual, groups), how)
        assert all(reason == NEEDED for reasons in why.values() for reason in reasons)
        assert not keeps.notes
