"""What a certificate takes for a difference, and what for rounding or for no image at all."""

import pytest
import torch
from small_nets import close, settled
from torch import Tensor, nn

from dnal_mini.pruning import certificate
from dnal_mini.pruning.certificate import certified
from dnal_mini.pruning.pruner import prune

SHAPE = (3, 8, 10)


class Blind(nn.Module):
    """Norm after norm behind a layer of constants: with batch statistics they magnify rounding."""

    def __init__(self, tracks: bool = True) -> None:
        super().__init__()
        layers = [nn.Conv2d(3, 7, 3), nn.BatchNorm2d(7), nn.Sigmoid()]
        for _ in range(5):
            norm = nn.BatchNorm2d(7, track_running_stats=tracks)
            layers += [nn.Conv2d(7, 7, 1), norm, nn.Sigmoid()]
        self.layers, self.conv, self.fc = (
            nn.Sequential(*layers),
            nn.Conv2d(3, 5, 3),
            nn.Linear(7, 4),
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.fc(self.layers(x).mean((2, 3))), self.conv(x)


def blind(tracks: bool = True) -> nn.Module:
    torch.manual_seed(2)
    net = settled(Blind(tracks)).double().eval()
    net.layers[1].weight.data.zero_()
    return net


@pytest.mark.parametrize("tracks", [True, False])
def test_rounding_that_norms_magnify_is_no_difference(
    monkeypatch: pytest.MonkeyPatch, tracks: bool
):
    small = prune(blind(tracks), SHAPE)
    assert small.module.layers[0].out_channels < 7
    monkeypatch.setattr(certificate, "NOISE", 0)
    with pytest.raises(ValueError, match="differ"):
        prune(blind(tracks), SHAPE)


@pytest.mark.parametrize(
    ("name", "tracks"),
    [
        ("fc.bias", True),
        ("fc.bias", False),
        ("conv.weight", True),
        ("conv.weight", False),
        ("layers.4.bias", True),  # else the next norm takes it away again
    ],
)
def test_what_is_no_rounding_is_a_difference(name: str, tracks: bool):
    net, other = blind(tracks), blind(tracks)
    certified(net, other, SHAPE)
    other.get_parameter(name).data[0] += 1e-5
    with pytest.raises(ValueError, match="differ"):
        certified(net, other, SHAPE)


class Counts(nn.Module):
    """Its numbers fit images of one size; others give more rows, or fewer, and no error."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.fc = nn.Linear(6 * 8 * 10, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.bn(self.conv(x)).sigmoid().reshape(-1, 480))


def test_a_size_at_which_pixels_of_images_are_mixed_is_none_that_a_net_takes():
    torch.manual_seed(3)
    net = settled(Counts()).double().eval()
    close(net.bn, 1, 4)  # what they leave moves into the bias of fc: it holds for whole rows
    wider = torch.zeros(3, 3, 16, 20, dtype=torch.float64)
    assert len(net(wider)) == 12
    small = prune(net, SHAPE)
    assert {tuple(trial["image_shape"]) for trial in small.spec["trials"]} == {SHAPE}


class Chosen(nn.Module):
    """Logits of which a mask rules some out, others for each image; a second mean over pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 7, 3), nn.BatchNorm2d(7)
        self.fc = nn.Linear(7, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        maps = self.bn(self.conv(x)).relu()
        logits = self.fc(maps.mean((2, 3)))
        out = x[:, 0, 0, :5] > 0.5
        far = maps[:, :, 4:].mean((2, 3))  # no pixel at half the size
        return logits.masked_fill(out, float("-inf")), far


def chosen() -> nn.Module:
    torch.manual_seed(4)
    return settled(Chosen()).double().eval()


def test_logits_that_a_mask_rules_out_and_means_of_nothing_are_no_difference():
    net = chosen()
    close(net.bn, 1, 4)
    small = prune(net, SHAPE)
    assert small.module.fc.in_features == 5
    sizes = {tuple(trial["image_shape"]) for trial in small.spec["trials"]}
    assert SHAPE in sizes
    assert len(sizes) == 2
    assert (3, 4, 5) not in sizes, "there the second output is no number"


@pytest.mark.parametrize("fault", [1e-5, float("inf"), float("nan")])
def test_a_fault_beside_infinite_logits_is_seen(fault: float):
    net, other = chosen(), chosen()
    certified(net, other, SHAPE)
    other.fc.bias.data[3] += fault
    with pytest.raises(ValueError, match="differ"):
        certified(net, other, SHAPE)


class Bordered(nn.Module):
    """A channel that its norm makes -1/2 in eval mode and +1/2 in training, and then a border."""

    def __init__(self, pads: bool) -> None:
        super().__init__()
        self.pads = pads
        self.conv, self.bn1 = nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6)
        self.deep = nn.Conv2d(6, 6, 3, padding=int(pads), groups=6, bias=False)
        self.bn2, self.mix, self.bn3 = nn.BatchNorm2d(6), nn.Conv2d(6, 5, 1), nn.BatchNorm2d(5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv(x)).relu()
        x = x if self.pads else nn.functional.pad(x, (1, 1, 1, 1))
        return self.bn3(self.mix(self.bn2(self.deep(x)))).sigmoid().mean((2, 3))


@pytest.mark.parametrize("pads", [True, False])
def test_a_channel_that_is_zero_in_eval_mode_alone_is_no_constant_behind_a_border(pads: bool):
    torch.manual_seed(5)
    net = settled(Bordered(pads)).double().eval()
    with torch.no_grad():
        net.conv.weight[2] = 0.0
        for name, value in (("running_mean", 1), ("running_var", 1), ("weight", 1), ("bias", 0.5)):
            getattr(net.bn1, name)[2] = value
    small = prune(net, SHAPE)
    modes = {trial["mode"] for trial in small.spec["trials"]}
    assert modes >= {"eval", "train"}, "and they agree in both, or it would have been refused"
    assert small.module.deep.groups == 6
