"""Nets as people write them, one for each way in which forward code has surprised a pruner."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from small_nets import relative_difference, settled
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dnal_mini.deployment.fold import deploy
from dnal_mini.gating import add_gates, gates, set_gates
from dnal_mini.graph.outputs import tensors_in
from dnal_mini.pruning.netfile import load, save
from dnal_mini.pruning.pruner import prune

SHAPE = (3, 20, 16)


def block(inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())


class Base(nn.Module):
    """Three blocks and a head; what is between the second and the third is each net's own."""

    def __init__(self, wide: int = 12) -> None:
        super().__init__()
        self.a, self.b, self.c = block(3, 8), block(8, 12), block(wide, 10)
        self.fc = nn.Linear(10, 5)

    def mid(self, x: Tensor) -> Tensor:
        return x

    def forward(self, x: Tensor) -> Any:
        return self.fc(self.c(self.mid(self.b(self.a(x)))).mean((2, 3)))


@dataclass(frozen=True)
class Kin:
    build: Callable[[], nn.Module]
    shapes: tuple[tuple[int, ...], ...] = (SHAPE,)  # the first is that of the cut
    dead: str = "-"  # gates with this in their name close wholly
    walls: tuple[str, ...] = ()  # what the report names, by its beginning
    options: dict[str, Any] = field(default_factory=dict)  # of add_gates


KIN: dict[str, Kin] = {}


def kin(**how: Any) -> Callable[[Callable[[], nn.Module]], Callable[[], nn.Module]]:
    def add(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
        KIN[build.__name__] = Kin(build, **how)
        return build

    return add


OTHER_SIZES = (SHAPE, (3, 21, 17), (3, 37, 11))


# --- facts measured at one image size
@kin(shapes=OTHER_SIZES, dead="ctx")
class PyramidPooling(Base):
    def __init__(self) -> None:
        super().__init__()
        self.ctx = block(12, 12, 1)

    def mid(self, x: Tensor) -> Tensor:
        small = self.ctx(F.adaptive_avg_pool2d(x, 3))
        return x + F.interpolate(small, size=x.shape[-2:], mode="bilinear", align_corners=False)


@kin(shapes=OTHER_SIZES, dead="ctx")
class CeilPoolBesideConv(Base):
    def __init__(self) -> None:
        super().__init__()
        self.ctx = nn.Sequential(nn.Conv2d(12, 12, 3, 2, 1), nn.BatchNorm2d(12))

    def mid(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, 2, ceil_mode=True) + self.ctx(x)


# --- forward code that looks at its layers
@kin()
class TableOfPairs(Base):
    """Layers in tuples in a plain dict."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = {"first": (self.a[0], self.a[1]), "second": (self.b[0], self.b[1])}

    def forward(self, x: Tensor) -> Tensor:
        for conv, norm in self.stages.values():
            x = norm(conv(x)).relu()
        return self.fc(self.c(x).mean((2, 3)))


@kin()
class AsksForAttributes(Base):
    """It tells a norm from a convolution by what it has."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in (*self.a, *self.b, *self.c):
            x = layer(x)
            if hasattr(layer, "running_mean") and layer.num_features > 0:
                x = x * 2
        return self.fc(x.mean((2, 3)))


@kin()
class ReadsStrideAndDilation(Base):
    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(12, 12, 3, stride=2, dilation=2, padding=2)

    def mid(self, x: Tensor) -> Tensor:
        y = F.interpolate(self.down(x), scale_factor=float(self.down.stride[0]))
        return F.pad(x, (0,) * self.down.dilation[0] * 2) + y


@kin()
class ReadsWidth(Base):
    def mid(self, x: Tensor) -> Tensor:
        return x.view(-1, self.b[0].out_channels, *x.shape[2:]).contiguous()


@kin(walls=("div in forward: its numbers stay",))
class CountsWithItsWidth(Base):
    """The number is another one behind the cut: nothing may go there."""

    def mid(self, x: Tensor) -> Tensor:
        return x / self.c[0].in_channels ** 0.5


# --- one mode traced
@kin(options={"order": "conv-bn-relu-ss"})
class DropoutAndHeadOfTraining(Base):
    def __init__(self) -> None:
        super().__init__()
        self.aux = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Any:
        x = F.relu(self.b[1](self.b[0](F.relu(self.a[1](self.a[0](x))))))
        y = self.fc(F.dropout2d(self.c(x), 0.5, self.training).mean((2, 3)))
        return (y, self.aux(x.mean((2, 3)))) if self.training else y


# --- the boundary of the graph
@kin()
class FlagByName(Base):
    def forward(self, x: Tensor, *, features: bool = False) -> Any:
        x = self.c(self.b(self.a(x)))
        return x if features else self.fc(x.mean((2, 3)))


@kin()
class SizeOrNone(Base):
    def forward(self, x: Tensor, size: tuple[int, int] | None = None, **more: Any) -> Any:
        x = x if size is None else F.interpolate(x, size=size)
        return super().forward(x)


@kin()
class CastsAsItsWeights(Base):
    def mid(self, x: Tensor) -> Tensor:
        return x.to(torch.float32).type_as(self.fc.weight).to(self.fc.weight.dtype)


class Found(NamedTuple):
    scores: Tensor
    maps: list[Tensor]


@kin()
class ReturnsNamedTuple(Base):
    def forward(self, x: Tensor) -> Any:
        x = self.b(self.a(x))
        return Found(self.fc(self.c(x).mean((2, 3))), [x])


@kin()
class ReturnsNoneAndWords(Base):
    def forward(self, x: Tensor) -> Any:
        return {"logits": super().forward(x), "loss": None, "name": "net", "scale": 0.5}


@kin()
class ReturnsNestedObject(Base):
    def forward(self, x: Tensor) -> Any:
        return SimpleNamespace(out=SimpleNamespace(logits=super().forward(x)), size=x.shape)


# --- state that is not plain tensors
@kin()
class ConfigIsAnObject(Base):
    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(depth=3, of=Base)


@kin()
class ListAndDictOfTheSame(Base):
    def __init__(self) -> None:
        super().__init__()
        self.all = nn.ModuleList([self.a, self.b, self.c])
        self.by_name = nn.ModuleDict({"first": self.a, "head": self.fc})

    def forward(self, x: Tensor) -> Any:
        for layer in self.all:
            x = layer(x)
        return self.by_name["head"](x.mean((2, 3)))


@kin()
class StateHook(Base):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros((), dtype=torch.long), persistent=False)
        self._register_load_state_dict_pre_hook(lambda state, *_: state.pop("old", None))


@kin()
class NanAndBoolBuffers(Base):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("unset", torch.full((3,), float("nan")))
        self.register_buffer("seen", torch.zeros(4, dtype=torch.bool))


@kin()
class KeepsLosses(Base):
    """A dict of what it saw last, one part of it with its gradient."""

    def mid(self, x: Tensor) -> Tensor:
        self.last = {"map": x, "mean": x.mean().detach()}
        return x


# --- a layer of one's own
class OwnNorm(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        batch = self.training
        y = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, batch)
        return F.leaky_relu(y, 0.1)


@kin()
class NormWithItsOwnCall(Base):
    def __init__(self) -> None:
        super().__init__()
        self.b = nn.Sequential(nn.Conv2d(8, 12, 3), OwnNorm(12))


class ConvWithNorm(nn.Conv2d):
    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes, bias=False)
        self.norm = nn.BatchNorm2d(self.out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(super().forward(x)).relu()


@kin()
class NormInsideAConv(Base):
    def __init__(self) -> None:
        super().__init__()
        self.b = ConvWithNorm(8, 12, 3)


@kin()
class ListsOfParts(Base):
    """What C2f does, with split and +=."""

    def __init__(self) -> None:
        super().__init__(wide=22)
        self.m1, self.m2 = block(6, 5), block(5, 5)

    def mid(self, x: Tensor) -> Tensor:
        parts = list(x.split(x.shape[1] // 2, 1))
        for layer in (self.m1, self.m2):
            parts += [layer(parts[-1])]
        return torch.cat(parts, 1)


@kin(walls=("split in forward",))
class WidthsWrittenDown(ListsOfParts):
    def mid(self, x: Tensor) -> Tensor:
        parts = [*x.split((6, 6), 1)]
        parts.extend(layer(parts[-1]) for layer in (self.m1,))
        return torch.cat([*parts, self.m2(parts[-1])], 1)


@kin()
class EndsInSlopes(Base):
    """A residual branch that ends in a PReLU with a slope for each channel."""

    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Sequential(nn.Conv2d(12, 12, 1), nn.BatchNorm2d(12), nn.PReLU(12))

    def mid(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


# --- other dimensions
@kin(shapes=((2, 40), (2, 53)))
def AutoEncoder1d() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(2, 9, 5, 2), nn.BatchNorm1d(9), nn.ReLU(), nn.ConvTranspose1d(9, 7, 4, 2),
        nn.BatchNorm1d(7), nn.ReLU(), nn.Conv1d(7, 3, 1),
    )  # fmt: skip


@kin(shapes=((1, 9, 10, 11), (1, 12, 9, 8)))
class ResidualVolume(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.n1 = nn.Conv3d(1, 7, 3, padding=1), nn.BatchNorm3d(7)
        self.conv, self.n2 = nn.Conv3d(7, 7, 3, padding=1), nn.BatchNorm3d(7)
        self.fc = nn.Linear(7, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool3d(self.n1(self.stem(x)).relu(), 2)
        return self.fc((x + self.n2(self.conv(x))).mean((2, 3, 4)))


# --- learned numbers, hooks, other spellings
@kin()
class ScaleAndShift(Base):
    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.rand(1, 12, 1, 1) + 0.5)
        self.beta = nn.Parameter(torch.rand(12, 1, 1))

    def mid(self, x: Tensor) -> Tensor:
        return self.gamma * x + x * self.beta


@kin()
class WeightedFusion(Base):
    """As in BiFPN."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.d = nn.Parameter(torch.rand(2)), block(12, 12)

    def mid(self, x: Tensor) -> Tensor:
        w = F.relu(self.w)
        w = w / (w.sum() + 1e-4)
        return w[0] * x + w[1] * self.d(x)


@kin()
class WatchedFromBothSides(Base):
    def __init__(self) -> None:
        super().__init__()
        self.b[0].register_forward_pre_hook(lambda module, inputs: None)
        self.b[2].register_full_backward_hook(lambda module, given, taken: None)


@kin()
class TurnsAxes(Base):
    """The gain of an excitation, over pixels in rows."""

    def mid(self, x: Tensor) -> Tensor:
        rows = x.flatten(2).transpose(1, 2)
        return (rows * x.mean((2, 3)).sigmoid()[:, None]).transpose(1, 2).reshape(x.shape)


@kin()
class TilesAndExpands(Base):
    def __init__(self) -> None:
        super().__init__(wide=36)

    def mid(self, x: Tensor) -> Tensor:
        mean = x.mean((2, 3), keepdim=True)
        tiled = torch.tile(mean, (1, 1, *x.shape[2:]))
        return torch.cat([x, tiled, x.amax((2, 3), keepdim=True).expand_as(x)], 1)


@kin()
class OneChannelForAll(Base):
    """A spatial attention: a map of one channel, spread over all."""

    def __init__(self) -> None:
        super().__init__()
        self.look = nn.Conv2d(12, 1, 1)

    def mid(self, x: Tensor) -> Tensor:
        return x * self.look(x).sigmoid().expand(-1, x.shape[1], -1, -1)


def outputs(net: nn.Module, images: Tensor, train: bool) -> list[Tensor]:
    net = copy.deepcopy(net).double().eval()
    for module in net.modules():
        if isinstance(module, _BatchNorm):
            module.train(train)
    with torch.no_grad():
        return tensors_in(net(images.clone()))


def close_some(net: nn.Module, dead: str) -> None:
    draw = torch.Generator().manual_seed(1)
    for name, gate in gates(net).items():
        gate.s.data.fill_(-1)
        if dead not in name:
            gate.s.data[torch.randperm(len(gate.s), generator=draw)[: len(gate.s) // 2]] = 1
    set_gates(net, mode="hard")


def size(net: nn.Module) -> int:
    return sum(parameter.numel() for parameter in net.parameters())


@pytest.mark.parametrize("residual", ["scatter", "tie"])
@pytest.mark.parametrize("name", KIN)
def test_a_net_as_people_write_them_is_gated_cut_and_comes_back(name: str, residual: str, tmp_path):
    case = KIN[name]
    torch.manual_seed(4)
    net = settled(case.build()).eval()
    gated = add_gates(net, **{"image_shape": case.shapes[0], **case.options})
    close_some(gated, case.dead)
    small = prune(gated, case.shapes[0], residual)
    assert size(small.module) < (0.9 if case.walls else 0.7) * size(net)
    told = [wall for wall in small.report.walls if not wall.startswith(case.walls or "-")]
    assert not told
    assert bool(small.report.walls) is bool(case.walls)
    save(small, tmp_path / "net")
    back = load(tmp_path / "net", case.build).module
    for train in (False, True):
        for shape in case.shapes:
            images = torch.randn(3, *shape, dtype=torch.float64)
            expected = outputs(gated, images, train)
            for found in (small.module, back):
                assert relative_difference(expected, outputs(found, images, train)) <= 1e-9
    images = torch.randn(3, *case.shapes[0], dtype=torch.float64)
    plain = outputs(deploy(small.module, case.shapes[0]), images, False)
    assert relative_difference(outputs(small.module, images, False), plain) <= 1e-5
