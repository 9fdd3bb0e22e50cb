"""A net with channels that nobody needs, planted: which methods find them, and which cannot.

Twelve of the sixteen channels of the first layer are cut off from the rest and have filters three
times as large. What a method says of a channel is judged by the share of pairs, one needed and one
not, that it ranks rightly: 1 is perfect, 1/2 is chance.
"""

import math

import pytest
import torch
from torch import Tensor, nn

from dnal_mini.data.imageset import ImageSet, Split
from dnal_mini.gating import add_gates, gates, set_gates, weight_parameters
from dnal_mini.graph.copies import copied
from dnal_mini.methods import METHODS
from dnal_mini.methods.contract import Scorer, Subject
from dnal_mini.search.stages import run_stage
from dnal_mini.training.stage import Feed, Session, Stage, Work

NEEDED, ALL, SIDE = 4, 16, 12
FEED = Feed(32, crop=0, flip=False)


def gratings(count: int, seed: int) -> Split:
    """Waves in four directions with a phase of their own each, in noise."""
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(4, (count,), generator=draw)
    y, x = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    angle = labels * math.pi / 4
    across = x * angle.cos()[:, None, None] + y * angle.sin()[:, None, None]
    phase = 2 * math.pi * torch.rand(count, 1, 1, generator=draw)
    images = (across * 2 * math.pi / 4 + phase).sin()[:, None]
    return Split(images + 0.3 * torch.randn(images.shape, generator=draw), labels)


class Planted(nn.Module):
    """Two convolutions; the second does not listen to channels 4 to 15 of the first."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(1, ALL, 3, padding=1, bias=False), nn.BatchNorm2d(ALL)
        self.conv2 = nn.Conv2d(ALL, 8, 3, padding=1, bias=False)
        self.bn2, self.fc = nn.BatchNorm2d(8), nn.Linear(8, 4)
        with torch.no_grad():
            self.conv1.weight[NEEDED:] *= 3
        listens = torch.zeros(1, ALL, 1, 1)
        listens[:, :NEEDED] = 1
        self.register_buffer("listens", listens)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv1(x)).relu() * self.listens
        return self.fc(self.bn2(self.conv2(x)).relu().mean((2, 3)))


@pytest.fixture(scope="module")
def data() -> ImageSet:
    train, val = gratings(512, 1), gratings(64, 2)
    return ImageSet(
        name="gratings", classes=("a", "b", "c", "d"), mean=(0.0,), std=(1.0,), train=train,
        val=val, load_test=lambda: val,
    )  # fmt: skip


@pytest.fixture(scope="module")
def dense(data: ImageSet) -> nn.Module:
    """The gated net with the weights of stage 1, which has learnt to tell the directions apart."""
    torch.manual_seed(0)
    net = add_gates(Planted(), image_shape=(1, SIDE, SIDE))
    set_gates(net, mode="off")
    stage = Stage("weight_stage", 6, 0.1, feed=FEED)
    work = Work(({"params": list(weight_parameters(net))},))
    *_, row = run_stage(net, data, stage, work, Session())
    assert row["val_accuracy"] > 0.9
    return net


def ranked_rightly(values: Tensor) -> float:
    needed, dead = values[:NEEDED], values[NEEDED:]
    return float((needed[:, None] > dead).float().mean())


def searched(name: str, net: nn.Module, data: ImageSet, **settings: float) -> Tensor:
    """What a method says of the channels of the first layer after its own stages."""
    method = METHODS[name](**settings)
    given = Subject(copied(net), data, floors={"bn1.gate": 1, "bn2.gate": 1})
    assert isinstance(method, Scorer)
    for stage in method.stages(Stage("weight_stage", 6, 0.1, feed=FEED)):
        for _ in run_stage(given.net, data, stage, method.work(stage, given), Session()):
            pass
    assert list(gates(given.net)) == ["bn1.gate", "bn2.gate"]
    return method.values(given)["bn1.gate"]


FINDS = {  # at these strengths: too weak ones tell nothing yet, ruinous ones no more
    "dnal": {"arch_epochs": 10, "arch_lr": 0.5, "gate_price": 3e-3},
    "slimming": {"slimming_epochs": 16, "slimming_lr": 0.05, "scale_price": 0.015},
    "group-lasso": {"lasso_epochs": 12, "lasso_lr": 0.05, "group_price": 0.1},
}


@pytest.mark.parametrize("name", FINDS)
def test_a_search_finds_the_channels_that_nobody_needs(name: str, dense, data):
    values = searched(name, dense, data, **FINDS[name])
    assert ranked_rightly(values) >= 0.99
    exact = name == "group-lasso"  # the one whose steps end at 0 and not about it
    assert bool((values[NEEDED:] == 0).all()) == exact
    assert bool((values[:NEEDED] != 0).all())


def test_at_too_low_a_price_long_filters_still_look_needed(dense, data):
    values = searched("group-lasso", dense, data, **FINDS["group-lasso"] | {"group_price": 0.01})
    assert ranked_rightly(values) < 0.5


def test_the_size_of_filters_looks_backwards_and_is_wrong_about_every_pair(dense, data):
    assert ranked_rightly(searched("l1-norm", dense, data)) <= 0.01
