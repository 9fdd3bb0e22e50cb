"""A net run wider, with channels of zeros, is the net: function, gradients, steps, files."""

import copy
import dataclasses

import pytest
import torch
from random_nets import build, draw_gates, program, settle
from small_nets import NETS, NORMS, SHAPE, gated
from torch import Tensor, nn
from torch.nn import functional as F

import dnal_mini as dnal
from dnal_mini.config import SearchConfig
from dnal_mini.pruning.pad import Padded, padded
from dnal_mini.runs import runlog


def cut(name: str, residual: str = "scatter") -> nn.Module:
    return dnal.prune(gated(name, 0.6), SHAPE, residual).module.double()


def steps(net: nn.Module, runs: nn.Module, count: int, images: Tensor) -> list[Tensor]:
    """Parameters and buffers after a few steps of SGD, and the last gradients."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.02, momentum=0.9, weight_decay=1e-3)
    runs.train()
    for step in range(count):
        batch = images.roll(step, -1)
        loss = F.cross_entropy(runs(batch), torch.arange(len(batch)) % 5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert all(p.grad is not None for p in net.parameters())
    grads = [p.grad for p in net.parameters()]
    return [*grads, *net.state_dict().values()]  # type: ignore[list-item]


@pytest.mark.parametrize("residual", ["scatter", "tie"])
@pytest.mark.parametrize("name", NETS)
def test_a_padded_net_is_the_net_in_function_gradients_and_steps(name: str, residual: str):
    net = cut(name, residual)
    plain, images = copy.deepcopy(net), torch.randn(6, *SHAPE, dtype=torch.float64)
    wide = padded(net, SHAPE)
    assert isinstance(wide, Padded)
    widths = [m.out_channels for m in wide.lent[0].modules() if isinstance(m, nn.Conv2d)]
    assert sum(width % 8 == 0 for width in widths) > 0.9 * len(widths)
    assert any(m.out_channels % 8 for m in net.modules() if isinstance(m, nn.Conv2d))
    assert list(wide.parameters()) == list(net.parameters())
    torch.testing.assert_close(wide.eval()(images), plain.eval()(images))
    for found, expected in zip(steps(net, wide, 3, images), steps(plain, plain, 3, images),
                               strict=True):  # fmt: skip
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(wide.eval()(images), plain.eval()(images))


def test_norms_with_running_statistics_run_so_in_the_wide_net_too():
    net = cut("vgg16")
    wide, plain, images = padded(net, SHAPE), copy.deepcopy(net), torch.randn(6, *SHAPE).double()
    for each in (wide, plain):
        each.train()
        for norm in (m for m in each.modules() if isinstance(m, NORMS)):
            norm.eval()
    torch.testing.assert_close(wide(images), plain(images))
    for found, expected in zip(net.buffers(), plain.buffers(), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("seed", range(0, 40, 2))
def test_random_nets_are_padded_where_nothing_forbids_it(seed: int):
    net = dnal.add_gates(settle(build(program(seed)), seed).double(), image_shape=(3, 12, 10))
    draw_gates(dnal.gates(net), seed)
    dnal.set_gates(net, mode="hard", delta=1e4)
    net = dnal.prune(net, (3, 12, 10)).module
    wide, plain = padded(net, (3, 12, 10), 4), copy.deepcopy(net)
    images = torch.randn(3, 3, 12, 10, dtype=torch.float64)
    for train in (False, True):
        outputs = []
        for each in (wide, plain):
            torch.manual_seed(0)
            found = each.train(train)(images.clone())
            outputs.append(torch.utils._pytree.tree_leaves(found))
        for a, b in zip(*outputs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-7)
    for a, b in zip(net.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(a, b)


class Walled(nn.Module):
    """Its first layer's channels are split, its second's are written down in the forward code."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 6, 3), nn.Conv2d(3, 5, 3)
        self.three, self.end = nn.Conv2d(5, 7, 1), nn.Linear(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.one(x).chunk(2, 1)
        y = self.two(left * right).reshape(len(x), 5, -1)
        return self.end(self.three(y[..., None]).relu().mean((2, 3)))


def test_channels_that_are_split_or_counted_stay_and_the_others_are_padded():
    net = Walled().double()
    wide = padded(net, (3, 9, 9))
    assert isinstance(wide, Padded)
    assert wide.ends == {
        "three.weight": {0: 1}, "three.bias": {0: 1}, "end.weight": {1: 1}
    }  # fmt: skip


class Counting(nn.Module):
    """Reads a width where the analysis cannot see it."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 5, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.one(x)
        return self.two(y / y.shape[1]).mean((2, 3))


@pytest.mark.parametrize("net", [Counting(), nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten())])
def test_a_net_that_cannot_be_padded_runs_as_it_is(net: nn.Module):
    assert padded(net, (3, 9, 9)) is net


def test_a_run_is_padded_by_its_settings_and_leaves_the_same_files(tmp_path):
    config = SearchConfig().replace(
        data="toy", val=32, width=0.07, weight_epochs=1, arch_epochs=3, fine_tune_epochs=2,
        batch=64, arch_lr=5.0, gate_price=1e-3, precision="float32", baseline="none",
    )  # fmt: skip
    plain = dnal.run(config, tmp_path / "plain")
    wide = dnal.run(config.replace(pad_to=8), tmp_path / "wide")
    assert wide["macs"] == plain["macs"]
    rows = [
        [row for row in runlog.read(tmp_path / name) if row.get("stage") == "fine_tune"]
        for name in ("plain", "wide")
    ]
    assert [len(each) for each in rows] == [2, 2]
    for a, b in zip(*rows, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)
    nets = [
        dnal.load(tmp_path / n / "small.safetensors", dnal.models.vgg16) for n in ("plain", "wide")
    ]
    for a, b in zip(*(net.module.state_dict().values() for net in nets), strict=True):
        torch.testing.assert_close(a, b, rtol=0.05, atol=0.01)
    assert dataclasses.replace(config, pad_to=8) != config
