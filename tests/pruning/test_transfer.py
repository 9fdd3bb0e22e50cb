"""What each operation does to channels: told by hand, held against the running net, cut exactly."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from small_nets import assert_same_function, close, hold_the_facts, settled
from torch import Tensor, nn
from torch.nn import functional as F

from dnal_mini.pruning.analysis import analyse
from dnal_mini.pruning.facts import CONSTANT, FIXED, LIVE, ZERO, Analysis
from dnal_mini.pruning.pruner import prune
from dnal_mini.pruning.transfer import places_of

SHAPE = (3, 8, 6)
CLOSED = (1, 4)  # of six channels


class Around(nn.Module):
    """A convolution whose norm has closed channels, the operation in the middle, a 1x1 head."""

    def __init__(self, middle: Callable[..., Any], closed: Sequence[int], **parts: nn.Module):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        for name, part in parts.items():
            setattr(self, name, part)
        self.middle = middle
        after = self.eval().inner(torch.zeros(2, *SHAPE))
        is_image = after.dim() == 4
        self.head = nn.Conv2d(after.shape[1], 5, 1) if is_image else nn.Linear(after.shape[-1], 5)
        settled(self).double()  # a constant in a bias is rounded to the net's own precision
        close(self.bn, *closed)

    def inner(self, x: Tensor) -> Tensor:
        return self.middle(self, self.bn(self.conv(x)))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(x))


def before_head(analysis: Analysis):
    """Facts of what the head reads."""
    (head,) = (n for n, layer in analysis.graph.layers.items() if layer.name == "head")
    return analysis.facts[head.all_input_nodes[0]]


def at(state: Tensor, what: int) -> list[int]:
    return (state == what).nonzero().flatten().tolist()


# --- one operation between a closed norm and a head ------------------------------------------


def shuffled(x: Tensor, groups: int) -> Tensor:
    n, c, h, w = x.shape
    return x.view(n, groups, c // groups, h, w).transpose(1, 2).reshape(n, c, h, w)


def halves(x: Tensor) -> Tensor:
    first, second = x.chunk(2, 1)
    return torch.cat([second, first], 1)


def folded(x: Tensor, join: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    first, second = x.chunk(2, 1)
    return join(first, second)


def excite(net: Any, x: Tensor) -> Tensor:
    scale = net.fc2(F.relu(net.fc1(x.mean((2, 3), keepdim=True)))).sigmoid()
    return scale * x


# name: (operation, its modules, zero channels of the result, channels of the first layer left)
KEEP_ZERO: dict[str, tuple] = {
    "relu module": (lambda n, x: n.act(x), {"act": nn.ReLU()}),
    "relu in place": (lambda n, x: n.act(x), {"act": nn.ReLU(inplace=True)}),
    "F.relu": (lambda n, x: F.relu(x), {}),
    "x.relu": (lambda n, x: x.relu(), {}),
    "x.relu_": (lambda n, x: x.relu_(), {}),
    "relu6": (lambda n, x: F.relu6(x), {}),
    "silu": (lambda n, x: F.silu(x), {}),
    "gelu": (lambda n, x: n.act(x), {"act": nn.GELU()}),
    "hardswish": (lambda n, x: n.act(x), {"act": nn.Hardswish()}),
    "tanh": (lambda n, x: torch.tanh(x), {}),
    "leaky relu": (lambda n, x: F.leaky_relu(x, 0.2), {}),
    "prelu": (lambda n, x: n.act(x), {"act": nn.PReLU()}),
    "prelu by channel": (lambda n, x: n.act(x), {"act": nn.PReLU(6)}),
    "abs": (lambda n, x: x.abs(), {}),
    "square": (lambda n, x: x**2, {}),
    "clamp": (lambda n, x: x.clamp(0, 3), {}),
    "times a number": (lambda n, x: 0.3 * x, {}),
    "over a number": (lambda n, x: x / 7, {}),
    "minus itself in part": (lambda n, x: x - 0.5 * x, {}),
    "max pool": (lambda n, x: n.pool(x), {"pool": nn.MaxPool2d(2)}),
    "padded max pool": (lambda n, x: F.max_pool2d(x.relu(), 3, 2, padding=1), {}),
    "average pool": (lambda n, x: F.avg_pool2d(x, 2), {}),
    "padded average pool": (lambda n, x: n.pool(x), {"pool": nn.AvgPool2d(3, 2, padding=1)}),
    "adaptive average": (lambda n, x: n.pool(x), {"pool": nn.AdaptiveAvgPool2d((3, 2))}),
    "adaptive max": (lambda n, x: F.adaptive_max_pool2d(x, 1), {}),
    "interpolate": (lambda n, x: F.interpolate(x, scale_factor=2), {}),
    "bilinear": (lambda n, x: F.interpolate(x, size=(5, 7), mode="bilinear"), {}),
    "upsample": (lambda n, x: n.up(x), {"up": nn.Upsample(scale_factor=2)}),
    "pad": (lambda n, x: F.pad(x, (1, 2, 3, 0)), {}),
    "pad module": (lambda n, x: n.pad(x), {"pad": nn.ZeroPad2d(1)}),
    "reflection": (lambda n, x: F.pad(x, (1, 1, 2, 2), mode="reflect"), {}),
    "dropout": (lambda n, x: n.drop(x), {"drop": nn.Dropout(0.3)}),
    "dropout function": (lambda n, x: F.dropout2d(x, 0.3, n.training), {}),
    "identity": (lambda n, x: n.same(x), {"same": nn.Identity()}),
    "pixels of every second row": (lambda n, x: x[:, :, ::2], {}),
    "flipped": (lambda n, x: x.flip(-1), {}),
    "turned": (lambda n, x: x.transpose(2, 3).contiguous(), {}),
    "mean": (lambda n, x: x.mean((2, 3)), {}),
    "mean kept": (lambda n, x: torch.mean(x, (2, 3), keepdim=True), {}),
    "sum": (lambda n, x: x.sum((-2, -1)), {}),
    "largest": (lambda n, x: x.amax((2, 3)), {}),
    "squeeze": (lambda n, x: F.adaptive_avg_pool2d(x, 1).squeeze(-1).squeeze(-1), {}),
    "squeeze and excite": (excite, {"fc1": nn.Conv2d(6, 3, 1), "fc2": nn.Conv2d(3, 6, 1)}),
    "sum with itself": (lambda n, x: x.relu() + x.sigmoid() * x, {}),
    "maximum": (lambda n, x: torch.maximum(x, 0.1 * x), {}),
    "by way of channels last": (lambda n, x: x.permute(0, 2, 3, 1).relu().permute(0, 3, 1, 2), {}),
}


@pytest.mark.parametrize("name", KEEP_ZERO)
def test_an_operation_of_single_channels_passes_the_zeros_on(name):
    """G1: zero in, zero out; the filter of a closed channel and the head's inputs go."""
    middle, parts = KEEP_ZERO[name]
    net = Around(middle, CLOSED, **parts)
    assert at(before_head(analyse(net, SHAPE)).state, ZERO) == [*CLOSED]
    small = prune(net, SHAPE)
    assert not small.report.walls
    assert small.module.conv.out_channels == 4
    assert small.module.head.weight.shape[1] == 4
    assert_same_function(net, small, SHAPE)
    assert hold_the_facts(net, SHAPE)[ZERO] >= 2


MOVED: dict[str, tuple] = {
    "cat": (lambda n, x: torch.cat([x, x.relu()], 1), CLOSED, [1, 4, 7, 10], 4),
    "cat of the last axis": (lambda n, x: torch.cat([x, x.relu()], 3), CLOSED, [2, 3, 8, 9], 6),
    "halves exchanged": (lambda n, x: halves(x), CLOSED, [1, 4], 4),
    "halves exchanged unequally": (lambda n, x: halves(x), (0, 1, 3), [0, 3, 4], 4),
    "halves, one of them dead": (lambda n, x: halves(x), (0, 3, 4, 5), [0, 1, 2, 3], 4),
    "sum of halves": (lambda n, x: folded(x, torch.add), CLOSED, [1], 4),
    "sum of halves, pairs apart": (lambda n, x: folded(x, torch.add), (1, 5), [], 6),
    "product of halves": (lambda n, x: folded(x, torch.mul), (1, 5), [1, 2], 2),
    "thirds": (lambda n, x: torch.cat(x.split(2, 1)[::-1], 1), (2, 3), [2, 3], 6),
    "unequal parts": (lambda n, x: torch.cat(x.split([4, 2], 1)[::-1], 1), CLOSED, [0, 3], 6),
    "first channels": (lambda n, x: x[:, :4], CLOSED, [1], 3),
    "every second channel": (lambda n, x: x[:, ::2], CLOSED, [2], 6),
    "narrow": (lambda n, x: x.narrow(1, 1, 4), CLOSED, [0, 3], 6),
    "shuffle by hand": (lambda n, x: shuffled(x, 2), CLOSED, [2, 3], 4),
    "shuffle in three": (lambda n, x: shuffled(x, 3), (0, 3, 5), [0, 4, 5], 3),
    "shuffle function": (lambda n, x: F.channel_shuffle(x, 2), CLOSED, [2, 3], 4),
    "images exchanged": (lambda n, x: x.flip(0), CLOSED, [1, 4], 4),
    "channels turned round": (lambda n, x: x.flip(1), CLOSED, [1, 4], 4),
    "stacked and taken apart": (
        lambda n, x: torch.stack([x, x.relu()], 2).flatten(1, 2), CLOSED, [2, 3, 8, 9], 4,
    ),
    "shortcut with new channels": (
        lambda n, x: F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 1)), CLOSED, [0, 1, 3, 6, 8], 4,
    ),
    "product with one channel": (lambda n, x: x * x[:, :1], CLOSED, [1, 4], 4),
    "product with a closed channel": (lambda n, x: x * x[:, 1:2], CLOSED, [0, 1, 2, 3, 4, 5], 1),
}  # fmt: skip


@pytest.mark.parametrize("name", MOVED)
def test_an_operation_that_moves_channels_is_followed(name):
    middle, closed, zeros, left = MOVED[name]
    net = Around(middle, closed)
    assert at(before_head(analyse(net, SHAPE)).state, ZERO) == zeros
    small = prune(net, SHAPE)
    if len(zeros) == net.head.in_channels:  # nothing depends on the image
        return
    assert_same_function(net, small, SHAPE)
    assert small.module.conv.out_channels == left
    assert small.certificate <= 1e-12
    assert hold_the_facts(net, SHAPE)[ZERO] >= len(zeros)


CONSTANTS: dict[str, tuple] = {
    "sigmoid": (lambda n, x: x.sigmoid(), {}, 0.5),
    "sigmoid module": (lambda n, x: n.act(x), {"act": nn.Sigmoid()}, 0.5),
    "hardsigmoid": (lambda n, x: F.hardsigmoid(x), {}, 0.5),
    "softplus": (lambda n, x: F.softplus(x), {}, 0.6931471805599453),
    "threshold": (lambda n, x: n.act(x), {"act": nn.Threshold(0.1, 0.3)}, 0.3),
    "exp": (lambda n, x: x.exp(), {}, 1.0),
    "cos": (lambda n, x: torch.cos(x), {}, 1.0),
    "clamp from below": (lambda n, x: x.clamp(min=0.05), {}, 0.05),
    "plus a number": (lambda n, x: x + 0.25, {}, 0.25),
    "a number minus": (lambda n, x: 2 - x, {}, 2.0),
    "a number over": (lambda n, x: 3 / (1 + x.abs()), {}, 3.0),
    "max pool of it": (lambda n, x: F.max_pool2d(x.sigmoid(), 2), {}, 0.5),
    "average pool of it": (lambda n, x: F.avg_pool2d(x.sigmoid(), 2), {}, 0.5),
    "mean of it": (lambda n, x: x.sigmoid().mean((2, 3)), {}, 0.5),
    "interpolated": (lambda n, x: F.interpolate(x.sigmoid(), scale_factor=2), {}, 0.5),
    "reflected": (lambda n, x: F.pad(x.sigmoid(), (1, 1, 1, 1), mode="reflect"), {}, 0.5),
    "padded with the same": (lambda n, x: F.pad(x.sigmoid(), (1, 1), value=0.5), {}, 0.5),
    "sum of two": (lambda n, x: x.sigmoid() + x.cos(), {}, 1.5),
    "product of two": (lambda n, x: x.sigmoid() * (x + 3), {}, 1.5),
    "quotient of two": (lambda n, x: x.exp() / (x.exp() + 1), {}, 0.5),
}


@pytest.mark.parametrize("name", CONSTANTS)
def test_a_value_that_all_pixels_share_folds_into_the_bias_of_the_head(name):
    """An activation of zero is its own value: sigmoid(0) is not 0. Exact in both modes."""
    middle, parts, value = CONSTANTS[name]
    net = Around(middle, CLOSED, **parts)
    found = before_head(analyse(net, SHAPE))
    assert at(found.state, CONSTANT) == [*CLOSED]
    assert found.value[[*CLOSED]].tolist() == pytest.approx([value, value], rel=1e-12)
    assert found.steady[[*CLOSED]].all()
    small = prune(net, SHAPE)
    assert small.module.conv.out_channels == 4
    assert small.report.notes == ["constants folded: into the bias of head"]
    assert_same_function(net, small, SHAPE)
    assert hold_the_facts(net, SHAPE)[CONSTANT] >= 2


FIXED_BY: dict[str, tuple] = {
    "zero padding": (lambda n, x: F.pad(x.sigmoid(), (1, 1)), {}),
    "padded average": (lambda n, x: n.pool(x.sigmoid()), {"pool": nn.AvgPool2d(3, 1, 1)}),
    "padded average function": (lambda n, x: F.avg_pool2d(x.sigmoid(), 3, padding=1), {}),
    "sum over pixels": (lambda n, x: x.sigmoid().sum((2, 3)), {}),
}


@pytest.mark.parametrize("name", FIXED_BY)
def test_a_constant_that_meets_a_border_is_fixed_and_stays(name):
    """G2: in the interior it could be folded, at the border it could not."""
    middle, parts = FIXED_BY[name]
    net = Around(middle, CLOSED, **parts)
    assert at(before_head(analyse(net, SHAPE)).state, FIXED) == [*CLOSED]
    small = prune(net, SHAPE)
    assert small.module.conv.out_channels == 6
    assert not small.report.notes
    assert_same_function(net, small, SHAPE)
    assert hold_the_facts(net, SHAPE)[FIXED] >= 2


def test_a_padded_maximum_of_a_constant_is_the_constant():
    net = Around(lambda n, x: F.max_pool2d(x.sigmoid() - 1, 3, padding=1), CLOSED)
    found = before_head(analyse(net, SHAPE))
    assert found.value[[*CLOSED]].tolist() == [-0.5, -0.5]  # padded with -inf, not with 0
    assert hold_the_facts(net, SHAPE)[CONSTANT] >= 2


# --- layers with weights ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(6, 7, 3, stride=2, padding=1),
        nn.Conv2d(6, 7, (3, 2), dilation=2, bias=False),
        nn.Conv2d(6, 7, 3, padding="same"),
        nn.Conv2d(6, 7, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(6, 7, 3, padding=2, padding_mode="circular", bias=False),
        nn.ConvTranspose2d(6, 7, 3, stride=2, padding=1, output_padding=1),
        nn.ConvTranspose2d(6, 7, 2, bias=False),
    ],
    ids=str,
)
def test_a_layer_loses_the_inputs_that_are_zero_and_the_outputs_that_nobody_needs(layer):
    """G1, G19: the bias of what stays is what it was."""
    net = Around(lambda n, x: n.layer(x), CLOSED, layer=layer)
    net.head.weight.data[:, 2] = 0
    small = prune(net, SHAPE)
    cut = small.module.layer
    ins, outs = (1, 0) if isinstance(layer, nn.Conv2d) else (0, 1)
    assert (cut.weight.shape[ins], cut.weight.shape[outs]) == (4, 6)
    assert (cut.in_channels, cut.out_channels) == (4, 6)
    if layer.bias is not None:
        assert torch.equal(cut.bias, net.layer.bias[[0, 1, 3, 4, 5, 6]])
    assert_same_function(net, small, SHAPE)
    assert not small.report.walls


@pytest.mark.parametrize(
    ("closed", "groups", "left"),
    [
        ((1, 4), 2, (4, 2)),  # one of each group
        ((0, 1), 2, (6, 2)),  # groups stay of equal size: nothing to be won
        ((0, 1, 2), 2, (3, 1)),  # a whole group
        ((0, 3, 5), 3, (3, 3)),
        ((2, 3), 3, (4, 2)),
        ((0, 5), 6, (4, 4)),
    ],
)
def test_groups_stay_of_equal_size_or_go(closed, groups, left):
    """G9, G11: depthwise layers shrink with their input, other groups where they stay equal."""
    net = Around(
        lambda n, x: n.bn2(n.layer(x)),
        closed,
        layer=nn.Conv2d(6, 6, 3, padding=1, groups=groups, bias=False),
        bn2=nn.BatchNorm2d(6),
    )
    dead = [c for c in range(6) if c // (6 // groups) in groups_within(closed, 6 // groups)]
    close(net.bn2, *dead)  # the whole group goes only if its outputs are closed, too
    small = prune(net, SHAPE)
    assert (small.module.layer.in_channels, small.module.layer.groups) == left
    assert small.module.conv.out_channels == left[0]
    assert_same_function(net, small, SHAPE)
    assert not small.report.walls


def groups_within(closed: Sequence[int], size: int) -> set[int]:
    """Groups of which all members are closed."""
    return {g for g in range(6 // size) if all(g * size + j in closed for j in range(size))}


def test_a_group_that_is_dead_on_one_side_only_stays():
    net = Around(
        lambda n, x: n.layer(x), (0, 1, 2), layer=nn.Conv2d(6, 4, 1, groups=2)
    )  # its bias still goes through
    small = prune(net, SHAPE)
    assert_same_function(net, small, SHAPE)
    assert small.module.layer.groups in (1, 2)


def test_zero_into_a_depthwise_layer_with_a_norm_is_not_zero():
    """G10: a gate on the expansion alone leaves a constant behind the depthwise norm."""
    net = Around(
        lambda n, x: n.bn2(n.layer(x)),
        CLOSED,
        layer=nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False),
        bn2=nn.BatchNorm2d(6),
    )
    found = before_head(analyse(net, SHAPE))
    assert at(found.state, CONSTANT) == [*CLOSED]
    assert not found.steady[[*CLOSED]].any()  # beta in train mode, shifted in eval mode
    norm = net.bn2
    shifted = norm.bias - norm.weight * norm.running_mean / (norm.running_var + norm.eps).sqrt()
    torch.testing.assert_close(found.value[[*CLOSED]], shifted[[*CLOSED]].detach())
    small = prune(net, SHAPE)
    assert small.module.layer.groups == 6  # no norm behind the head takes the difference up
    assert_same_function(net, small, SHAPE)


def test_a_constant_that_differs_between_the_modes_goes_into_a_layer_with_a_norm_behind_it():
    """G10, G15: the norm takes any constant away in train mode; in eval mode its mean has it."""
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6),
        nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False), nn.BatchNorm2d(6),
        nn.Conv2d(6, 5, 1, bias=False), nn.BatchNorm2d(5), nn.ReLU(),
    )  # fmt: skip
    settled(net).double()
    close(net[1], *CLOSED)
    small = prune(net, SHAPE)
    assert small.module[2].groups == 4
    assert small.report.notes == ["constants folded: into the running mean of 5"]
    assert not torch.equal(small.module[5].running_mean, net[5].running_mean)
    assert torch.equal(small.module[4].weight, net[4].weight[:, [0, 2, 3, 5]])
    assert_same_function(net, small, SHAPE)


def test_a_linear_layer_loses_the_columns_of_a_channel():
    """G1: flatten makes h * w columns of a channel."""
    net = Around(lambda n, x: F.max_pool2d(x, 2).flatten(1), CLOSED)
    assert net.head.in_features == 6 * 4 * 3
    small = prune(net, SHAPE)
    columns = torch.arange(72).reshape(6, 12)[[0, 2, 3, 5]].flatten()
    assert torch.equal(small.module.head.weight, net.head.weight[:, columns])
    assert_same_function(net, small, SHAPE)


@pytest.mark.parametrize(
    "flatten",
    [
        lambda n, x: torch.flatten(x, 1),
        lambda n, x: x.view(x.size(0), -1),
        lambda n, x: x.reshape(x.shape[0], -1),
        lambda n, x: n.flatten(x),
        lambda n, x: x.permute(0, 2, 3, 1).flatten(1),
    ],
    ids=["function", "view", "reshape", "module", "channels last"],
)
def test_every_way_to_flatten_is_followed(flatten):
    net = Around(flatten, CLOSED, flatten=nn.Flatten())
    small = prune(net, SHAPE)
    assert small.module.head.in_features == 4 * 8 * 6
    assert not small.report.walls
    assert_same_function(net, small, SHAPE)


def test_a_linear_layer_on_the_last_axis_takes_channels_last():
    net = Around(lambda n, x: n.fc(x.permute(0, 2, 3, 1)).relu(), CLOSED, fc=nn.Linear(6, 7))
    small = prune(net, SHAPE)
    assert small.module.fc.in_features == small.module.conv.out_channels == 4
    assert_same_function(net, small, SHAPE)


@pytest.mark.parametrize(
    ("conv", "norm", "sizes"),
    [(nn.Conv1d, nn.BatchNorm1d, (48,)), (nn.Conv3d, nn.BatchNorm3d, (4, 2, 6))],
)
def test_signals_and_volumes_inside_a_net_are_pruned_as_well(conv, norm, sizes):
    net = Around(
        lambda n, x: (
            n.norm(n.layer(x.unflatten(2, (4, 2)) if len(sizes) > 1 else x.flatten(2)))
            .relu()
            .flatten(2)
            .mean(2)
        ),
        CLOSED,
        layer=conv(6, 7, 3, padding=1),
        norm=norm(7),
    )
    close(net.norm, 0, 5, 6)
    small = prune(net, SHAPE)
    assert small.module.layer.weight.shape[:2] == (4, 4)
    assert not small.report.walls
    assert_same_function(net, small, SHAPE)
    assert hold_the_facts(net, SHAPE)[ZERO] >= 6


# --- constants folded into a bias ------------------------------------------------------------


@pytest.mark.parametrize(
    ("layer", "folds"),
    [
        (nn.Conv2d(6, 7, 3, bias=False), True),
        (nn.Conv2d(6, 7, 1, stride=2), True),
        (nn.Conv2d(6, 7, 3, padding=1, padding_mode="reflect"), True),
        (nn.Conv2d(6, 7, 3, padding=1, padding_mode="replicate"), True),
        (nn.Conv2d(6, 7, 3, padding=1, padding_mode="circular"), True),
        (nn.Conv2d(6, 7, 1, padding="same"), True),
        (nn.Conv2d(6, 7, 3, padding="valid"), True),
        (nn.Conv2d(6, 7, 3, padding=1), False),
        (nn.Conv2d(6, 7, 3, padding="same"), False),
        (nn.Conv2d(6, 7, 1, padding=1), False),
        (nn.ConvTranspose2d(6, 7, 2), False),
    ],
    ids=str,
)
def test_a_constant_goes_where_it_does_not_meet_a_border_of_zeros(layer, folds):
    """G2: exact in both modes where it goes, kept where the border would be wrong."""
    net = Around(lambda n, x: n.layer(x.sigmoid()), CLOSED, layer=layer)
    small = prune(net, SHAPE)
    assert small.module.conv.out_channels == (4 if folds else 6)
    assert small.report.notes == (["constants folded: into the bias of layer"] if folds else [])
    if folds:
        weight, whole = net.layer.weight.detach().double(), (2, 3)
        shift = 0.5 * weight.sum(whole)[:, [*CLOSED]].sum(1)
        before = 0 if net.layer.bias is None else net.layer.bias.double()
        torch.testing.assert_close(small.module.layer.bias.double(), before + shift)
    assert_same_function(net, small, SHAPE)


def test_a_constant_goes_into_the_bias_of_a_linear_layer():
    net = Around(lambda n, x: n.fc(x.sigmoid().flatten(1)), CLOSED, fc=nn.Linear(288, 7))
    small = prune(net, SHAPE)
    assert small.module.fc.in_features == 4 * 48
    shift = 0.5 * net.fc.weight.detach().reshape(7, 6, 48)[:, [*CLOSED]].sum((1, 2))
    torch.testing.assert_close(small.module.fc.bias, net.fc.bias + shift)
    assert_same_function(net, small, SHAPE)


# --- norms -----------------------------------------------------------------------------------


def test_a_norm_without_statistics_makes_no_constant_of_a_constant():
    net = Around(
        lambda n, x: n.bn2(x.sigmoid()), CLOSED, bn2=nn.BatchNorm2d(6, track_running_stats=False)
    )
    found = before_head(analyse(net, SHAPE))
    assert at(found.state, FIXED) == [*CLOSED]
    assert_same_function(net, prune(net, SHAPE), SHAPE)


def test_a_zero_that_holds_in_eval_mode_only_is_not_cut():
    """G2: beta - gamma * mean / sqrt(var + eps) is 0 by chance; in train mode it is beta."""
    net = Around(lambda n, x: n.bn2(x), CLOSED, bn2=nn.BatchNorm2d(6, eps=2.0**-60))
    norm = net.bn2
    norm.weight.data[1], norm.bias.data[1] = 2.0, 3.0
    norm.running_mean[1], norm.running_var[1] = 3.0, 4.0
    found = before_head(analyse(net, SHAPE))
    assert (int(found.state[1]), float(found.value[1])) == (CONSTANT, 0.0)
    small = prune(net, SHAPE)
    assert small.module.conv.out_channels == 6
    assert_same_function(net, small, SHAPE)


# --- learned numbers -------------------------------------------------------------------------


class Scaled(Around):
    """Numbers of the net's own between the norm and the head."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__(lambda net, x: x, CLOSED)
        self.numbers = nn.Parameter(torch.rand(shape, dtype=torch.float64) + 0.5)
        self.middle = lambda net, x: x * net.numbers


def test_zero_times_a_learned_number_is_zero():
    net = Scaled(())
    assert at(before_head(analyse(net, SHAPE)).state, ZERO) == [*CLOSED]
    small = prune(net, SHAPE)
    assert small.module.conv.out_channels == 4
    assert_same_function(net, small, SHAPE)


def test_learned_numbers_per_channel_are_cut_with_them():
    net = Scaled((6, 1, 1))
    small = prune(net, SHAPE)
    assert small.module.conv.out_channels == 4
    assert tuple(small.module.numbers.shape) == (4, 1, 1)
    assert not small.report.walls
    assert_same_function(net, small, SHAPE)


def test_all_four_states_occur_in_the_judged_nets():
    """The judge would be silent about a state that no net shows."""
    net = Around(lambda n, x: F.pad(torch.cat([x, x.sigmoid(), n.bn(x) + 1], 1), (1, 0)), CLOSED)
    seen = hold_the_facts(net, SHAPE)
    assert min(seen) > 0
    assert seen[LIVE] > seen[ZERO]


def test_places_are_found_of_entries_in_any_order_of_memory():
    wanted = torch.tensor([[7, 3, 9], [5, 7, 4]]).T
    found = places_of(wanted, torch.tensor([5, 9, 7, 3]))  # a warning of torch's is an error here
    assert found.tolist() == [[2, 0], [3, 2], [1, -1]]
