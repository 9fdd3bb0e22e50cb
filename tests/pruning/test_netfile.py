"""Pruned nets as files: bit by bit, without pickle, from older formats, and never damaged ones."""

import json
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_nets import NETS, SHAPE, close, gated, make_shallow, settled
from torch import nn

from dnal_mini.models import MODELS, resnet56, vgg16
from dnal_mini.pruning.netfile import _digest, load, save
from dnal_mini.pruning.pruner import prune

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
    change(spec)
    about["dnal_mini"] = json.dumps(spec, sort_keys=True)
    tensors = load_file(path)
    if sign:
        about["sha256"] = _digest(about["dnal_mini"], tensors)
    save_file(tensors, path, metadata=about)


def refused(path: Path, build, word: str) -> None:
    """``load`` says in one line what it got, what it needs and what to do."""
    with pytest.raises(ValueError, match=rf"^got [^\n]*{word}[^\n]*$") as caught:
        load(path, build)
    assert str(path) in str(caught.value) or "layer" in str(caught.value)


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
    assert (spec["format"], spec["builder"]) == (2, "ResNet56")
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


# --- other formats ---------------------------------------------------------------------------

OLD = ["vgg16", "resnet56", "mobilenetv2"]


@pytest.mark.parametrize("name", OLD)
def test_a_file_of_format_1_computes_what_it_computed_then(name):
    back = load(FILES / f"format1_{name}.safetensors", MODELS[name])
    image = torch.sin(torch.arange(2 * 3 * 16 * 16, dtype=torch.float64) ** 1.3)
    found = back.module.double().eval()(image.reshape(2, *SHAPE)).detach()
    expected = json.loads((FILES / "format1_outputs.json").read_text())[name]
    torch.testing.assert_close(found, torch.tensor(expected).double(), rtol=1e-5, atol=1e-8)
    assert back.spec["format"] == 2
    assert back.certificate == back.spec["certificate"]["absolute"] <= 1e-12
    assert len(str(back.report).splitlines()) > len(back.report.layers) > 9


@pytest.mark.parametrize("name", OLD)
def test_a_net_of_format_1_is_saved_as_format_2(tmp_path, name):
    old = load(FILES / f"format1_{name}.safetensors", MODELS[name])
    save(old, tmp_path / "new.safetensors")
    new = load(tmp_path / "new.safetensors", MODELS[name])
    x = torch.randn(2, *SHAPE)
    torch.testing.assert_close(new.module.eval()(x), old.module.eval()(x), rtol=0, atol=0)
    assert new.spec == json.loads(json.dumps(old.spec))


def test_a_file_of_a_later_format_says_what_to_do(tmp_path):
    _, path = saved(tmp_path)
    rewritten(path, lambda spec: spec.update(format=3))
    refused(path, resnet56, "format 3; this version reads 1 to 2: install")


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


def cut(name: str, key: str, value) -> object:
    return lambda spec: spec["modules"][name].update({key: value})


@pytest.mark.parametrize(
    "change",
    [
        cut("blocks.1.conv1", "out", [0, 99]),
        cut("blocks.1.conv1", "out", [0, -9]),
        cut("blocks.1.conv1", "in", [0, 99]),
        cut("blocks.1.bn1", "out", [99]),
        lambda spec: spec["modules"].update({"blocks.7.conv1": {"gone": True}}),
    ],
    ids=["output", "negative", "input", "norm", "layer"],
)
def test_an_index_out_of_range_is_refused(tmp_path, change):
    _, path = saved(tmp_path)
    rewritten(path, change)
    refused(path, resnet56, "does not fit|another net")


@pytest.mark.parametrize("key", ["gather", "scatter", "source"])
def test_a_map_that_reads_a_channel_that_is_not_there_is_refused(tmp_path, key):
    _, path = saved(tmp_path)

    def change(spec: dict) -> None:
        entry = next(entry for entry in spec["modules"].values() if key in entry)
        entry[key] = [99, *entry[key][1:]]

    rewritten(path, change)
    refused(path, resnet56, "cannot run|does not fit")


@pytest.mark.parametrize("key", ["modules", "report", "certificate", "config"])
def test_a_spec_that_lacks_a_part_is_refused(tmp_path, key):
    _, path = saved(tmp_path)
    rewritten(path, lambda spec: spec.pop(key))
    refused(path, resnet56, key)


def test_saving_leaves_no_half_file_behind(tmp_path):
    small, path = saved(tmp_path)
    whole = path.read_bytes()
    small.spec["broken"] = object()  # not JSON
    with pytest.raises(TypeError):
        save(small, path)
    assert path.read_bytes() == whole
    assert [file.name for file in tmp_path.iterdir()] == ["net.safetensors"]
