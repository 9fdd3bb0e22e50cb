"""A branch that is gone, in forward code that looks at its layers or keeps them elsewhere."""

from pathlib import Path

import pytest
import torch
from small_nets import close, outputs, relative_difference, settled
from torch import Tensor, nn

from dnal_mini.deployment.fold import deploy
from dnal_mini.gating import add_gates, gates, set_gates
from dnal_mini.layers.channelmap import ChannelMap
from dnal_mini.layers.hollow import Hollow
from dnal_mini.models import restart
from dnal_mini.pruning import pruner
from dnal_mini.pruning.netfile import load, save
from dnal_mini.pruning.pruner import prune
from dnal_mini.pruning.trial import follows

SHAPE = (3, 9, 11)


class Block(nn.Module):
    """A branch of its own class, and what is said of it."""

    def __init__(self) -> None:
        super().__init__()
        self.p, self.q = nn.Conv2d(7, 5, 3, padding=1, bias=False), nn.BatchNorm2d(5)
        self.r, self.t = nn.Conv2d(5, 7, 1), nn.BatchNorm2d(7)

    def forward(self, x: Tensor) -> Tensor:
        return self.t(self.r(self.q(self.p(x)).relu()))


class Looks(nn.Module):
    """A stem, a branch of two convolutions that is read in one of several ways, a head."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.stem, self.bn = way, nn.Conv2d(3, 7, 3), nn.BatchNorm2d(7)
        self.branch, self.fc = Block(), nn.Linear(7, 5)
        self.chain = [self.branch.p, self.branch.q, nn.ReLU(), self.branch.r, self.branch.t]
        self.blocks = [self.branch]

    def forward(self, x: Tensor) -> Tensor:
        x = y = self.bn(self.stem(x)).relu()
        b = self.branch
        if self.way == "list of layers":
            for layer in self.chain:
                y = layer(y)
        elif self.way == "list of blocks":
            y = self.blocks[0](y)
        elif self.way == "keyword":
            y = b.t(input=b.r(input=b.q(b.p(input=y)).relu()))
        else:
            y = b.t(b.r(b.q(b.p(y)).relu()))
        if self.way == "sizes":
            y = y * (b.p.kernel_size[0] // 3) * (b.p.in_channels > 0) * (b.t.num_features > 0)
        if self.way == "class" and isinstance(b.t, nn.BatchNorm2d):
            y = y * 2
        return self.fc((x + y).mean((2, 3)))


WAYS = ["plain", "list of layers", "list of blocks", "keyword", "sizes", "class"]


@pytest.mark.parametrize("residual", ["scatter", "tie"])
@pytest.mark.parametrize("way", WAYS)
def test_a_dead_branch_goes_however_the_forward_finds_it(tmp_path: Path, way: str, residual: str):
    torch.manual_seed(5)
    net = settled(Looks(way))
    close(net.bn, 1, 4)
    close(net.branch.t, *range(7))
    small = prune(net, SHAPE, residual)
    assert not list(small.module.branch.parameters())
    assert (small.module.stem.out_channels, small.module.fc.in_features) == (5, 5)
    assert not small.report.walls
    save(small, tmp_path / "net")
    back, images = load(tmp_path / "net", lambda: Looks(way)).module, torch.randn(3, *SHAPE)
    for train in (False, True):
        expected = outputs(net, images, train)
        for found in (small.module, back):
            assert relative_difference(expected, outputs(found, images, train)) <= 1e-10
    plain = deploy(small.module, SHAPE)
    torch.testing.assert_close(plain(images), small.module.eval()(images), rtol=1e-4, atol=1e-5)
    hollow = [m for m in small.module.modules() if isinstance(m, Hollow)]
    gone = [m for m in small.module.modules() if isinstance(m, nn.Identity | ChannelMap)]
    assert bool(hollow) is (way in WAYS[1:5])
    assert hollow or gone


def test_a_net_with_hollow_layers_is_gated_cut_and_drawn_anew_like_any_other():
    net = settled(Looks("sizes"))
    close(net.branch.t, *range(7))
    small = prune(net, SHAPE).module
    gated = add_gates(small, image_shape=SHAPE)
    assert list(gates(gated)) == ["bn.gate"]
    gates(gated)["bn.gate"].s.data = torch.tensor([1, -1, 1, 1, -1, 1, 1.0])
    set_gates(gated, mode="hard")
    again = prune(gated, SHAPE)
    assert again.module.stem.out_channels == 5
    images = torch.randn(3, *SHAPE)
    assert relative_difference(outputs(gated, images), outputs(again.module, images)) <= 1e-10
    restart(again.module, seed=3)
    assert again.module.branch.p.kernel_size == (3, 3)


class TwoNames(nn.Module):
    """A norm under two names, behind a convolution that is called again: nothing takes its gate."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5)
        self.conv, self.first = nn.Conv2d(5, 5, 3), nn.BatchNorm2d(5)
        self.second, self.fc = self.first, nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(self.conv(self.bn(self.stem(x)).relu())).relu()
        return self.fc(self.second(self.conv(x)).mean((2, 3)))


def test_a_map_in_front_of_a_layer_is_no_layer_that_stays_hollow(monkeypatch: pytest.MonkeyPatch):
    net = add_gates(settled(TwoNames()), "conv-ss-bn-relu", image_shape=SHAPE)
    for gate in gates(net).values():
        gate.s.data = torch.tensor([1.0, -1, 1, 1, -1])
    set_gates(net, mode="hard")
    tried = []

    def fails_at_first(*given: object) -> Exception | None:
        tried.append(given)
        return RuntimeError("of another width") if len(tried) == 1 else follows(*given)

    monkeypatch.setattr(pruner, "follows", fails_at_first)
    small, images = prune(net, SHAPE).module, torch.randn(3, *SHAPE)
    assert len(tried) > 1
    assert not [m for m in small.modules() if isinstance(m, Hollow)]
    assert relative_difference(outputs(net, images), outputs(small, images)) <= 1e-10
