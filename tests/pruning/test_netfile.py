"""Pruned nets as files: bit by bit, without pickle, from older formats, and never damaged ones."""

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_nets import (
    NETS,
    SHAPE,
    close,
    draw_gates,
    gated,
    make_shallow,
    outputs,
    relative_difference,
    settled,
)
from systems import pipe
from torch import Tensor, nn
from torch.nn import functional as F

from dnal_mini.gating import add_gates, gates, set_gates
from dnal_mini.layers.scaled_sigmoid import ScaledSigmoid
from dnal_mini.models import MODELS, resnet56, vgg16
from dnal_mini.models.resnet import zero_padded_shortcut
from dnal_mini.pruning.netfile import _digest, load, save
from dnal_mini.pruning.pruner import Pruned, prune
from dnal_mini.pruning.surgery import operate

FILES = Path(__file__).parents[1] / "files"


@pytest.fixture(autouse=True)
def shallow(monkeypatch: pytest.MonkeyPatch) -> None:
    make_shallow(monkeypatch)


def saved(tmp_path: Path, name: str = "resnet56"):
    small = prune(gated(name, keep=0.4), SHAPE)
    path = tmp_path / "net.safetensors"
    save(small, path)
    return small, path


def rewritten(path: Path, change, sign: bool = True) -> None:
    """Change the spec in a file; ``sign``: with the checksum of the changed one."""
    raw = path.read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    about = json.loads(raw[8 : 8 + size])["__metadata__"]
    spec = json.loads(about["dnal_mini"])
    told = spec.pop("sha256")
    change(spec)
    tensors = load_file(path)
    digest = _digest(json.dumps(spec, sort_keys=True), tensors) if sign else told
    about["dnal_mini"] = json.dumps(spec | {"sha256": digest}, sort_keys=True)
    save_file(tensors, path, metadata=about)


def refused(path: Path, build, word: str) -> None:
    """``load`` says in one line what it got, what it needs and what to do."""
    with pytest.raises(ValueError, match=rf"^got [^\n]*{word}[^\n]*$") as caught:
        load(path, build)
    assert str(path) in str(caught.value) or "a spec whose" in str(caught.value)


# --- there and back --------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETS)
def test_a_saved_net_comes_back_bit_by_bit(tmp_path, name):
    small, path = saved(tmp_path, name)
    back = load(path, MODELS[name])
    x = torch.randn(2, *SHAPE)
    torch.testing.assert_close(back.module.eval()(x), small.module.eval()(x), rtol=0, atol=0)
    assert (back.spec, back.report, back.certificate) == (
        json.loads(json.dumps(small.spec)),
        small.report,
        small.certificate,
    )


def test_the_file_holds_the_papers_in_its_header(tmp_path):
    small, path = saved(tmp_path)
    raw = path.read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    spec = json.loads(json.loads(raw[8 : 8 + size])["__metadata__"]["dnal_mini"])
    assert (spec["format"], spec["builder"]) == (4, "ResNet56")
    assert spec["config"] == small.module.config
    assert spec["image_shape"] == list(SHAPE)
    assert 0 <= spec["certificate"]["relative"] <= 1e-12  # float64
    assert 0 <= spec["certificate"]["relative_float32"] <= 1e-5
    assert spec["cost"]["pruned"]["macs"] < spec["cost"]["dense"]["macs"]
    convs = {f"blocks.{i}.conv{k}" for i in range(4) for k in (1, 2)} | {"stem.conv", "classifier"}
    assert {row["layer"] for row in spec["report"]["layers"]} == convs


def test_a_net_of_float64_comes_back_as_one(tmp_path):
    small = prune(gated("vgg16", keep=0.5).double(), SHAPE)
    save(small, tmp_path / "net.safetensors")
    back = load(tmp_path / "net.safetensors", lambda **config: vgg16(**NETS["vgg16"]).double())
    x = torch.randn(2, *SHAPE).double()
    torch.testing.assert_close(back.module.eval()(x), small.module.eval()(x), rtol=0, atol=0)


def test_a_folded_constant_comes_back_as_a_bias(tmp_path):
    def build() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(3, 7, 3), nn.BatchNorm2d(7), nn.Conv2d(7, 5, 1, bias=False), nn.ReLU()
        )

    net = settled(build())
    net[1].weight.data[[2, 5]] = 0
    small = prune(net, SHAPE)
    save(small, tmp_path / "net.safetensors")
    back = load(tmp_path / "net.safetensors", build).module
    assert back[2].bias is not None
    assert back[0].out_channels == 5
    x = torch.randn(2, *SHAPE)
    torch.testing.assert_close(back.eval()(x), small.module.eval()(x), rtol=0, atol=0)
    torch.testing.assert_close(back(x), net.eval()(x), rtol=1e-4, atol=1e-5)


FRESH = """
import pickle
import sys
pickle.load = pickle.loads = pickle.Unpickler = None
import torch
torch.load = None
import dnal_mini as dnal
sys.path.insert(0, sys.argv[2])
from own_net import build
small = dnal.load(sys.argv[1], build=build)
torch.manual_seed(5)
total = small.module.eval()(torch.randn(2, 3, 9, 7)).sum()
print(type(small.module).__name__, float(total.detach()))
"""

OWN = """
from torch import nn
from torch.nn import functional as F


class Own(nn.Module):
    def __init__(self, hidden):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, hidden, 3, padding=1), nn.BatchNorm2d(hidden)
        self.fc = nn.Linear(hidden, 5)

    def forward(self, x):
        return self.fc(F.relu(self.bn(self.conv(x))).mean((2, 3)))


def build():
    return Own(11)
"""


def test_a_fresh_process_loads_onto_a_users_own_class_without_pickle(tmp_path):
    (tmp_path / "own_net.py").write_text(OWN)
    namespace: dict = {"__name__": "own_net"}
    exec(OWN, namespace)
    net = settled(namespace["build"]())
    close(net.bn, 0, 3, 10)
    small = prune(net, (3, 9, 7))
    save(small, tmp_path / "net.safetensors")
    torch.manual_seed(5)
    expected = float(small.module.eval()(torch.randn(2, 3, 9, 7)).sum().detach())
    command = [sys.executable, "-c", FRESH, str(tmp_path / "net.safetensors"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    name, found = done.stdout.split()
    assert name == "Own"
    assert float(found) == pytest.approx(expected, rel=1e-5)


# --- what a spec says ------------------------------------------------------------------------


class Assorted(nn.Module):
    """A shortcut, a dead branch, groups, a turned convolution, a bare parameter, wide columns."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn0 = nn.Conv2d(3, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
        self.wide, self.bn1 = nn.Conv2d(12, 20, 3, 2, padding=1), nn.BatchNorm2d(20)
        self.shortcut = zero_padded_shortcut(12, 20, 2)
        self.dead, self.bn2 = nn.Conv2d(20, 20, 3, padding=1), nn.BatchNorm2d(20)
        self.mix, self.bn3 = nn.Conv2d(20, 12, 1), nn.BatchNorm2d(12)
        self.grouped, self.bn4 = nn.Conv2d(12, 9, 3, padding=1, groups=3), nn.BatchNorm2d(9)
        self.up, self.bn5 = nn.ConvTranspose2d(9, 7, 2, 2), nn.BatchNorm2d(7)
        self.slope, self.point = nn.PReLU(7), nn.Conv2d(7, 8, 1, bias=False)
        self.bare = nn.Parameter(torch.empty(5, 8, 3, 3))
        self.head = nn.Linear(5 * 3 * 3, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn0(self.stem(x)))
        x = F.relu(self.bn1(self.wide(x)) + self.shortcut(x))
        x = F.relu(x + self.bn2(self.dead(x)))
        x = F.relu(self.bn3(self.mix(x)))
        x = F.relu(self.bn4(self.grouped(x)))
        x = F.relu(self.point(self.slope(self.bn5(self.up(x)))))
        x = F.adaptive_avg_pool2d(F.conv2d(x, self.bare), 3)
        return self.head(F.relu(x).flatten(1))


ASSORTED_SHAPE = (3, 11, 9)


def assorted() -> Pruned:
    torch.manual_seed(11)
    net = settled(Assorted())
    nn.init.normal_(net.bare, std=0.2)
    close(net.bn0, 0, 7)
    close(net.bn1, 1, 4, 6, 11, 19)
    close(net.bn2, *range(20))
    close(net.bn3, 0, 5, 10)
    close(net.bn4, 1, 3, 8)
    close(net.bn5, 2, 3)
    net.bn5.weight.data[5] = 0  # a constant: it moves into the bias of the next layer
    with torch.no_grad():
        net.point.weight[[2, 6]] = 0
        net.head.weight[:, 9:18] = 0  # nobody reads channel 1
    return prune(net, ASSORTED_SHAPE)


def test_each_parameter_and_buffer_says_which_indices_stay():
    """By hand from the channels closed above; by tensor, axis 0 is that of a ConvTranspose's input.

    The trunk keeps what the shortcut or bn1 brings in: all but 1 and 19, and the shortcut's two
    dead ones where bn1 is closed as well (4 and 11 of the trunk: closed in bn1 and in bn0).
    """
    spec = assorted().spec
    keep, modules = spec["keep"], spec["modules"]
    stem = [j for j in range(12) if j not in (0, 7)]
    wide = [j for j in range(20) if j not in (1, 4, 6, 11, 19)]
    trunk = sorted({*wide, *(j + 4 for j in stem)})
    assert keep["stem.weight"] == keep["bn0.running_var"] == {"0": stem}
    assert keep["wide.weight"] == {"0": wide, "1": stem}
    assert keep["wide.bias"] == keep["bn1.weight"] == keep["bn1.bias"] == {"0": wide}
    assert keep["mix.weight"] == {"0": [1, 2, 3, 4, 6, 7, 8, 9, 11], "1": trunk}
    assert keep["grouped.weight"] == {"0": [0, 2, 4, 5, 6, 7]}
    assert modules["grouped"] == {"inputs": [1, 2, 3, 4, 6, 7, 8, 9, 11]}
    assert keep["up.weight"] == {"0": [0, 2, 4, 5, 6, 7], "1": [0, 1, 4, 6]}
    assert keep["slope.weight"] == keep["up.bias"] == {"0": [0, 1, 4, 6]}
    assert keep["bare"] == {"0": [0, 2, 3, 4], "1": [0, 1, 3, 4, 5, 7]}
    assert keep["head.weight"] == {"1": [*range(9), *range(18, 45)]}
    assert not {"head.bias", "dead.weight", "bn0.num_batches_tracked"} & set(keep)
    assert modules["bn2"] == {"source": [-1] * len(trunk), "stride": 1}
    assert (modules["dead"], modules["point"]) == ({"gone": True}, {"bias": True})
    shortcut = [stem.index(j - 4) if j - 4 in stem else -1 for j in trunk]
    assert modules["shortcut"] == {"source": shortcut, "stride": 2}


def test_the_sizes_that_layers_state_are_those_of_their_tensors(tmp_path):
    small = assorted()
    save(small, tmp_path / "net.safetensors")
    for net in (small.module, load(tmp_path / "net.safetensors", Assorted).module):
        assert (net.wide.in_channels, net.wide.out_channels) == (10, 15)
        assert (net.grouped.in_channels, net.grouped.out_channels, net.grouped.groups) == (9, 6, 3)
        assert (net.up.in_channels, net.up.out_channels) == (6, 4)
        assert (net.slope.num_parameters, net.bn5.num_features) == (4, 4)
        assert (net.head.in_features, net.head.out_features) == (36, 6)


def test_a_norm_without_any_tensor_states_its_size_too(tmp_path):
    def build() -> nn.Module:
        norm = nn.BatchNorm2d(7, affine=False, track_running_stats=False)
        return nn.Sequential(nn.Conv2d(3, 7, 3), norm, nn.ReLU(), nn.Conv2d(7, 5, 1)).double()

    net = build()
    net[3].weight.data[:, [1, 4]] = 0  # nobody reads them
    back = comes_back(tmp_path / "net", net, build)
    assert back.module[1].num_features == 5
    assert prune(back.module, (3, 9, 7)).spec["keep"] == {}


def test_a_permutation_is_followed_and_its_neighbours_undo_it(tmp_path):
    def build() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(3, 7, 3), nn.BatchNorm2d(7), nn.ReLU(), nn.Conv2d(7, 5, 1), nn.Flatten(1),
            nn.Linear(5 * 5 * 7, 4),
        )  # fmt: skip

    net = settled(build()).double()
    small = prune(net, (3, 7, 9))
    order, other = [4, 0, 6, 2, 1, 5, 3], [3, 1, 4, 0, 2]
    norm = ("weight", "bias", "running_mean", "running_var")
    keep = {"0.weight": {"0": order}, "0.bias": {"0": order}, "3.bias": {"0": other}}
    keep |= {f"1.{role}": {"0": order} for role in norm}
    keep |= {"3.weight": {"0": other, "1": order}}
    keep |= {"5.weight": {"1": [35 * j + pixel for j in other for pixel in range(35)]}}
    operate(small.module, {"keep": keep, "modules": {}})
    assert torch.equal(small.module[0].weight, net[0].weight[order])
    save(Pruned(small.module, small.spec | {"keep": keep}, small.report, 0.0), tmp_path / "net")
    back = load(tmp_path / "net", lambda: build().double()).module
    assert torch.equal(back[3].weight, net[3].weight[other][:, order])
    x = torch.randn(2, 3, 7, 9).double()
    for found in (small.module, back):
        torch.testing.assert_close(found.eval()(x), net.eval()(x), rtol=1e-12, atol=1e-12)


# --- what dropping gates put in comes back onto a net that never had gates -------------------


def chain(*changes: str) -> nn.Module:
    """Three convolutions with norms: lent (one gamma for two), bare (no affine), sigmoids."""
    act = nn.Sigmoid if "sigmoid" in changes else nn.ReLU
    norms = [nn.BatchNorm2d(7, affine="bare" not in changes) for _ in range(3)]
    if "blind" in changes:
        norms[1] = nn.BatchNorm2d(7, affine=False, track_running_stats=False)
    if "lent" in changes:
        norms[1].weight = norms[0].weight
    first = [nn.BatchNorm2d(3)] if "image" in changes else []
    parts = [[nn.Conv2d(n, 7, 3, padding=1), norms[k], act()] for k, n in enumerate((3, 7, 7))]
    return nn.Sequential(*first, *parts[0], *parts[1], *parts[2], nn.Conv2d(7, 5, 1))


class Branch(nn.Module):
    """A trunk and a branch of two convolutions, whose norms are lent or followed by a sigmoid."""

    def __init__(self, *changes: str) -> None:
        super().__init__()
        self.stem = chain(*changes)
        self.branch = nn.Sequential(chain(*changes), nn.Conv2d(5, 5, 3, padding=1))
        self.bn, self.unused = nn.BatchNorm2d(5), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = F.pad(x, (0, 0, 0, 0, 0, 0))[:, :3]
        return torch.tanh(x + self.bn(self.branch(y)))


ORDERS = ("conv-bn-ss-relu", "conv-bn-relu-ss", "conv-ss-bn-relu")
PUT_IN = {
    "lent": lambda: chain("lent"),
    "bare": lambda: chain("bare"),
    "blind": lambda: chain("blind"),
    "sigmoid": lambda: chain("sigmoid"),
    "image": lambda: chain("image"),
    "lent and sigmoid": lambda: chain("lent", "sigmoid"),
    "branch": lambda: Branch("lent"),
    "bare branch": lambda: Branch("bare", "sigmoid"),
}


def comes_back(path: Path, net: nn.Module, build, residual: str = "scatter") -> Pruned:
    """Prune, save, load; what is loaded is the pruned net in class, names and numbers."""
    small = prune(net, (3, 9, 7), residual)
    save(small, path)
    back = load(path, build)
    assert type(back.module).__name__ == type(small.module).__name__
    assert list(back.module.state_dict()) == list(small.module.state_dict())
    assert not gates(back.module)
    images = torch.randn(3, 3, 9, 7)
    for train in (False, True):
        expected, found = outputs(net, images, train), outputs(back.module, images, train)
        assert relative_difference(expected, found) <= 1e-10
        assert torch.equal(outputs(small.module, images, train)[0], found[0])
    return back


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", PUT_IN)
def test_a_plain_builder_gets_all_that_dropping_gates_put_in(tmp_path, name, order):
    net = add_gates(settled(PUT_IN[name]()).double(), order)
    draw_gates(net, 0.6)
    for residual in ("scatter", "tie"):
        comes_back(tmp_path / "net", net, lambda: PUT_IN[name]().double(), residual)
        list(gates(net).values())[-1].s.data.fill_(-1.0)  # of a branch: the whole branch goes


def test_the_maps_of_closed_gates_are_said_of_the_norms_themselves(tmp_path):
    net = add_gates(settled(chain("lent")))
    gates(net)["1.gate"].s.data[:] = torch.tensor([1, -1, 1, 1, -1, 1, 1.0])
    gates(net)["4.gate"].s.data.fill_(1.0)
    gates(net)["7.gate"].s.data[:] = torch.tensor([1, -1, 1, 1, -1, 1, -1.0])
    spec = comes_back(tmp_path / "net", net, lambda: chain("lent")).spec
    assert spec["modules"]["1.scatter"] == {"source": [0, 2, 3, 5, 6], "stride": 1}
    assert spec["keep"]["6.weight"] == {"0": [0, 2, 3, 5]}
    assert not [name for name in spec["keep"] if name.startswith("1.")]
    back = load(tmp_path / "net", lambda: chain("lent")).module
    assert back[1].weight is back[4].weight


class OwnGate(nn.Module):
    """A gate that the user's forward calls, behind a sigmoid."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.gate, self.head = nn.Conv2d(3, 7, 3), ScaledSigmoid(7), nn.Conv2d(7, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.gate(torch.sigmoid(self.conv(x))))


def test_a_builder_with_gates_is_taken_without_them(tmp_path):
    net = OwnGate()
    draw_gates(net, 0.5)
    set_gates(net, mode="hard")
    assert not gates(comes_back(tmp_path / "net", net, OwnGate).module)
    net = add_gates(settled(chain("bare")))
    draw_gates(net, 0.5)
    assert not gates(comes_back(tmp_path / "net", net, lambda: add_gates(chain("bare"))).module)


# --- the probe -------------------------------------------------------------------------------


def test_the_probe_holds_what_the_net_computes_from_its_seed(tmp_path):
    class Two(nn.Sequential):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self[1](self[0](x)), self[0](x).mean((1, 2, 3))

    small = prune(settled(Two(nn.Conv2d(3, 7, 3), nn.BatchNorm2d(7))), (3, 9, 7))
    save(small, tmp_path / "net.safetensors")
    stored: dict = {}
    rewritten(tmp_path / "net.safetensors", lambda spec: stored.update(spec["probe"]))
    draw = torch.Generator().manual_seed(stored["seed"])
    images = torch.rand(2, 3, 9, 7, generator=draw).double() * 2 - 1
    wide, means = small.module.double().eval()(images)
    wide, means = wide.detach(), means.detach()
    first, second = stored["outputs"]
    assert (first["shape"], second["shape"]) == ([2, 7, 7, 5], [2])
    assert second["numbers"] == pytest.approx(means.tolist(), rel=1e-12)
    assert first["largest"] == pytest.approx(float(wide.abs().max()), rel=1e-12)
    step = 21  # of 490 numbers at most 24
    assert first["numbers"] == pytest.approx(wide.flatten()[::step].tolist(), rel=1e-12)


def test_a_net_that_was_trained_after_pruning_is_probed_as_it_is_saved(tmp_path):
    small, path = saved(tmp_path)
    with torch.no_grad():
        small.module.classifier.weight.mul_(3)
    save(small, path)
    assert torch.equal(
        load(path, resnet56).module.classifier.weight, small.module.classifier.weight
    )


def test_a_builder_whose_net_computes_something_else_is_refused(tmp_path):
    _, path = saved(tmp_path, "vgg16")

    def other(num_classes: int, width: float, image_size: int) -> nn.Module:
        net = vgg16(num_classes, width, image_size)
        for norm in (m for m in net.modules() if isinstance(m, nn.BatchNorm2d)):
            norm.eps = 1e-2
        return net

    refused(path, other, r"whose outputs are \d\.\de-0\d of the largest from those")
    rewritten(path, lambda spec: spec["probe"]["outputs"].append(spec["probe"]["outputs"][0]))
    refused(path, vgg16, r"whose outputs are 1\.0e\+00")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_probe_forgives_rounding_to_float32_and_no_more(tmp_path, dtype):
    path = tmp_path / "net.safetensors"
    save(prune(gated("resnet56", keep=0.5).double(), SHAPE), path)
    build = lambda num_classes, width: resnet56(num_classes, width).to(dtype)  # noqa: E731
    assert {p.dtype for p in load(path, build).module.parameters()} == {dtype}

    def change(spec: dict) -> None:
        (note,) = spec["probe"]["outputs"]
        note["numbers"][3] += 2e-5 * note["largest"]

    rewritten(path, change)
    refused(path, build, r"outputs are (2\.0|1\.9)e-05 of")


def test_a_net_of_numbers_that_are_not_finite_is_saved_and_comes_back(tmp_path):
    """A fine-tuning that diverged: the file holds what there is."""
    small, path = saved(tmp_path)
    with torch.no_grad():
        small.module.classifier.bias[2] = torch.nan
    save(small, path)
    assert load(path, resnet56).module.classifier.bias[2].isnan()


# --- other formats ---------------------------------------------------------------------------

OLD = {
    1: ["vgg16", "resnet56", "mobilenetv2"],
    2: ["mobilenetv2", "assorted"],
    3: ["assorted", "behind", "branch", "resnet56"],  # behind: a GraphModule with sigmoids
}
BUILDERS = {**MODELS, "assorted": Assorted}
BUILDERS |= {"behind": lambda: chain("sigmoid"), "branch": lambda: Branch("lent")}
CASES = [(version, name) for version, names in OLD.items() for name in names]


def from_older(version: int, name: str) -> Pruned:
    return load(FILES / f"format{version}_{name}.safetensors", BUILDERS[name])


@pytest.mark.parametrize(("version", "name"), CASES)
def test_a_file_of_an_older_format_computes_what_it_computed_then(version, name):
    back = from_older(version, name)
    shape = (2, *back.spec["image_shape"])
    image = torch.sin(torch.arange(torch.Size(shape).numel(), dtype=torch.float64) ** 1.3)
    found = back.module.double().eval()(image.reshape(shape)).detach()
    expected = json.loads((FILES / f"format{version}_outputs.json").read_text())[name]
    torch.testing.assert_close(found, torch.tensor(expected).double(), rtol=1e-5, atol=1e-8)
    assert back.spec["format"] == 4
    assert back.certificate == back.spec["certificate"]["absolute"] <= 1e-12
    assert len(str(back.report).splitlines()) > len(back.report.layers) >= 4


@pytest.mark.parametrize(("version", "name"), CASES)
def test_a_net_of_an_older_format_is_saved_in_the_present_one(tmp_path, version, name):
    old = from_older(version, name)
    save(old, tmp_path / "new.safetensors")
    new = load(tmp_path / "new.safetensors", BUILDERS[name])
    x = torch.randn(2, *old.spec["image_shape"])
    torch.testing.assert_close(new.module.eval()(x), old.module.eval()(x), rtol=0, atol=0)
    assert new.spec == json.loads(json.dumps(old.spec))


@pytest.mark.parametrize("version", [2, 3])
def test_an_older_format_says_the_same_as_the_present_one_of_the_same_net(version):
    old, new = from_older(version, "assorted").spec, assorted().spec
    assert (old["keep"], old["modules"]) == (new["keep"], new["modules"])


def test_a_file_of_a_later_format_says_what_to_do(tmp_path):
    _, path = saved(tmp_path)
    rewritten(path, lambda spec: spec.update(format=5))
    refused(path, resnet56, "of format 5; need 1 to 4; install a later dnal-mini")


# --- damaged and strange files ---------------------------------------------------------------


def test_a_truncated_file_is_refused(tmp_path):
    _, path = saved(tmp_path)
    whole = path.read_bytes()
    for size in (0, 5, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        refused(path, resnet56, "cut short or damaged")


def test_a_tampered_file_is_refused(tmp_path):
    _, path = saved(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    refused(path, resnet56, "edited")
    path.write_bytes(whole)
    rewritten(path, lambda spec: spec["certificate"].update(absolute=0.0, relative=1.0), sign=False)
    refused(path, resnet56, "edited")


def test_a_file_of_something_else_is_refused(tmp_path):
    path = tmp_path / "net.safetensors"
    save_file({"weight": torch.zeros(3)}, path)
    refused(path, resnet56, "without a dnal_mini spec")
    with pytest.raises(FileNotFoundError, match="not there"):
        load(tmp_path / "none.safetensors", resnet56)


def test_a_spec_of_another_architecture_is_refused(tmp_path):
    _, path = saved(tmp_path)
    refused(path, MODELS["vgg16"], "does not fit this VGG16")
    refused(path, lambda: resnet56(width=0.5), "architecture and widths|another net")


def keep(name: str, axis: str, index: list[int]):
    return lambda spec: spec["keep"].update({name: {axis: index}})


@pytest.mark.parametrize(
    "change",
    [
        keep("blocks.1.conv1.weight", "0", [0, 99]),
        keep("blocks.1.conv1.weight", "0", [0, -9]),
        keep("blocks.1.conv1.weight", "1", [0, 99]),
        keep("blocks.1.conv1.weight", "7", [0]),
        keep("blocks.1.bn1.running_var", "0", [99]),
        keep("blocks.1.bn1.no_such", "0", [1]),
        keep("blocks.1.bn1.forward", "0", [1]),
        lambda spec: spec["modules"].update({"blocks.7.conv1": {"gone": True}}),
        lambda spec: spec.update(keep=[]),
    ],
    ids=["output", "negative", "input", "axis", "norm", "tensor", "method", "layer", "table"],
)
def test_an_index_out_of_range_is_refused(tmp_path, change):
    _, path = saved(tmp_path)
    rewritten(path, change)
    refused(path, resnet56, "does not fit|another net|whose spec says keep")


@pytest.mark.parametrize("key", ["gather", "scatter", "shortcut"])
def test_a_map_that_reads_a_channel_that_is_not_there_is_refused(tmp_path, key):
    _, path = saved(tmp_path)

    def change(spec: dict) -> None:
        maps = (entry for name, entry in spec["modules"].items() if name.endswith(key))
        entry = next(entry for entry in maps if "source" in entry)
        entry["source"] = [99, *entry["source"][1:]]

    rewritten(path, change)
    refused(path, resnet56, "cannot run|does not fit")


@pytest.mark.parametrize("key", ["certificate", "config", "keep", "modules", "probe", "report"])
def test_a_spec_that_lacks_a_part_is_refused(tmp_path, key):
    _, path = saved(tmp_path)
    rewritten(path, lambda spec: spec.pop(key))
    refused(path, resnet56, key)


def test_saving_leaves_no_half_file_behind(tmp_path):
    small, path = saved(tmp_path)
    whole = path.read_bytes()
    small.spec["broken"] = object()  # not JSON
    with pytest.raises(ValueError, match="got a net whose its spec is no JSON"):
        save(small, path)
    assert path.read_bytes() == whole
    assert [file.name for file in tmp_path.iterdir()] == ["net.safetensors"]


def test_the_same_net_gives_the_same_bytes_with_the_usual_mode(tmp_path):
    path = tmp_path / "net.safetensors"
    save(prune(vgg16(num_classes=7, width=0.07).eval()), path)
    code = (
        "import sys, dnal_mini as dnal\n"
        "dnal.save(dnal.load(sys.argv[1], dnal.models.vgg16), sys.argv[2])"
    )
    command = [sys.executable, "-c", code, str(path), str(tmp_path / "again")]
    other = os.environ | {"PYTHONHASHSEED": "7"}  # another process may order things otherwise
    subprocess.run(command, check=True, env=other)
    assert (tmp_path / "again").read_bytes() == path.read_bytes()
    (tmp_path / "usual").write_bytes(b"")
    assert path.stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_a_place_that_is_no_file_is_refused_and_left_alone(tmp_path):
    small, _ = saved(tmp_path)
    pipe(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for place, word in (
        ("pipe", "no regular file"), ("folder", "no regular file"), ("none/net", "not there"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=rf"^got [^\n]*{word}[^\n]*; need [^\n]*$"):
            save(small, tmp_path / place)
    assert (tmp_path / "pipe").is_fifo()
    assert not any(file.name.endswith(".part") for file in tmp_path.iterdir())


class Own(nn.Module):
    """A user's net: a config of another kind, state of its own, an infinite mask, two names."""

    def __init__(self) -> None:
        super().__init__()
        self.config, self.epoch = "D", 0
        self.conv, self.norm, self.fc = nn.Conv2d(3, 7, 3), nn.BatchNorm2d(7), nn.Linear(7, 5)
        self.features = nn.Sequential(self.conv, self.norm)
        self.register_buffer("mask", torch.full((3, 3), float("-inf")).triu(1))

    def get_extra_state(self) -> dict:
        return {"epoch": self.epoch}

    def set_extra_state(self, state: dict) -> None:
        self.epoch = state["epoch"]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.features(x).relu().mean((2, 3)))


def test_a_users_net_with_state_of_its_own_is_saved_and_comes_back(tmp_path):
    net = Own().eval()
    net.epoch = 3
    gated = add_gates(net)
    for gate in gates(gated).values():
        gate.s.data = torch.linspace(-9, 9, 7)
    set_gates(gated, mode="hard")
    small = prune(gated, (3, 9, 11))
    assert small.spec["config"] is None
    save(small, tmp_path / "own")
    again = load(tmp_path / "own", Own).module.eval()
    x = torch.randn(2, 3, 9, 11)
    assert torch.equal(again(x), small.module.eval()(x))
    assert (again.epoch, again.conv.out_channels, again.features[0] is again.conv) == (3, 3, True)
