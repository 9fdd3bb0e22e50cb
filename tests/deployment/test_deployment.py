"""Folded nets and exported files against the nets that they come from."""

import copy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from dnal_mini.deployment import export as export_module
from dnal_mini.deployment.export import export, onnx_runner
from dnal_mini.deployment.fold import deploy
from dnal_mini.gating import add_gates, arch_parameters, set_gates
from dnal_mini.layers.channelmap import ChannelMap
from dnal_mini.layers.scaled_sigmoid import ScaledSigmoid
from dnal_mini.measure.cost import cost
from dnal_mini.models import MODELS
from dnal_mini.pruning.pruner import prune

SHAPE = (3, 16, 16)
NETS = {
    "vgg16": {"width": 0.125, "image_size": 16},
    "resnet56": {"width": 0.25},
    "mobilenetv2": {"width": 0.2},
}


@pytest.fixture(autouse=True)
def shallow(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """One block of each kind in ResNet and MobileNetV2, except in tests marked ``slow``."""
    if request.node.get_closest_marker("slow") is None:
        of_resnet, of_mobilenet = (
            sys.modules[f"dnal_mini.models.{name}"] for name in ("resnet", "mobilenetv2")
        )
        monkeypatch.setattr(of_resnet, "STAGES", ((16, 1, 1), (32, 1, 2), (64, 1, 2)))
        kinds = ((1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 2, 2))
        monkeypatch.setattr(of_mobilenet, "STAGES", kinds)


def settled(net: nn.Module) -> nn.Module:
    """Norms as after training, so that a norm that is folded wrongly shows; eval mode."""
    for norm in (m for m in net.modules() if isinstance(m, _BatchNorm)):
        if norm.affine:
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.uniform_(norm.bias, -0.5, 0.9)
        if norm.running_mean is not None:
            nn.init.normal_(norm.running_mean, std=0.3)
            nn.init.uniform_(norm.running_var, 0.5, 2)
    return net.eval()


def gated(name: str, keep: float = 0.5) -> nn.Module:
    """A net with hard gates drawn at random, at least one channel of each layer open."""
    net = add_gates(settled(MODELS[name](**NETS[name])))
    for s in arch_parameters(net):
        s.data = torch.where(torch.rand(len(s)) < keep, 1.0, -1.0)
        s.data[torch.randint(len(s), ())] = 1.0
    set_gates(net, mode="hard", delta=1e4)
    return net.eval()


def norms(net: nn.Module) -> int:
    return sum(isinstance(module, _BatchNorm) for module in net.modules())


@torch.no_grad()
def folded_and_checked(net: nn.Module, images: Tensor) -> nn.Module:
    """``deploy(net)`` in float64, of which is asserted that it computes what ``net`` computes."""
    net, images = copy.deepcopy(net).double(), images.double()
    folded = deploy(net)
    expected = net(images)
    assert expected.std() > 0
    assert float((folded(images) - expected).abs().max() / expected.abs().max()) < 1e-12
    return folded


# --- folding ----------------------------------------------------------------------------------


def test_folded_filter_and_bias_are_those_of_the_formula():
    conv, norm = nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5, eps=1e-3)
    net = settled(nn.Sequential(conv, norm)).double()
    gain = norm.weight / torch.sqrt(norm.running_var + 1e-3)
    folded, identity = deploy(net)
    assert type(identity) is nn.Identity
    torch.testing.assert_close(folded.weight, conv.weight * gain[:, None, None, None])
    bias = conv.bias * gain - norm.running_mean * gain + norm.bias
    torch.testing.assert_close(folded.bias, bias)


@pytest.mark.parametrize(
    ("layers", "image_shape"),
    [
        ([nn.Conv1d(3, 7, 3, bias=False), nn.BatchNorm1d(7)], (3, 11)),
        ([nn.Conv2d(3, 7, 3, padding=2, padding_mode="reflect"), nn.BatchNorm2d(7)], (3, 9, 11)),
        ([nn.Conv2d(6, 9, (3, 1), stride=2, groups=3), nn.BatchNorm2d(9, affine=False)], (6, 9, 5)),
        ([nn.Conv2d(5, 5, 3, groups=5, dilation=2), nn.SyncBatchNorm(5)], (5, 9, 7)),
        ([nn.Conv3d(2, 7, (1, 3, 2)), nn.BatchNorm3d(7)], (2, 3, 5, 4)),
        ([nn.ConvTranspose1d(3, 7, 3, stride=2), nn.BatchNorm1d(7)], (3, 5)),
        ([nn.ConvTranspose2d(3, 7, 3, padding=1, bias=False), nn.BatchNorm2d(7)], (3, 5, 6)),
        ([nn.ConvTranspose2d(6, 10, (3, 2), groups=2), nn.BatchNorm2d(10)], (6, 5, 4)),
        ([nn.ConvTranspose3d(4, 6, 2, groups=2), nn.BatchNorm3d(6)], (4, 3, 5, 4)),
        ([nn.Flatten(), nn.Linear(30, 7), nn.BatchNorm1d(7)], (5, 3, 2)),
        ([nn.Flatten(), nn.Linear(30, 7, bias=False), nn.BatchNorm1d(7, affine=False)], (5, 6)),
        (
            [nn.Flatten(), nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 5), nn.BatchNorm1d(5)],
            (3, 2),
        ),
    ],
    ids=lambda value: "-".join(str(m).split("(")[0] for m in value) if type(value) is list else "",
)
def test_a_norm_behind_a_layer_is_folded_exactly(layers, image_shape):
    net = settled(nn.Sequential(*layers))
    before = copy.deepcopy(net.state_dict())
    folded = folded_and_checked(net, torch.randn(3, *image_shape))
    assert norms(net) == 1
    assert norms(folded) == 0
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())


class Net(nn.Module):
    """A convolution, a norm, and a forward that is given."""

    def __init__(self, forward: Callable[["Net", Tensor], Tensor], **modules: nn.Module) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        for name, module in modules.items():
            setattr(self, name, module)
        self.does = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.does(self, x)


class OwnConv(nn.Conv2d):
    """A convolution that squares what torch's gives."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).square()


def plain(net: Net, x: Tensor) -> Tensor:
    return net.norm(net.conv(x))


def double_output(module: nn.Module, arguments: tuple, output: Tensor) -> Tensor:
    return 2 * output


def hooked(module: str) -> Net:
    net = Net(plain)
    net.get_submodule(module).register_forward_hook(double_output)
    return net


def kept_apart() -> dict[str, Net]:
    """Nets whose norm may not be folded, by the reason."""
    nets = {
        "output read twice": Net(lambda net, x: net.norm(y := net.conv(x)) + y),
        "layer called twice": Net(lambda net, x: net.norm(net.conv(net.conv(x)))),
        "norm called twice": Net(lambda net, x: net.norm(net.conv(net.norm(x)))),
        "activation between": Net(lambda net, x: net.norm(F.relu(net.conv(x)))),
        "filters read": Net(lambda net, x: F.conv2d(plain(net, x), net.conv.weight)),
        "shift read": Net(lambda net, x: plain(net, x) * net.norm.bias[:, None, None]),
        "batch statistics": Net(plain, norm=nn.BatchNorm2d(3, track_running_stats=False)),
        "hook on the layer": hooked("conv"),
        "hook on the norm": hooked("norm"),
        "parametrized": Net(plain),
        "own class": Net(plain, conv=OwnConv(3, 3, 1)),
        "own forward": Net(plain),
        "linear on rows": Net(plain, conv=nn.Linear(16, 16), norm=nn.BatchNorm2d(3)),
        "linear on many rows": Net(
            lambda net, x: net.norm(net.conv(x.flatten(2))),
            conv=nn.Linear(256, 3),
            norm=nn.BatchNorm1d(3),  # counts the 3 rows, not the 3 columns
        ),
    }
    nn.utils.parametrizations.weight_norm(nets["parametrized"].conv)
    nets["own forward"].conv.forward = torch.sin
    return nets


@pytest.mark.parametrize("reason", kept_apart())
def test_a_norm_that_cannot_be_folded_is_left(reason):
    net = settled(kept_apart()[reason])
    folded = deploy(net, SHAPE)
    assert norms(folded) == 1
    x = torch.randn(5, *SHAPE)
    assert torch.equal(folded(x), net(x))


def test_a_module_that_has_two_names_is_folded_under_both():
    net = settled(Net(plain))
    net.again = net.norm
    folded = folded_and_checked(net, torch.randn(5, *SHAPE))
    assert type(folded.norm) is type(folded.again) is nn.Identity


def test_a_hook_on_the_container_sees_what_it_saw():
    net = settled(nn.Sequential(nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5)), nn.ReLU()))
    net[0].register_forward_hook(double_output)
    assert norms(folded_and_checked(net, torch.randn(5, *SHAPE))) == 0


def slow(*values: object) -> object:
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("name", "residual"),
    [
        ("vgg16", None),
        ("mobilenetv2", None),
        ("resnet56", "scatter"),
        ("resnet56", "tie"),
        *(slow(name, residual) for name in NETS for residual in (None, "scatter", "tie")),
    ],
)
def test_no_norm_is_left_in_our_nets_and_they_compute_the_same(name, residual):
    if residual is None:
        net = settled(MODELS[name](**NETS[name]))
    else:
        net = prune(gated(name), SHAPE, residual).module
    images = torch.randn(3, *SHAPE)
    folded = folded_and_checked(net, images)
    assert norms(folded) == 0
    assert type(folded) is type(net)
    assert not folded.training
    assert cost(folded, SHAPE).macs == cost(net, SHAPE).macs
    assert torch.equal(deploy(folded)(images.double()), folded(images.double()))


@pytest.mark.parametrize(
    "name",
    ["shufflenet_v2_x0_5", *map(slow, ("mobilenet_v3_small", "mnasnet0_5", "efficientnet_b0"))],
)
def test_every_norm_of_torchvisions_small_nets_is_folded(name):
    models = pytest.importorskip("torchvision.models")
    net = settled(models.get_model(name, weights=None, num_classes=13))
    assert norms(folded_and_checked(net, torch.randn(2, 3, 64, 64))) == 0


def test_norms_of_a_densenet_that_stand_before_their_convolution_stay():
    models = pytest.importorskip("torchvision.models")
    net = settled(models.DenseNet(growth_rate=5, block_config=(2, 3), num_init_features=7))
    folded = folded_and_checked(net, torch.randn(2, 3, 64, 64))
    # folded: norm0 behind the stem, norm2 behind the first convolution of each of the 5 layers;
    # left: norm1 of the 5 layers, the norm of the one transition, norm5
    assert norms(net) - norms(folded) == 6
    assert norms(folded) == 7


def test_gates_and_images_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"got a net with 13 gates; need one without; do prune"):
        deploy(gated("vgg16"))
    with pytest.raises(ValueError, match=r"got image_shape \(4, 9, 7\), which fails: [^\n]*$"):
        deploy(Net(plain), (4, 9, 7))
    with pytest.raises(ValueError, match=r"^got a net that takes no image of a usual size; need"):
        deploy(Net(lambda net, x: plain(net, x).reshape(len(x), 3, 13, 11)))


class Looks(nn.Module):
    """Forward code that looks at its layers: at their class, in a plain list, at their numbers."""

    def __init__(self, way: str) -> None:
        super().__init__()
        convs = nn.Conv2d(3, 5, 3), nn.Conv2d(5, 7, 3)
        self.way = way
        self.layers = nn.ModuleList([convs[0], nn.BatchNorm2d(5), convs[1], nn.BatchNorm2d(7)])
        self.again = [(self.layers[0], self.layers[1]), (self.layers[2], self.layers[3])]

    def forward(self, x: Tensor) -> Tensor:
        for conv, norm in self.again if self.way == "list" else ():
            x = norm(conv(x)).relu()
        for layer in self.layers if self.way != "list" else ():
            x = layer(x)
            if self.way == "class" and isinstance(layer, nn.BatchNorm2d):
                x = x.relu()
            if self.way == "numbers" and layer is self.layers[3]:
                x = x + layer.bias[:, None, None]
        return x


@pytest.mark.parametrize(("way", "left"), [("class", 0), ("list", 0), ("numbers", 1)])
def test_a_norm_that_the_forward_looks_at_is_folded_as_far_as_it_can_be(way, left):
    net = settled(Looks(way))
    folded, x = deploy(net), torch.randn(5, *SHAPE)
    torch.testing.assert_close(folded(x), net.eval()(x), rtol=1e-4, atol=1e-4)
    assert [m.weight is None for m in folded.layers[1::2]] == [True, not left]
    assert sum(b.numel() for b in folded.buffers()) == left * 15


# --- files ------------------------------------------------------------------------------------


class Mapped(nn.Module):
    """Every use of a ChannelMap: gather, scatter, padded shortcut with stride, a gone branch."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 7, 3, padding=1), nn.BatchNorm2d(7)
        self.gather, self.conv2 = ChannelMap([6, 0, 3]), nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.scatter = ChannelMap([-1, 2, -1, -1, 0, 1, 3, -1, -1])
        self.shortcut = ChannelMap([-1, *range(7), -1], stride=2)
        self.gone = ChannelMap([-1] * 9, stride=2)
        self.head = nn.Linear(9, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm1(self.conv1(x)))
        x = self.scatter(self.conv2(self.gather(x))) + self.shortcut(x) + self.gone(x)
        return self.head(x.mean((2, 3)))


def run_file(path: Path, images: Tensor) -> Tensor:
    """The output of a file, by the library that it is for."""
    if path.suffix == ".onnx":
        return torch.from_numpy(onnx_runner(path)(images.numpy()))
    return torch.export.load(path).module()(images).detach()


@pytest.fixture(params=[".pt2", ".onnx"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Where a file of each format is to be written."""
    if request.param == ".onnx":
        for name in export_module.ONNX_PACKAGES:
            pytest.importorskip(name)
    return tmp_path / f"net{request.param}"


@pytest.mark.parametrize("fold", [False, True])
def test_a_file_computes_what_the_net_computes_for_every_batch_size(fold, path):
    net = settled(Mapped())
    before = copy.deepcopy(net.state_dict())
    done = export(net.train(), path, (3, 11, 13), fold=fold)
    assert done.path == path
    assert done.bytes == path.stat().st_size
    assert done.difference < 1e-5
    for batch in (1, 2, 3, 17):
        images = torch.randn(batch, 3, 11, 13)
        torch.testing.assert_close(run_file(path, images), net.eval()(images))
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())


def test_a_file_names_no_source_file_of_this_machine(path):
    export(settled(Mapped()), path, (3, 11, 13))
    content = path.read_bytes()
    for folder in (Path(torch.__file__).parent, Path(__file__).parents[1], path.parent):
        assert str(folder).encode() not in content


@pytest.mark.parametrize(
    ("name", "residual", "suffix"),
    [("vgg16", "scatter", ".onnx"), ("resnet56", "scatter", ".pt2")],
)
def test_the_file_of_a_pruned_net_equals_the_gated_net(name, residual, suffix, tmp_path):
    net = gated(name)
    small = prune(net, SHAPE, residual).module
    check_file(net, small, tmp_path / f"net{suffix}", fold=True)


@pytest.mark.slow
@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize("residual", ["scatter", "tie"])
@pytest.mark.parametrize("name", NETS)
def test_files_of_dense_and_pruned_nets_equal_the_nets(name, residual, fold, path):
    net = gated(name)
    small = prune(net, SHAPE, residual).module
    check_file(net, small, path, fold)
    if residual == "scatter":
        dense = settled(MODELS[name](**NETS[name]))
        check_file(dense, dense, path, fold)


def check_file(net: nn.Module, small: nn.Module, path: Path, fold: bool) -> None:
    """The file of ``small`` computes what ``net`` does, in float64, at batch sizes of its own."""
    done = export(small, path, SHAPE, fold=fold)
    for batch in (3, 4):
        images = torch.randn(batch, *SHAPE)
        with torch.no_grad():
            expected = copy.deepcopy(net).double()(images.double())
        error = (expected - run_file(done.path, images)).abs().max() / expected.abs().max()
        assert float(error) < 1e-4
        assert expected.std(0).max() > 0


def test_files_get_smaller_by_pruning_and_by_folding(tmp_path):
    net = gated("vgg16", keep=0.4)
    small = prune(net, SHAPE)
    dense = export(settled(MODELS["vgg16"](**NETS["vgg16"])), tmp_path / "dense.pt2", SHAPE)
    cut = export(small.module, tmp_path / "cut.pt2", SHAPE)
    folded = export(small.module, tmp_path / "folded.pt2", SHAPE, fold=True)
    parameters = [small.spec["cost"][which]["params"] for which in ("dense", "pruned")]
    assert dense.bytes - cut.bytes > 0.9 * 4 * (parameters[0] - parameters[1])
    assert folded.bytes < cut.bytes


def test_a_program_runs_in_a_process_that_has_only_torch(tmp_path):
    net = settled(Mapped())
    export(net, tmp_path / "net.pt2", (3, 11, 13), fold=True)
    images = torch.randn(3, 3, 11, 13)
    np.save(tmp_path / "images.npy", images.numpy())
    code = (
        "import sys, numpy, torch\n"
        "images = torch.from_numpy(numpy.load('images.npy'))\n"
        "found = torch.export.load('net.pt2').module()(images)\n"
        "numpy.save('found.npy', found.detach().numpy())\n"
        "assert 'dnal_mini' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    found = torch.from_numpy(np.load(tmp_path / "found.npy"))
    torch.testing.assert_close(found, net(images).detach())


def test_outputs_that_are_dicts_and_tuples_are_compared_one_by_one(path):
    def forward(net: Net, x: Tensor) -> dict:
        return {"sum": plain(net, x).sum((1, 2, 3)), "two": (plain(net, x), x.argmax(3))}

    net = settled(Net(forward))
    assert export(net, path, (3, 7, 5)).difference < 1e-5
    if path.suffix == ".onnx":
        images = torch.randn(3, 3, 7, 5)
        found, expected = onnx_runner(path)(images.numpy()), net(images)
        assert [array.shape for array in found] == [(3,), (3, 3, 7, 5), (3, 3, 7)]
        assert np.array_equal(found[2], expected["two"][1].numpy())


def test_float64_nets_are_held_to_a_tighter_limit(tmp_path):
    net = settled(Mapped()).double()
    assert export(net, tmp_path / "net.pt2", (3, 11, 13), fold=True).difference < 1e-14


def test_weights_too_large_for_one_onnx_file_get_a_second(tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(export_module, "ONE_FILE_BYTES", 1000)  # 2 GB would take minutes
    net = settled(Mapped())
    done = export(net, tmp_path / "net.onnx", (3, 11, 13))
    files = sorted(tmp_path.iterdir())
    assert [file.name for file in files] == ["net.onnx", "net.onnx.data"]
    assert done.bytes == sum(file.stat().st_size for file in files)
    images = torch.randn(3, 3, 11, 13)
    torch.testing.assert_close(run_file(done.path, images), net(images).detach())


# --- files that are not written ---------------------------------------------------------------


class Counting(nn.Module):
    """Gives another output at every call: a program can only hold one of them."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * self.calls


class Nan(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * float("nan")


@pytest.mark.parametrize("net", [Counting(), Nan()], ids=["differs", "nan"])
def test_a_file_that_computes_something_else_never_appears(net, path):
    path.write_text("an older file")
    with pytest.raises(
        ValueError, match=r"got net\.\w+ that differs from the net by .*; need 1e-04"
    ):
        export(net, path, (3, 5, 7))
    assert path.read_text() == "an older file"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    ("forward", "operator"),
    [
        (lambda net, x: torch.special.bessel_j0(x), "bessel_j0"),
        (lambda net, x: x.kthvalue(3, 1).values, "kthvalue"),
    ],
    ids=["bessel", "kthvalue"],
)
def test_an_operator_that_onnx_does_not_have_is_named(forward, operator, tmp_path):
    pytest.importorskip("onnxruntime")
    net = Net(forward)
    with pytest.raises(
        ValueError, match=rf"got a Net whose operator \w+\.{operator} .*; need"
    ) as e:
        export(net, tmp_path / "net.onnx", (3, 5, 7))
    assert "\n" not in str(e.value)
    assert list(tmp_path.iterdir()) == []
    assert export(net, tmp_path / "net.pt2", (3, 5, 7)).difference == 0


def test_a_forward_that_fixes_the_batch_size_is_told(path):
    with pytest.raises(ValueError, match=r"got a Net that torch.export cannot follow \(.*batch"):
        export(Net(lambda net, x: x.view(2, -1)), path, (3, 5, 7))
    assert list(path.parent.iterdir()) == []


@pytest.mark.parametrize(
    ("net", "name", "shape", "message"),
    [
        (Net(plain), "net.pth", (3, 5, 7), r"got file name 'net.pth'; need \.pt2 or \.onnx"),
        (Net(plain), "net", (3, 5, 7), r"got file name 'net'; need \.pt2 or \.onnx"),
        (Net(plain), "there/net.pt2", (3, 5, 7), r"got folder .*there; need one that is there"),
        (Net(plain), "net.pt2", (5, 5, 7), r"got image_shape \(5, 5, 7\) \(.*channels.*\); need"),
        (Net(plain).half(), "net.pt2", (3, 5, 7), r"got a net in torch.float16; need float32 or"),
        (ScaledSigmoid(3), "net.pt2", (3, 5, 7), r"got a net with 1 gates; need one without"),
    ],
    ids=["suffix", "no suffix", "folder", "shape", "dtype", "gates"],
)
def test_what_cannot_be_exported_is_told_in_one_line(net, name, shape, message, tmp_path):
    with pytest.raises(ValueError, match=message) as error:
        export(net, tmp_path / name, shape)
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("package", export_module.ONNX_PACKAGES)
def test_a_missing_package_is_named_with_the_way_to_get_it(package, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    message = rf"got no package {package}.*; do pip install dnal-mini\[export\]"
    with pytest.raises(ValueError, match=message):
        export(Net(plain), tmp_path / "net.onnx", (3, 5, 7))
    assert export(settled(Net(plain)), tmp_path / "net.pt2", (3, 5, 7)).difference == 0


# --- other runtimes ---------------------------------------------------------------------------


def test_the_runner_takes_files_and_bytes_and_a_number_of_threads(tmp_path):
    pytest.importorskip("onnxruntime")
    net = settled(Mapped())
    path = export(net, tmp_path / "net.onnx", (3, 11, 13)).path
    images = torch.randn(3, 3, 11, 13)
    for model in (path, str(path), path.read_bytes()):
        found = onnx_runner(model, threads=1)(images.numpy())
        assert found.dtype == np.float32
        torch.testing.assert_close(torch.from_numpy(found), net(images).detach())


def test_the_runner_tells_what_it_cannot_read(tmp_path):
    pytest.importorskip("onnxruntime")
    (tmp_path / "net.onnx").write_bytes(b"not a model")
    for model in (tmp_path / "net.onnx", tmp_path / "missing.onnx", b"not a model"):
        with pytest.raises(
            ValueError, match=r"got .*; need a whole ONNX model; do export"
        ) as error:
            onnx_runner(model)
        assert "\n" not in str(error.value)


def test_a_pruned_and_folded_net_compiles_as_one_graph():
    small = deploy(prune(gated("resnet56"), SHAPE).module)
    compiled = torch.compile(small, backend="aot_eager", fullgraph=True)
    images = torch.randn(3, *SHAPE)
    with torch.no_grad():
        torch.testing.assert_close(compiled(images), small(images))


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # the compiler's own
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler, here g++")
@pytest.mark.parametrize("residual", ["scatter", "tie"])
@pytest.mark.parametrize("name", NETS)
def test_compiled_code_equals_the_eager_net(name, residual):
    small = deploy(prune(gated(name), SHAPE, residual).module)
    images = torch.randn(3, *SHAPE)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(small)(images), small(images))
