"""Forward code that asks for another precision, no gradient or less memory in a part of it."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import dnal_mini as dnal
from dnal_mini.graph.capture import capture


def block(before: int, channels: int) -> nn.Sequential:
    conv = nn.Conv2d(before, channels, 3, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(channels), nn.ReLU())


class Net(nn.Module):
    def __init__(self, way: Callable[["Net", Tensor], Tensor]) -> None:
        super().__init__()
        self.way, self.scale = way, nn.Parameter(torch.ones(()))
        self.one, self.two, self.end = block(3, 12), block(12, 10), nn.Conv2d(10, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.way(self, x)


def half_precision(net: Net, x: Tensor) -> Tensor:
    with torch.autocast(x.device.type, dtype=torch.bfloat16):
        y = net.two(net.one(x))
    return net.end(y.float()).mean((2, 3))


@torch.autocast("cpu", dtype=torch.bfloat16)
def decorated(net: Net, x: Tensor) -> Tensor:
    return net.end(net.two(net.one(x))).mean((2, 3))


def other_device(net: Net, x: Tensor) -> Tensor:
    with torch.autocast("cuda", enabled=False):
        return net.end(net.two(net.one(x)).float()).mean((2, 3))


def nested(net: Net, x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = net.one(x)
        with torch.autocast("cpu", enabled=False):
            z = net.two(y.float())
        return net.end(z * net.scale).mean((2, 3))


def frozen(net: Net, x: Tensor) -> Tensor:
    with torch.no_grad():
        y, z = net.one(x), 2.0
    with torch.enable_grad():
        return net.end(net.two(y) * z).mean((2, 3))


def by_hand(net: Net, x: Tensor) -> Tensor:
    y = net.one(x.half().float()).to(torch.bfloat16).to(x.dtype)
    return net.end(net.two(y)).mean((2, 3)).to(torch.float16)


def recomputed(net: Net, x: Tensor) -> Tensor:
    y = checkpoint(net.one, x, use_reentrant=False)
    return net.end(checkpoint(net.two, y, use_reentrant=True)).mean((2, 3))


WAYS = [half_precision, decorated, other_device, nested, frozen, by_hand, recomputed]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.filterwarnings("ignore:None of the inputs:UserWarning")  # torch's, of a checkpoint
def test_a_region_of_the_forward_is_seen_through(way: Callable):
    torch.manual_seed(0)
    gated = dnal.add_gates(Net(way).eval(), image_shape=(3, 9, 11))
    for gate in dnal.gates(gated).values():
        gate.s.data = torch.where(torch.arange(len(gate.s)) % 2 == 0, 1.0, -1.0)
    dnal.set_gates(gated, mode="hard")
    small = dnal.prune(gated, (3, 9, 11))
    assert not small.report.walls
    assert [len(m.weight) for m in (small.module.one[0], small.module.two[0])] == [6, 5]
    assert small.certificate < 1e-12
    images = torch.randn(2, 3, 9, 11)
    torch.testing.assert_close(small.module(images), gated(images), atol=0.02, rtol=0.02)


def test_the_nodes_of_a_region_know_their_place():
    found = capture(Net(nested).eval(), (torch.randn(2, 3, 8, 8),))
    assert [layer.name for layer in found.layers.values()] == [
        "one.0", "one.1", "two.0", "two.1", "end"
    ]  # fmt: skip
    assert {"two.2", "one.2"} <= set(found.sole.values())
    found.graph.lint()
