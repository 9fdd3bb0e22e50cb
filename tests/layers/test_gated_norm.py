"""A gate inside a layer: any dimension, any class, hooks, copies; the layer stays what it was."""

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dnal_mini.gating import add_gates, gates, set_gates, strip_gates
from dnal_mini.layers.channelmap import ChannelMap
from dnal_mini.layers.gated_norm import Gated, GatedFirst, put_gate, take_gate
from dnal_mini.layers.mapped import put_map
from dnal_mini.layers.syncnorm import synced_norms


class NormThenSilu(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.silu(super().forward(x))


def noisy(layer: nn.Module) -> nn.Module:
    for tensor in layer.parameters():
        nn.init.normal_(tensor)
    return layer.double()


def without_shift(norm: nn.BatchNorm2d) -> nn.BatchNorm2d:
    """As later releases of torch build one with bias=False."""
    norm.register_parameter("bias", None)
    return norm


LAYERS = {
    "1d": (nn.BatchNorm1d(5), (4, 5)),
    "1d with length": (nn.BatchNorm1d(5), (4, 5, 7)),
    "2d": (nn.BatchNorm2d(5), (4, 5, 3, 7)),
    "3d": (nn.BatchNorm3d(5), (4, 5, 3, 7, 2)),
    "sync": (nn.SyncBatchNorm(5), (4, 5, 3)),
    "no affine": (nn.BatchNorm2d(5, affine=False), (4, 5, 3, 7)),
    "no shift": (without_shift(nn.BatchNorm2d(5)), (4, 5, 3, 7)),
    "convolution": (nn.Conv2d(3, 5, 3), (4, 3, 6, 7)),
    "no bias": (nn.Conv1d(6, 5, 3, groups=1, bias=False), (4, 6, 7)),
    "weight norm": (nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 5, 3)), (4, 3, 6, 7)),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("train", [False, True])
def test_a_gate_multiplies_what_the_layer_puts_out_and_goes_without_a_trace(name: str, train: bool):
    layer, shape = copy.deepcopy(LAYERS[name][0]), LAYERS[name][1]
    layer = noisy(layer).train(train)
    plain, x = copy.deepcopy(layer), torch.randn(shape, dtype=torch.float64)
    put_gate(layer)
    assert isinstance(layer, type(plain))
    assert [n for n in layer.state_dict() if "gate" not in n] == list(plain.state_dict())
    layer.gate.s.data.normal_()
    set_gates(layer, mode="soft", delta=2.0)
    expected = plain(x) * layer.gate.p.reshape(1, 5, *[1] * (len(shape) - 2))
    torch.testing.assert_close(layer(x), expected)
    for tensor, own in zip(
        plain.buffers(), (b for n, b in layer.named_buffers() if "gate" not in n), strict=True
    ):
        torch.testing.assert_close(own, tensor)
    take_gate(layer)
    assert (type(layer), vars(layer).keys()) == (type(plain), vars(plain).keys())


def test_the_gate_of_a_norm_with_an_activation_inside_stands_behind_the_affine():
    layer, x = noisy(NormThenSilu(5)), torch.randn(4, 5, 3, 7).double()
    plain = nn.BatchNorm2d(5).double()
    plain.load_state_dict(layer.state_dict())
    put_gate(layer)
    layer.gate.s.data.normal_()
    set_gates(layer, mode="soft", delta=2.0)
    torch.testing.assert_close(layer(x), F.silu(plain(x) * layer.gate.p[:, None, None]))


def test_copies_and_pickles_of_gated_and_mapped_layers_do_the_same():
    layer = noisy(NormThenSilu(5))
    put_gate(layer)
    put_map(layer, "scatter", ChannelMap([1, -1, 0, 4, 3, 2]))
    put_map(layer, "gather", ChannelMap([2, 1, 0, 3, 4]))
    set_gates(layer, mode="soft")
    x = torch.randn(4, 5, 3, 7).double()
    for other in (copy.deepcopy(layer), copy.copy(layer), pickle.loads(pickle.dumps(layer))):
        assert type(other) is type(layer)
        torch.testing.assert_close(other(x), layer(x))
    assert list(layer.state_dict()) == [
        *noisy(NormThenSilu(5)).state_dict(),
        "gate.s",
        "gate.delta",
    ]
    assert layer(x).shape == (4, 6, 3, 7)
    assert not layer(x)[:, 1].any()


def test_a_second_map_stands_between_the_first_and_the_layer():
    layer, x = noisy(nn.Conv2d(3, 5, 1)), torch.randn(2, 3, 4, 4).double()
    expected = layer(x)[:, [4, 1, 0]] * torch.tensor([1.0, 0, 1])[:, None, None]
    put_map(layer, "scatter", ChannelMap([4, 1, 0]))
    put_map(layer, "scatter", ChannelMap([0, -1, 2, 3, 4]))
    torch.testing.assert_close(layer(x), expected)


def test_hooks_and_flags_of_a_norm_stay_its_own():
    seen = []
    net = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Conv2d(5, 4, 3))
    net[1].register_forward_hook(lambda module, args, output: seen.append(output))
    net[1].eval()
    net[1].note = ["own"]
    gated = add_gates(net)
    seen.clear()
    gated(torch.randn(2, 3, 9, 9))
    assert (len(seen), gated[1].training, gated[1].note, gated[1].note is net[1].note) == (
        1, False, ["own"], False,
    )  # fmt: skip


def test_synced_norms_keep_gates_and_what_a_class_does_besides():
    net = nn.Sequential(NormThenSilu(5), nn.BatchNorm2d(5))
    put_gate(net[0])
    put_gate(net[1], GatedFirst)
    set_gates(net, mode="soft", delta=3.0)
    x = torch.randn(4, 5, 3, 7)
    kinds, expected = [type(m) for m in net], net.eval()(x)
    with synced_norms(net):
        assert [type(m).__name__ for m in net] == [
            "SyncedGatedNormThenSilu",
            "SyncedGatedFirstBatchNorm2d",
        ]
        torch.testing.assert_close(net(x), expected)
    assert [type(m) for m in net] == kinds


@pytest.mark.parametrize("what", ["gate", "forward"])
def test_a_norm_without_a_place_for_a_gate_is_refused(what: str):
    net = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5))
    setattr(net[1], what, torch.sin)
    with pytest.raises(
        ValueError, match=rf"^got a BatchNorm2d with a [^\n]*{what}[^\n]*; do leave it out$"
    ):
        add_gates(net)


def test_stripped_of_its_gates_a_net_has_its_own_classes_again():
    net = nn.Sequential(nn.Conv2d(3, 5, 3), NormThenSilu(5), nn.Conv2d(5, 4, 3))
    gated = add_gates(net)
    assert isinstance(gated[1], Gated)
    strip_gates(gated)
    assert not gates(gated)
    assert [type(m) for m in gated.modules()] == [type(m) for m in net.modules()]
    assert list(gated.state_dict()) == list(net.state_dict())
