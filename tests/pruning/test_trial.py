"""Code whose numbers do not follow the widths is a wall, named, and the only one."""

from typing import Any

import pytest
import torch
from small_nets import assert_same_function, close, settled
from torch import Tensor, nn

from dnal_mini.pruning.pruner import prune

SHAPE = (3, 9, 11)


class Part(nn.Module):
    """A part of a network, with numbers that are written down."""

    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.a, self.n, self.b = nn.Conv2d(6, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 6, 1)
        self.act = act


class Splits(Part):
    def forward(self, x: Tensor) -> Tensor:
        first, second = self.act(self.n(self.a(x))).split((4, 4), dim=1)
        return self.b(torch.cat((second, first * 2), 1))


class Views(Part):
    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.n(self.a(x)))
        return self.b(self.turned(x).reshape(x.shape))

    @staticmethod
    def turned(x: Tensor) -> Tensor:
        return x.view(len(x), 2, 4, *x.shape[2:]).transpose(1, 2)


class Whole(nn.Module):
    """A stem, a part and an end, one activation in all of them."""

    def __init__(self, part: type[Part]) -> None:
        super().__init__()
        self.act = nn.ReLU()
        self.stem, self.n, self.part = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), part(self.act)
        self.end, self.m = nn.Conv2d(6, 5, 3), nn.BatchNorm2d(5)

    def forward(self, x: Tensor) -> Tensor:
        return self.m(self.end(self.part(self.act(self.n(self.stem(x))))))


SOURCE = """
def of_part(this, x):
    first, second = this.act(this.n(this.a(x))).split((4, 4), dim=1)
    return this.b(torch.cat((second, first * 2), 1))
def of_whole(this, x):
    return this.m(this.end(this.part(this.act(this.n(this.stem(x))))))
"""


def without_file() -> nn.Module:
    """The same, of code that stands in no file: its lines are unknown."""
    names: dict[str, Any] = {"torch": torch}
    exec(SOURCE, names)
    part = type("Splits", (Part,), {"forward": names["of_part"]})
    return type("Whole", (Whole,), {"forward": names["of_whole"]})(part)


CASES = {
    "split": (lambda: Whole(Splits), "split in part"),
    "helper": (lambda: Whole(Views), "view in part"),
    "no file": (without_file, "split in part"),
}


@pytest.mark.parametrize("name", CASES)
def test_an_operation_that_does_not_follow_is_the_only_wall(name: str):
    build, wall = CASES[name]
    net = settled(build())
    close(net.n, 1, 4)
    close(net.part.n, 0, 2, 5)
    small = prune(net, SHAPE)
    assert {told.partition(":")[0] for told in small.report.walls} == {wall}
    assert small.module.stem.out_channels == 4
    assert (small.module.part.a.in_channels, small.module.part.a.out_channels) == (4, 8)
    assert_same_function(net, small, SHAPE)
