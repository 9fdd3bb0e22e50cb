"""Pruned nets against the hard-gated nets they come from: exact, smaller, and honest about it."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_nets import (
    NETS,
    SHAPE,
    assert_same_function,
    close,
    draw_gates,
    gated,
    make_shallow,
    outputs,
    relative_difference,
    settled,
)
from torch import Tensor, nn
from torch.nn import functional as F

from dnal_mini.gating import add_gates, arch_parameters, gates, set_gates
from dnal_mini.layers.channelmap import ChannelMap
from dnal_mini.measure.cost import cost
from dnal_mini.models import MODELS
from dnal_mini.pruning.certificate import certified
from dnal_mini.pruning.foldgates import drop_gates
from dnal_mini.pruning.netfile import load, save
from dnal_mini.pruning.pruner import prune


@pytest.fixture(autouse=True)
def shallow(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """One or two blocks of each kind, except in tests marked ``slow``."""
    if request.node.get_closest_marker("slow") is None:
        make_shallow(monkeypatch)


def core(layer: Any) -> Any:
    """The layer itself where the surgery has put a ChannelMap in front of it or behind."""
    parts = [p for p in layer.modules() if not isinstance(p, nn.Sequential | ChannelMap)]
    return parts[0]


# --- the three nets of the paper -------------------------------------------------------------


def certificate(name: str, residual: str, draw: int) -> float:
    """Prune a net with gates drawn at random and hold all that must hold against it."""
    dense = cost(MODELS[name](**NETS[name]), SHAPE)
    small = prune(net := gated(name, (0.8, 0.6, 0.4, 0.2)[draw % 4], seed=draw), SHAPE, residual)
    assert_same_function(net, small)
    found = cost(small.module, SHAPE)
    assert found.macs < dense.macs
    assert found.params < dense.params
    assert small.report.walls == []
    return small.certificate


@pytest.mark.parametrize("residual", ["scatter", "tie"])
@pytest.mark.parametrize("name", NETS)
def test_gates_drawn_at_random_prune_exactly(name, residual):
    """G1, G5, G6, G9, G21: hard-gated and pruned outputs agree in eval and in train mode."""
    for draw in (0, 1, 2, 3):
        assert certificate(name, residual, draw) <= 1e-12


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("residual", ["scatter", "tie"])
@pytest.mark.parametrize("name", NETS)
def test_twenty_draws_of_gates_prune_the_deep_nets_exactly(name, residual):
    """G1, G5, G6, G9, G21 at full depth."""
    for draw in range(20):
        assert certificate(name, residual, draw) <= 1e-12


@pytest.mark.parametrize("name", NETS)
def test_all_gates_open_keeps_the_net(name):
    net = gated(name, keep=1.1)
    small = prune(net, SHAPE)
    plain = MODELS[name](**NETS[name])
    assert small.certificate == 0
    assert cost(small.module, SHAPE) == cost(plain, SHAPE)
    assert type(small.module) is type(plain)
    assert small.module.state_dict().keys() == plain.state_dict().keys()
    assert not small.spec["keep"]
    assert not small.spec["modules"]


@pytest.mark.parametrize("residual", ["scatter", "tie"])
@pytest.mark.parametrize("name", NETS)
def test_pruning_twice_cuts_nothing_more(name, residual):
    """G21: prune(prune(net)) = prune(net)."""
    once = prune(gated(name, keep=0.4), SHAPE, residual)
    twice = prune(once.module, SHAPE, residual)
    assert cost(twice.module, SHAPE) == cost(once.module, SHAPE)


@pytest.mark.parametrize("name", NETS)
def test_closing_one_more_gate_never_costs_more(name):
    """G22, and G14: what is closed is not counted, wherever it is."""
    net = gated(name, keep=0.6)
    before = prune(net, SHAPE).spec["cost"]["pruned"]
    for s in list(arch_parameters(net))[::3]:
        s.data[int(s.argmax())] = -1.0
        after = prune(net, SHAPE).spec["cost"]["pruned"]
        assert after["macs"] <= before["macs"]
        assert after["params"] <= before["params"]
        before = after


def test_tie_keeps_no_index_operation_and_scatter_fewer_macs():
    """G5: a branch is added in at its places, or all members of a channel set keep the union."""
    net = gated("resnet56", keep=0.6)
    tied, scattered = prune(net, SHAPE, "tie"), prune(net, SHAPE, "scatter")
    strides = [m.stride for m in tied.module.modules() if isinstance(m, ChannelMap)]
    assert strides == [2, 2]  # the two shortcuts that the plain net has, too
    assert cost(scattered.module, SHAPE).macs < cost(tied.module, SHAPE).macs


def test_vgg_params_and_macs_are_those_of_the_kept_widths():
    """G21: the count of the physical net is that of the kept widths, by hand."""
    net = gated("vgg16", keep=0.5)
    kept = [int(gate.is_open.sum()) for gate in gates(net).values()]
    classes, hidden, before = 10, 64, [3, *kept]
    pixels = [256, 256, 64, 64, 16, 16, 16, 4, 4, 4, 1, 1, 1]
    macs = sum(9 * a * b * p for a, b, p in zip(before, kept, pixels, strict=False))
    params = sum((9 * a + 3) * b for a, b in zip(before, kept, strict=False))
    found = cost(prune(net, SHAPE).module, SHAPE)
    assert found.macs == macs + kept[-1] * hidden + hidden * classes
    assert found.params == params + (kept[-1] + 3) * hidden + (hidden + 1) * classes


def test_the_trunk_is_what_stem_and_branches_have_left_alive():
    """G6, G7: liveness of a stage is the union over stem and blocks so far."""
    net = gated("resnet56", keep=0.5)
    every = gates(net)
    alive = every["stem.bn.gate"].is_open | every["blocks.0.bn2.gate"].is_open
    small = prune(net, SHAPE)
    conv = core(small.module.blocks[1].conv1)  # reads the first stage's end: all that lives
    assert conv.in_channels == int(alive.sum())
    assert conv.out_channels == int(every["blocks.1.bn1.gate"].is_open.sum())


def test_a_dead_expansion_goes_with_its_depthwise_gate():
    """G9: expansion filter, depthwise filter, projection input; groups shrink with the width."""
    net = gated("mobilenetv2", keep=1.1)
    gate = gates(net)["blocks.3.depthwise.bn.gate"]
    gate.s.data[[0, 4, 5]] = -1.0
    small = prune(net, SHAPE).module
    block, full = small.blocks[3], len(gate.s)
    assert block.expand.conv.out_channels == block.depthwise.conv.groups == full - 3
    assert block.project.conv.in_channels == full - 3


def test_a_stem_without_a_gate_shrinks_only_where_nobody_else_reads_it():
    """G12: in this net the first block's shortcut reads the stem, so the stem stays."""
    net = gated("mobilenetv2", keep=0.5)
    small = prune(net, SHAPE).module
    assert small.stem.conv.out_channels == net.stem.conv.out_channels


# --- layers and branches that die as a whole -------------------------------------------------


def test_a_dead_layer_keeps_one_channel_and_says_so():
    """G17: no layer without channels, and a note about it."""
    net = gated("vgg16", keep=0.7)
    gates(net)["features.bn6.gate"].s.data.fill_(-1.0)
    small = prune(net, SHAPE)
    assert small.module.features.conv6.out_channels == 1
    assert any("features.conv7" in note and "keeps 1" in note for note in small.report.notes)
    first, second = (outputs(small.module, torch.randn(2, *SHAPE))[0] for _ in range(2))
    torch.testing.assert_close(first, second)  # the output ignores the image, as the gated one


@pytest.mark.parametrize("residual", ["scatter", "tie"])
@pytest.mark.parametrize("stride", [1, 2])
def test_a_dead_branch_goes_as_a_whole(residual, stride):
    """G8: block = act(skip); the inner layers of a dead branch are not counted."""
    net = gated("resnet56", keep=1.1)
    block = {1: 2, 2: 1}[stride]
    gates(net)[f"blocks.{block}.bn2.gate"].s.data.fill_(-1.0)
    small = prune(net, SHAPE, residual)
    assert_same_function(net, small)
    assert isinstance(small.module.blocks[block].conv1, nn.Identity)
    assert isinstance(small.module.blocks[block].conv2, nn.Identity)
    assert f"branch gone: blocks.{block}.bn2 adds nothing" in small.report.notes
    rows = {row["layer"]: row["after"] for row in small.report.layers}
    assert rows[f"blocks.{block}.conv1"] == rows[f"blocks.{block}.conv2"] == 0


def test_a_live_gate_behind_a_dead_layer_stays_exact():
    """G15: the next norm emits a constant per channel, beta in train mode; it is kept."""
    net = gated("resnet56", keep=0.7)
    gates(net)["blocks.3.bn1.gate"].s.data.fill_(-1.0)
    small = prune(net, SHAPE)
    assert_same_function(net, small)
    assert small.module.blocks[3].conv2.weight.shape[1] == 1


class Mixed(nn.Module):
    """A supernet's layers: inverted candidates of three kernel sizes added to a skip, or not."""

    def __init__(self, skip: bool = True) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 7, 3, padding=1), nn.BatchNorm2d(7), nn.ReLU())
        self.paths = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(7, 11, 1, bias=False), nn.BatchNorm2d(11), nn.ReLU(),
                nn.Conv2d(11, 11, k, padding=k // 2, groups=11, bias=False), nn.BatchNorm2d(11),
                nn.ReLU(), nn.Conv2d(11, 7, 1, bias=False), nn.BatchNorm2d(7),
            )
            for k in (3, 5, 7)
        )  # fmt: skip
        self.skip, self.head = skip, nn.Conv2d(7, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        total = sum(path(x) for path in self.paths)
        return self.head(x + total if self.skip else total).mean((2, 3))


@pytest.mark.parametrize("residual", ["scatter", "tie"])
@pytest.mark.parametrize("dead", [(0,), (1, 2), (0, 1, 2)])
def test_a_candidate_whose_projection_is_closed_goes(dead, residual):
    """G14: no gate of the projection open: the whole candidate; G16: none left: the skip."""
    net = settled(Mixed()).double()
    for path in (net.paths[i] for i in dead):
        close(path[7], *range(7))
    small = prune(net, (3, 9, 7), residual)
    assert_same_function(net, small, (3, 9, 7))
    for i, path in enumerate(small.module.paths):
        left = [layer for layer in path.modules() if isinstance(layer, nn.Conv2d)]
        assert len(left) == (0 if i in dead else 3)


def test_a_candidate_whose_middle_is_closed_leaves_a_constant():
    """G15: depthwise gates 0, projection live: a constant per channel, exact in both modes."""
    net = settled(Mixed()).double()
    close(net.paths[1][4], *range(11))
    small = prune(net, (3, 9, 7))
    assert_same_function(net, small, (3, 9, 7))
    assert core(small.module.paths[1][0]).out_channels <= 1
    assert small.module.paths[0][0].out_channels == 11


def test_a_mixed_layer_without_skip_and_without_candidates_cuts_the_net():
    """G16: it is not refused: the gated net ignores its image as well."""
    net = settled(Mixed(skip=False)).double()
    for path in net.paths:
        close(path[7], *range(7))
    small = prune(net, (3, 9, 7))
    images = torch.randn(2, 3, 9, 7)
    for train in (False, True):
        expected, got = outputs(net, images, train), outputs(small.module, images, train)
        assert relative_difference(expected, got) <= 1e-12
    assert small.report.notes


# --- where the gate stands -------------------------------------------------------------------


def test_the_gate_behind_the_activation_prunes_as_well():
    net = add_gates(settled(MODELS["vgg16"](**NETS["vgg16"])), "conv-bn-relu-ss")
    draw_gates(net, 0.5)
    small = prune(net, SHAPE)
    kept = [int(gate.is_open.sum()) for gate in gates(net).values()]
    convs = [m for m in small.module.modules() if isinstance(m, nn.Conv2d)]
    assert [conv.out_channels for conv in convs] == kept
    assert small.certificate <= 1e-12


def test_the_gate_before_the_norm_cannot_be_cut_exactly_and_is_not():
    """G2: what a closed channel leaks, beta, is still there."""
    net = add_gates(settled(MODELS["vgg16"](**NETS["vgg16"])), "conv-ss-bn-relu")
    draw_gates(net, 0.5)
    small = prune(net, SHAPE)
    plain = MODELS["vgg16"](**NETS["vgg16"])
    assert small.certificate <= 1e-12
    norms = [m for m in small.module.modules() if isinstance(m, nn.BatchNorm2d)]
    assert all(bool((norm.bias.detach() != 0).all()) for norm in norms)
    assert cost(small.module, SHAPE).macs > 0.5 * cost(plain, SHAPE).macs


def test_drop_gates_equals_hard_gates_in_both_modes():
    net = gated("resnet56", keep=0.5, alive=False, seed=3)
    plain, images = drop_gates(net), torch.randn(3, *SHAPE)
    assert not gates(plain)
    for train in (False, True):
        expected, got = outputs(net, images, train), outputs(plain, images, train)
        assert relative_difference(expected, got) <= 1e-12


# --- a user's own net ------------------------------------------------------------------------


class Own(nn.Module):
    """Convolution, a residual branch, linear."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 11, 3, padding=1), nn.BatchNorm2d(11)
        self.conv2, self.bn2 = nn.Conv2d(11, 11, 5, padding=2), nn.BatchNorm2d(11)
        self.fc = nn.Linear(11, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(x + self.bn2(self.conv2(x)))
        return self.fc(x.mean((2, 3)))


def own(keep: float = 0.5) -> nn.Module:
    net = add_gates(settled(Own()))
    draw_gates(net, keep)
    set_gates(net, mode="hard", delta=100.0)
    return net


def test_a_users_own_net_keeps_its_class_and_forward():
    net = own()
    small = prune(net, SHAPE)
    assert type(small.module) is Own
    assert "forward" not in vars(small.module)
    assert not gates(small.module)
    assert_same_function(net, small)


def test_an_image_need_not_be_square():
    net = own()
    small = prune(net, (3, 11, 7))
    assert_same_function(net, small, (3, 11, 7))
    assert small.spec["image_shape"] == [3, 11, 7]


class Several(Own):
    """Returns its feature map and its logits, as a tuple or a dict."""

    returns: str

    def forward(self, x: Tensor) -> Any:
        x = F.relu(self.bn1(self.conv1(x)))
        y = self.fc(F.relu(self.bn2(self.conv2(x))).mean((2, 3)))
        return (y, [x]) if self.returns == "tuple" else {"logits": y, "map": x}


@pytest.mark.parametrize("returns", ["tuple", "dict"])
def test_a_feature_map_that_is_returned_keeps_its_channels(returns):
    net = Several()
    net.returns = returns
    net = add_gates(settled(net))
    draw_gates(net, 0.5)
    small = prune(net, SHAPE)
    assert_same_function(net, small)
    assert small.module.conv1.out_channels == 11
    assert core(small.module.conv2).out_channels == int(gates(net)["bn2.gate"].is_open.sum())


class Again(Own):
    """Calls its second convolution twice, with a norm of its own each time."""

    def __init__(self) -> None:
        super().__init__()
        self.bn3 = nn.BatchNorm2d(11)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        return self.fc(F.relu(self.bn3(self.conv2(x))).mean((2, 3)))


def test_a_layer_that_is_called_twice_loses_what_is_dead_in_both_calls():
    net = settled(Again())
    for norm in (net.bn1, net.bn2):
        close(norm, 0, 3, 4)
    close(net.bn3, 3, 4, 7)
    small = prune(net, SHAPE)
    assert small.module.conv2.weight.shape[:2] == (9, 9)  # 3 and 4 go; 0 and 7 live once
    assert_same_function(net, small)


def test_a_layer_called_twice_on_the_same_channels_gets_smaller():
    net = settled(Again())
    for norm in (net.bn1, net.bn2, net.bn3):
        close(norm, 0, 3, 4)
    small = prune(net, SHAPE)
    assert small.module.conv2.weight.shape[:2] == (8, 8)
    assert_same_function(net, small)


def test_pruned_net_trains():
    """G23: what is gone takes no weight decay and is not counted; all that is left learns."""
    small = prune(gated("mobilenetv2", keep=0.5), SHAPE).module
    loss = small(torch.randn(4, *SHAPE)).square().mean()
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in small.parameters())


def test_frozen_weights_stay_frozen():
    net = own()
    net.conv1.weight.requires_grad_(False)
    small = prune(net, SHAPE).module
    assert not small.conv1.weight.requires_grad
    assert small.conv1.bias.requires_grad


@pytest.mark.parametrize("train", [False, True])
def test_the_modes_of_the_modules_are_those_of_the_net(train):
    net = own().train(train)
    net.bn2.train(not train)
    small = prune(net, SHAPE).module
    assert [small.training, small.conv1.training] == [train, train]


# --- options ---------------------------------------------------------------------------------


@pytest.mark.parametrize("residual", ["scatter", "tie"])
@pytest.mark.parametrize(("least", "multiple"), [(1, 4), (3, 1), (2, 3), (5, 2)])
def test_widths_are_multiples_and_not_below_the_minimum(residual, least, multiple):
    """Dead channels stay for it, labelled as held; the function stays what it is."""
    for draw in range(3):
        torch.manual_seed(draw)
        net = own(keep=0.3)
        small = prune(net, SHAPE, residual, min_channels=least, round_to=multiple)
        for conv in (m for m in small.module.modules() if isinstance(m, nn.Conv2d)):
            for width in {conv.out_channels, conv.in_channels} - {3}:
                assert width == 11 or (width >= least and width % multiple == 0)
        assert_same_function(net, small)
        exact = prune(net, SHAPE, residual)
        after = small.spec["cost"]["pruned"]["macs"]
        assert after >= exact.spec["cost"]["pruned"]["macs"]  # the trade


def test_rounding_counts_the_channels_that_it_holds():
    net = own(keep=1.1)
    gates(net)["bn1.gate"].s.data[[0, 2, 3, 8]] = -1.0  # 7 of the first layer are left
    gates(net)["bn2.gate"].s.data[[0, 2, 3, 8, 9, 10]] = -1.0
    small = prune(net, SHAPE, round_to=4)
    rows = {row["layer"]: row for row in small.report.layers}
    assert (rows["conv1"]["after"], rows["conv1"]["held"]) == (8, 1)
    assert (rows["conv2"]["after"], rows["conv2"]["held"]) == (8, 3)


@torch.no_grad()
def soft(net: nn.Module, low: float, high: float) -> nn.Module:
    """Soft gates: closed at about ``low``, open at about ``high``."""
    set_gates(net.double(), mode="soft", delta=1.0)
    for gate in gates(net).values():
        p = torch.where(gate.s > 0, high, low) * (1 - 0.01 * torch.rand(len(gate.s)))
        gate.s.copy_(torch.logit(p.double()))
    return net


def test_absorb_multiplies_an_open_gate_into_its_norm_exactly():
    """G3: gamma <- p gamma, beta <- p beta; the rest is cut."""
    net = soft(own(), low=1e-30, high=0.7)
    small = prune(net, SHAPE, absorb=True)
    gate = gates(net)["bn2.gate"]
    expected = (gate.p * net.bn2.weight)[gate.is_open]
    torch.testing.assert_close(core(small.module.bn2).weight, expected, rtol=1e-12, atol=0)
    images = torch.randn(3, *SHAPE).double()
    for train in (False, True):
        of_soft = copy.deepcopy(net).train(train)(images).detach()
        got = copy.deepcopy(small.module).train(train)(images).detach()
        torch.testing.assert_close(got, of_soft, rtol=1e-10, atol=1e-12)
    assert core(small.module.conv2).out_channels == int(gate.is_open.sum())


def test_absorb_passes_a_relu_but_no_other_activation():
    for activation, fits in ((F.relu, True), (F.leaky_relu, True), (F.silu, False)):

        class Behind(Own):
            act = staticmethod(activation)

            def forward(self, x: Tensor) -> Tensor:
                return self.fc(self.act(self.bn1(self.conv1(x))).mean((2, 3)))

        net = add_gates(settled(Behind()), "conv-bn-relu-ss", lambda name, norm: name == "bn1")
        draw_gates(net, 0.5)
        net = soft(net, 1e-30, 0.8)
        if not fits:
            with pytest.raises(ValueError, match=r"^got gate [^\n]* p < 1 [^\n]*$"):
                prune(net, SHAPE, absorb=True)
            continue
        small = prune(net, SHAPE, absorb=True).module
        images = torch.randn(2, *SHAPE).double()
        torch.testing.assert_close(small.eval()(images), net.eval()(images), rtol=1e-10, atol=1e-12)


def test_gates_that_are_still_soft_are_refused_with_the_gap_named():
    """G3: the gap max_j min(p_j, 1 - p_j) is reported before pruning."""
    net = soft(own(), low=0.001, high=0.9)
    ps = [gate.p.detach() for gate in gates(net).values()]
    gap = max(float(torch.minimum(p, 1 - p).max()) for p in ps)
    with pytest.raises(ValueError, match=f"^got soft gates: binarisation gap {gap:.2g} in [^\n]*$"):
        prune(net, SHAPE)
    rounded = prune(net, SHAPE, max_gap=0.2)  # allowed: rounded, and exact for the rounded net
    assert_same_function(net, rounded)
    assert prune(net, SHAPE, absorb=True).certificate <= 1e-12  # closed ones are at 0.001
    with pytest.raises(ValueError, match=r"binarisation gap 0\.3 "):
        prune(soft(own(), low=0.3, high=0.9), SHAPE, absorb=True)


def test_a_small_gap_is_rounded_away():
    net = soft(own(), low=0.004, high=0.999)
    for gate in gates(net).values():
        gate.s.data[gate.s > 0] = 8.0
    small = prune(net, SHAPE)
    assert_same_function(net, small)
    assert small.certificate <= 1e-12


def test_off_is_open_and_never_trained_is_an_error():
    """G4, G18: off is gain 1, not 0.5; s = 0 counts as closed, unless all are: then no training."""
    net = own(keep=1.1)
    set_gates(net, mode="off")
    gates(net)["bn2.gate"].s.data[4] = 0.0
    assert core(prune(net, SHAPE).module.conv2).out_channels == 10
    with pytest.raises(ValueError, match="s = 0"):
        prune(add_gates(Own()), SHAPE)


# --- certificate and report ------------------------------------------------------------------


def test_the_certificate_sees_a_wrong_cut():
    net = gated("vgg16", keep=0.5)
    small = prune(net, SHAPE)
    full = net.double()
    set_gates(full, mode="hard")
    cut = small.module.double()
    assert certified(full, cut, SHAPE)[0].relative < 1e-8
    cut.features.bn3.bias.data[0] += 1e-3
    with pytest.raises(ValueError, match=r"differ by [^\n]*eval mode"):
        certified(full, cut, SHAPE)


def test_a_wrong_cut_raises(monkeypatch):
    """More than 1e-8 of what varies with the image is never handed out."""
    import sys

    surgery = sys.modules["dnal_mini.pruning.pruner"]
    operate = surgery.operate

    def clumsy(net: nn.Module, modules: dict[str, dict]) -> None:
        operate(net, modules)
        net.fc.weight.data *= 1 + 3e-7

    monkeypatch.setattr(surgery, "operate", clumsy)
    with pytest.raises(ValueError, match=r"^got outputs that differ by [^\n]*1e-08$"):
        prune(own(), SHAPE)


def test_the_certificate_holds_in_both_precisions():
    small = prune(own(), SHAPE)
    found = small.spec["certificate"]
    assert found["absolute"] == small.certificate <= 1e-12
    assert found["relative"] <= 1e-12
    assert found["relative_float32"] <= 1e-5
    assert {p.dtype for p in small.module.parameters()} == {torch.float32}


def test_the_report_is_a_table_with_a_row_for_each_layer():
    net = own(keep=1.1)
    gates(net)["bn1.gate"].s.data[[0, 2]] = -1.0
    net.fc.weight.data[:, 5] = 0  # nobody needs channel 5 of the sum
    report = prune(net, SHAPE, "tie").report
    rows = {row["layer"]: row for row in report.layers}
    assert list(rows) == ["conv1", "conv2", "fc"]
    assert (rows["conv1"]["before"], rows["conv1"]["zero"], rows["conv1"]["after"]) == (11, 2, 11)
    assert rows["conv1"]["tied"] == 2  # their places in the sum are alive
    assert rows["fc"] | {"before": 6, "zero": 0, "unneeded": 0, "after": 6} == rows["fc"]
    lines = str(report).splitlines()
    assert lines[0].split() == [
        "layer", "before", "zero", "unneeded", "tied", "walled", "held", "after",
    ]  # fmt: skip
    assert lines[1].split() == ["conv1", "11", "2", "0", "2", "0", "0", "11"]
    assert "live" not in str(report)


def test_a_channel_that_nobody_needs_is_counted_as_such():
    net = own(keep=1.1)
    net.fc.weight.data[:, 5] = 0
    net.conv2.weight.data[:, 5] = 0
    small = prune(net, SHAPE)
    rows = {row["layer"]: row for row in small.report.layers}
    assert (rows["conv1"]["unneeded"], rows["conv1"]["after"]) == (1, 10)
    assert small.module.fc.in_features == 10
    assert_same_function(net, small)


class Walled(Own):
    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x))).softmax(1)
        return self.fc(F.relu(self.bn2(self.conv2(x))).mean((2, 3)))


def test_a_wall_is_named_with_its_operation_its_place_and_what_it_holds():
    net = settled(Walled())
    close(net.bn1, 1, 2, 9)
    close(net.bn2, 0, 7)
    small = prune(net, SHAPE)
    assert small.report.walls == ["softmax in forward: keeps 3 dead channels"]
    assert "wall: softmax in forward: keeps 3 dead channels" in str(small.report)
    assert {row["layer"]: row["walled"] for row in small.report.layers} == {
        "conv1": 3, "conv2": 0, "fc": 0,
    }  # fmt: skip
    assert small.module.conv1.out_channels == 11
    assert small.module.conv2.out_channels == 9
    assert_same_function(net, small)


# --- bad input -------------------------------------------------------------------------------


def spoiled(change: Callable[[Any], Any]) -> nn.Module:
    net = own()
    change(net)
    return net


class Branches(Own):
    def forward(self, x: Tensor) -> Tensor:
        if x.mean() > 0:  # this line is to be named
            x = -x
        return super().forward(x)


def fresh_statistics() -> nn.Module:
    net = add_gates(Own())
    draw_gates(net, 0.5)
    return net


BAD: dict[str, tuple] = {
    "unsettled statistics": (fresh_statistics, {}, "training mode whose bn1"),
    "NaN weight": (
        lambda: spoiled(lambda net: net.conv1.weight.data[0, 0].fill_(torch.nan)), {}, "conv1",
    ),
    "infinite statistics": (
        lambda: spoiled(lambda net: net.bn2.running_var.fill_(torch.inf)), {}, "bn2",
    ),
    "NaN gate": (lambda: spoiled(lambda net: net.bn2.gate.s.data[:1].fill_(torch.nan)), {}, "bn2"),
    "wrong channels": (own, {"image_shape": (4, 8, 8)}, "image_shape"),
    "no shape at all": (own, {"image_shape": (3, 8)}, "image_shape"),
    "image too small": (
        lambda: gated("vgg16", 0.5), {"image_shape": (3, 5, 5)}, "image_shape",
    ),
    "soft gates": (lambda: soft(own(), 0.1, 0.9), {}, "binarisation gap"),
    "residual": (own, {"residual": "union"}, "need one of scatter, tie"),
    "min_channels": (own, {"min_channels": 0}, "min_channels 0"),
    "round_to": (own, {"round_to": -2}, "round_to -2"),
    "untraceable": (lambda: settled(Branches()), {}, "cannot be followed"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_gets_one_line_and_is_left_alone(name):
    make, options, word = BAD[name]
    net = make()
    before = copy.deepcopy(net.state_dict())
    modes = [module.training for module in net.modules()]
    with pytest.raises(ValueError, match=rf"^got [^\n]*{word}[^\n]*$") as caught:
        prune(net, **{"image_shape": SHAPE, **options})
    assert "need" in str(caught.value) or "fails" in str(caught.value)
    assert [module.training for module in net.modules()] == modes
    for key, value in net.state_dict().items():
        torch.testing.assert_close(value, before[key], rtol=0, atol=0, equal_nan=True)


def test_statistics_that_are_meant_to_be_fresh_pass_in_eval_mode():
    net = fresh_statistics().eval()
    assert prune(net, SHAPE).certificate <= 1e-12


def test_a_net_that_cannot_be_traced_names_the_line_of_its_forward():
    line = r"test_pruner\.py:\d+: if x\.mean\(\) > 0:  # this line is to be named"
    with pytest.raises(ValueError, match=rf"^got a Branches whose [^\n]*{line}[^\n]*need[^\n]*$"):
        prune(settled(Branches()), SHAPE)


@pytest.mark.parametrize("name", NETS)
def test_the_argument_is_left_alone(name):
    net = gated(name, keep=0.5)
    before = copy.deepcopy(net.state_dict())
    settings = [(gate.mode, gate.threshold) for gate in gates(net).values()]
    prune(net, SHAPE)
    assert not any(module.training is False for module in net.modules())
    assert [(gate.mode, gate.threshold) for gate in gates(net).values()] == settings
    for key, value in net.state_dict().items():
        torch.testing.assert_close(value, before[key], rtol=0, atol=0)


@pytest.mark.gpu
def test_a_net_on_the_gpu_is_pruned_there():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    small = prune(gated("resnet56", keep=0.5).cuda(), SHAPE)
    assert {tensor.device.type for tensor in small.module.state_dict().values()} == {"cuda"}
    assert small.module(torch.randn(2, *SHAPE, device="cuda")).isfinite().all()


class Lent(nn.Module):
    """Two convolutions with one weight, each with a norm of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 7, 3), nn.BatchNorm2d(7)
        self.a, self.p = nn.Conv2d(7, 7, 3, padding=1, bias=False), nn.BatchNorm2d(7)
        self.b, self.q = nn.Conv2d(7, 7, 3, padding=1, bias=False), nn.BatchNorm2d(7)
        self.b.weight = self.a.weight
        self.fc = nn.Linear(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.p(self.a(self.bn(self.stem(x)).relu())).relu()
        return self.fc(self.q(self.b(x)).relu().mean((2, 3)))


def test_a_weight_of_two_layers_is_cut_in_both_and_stays_one(tmp_path):
    net = settled(Lent())
    for norm in (net.bn, net.p, net.q):
        close(norm, 1, 4)
    small = prune(net, SHAPE)
    assert not small.report.walls
    assert_same_function(net, small)
    save(small, tmp_path / "net")
    for cut in (small.module, load(tmp_path / "net", Lent).module):
        assert cut.a.weight is cut.b.weight
        assert [(c.in_channels, c.out_channels) for c in (cut.a, cut.b)] == [(5, 5)] * 2
    assert_same_function(net, small)
