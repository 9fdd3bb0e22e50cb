"""The three networks have exactly the published sizes, and a forward that the pruner can read."""

import json
from collections import Counter
from itertools import pairwise
from math import sqrt

import pytest
import torch
from torch import nn

from dnal_mini.graph.capture import capture
from dnal_mini.layers.channelmap import ChannelMap
from dnal_mini.measure.authors import authors_counting
from dnal_mini.measure.cost import cost
from dnal_mini.models import MODELS, mobilenetv2, resnet56, vgg16
from dnal_mini.models.resnet import zero_padded_shortcut

# model: plain MACs, the authors' FLOPs, parameters, the authors' parameters, printed M, printed M
PUBLISHED = {
    "vgg16": (313_463_808, 313_472_778, 14_991_946, 14_990_922, "313.47", "14.99"),
    "resnet56": (125_485_696, 125_487_738, 853_018, 853_018, "125.49", "0.85"),
    "mobilenetv2": (91_154_944, 91_172_498, 2_296_922, 2_296_922, "91.17", "2.30"),
}
GATED = {"vgg16": (13, 4224), "resnet56": (55, 2032), "mobilenetv2": (35, 9920)}
ONCE = (nn.ReLU, nn.BatchNorm2d, nn.BatchNorm1d)


def small(model: str, **arguments: object) -> nn.Module:
    """A narrow net for images of 16 x 16."""
    size = {"image_size": 16} if model == "vgg16" else {}
    return MODELS[model](width=0.2, **size, **arguments)


@pytest.mark.parametrize("model", MODELS)
def test_counts_equal_the_published_ones(model):
    macs, flops, params, authors_params, printed_flops, printed_params = PUBLISHED[model]
    net = MODELS[model]()
    measured = cost(net)
    assert (measured.macs, measured.params) == (macs, params)
    assert authors_counting(net) == (flops, authors_params)
    assert f"{flops / 1e6:.2f}" == printed_flops
    assert f"{authors_params / 1e6:.2f}" == printed_params


@pytest.mark.parametrize("model", MODELS)
def test_the_papers_gates_are_counted_out(model):
    net = MODELS[model](width=1)
    norms = [
        norm
        for name, norm in net.named_modules()
        if isinstance(norm, nn.BatchNorm2d) and net.gate_here(name)
    ]
    assert (len(norms), sum(norm.num_features for norm in norms)) == GATED[model]


@pytest.mark.parametrize(
    ("name", "gated"),
    [
        ("stem.bn", False),
        ("blocks.3.expand.bn", False),
        ("blocks.3.depthwise.bn", True),
        ("blocks.3.project.bn", True),
        ("blocks.0.shortcut.bn", False),
        ("head.bn", True),
    ],
)
def test_mobilenetv2_gates_depthwise_projection_and_head_only(name, gated):
    net = mobilenetv2(width=0.3)
    assert isinstance(net.get_submodule(name), nn.BatchNorm2d)
    assert net.gate_here(name) is gated


@pytest.mark.parametrize("model", MODELS)
def test_width_1_builds_the_same_net_as_the_default(model):
    default, full = MODELS[model](), MODELS[model](width=1)
    shapes = [p.shape for p in default.parameters()]
    assert [p.shape for p in full.parameters()] == shapes


@pytest.mark.parametrize("width", [0.01, 0.25, 0.3, 1.1])
def test_width_multiplies_every_channel_count_of_vgg16(width):
    published = [64, 64, 128, 128, 256, 256, 256, *[512] * 6]
    net = vgg16(width=width)
    channels = [m.out_channels for m in net.modules() if isinstance(m, nn.Conv2d)]
    assert channels == [max(4, round(c * width)) for c in published]
    assert net.classifier.fc1.out_features == max(4, round(512 * width))


def test_parameters_of_a_quarter_width_vgg16_by_hand():
    channels = [3, 16, 16, 32, 32, 64, 64, 64, *[128] * 6]
    convs = sum(9 * a * b + b + 2 * b for a, b in pairwise(channels))
    head = (128 * 128 + 128) + 2 * 128 + (128 * 10 + 10)
    assert cost(vgg16(width=0.25)).params == convs + head


@pytest.mark.parametrize(("width", "stages"), [(0.7, (11, 22, 45)), (0.3, (5, 10, 19))])
def test_resnet56_at_other_widths_pads_with_zeros_where_halves_are_odd(width, stages):
    net = resnet56(width=width).eval()
    assert [net.blocks[i].bn2.num_features for i in (8, 17, 26)] == list(stages)
    assert net(torch.rand(2, 3, 13, 17)).shape == (2, 10)


@pytest.mark.parametrize("model", MODELS)
def test_every_parameter_gets_a_finite_gradient(model):
    net = small(model, num_classes=7)
    logits = net(torch.rand(5, 3, 16, 16))
    assert logits.shape == (5, 7)
    assert logits.isfinite().all()
    nn.functional.cross_entropy(logits, torch.arange(5)).backward()
    missing = [
        name for name, p in net.named_parameters() if p.grad is None or not p.grad.isfinite().all()
    ]
    assert missing == []


@pytest.mark.parametrize("model", ["resnet56", "mobilenetv2"])
@pytest.mark.parametrize("size", [(1, 1), (29, 43)])
def test_nets_with_global_pooling_take_images_of_any_size(model, size):
    net = MODELS[model](num_classes=3, width=0.2).eval()
    assert net(torch.rand(2, 3, *size)).shape == (2, 3)


@pytest.mark.parametrize("size", [16, 31, 32, 47, 65])
def test_vgg16_ends_in_one_pixel_at_every_image_size(size):
    net = vgg16(num_classes=11, width=0.1, image_size=size).eval()
    assert net(torch.rand(2, 3, size, size)).shape == (2, 11)
    assert net.pool(net.features(torch.rand(2, 3, size, size))).shape[2:] == (1, 1)


@pytest.mark.parametrize("model", MODELS)
def test_forward_holds_only_modules_called_once_and_plain_additions(model):
    net = small(model).eval()
    graph = capture(net, (torch.rand(2, 3, 16, 16),))
    own = [node for node in graph.nodes if node.op == "call_function" and node not in graph.sole]
    assert {str(node.target).split(".")[1] for node in own} <= {"add", "add_", "flatten"}
    calls = Counter(graph.sole.values())
    once = [name for name, module in net.named_modules() if isinstance(module, ONCE)]
    assert {calls[name] for name in once} == {1}


@pytest.mark.parametrize("model", MODELS)
def test_a_net_is_rebuilt_from_its_config(model):
    net = small(model, num_classes=7).eval()
    config = json.loads(json.dumps(net.config))
    twin = MODELS[config.pop("builder")](**config).eval()
    twin.load_state_dict(net.state_dict(), strict=True)
    images = torch.rand(2, 3, 16, 16)
    torch.testing.assert_close(twin(images), net(images), rtol=0, atol=0)


def test_the_padded_shortcut_takes_every_second_pixel_and_centres_the_channels():
    x = torch.rand(2, 5, 7, 11)
    expected = torch.zeros(2, 12, 4, 6)
    expected[:, 3:8] = x[:, :, ::2, ::2]  # 7 new channels: 3 before, 4 after
    torch.testing.assert_close(zero_padded_shortcut(5, 12, stride=2)(x), expected, rtol=0, atol=0)


def test_identity_shortcuts_are_identity_modules():
    net = resnet56(width=0.3)
    kinds = [type(block.shortcut) for block in net.blocks]
    assert [i for i, kind in enumerate(kinds) if kind is ChannelMap] == [9, 18]
    assert Counter(kinds) == {nn.Identity: 25, ChannelMap: 2}


def test_mobilenetv2_has_convolution_shortcuts_where_the_width_changes_at_stride_1():
    shortcuts = [block.shortcut for block in mobilenetv2().blocks]
    convs = [s.conv for s in shortcuts if isinstance(s, nn.Sequential)]
    pairs = [(conv.in_channels, conv.out_channels) for conv in convs]
    assert pairs == [(32, 16), (16, 24), (64, 96), (160, 320)]
    assert shortcuts.count(None) == 3  # the three blocks of stride 2


@pytest.mark.parametrize(("model", "gamma"), [("vgg16", 0.5), ("resnet56", 1), ("mobilenetv2", 1)])
def test_weights_start_with_the_published_spread(model, gamma):
    net = MODELS[model]()
    convs = [m for m in net.modules() if isinstance(m, nn.Conv2d)]
    largest = max(convs, key=lambda conv: conv.weight.numel())
    spread = sqrt(2 / (largest.kernel_size[0] ** 2 * largest.out_channels))
    # 4 standard errors of an estimated standard deviation
    tolerance = 4 / sqrt(2 * largest.weight.numel())
    assert float(largest.weight.detach().std()) == pytest.approx(spread, rel=tolerance)
    gammas = [m.weight for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    assert all((weight == gamma).all() for weight in gammas)
    assert all((conv.bias == 0).all() for conv in convs if conv.bias is not None)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"num_classes": 0}, "got num_classes 0"),
        ({"num_classes": 2.5}, "got num_classes 2.5"),
        ({"width": 0}, "got width 0"),
        ({"width": -0.5}, "got width -0.5"),
        ({"width": float("nan")}, "got width nan"),
        ({"width": "half"}, "got width 'half'"),
    ],
)
def test_sizes_that_cannot_be_built_are_refused_in_one_line(model, arguments, reason):
    with pytest.raises(ValueError, match=reason) as error:
        MODELS[model](**arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("size", [15, 0, 32.0])
def test_vgg16_refuses_images_too_small_for_its_pools(size):
    with pytest.raises(ValueError, match="need an int of at least 16"):
        vgg16(image_size=size)
