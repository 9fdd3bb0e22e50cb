"""A net of the user's own, images of the user's own: one call, and known again when it is resumed.

The nets are tiny and of odd sizes; what is asked is what a run leaves, not how it got there.
"""

import copy
import importlib
import json
import shutil
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from safetensors.torch import save_file, save_model
from small_nets import make_shallow
from small_runs import Stop, stopped_at
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from dnal_mini.cli.commands import main
from dnal_mini.config import Budget, SearchConfig
from dnal_mini.data.imageset import ImageSet
from dnal_mini.data.sources import toy_images
from dnal_mini.gating import gates
from dnal_mini.measure.cost import cost
from dnal_mini.methods import METHODS
from dnal_mini.methods.contract import Method, Subject
from dnal_mini.models import MODELS
from dnal_mini.pruning.netfile import load, save
from dnal_mini.pruning.pruner import prune
from dnal_mini.runs import runlog
from dnal_mini.runs.reopen import nets_in
from dnal_mini.search.driver import run
from dnal_mini.search.sweep import sweep

TIMED = {"latency_s", "seconds"}
CONFIG = SearchConfig().replace(
    name="mine", weight_epochs=2, arch_epochs=3, fine_tune_epochs=2, batch=16, weight_lr=0.05,
    arch_lr=5.0, gate_price=1e-2, precision="float32", channels_last=False, width=0.25, crop=2,
)  # fmt: skip


class Net(nn.Module):
    """Two convolutions of 7 and 5 channels; ``stride`` and ``sign`` change no shape."""

    def __init__(self, num_classes: int = 3, wide: int = 7, stride: int = 2, sign: int = 1) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, wide, 3, padding=1)
        self.norm = nn.BatchNorm2d(wide)
        self.second = nn.Conv2d(wide, 5, 3, stride)
        self.last_norm = nn.BatchNorm2d(5)
        self.head = nn.Linear(5, num_classes)
        self.sign = sign

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.sign * self.norm(self.first(x)))
        return self.head(torch.relu(self.last_norm(self.second(x))).mean((2, 3)))


class Shaken(Dataset):
    """Images in [0, 1] with noise of torch, numpy or Python on each; labels in ``targets``."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.targets = images.float() / 255, labels.tolist()

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, place: int) -> tuple[Tensor, int]:
        noise = 0.1 * torch.randn(3, 1, 1) + 0.1 * float(np.random.rand())  # noqa: NPY002
        return self.images[place] + noise, self.targets[place]


def toy(seed: int = 0, classes: int = 3, image_shape: tuple[int, int, int] = (3, 12, 10)):
    return toy_images(90, 33, 21, num_classes=classes, image_shape=image_shape, seed=seed)


def loaders(seed: int = 0, batch: int = 16, kind: type[Dataset] = Shaken) -> tuple[DataLoader, ...]:
    """Train, val and test; the last batch of train is not full."""
    parts = (toy(seed).train, toy(seed).val, toy(seed).test)
    sets = [kind(part.images, part.labels) for part in parts]
    return tuple(DataLoader(each, batch, shuffle=k == 0) for k, each in enumerate(sets))


def net(seed: int = 0, **changes) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Net(**changes)


def told(result: dict) -> dict:
    return {name: value for name, value in result.items() if name not in TIMED}


def tensors(folder: Path) -> dict[str, Tensor]:
    return load(folder / "small.safetensors", Net).module.state_dict()


# One call -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [toy, loaders])
@pytest.mark.parametrize("order", ["conv-bn-ss-relu", "conv-bn-relu-ss"])
def test_any_net_and_any_images_take_the_whole_road(tmp_path, given, order):
    mine, data = net(), given()
    mine.eval()
    before = copy.deepcopy(mine.state_dict())
    config = CONFIG.replace(order=order)
    result = run(config, tmp_path / "run", net=mine, data=data)
    for name, tensor in mine.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert not mine.training
    assert result["macs"][0] == cost(mine, (3, 12, 10)).macs
    assert result["macs"][1] < result["macs"][0]
    assert result["test_images"] == 21
    record = runlog.read(tmp_path / "run")
    settings = record[0]["config"]
    assert settings["model"] == f"{Net.__module__}.Net"
    assert (settings["data"], settings["val"], settings["width"]) == ("own", 33, 1.0)
    ours = isinstance(data, ImageSet)  # else the loaders crop and mirror, if they like
    assert (settings["crop"], settings["flip"], settings["batch"]) == (2 * ours, ours, 16)
    assert record[0]["data"]["train"] == 90
    small = load(tmp_path / "run" / "small.safetensors", build=Net).module
    assert cost(small, (3, 12, 10)).macs == result["macs"][1]
    assert run(config, tmp_path / "run", net=mine, data=given()) == result


def test_a_net_of_another_precision_is_trained_in_that_of_the_run(tmp_path):
    result = run(CONFIG, tmp_path / "run", net=net().double(), data=toy())
    assert told(run(CONFIG, tmp_path / "float", net=net(), data=toy())) == told(result)


def test_a_given_net_starts_from_its_own_weights(tmp_path):
    first = run(CONFIG.replace(baseline="none"), tmp_path / "first", net=net(), data=toy())
    other = run(CONFIG.replace(baseline="none"), tmp_path / "other", net=net(1), data=toy())
    losses = [runlog.epochs(tmp_path / n)[0]["loss"] for n in ("first", "other")]
    assert losses[0] != losses[1]
    config = CONFIG.replace(weight_epochs=0)
    result = run(config, tmp_path / "as it is", net=net(), data=toy())
    assert result["weight_stage_accuracy"] not in (None, first["weight_stage_accuracy"])
    assert first["macs"] != other["macs"] or told(first) != told(other)


@pytest.mark.parametrize("method", [name for name in METHODS if name != "dnal"])
def test_every_method_of_ours_decides_about_a_net_of_the_users(tmp_path, method):
    config = CONFIG.replace(method=method, budget=Budget(macs=0.5), tuned_from="scratch")
    result = run(config, tmp_path / "run", net=net(), data=toy())
    assert result["macs"][1] / result["macs"][0] == pytest.approx(0.5, abs=0.15)


def test_one_of_ours_takes_loaders_and_learns_its_classes_from_their_labels(tmp_path, monkeypatch):
    make_shallow(monkeypatch)
    parts = toy(classes=5, image_shape=(3, 16, 16))
    sets = [Shaken(p.images, p.labels) for p in (parts.train, parts.val, parts.test)]
    config = CONFIG.replace(model="resnet56", weight_epochs=1, arch_epochs=1, fine_tune_epochs=1)
    run(config, tmp_path / "run", data=[DataLoader(each, 40) for each in sets])
    small = load(tmp_path / "run" / "small.safetensors", MODELS["resnet56"])
    assert small.spec["config"]["num_classes"] == 5
    assert small.spec["image_shape"] == [3, 16, 16]


def test_images_that_one_of_ours_does_not_take_are_refused_before_anything_is_made(tmp_path):
    grey = toy(image_shape=(1, 16, 16))
    with pytest.raises(ValueError, match=r"a ResNet56 that does not take images of \(1, 16, 16\)"):
        run(CONFIG.replace(model="resnet56"), tmp_path / "run", data=grey)
    assert not (tmp_path / "run").exists()


# Resumed ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_on_loaders_goes_on_from_the_end_of_an_epoch_to_the_same_bit(tmp_path, workers):
    def shaken() -> list[DataLoader]:
        return [
            DataLoader(each.dataset, 16, shuffle=k == 0, num_workers=workers if k == 0 else 0)
            for k, each in enumerate(loaders())
        ]

    whole = run(CONFIG, tmp_path / "whole", net=net(), data=shaken())
    with pytest.raises(Stop):
        run(CONFIG, tmp_path / "cut", net=net(), data=shaken(), on_row=stopped_at("arch_stage", 2))
    assert told(run(CONFIG, tmp_path / "cut", net=net(), data=shaken())) == told(whole)
    ours = tensors(tmp_path / "cut")
    for name, value in tensors(tmp_path / "whole").items():
        assert torch.equal(value, ours[name]), name


@pytest.mark.parametrize("given", [toy, loaders])
def test_an_interrupt_inside_an_epoch_is_told_and_nothing_before_it_is_lost(tmp_path, given):
    whole = run(CONFIG, tmp_path / "whole", net=net(), data=given())
    begun = []

    def interrupting(steps, text):
        begun.append(text)
        for step in steps:
            if (text, step) == ("arch_stage epoch 2/3", 2) and len(begun) > 3:
                signal.raise_signal(signal.SIGINT)
            yield step

    with pytest.raises(KeyboardInterrupt, match=r"stopped in epoch 2.*same call of dnal\.run"):
        run(CONFIG, tmp_path / "cut", interrupting, net=net(), data=given())
    del begun[:]
    assert told(run(CONFIG, tmp_path / "cut", interrupting, net=net(), data=given())) == told(whole)
    assert begun[0] == "arch_stage epoch 2/3"  # from its beginning or inside it, no epoch before


def test_a_run_of_one_step_an_epoch_is_interrupted_and_saved(tmp_path):
    config = CONFIG.replace(batch=90)
    whole = run(config, tmp_path / "whole", net=net(), data=toy())
    rows = []

    def interrupting(row):
        rows.append(row)
        if (row.get("stage"), row.get("epoch")) == ("weight_stage", 1):
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt, match="stopped after epoch 1"):
        run(config, tmp_path / "cut", on_row=interrupting, net=net(), data=toy())
    assert rows[-1]["epoch"] == 1
    assert told(run(config, tmp_path / "cut", net=net(), data=toy())) == told(whole)


# Another net, other weights, other images ---------------------------------------------------------

CHANGED = {  # what is given in place of net() and toy(): the cause that is told
    "width": (lambda: (net(wide=9), toy()), r"another net than that of .*Net, 708 parameters"),
    "weights": (lambda: (net(1), toy()), "starts from other weights"),
    "stride": (lambda: (net(stride=1), toy()), "answers otherwise.*with the same modules"),
    "forward": (lambda: (net(sign=-1), toy()), "answers otherwise.*with the same modules"),
    "images": (lambda: (net(), toy(1)), r"got images, 90 to train .*that are not those of"),
    "no net": (lambda: (None, toy()), r"model='[\w.]+\.Net', not 'vgg16'"),
    "no images": (lambda: (net(), None), "data='own', not 'digits'"),
    "one weight": (lambda: (nudged(net()), toy()), "starts from other weights"),
}


def nudged(module: nn.Module) -> nn.Module:
    """A net that differs in the last digit of one number."""
    with torch.no_grad():
        module.head.bias[1] = torch.nextafter(module.head.bias[1], torch.tensor(9.0))
    return module


@pytest.fixture(scope="module")
def left(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs of a net of the user's, one finished and one not."""
    folder = tmp_path_factory.mktemp("left")
    config = CONFIG.replace(baseline="none", weight_epochs=1)
    run(config, folder / "finished", net=net(), data=toy())
    stop = stopped_at("arch_stage", 1)
    with pytest.raises(Stop):
        run(config, folder / "unfinished", net=net(), data=toy(), on_row=stop)
    return folder


@pytest.mark.parametrize("name", CHANGED)
@pytest.mark.parametrize("place", ["finished", "unfinished", "taken over"])
def test_what_is_not_that_of_the_run_is_refused_with_its_cause(left, tmp_path, name, place):
    give, cause = CHANGED[name]
    mine, data = give()
    config, out = CONFIG.replace(baseline="none", weight_epochs=1), left / place
    if place == "taken over":
        config, out = config.replace(weights_from=str(left / "finished")), tmp_path / "new"
        if name in ("no net", "no images"):  # then other things do not fit either
            cause = "got "
    before = {p: p.stat().st_mtime_ns for p in left.rglob("*") if p.name != "lock"}
    with pytest.raises(ValueError, match=cause) as refusal:
        run(config, out, net=mine, data=data)
    assert "\n" not in str(refusal.value)
    assert {p: p.stat().st_mtime_ns for p in left.rglob("*") if p.name != "lock"} == before
    assert not (tmp_path / "new").exists()


def test_stage_one_of_a_given_net_is_taken_over_by_a_run_at_another_price(left, tmp_path):
    config = CONFIG.replace(baseline="none", weight_epochs=1, gate_price=3e-2)
    alone = run(config, tmp_path / "alone", net=net(), data=toy())
    config = config.replace(weights_from=str(left / "finished"))
    taken = run(config, tmp_path / "taken", net=net(), data=toy())
    assert told(taken) == told(alone)
    assert any(row.get("taken_over") for row in runlog.epochs(tmp_path / "taken"))


# Refused before anything is trained ---------------------------------------------------------------


class Twice(Net):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(x), x


class Helped(Net):
    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        return (super().forward(x), x) if self.training else super().forward(x)


class Branching(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if float(x.detach().mean()) < 9 else -x)


class Scaled(Net):
    """A layer with weights of its own, which nobody can draw anew."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scale


@dataclass(frozen=True)
class Wider(Method):
    """All layers get one channel more."""

    name: ClassVar[str] = "wider"

    def widths(self, subject: Subject) -> dict[str, int]:
        return {name: len(gate.s) + 1 for name, gate in gates(subject.net).items()}


def no_norm() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 5, 3), nn.Flatten(), nn.Linear(5 * 10 * 8, 3))


def norm_first() -> nn.Module:
    return nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 5, 3), nn.Flatten(), nn.Linear(400, 3))


NETS = {
    "a class": (lambda: Net, {}, "; need an nn.Module; do build it first"),
    "lazy": (lambda: nn.Sequential(nn.LazyConv2d(5, 3)), {}, "lazy layers"),
    "no layer": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(360, 3)), {}, "got no BatchNorm to"),
    "another size": (lambda: nn.Sequential(*no_norm(), nn.Linear(4, 2)), {}, "does not take image"),
    "a tuple": (Twice, {}, "answers two images with a tuple"),
    "a tuple to train on": (Helped, {}, "answers two images with a tuple"),
    "few classes": (lambda: net(num_classes=2), {}, "tells 2 classes apart, and images of 3"),
    "not traced": (Branching, {}, "branch on the numbers in a tensor"),
    "own weights": (Scaled, {"tuned_from": "scratch"}, "layer Scaled has weights and no reset_par"),
    "no filter": (norm_first, {"method": "l1-norm"}, "without a convolution of 3 channels"),
    "no builder": (Net, {"method": "wider"}, "method wider for a given net; need a builder"),
}


@pytest.mark.parametrize("name", NETS)
def test_a_net_that_cannot_be_searched_is_refused_before_it_is_trained(tmp_path, monkeypatch, name):
    monkeypatch.setitem(METHODS, "wider", Wider)
    make, fields, cause = NETS[name]
    config = CONFIG.replace(budget=Budget(macs=0.5), **fields)
    with pytest.raises(ValueError, match=cause) as refusal:
        run(config, tmp_path / "run", net=make(), data=toy())
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "run").exists()


# Weights ------------------------------------------------------------------------------------------


def test_weights_of_a_file_are_those_that_a_given_net_would_bring(tmp_path):
    save_model(net(5), tmp_path / "mine.safetensors")
    config = CONFIG.replace(weights=str(tmp_path / "mine.safetensors"), baseline="none")
    assert config.weight_epochs == 0
    assert config.replace(weight_epochs=3).weight_epochs == 3
    of_file = run(config, tmp_path / "file", net=net(), data=toy())
    given = run(config.replace(weights=""), tmp_path / "given", net=net(5), data=toy())
    assert told(of_file) == told(given)
    settings = runlog.read(tmp_path / "file")[0]["config"]
    assert (settings["weights"], settings["weight_epochs"]) == ("mine.safetensors", 0)
    stages = [row["stage"] for row in runlog.epochs(tmp_path / "file")]
    assert stages == ["arch_stage"] * 3 + ["fine_tune"] * 2
    assert of_file["seconds"]["weight_stage"] == 0
    assert run(config, tmp_path / "file", net=net(), data=toy()) == of_file
    save_model(net(6), tmp_path / "mine.safetensors")  # another file of that name
    with pytest.raises(ValueError, match="starts from other weights"):
        run(config, tmp_path / "file", net=net(), data=toy())


def test_weights_of_ours_are_part_of_what_a_run_is(tmp_path):
    config = SearchConfig().replace(
        data="toy", val=32, width=0.07, arch_epochs=1, fine_tune_epochs=1, batch=64,
        precision="float32", channels_last=False, weight_epochs=0,
    )  # fmt: skip
    for seed in (1, 2):
        torch.manual_seed(seed)
        save_model(MODELS["vgg16"](4, width=0.07), tmp_path / f"{seed}.safetensors")
    first = config.replace(weights=str(tmp_path / "1.safetensors"))
    whole = run(first, tmp_path / "run")
    assert {"baseline", "arch_stage", "fine_tune"} == {
        row["stage"] for row in runlog.epochs(tmp_path / "run")
    }
    taken = run(first.replace(weights_from=str(tmp_path / "run")), tmp_path / "taken")
    assert told(taken) == told(whole)
    for other in (config.replace(weights=str(tmp_path / "2.safetensors")), config):
        with pytest.raises(ValueError, match=r"starts from other weights|drawn from the seed"):
            run(other, tmp_path / "run")
        with pytest.raises(ValueError, match=r"starts from other weights|drawn from the seed"):
            run(other.replace(weights_from=str(tmp_path / "run")), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_saved_net_of_which_nothing_was_cut_is_a_file_of_weights(tmp_path):
    trained = net(5)
    trained(torch.rand(4, 3, 12, 10))  # its norms have seen something
    save(prune(trained.eval(), (3, 12, 10)), tmp_path / "dense.safetensors")
    config = CONFIG.replace(baseline="none", weights=str(tmp_path / "dense.safetensors"))
    result = run(config, tmp_path / "run", net=net(), data=toy())
    config = config.replace(weights="")
    assert told(run(config, tmp_path / "given", net=trained, data=toy())) == told(result)
    cut = tmp_path / "run" / "small.safetensors"
    with pytest.raises(ValueError, match=r"got weights .*small.safetensors with .*; need \("):
        run(CONFIG.replace(weights=str(cut)), tmp_path / "other", net=net(), data=toy())


def test_loaders_are_not_shared_by_several_processes(tmp_path):
    with pytest.raises(ValueError, match="got DataLoaders for several processes; need one"):
        run(CONFIG.replace(devices=2), tmp_path / "run", net=net(), data=loaders())
    assert not (tmp_path / "run").exists()


def state(**changes: Tensor | None) -> dict[str, Tensor]:
    found = {**net().state_dict(), **changes}
    return {name: tensor for name, tensor in found.items() if tensor is not None}


FILES = {
    "missing": (state(**{"head.bias": None}), "without head.bias"),
    "more": (state(**{"head.scale": torch.ones(3)}), "with head.scale, which the net has not"),
    "shape": (state(**{"first.weight": torch.ones(9, 3, 3, 3)}), r"first.weight of \(9, 3, 3, 3\)"),
}


@pytest.mark.parametrize("name", [*FILES, "no file", "no tensors"])
def test_weights_that_do_not_fit_are_told_by_the_first_of_them(tmp_path, name):
    path = tmp_path / "mine.safetensors"
    if name in FILES:
        save_file(FILES[name][0], path)
    elif name == "no tensors":
        torch.save(net().state_dict(), path)
    cause = FILES[name][1] if name in FILES else {"no file": "not there"}.get(name, "need a .safe")
    with pytest.raises(ValueError, match=f"got weights .*{cause}") as refusal:
        run(CONFIG.replace(weights=str(path)), tmp_path / "run", net=net(), data=toy())
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "run").exists()


# A builder by its name, and the command -----------------------------------------------------------

MODULE = """
import torch
from torch import nn

def small(num_classes, width=1.0, image_size=0):
    assert image_size == 16
    wide = round(8 * width)
    return nn.Sequential(
        nn.Conv2d(3, wide, 3, padding=1), nn.BatchNorm2d(wide), nn.ReLU(),
        nn.Conv2d(wide, wide - 3, 3), nn.BatchNorm2d(wide - 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(wide - 3, num_classes),
    )

def plain(num_classes):
    return small(num_classes, image_size=16)

def nothing(num_classes):
    return "a net"

def classless():
    return small(3, image_size=16)

def broken(num_classes):
    return undefined

five = 5
"""
WORDS = [
    "--data", "folder", "--val", "6", "--batch", "8", "--weight-epochs", "1", "--arch-epochs", "2",
    "--fine-tune-epochs", "1", "--arch-lr", "5", "--gate-price", "1e-2", "--precision", "float32",
]  # fmt: skip


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to stand in, with a module of the user's and images in ``images``."""
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("DNAL_DATA", raising=False)
    for name in [name for name in sys.modules if name.startswith("nets_of_mine")]:
        monkeypatch.delitem(sys.modules, name)
    (tmp_path / "nets_of_mine.py").write_text(MODULE)
    parts = toy(image_shape=(3, 16, 16))
    for split, part in (("train", parts.train), ("test", parts.test)):
        for k, (image, label) in enumerate(zip(part.images[:40], part.labels[:40], strict=True)):
            folder = tmp_path / "images" / split / f"class {int(label)}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{k}.png")
    return tmp_path


def the_line(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one line that the command refuses the words with."""
    assert main(list(words)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_the_command_takes_a_function_that_makes_the_net(place, capsys, monkeypatch):
    given = ["--model", "nets_of_mine:small", "--data-dir", "images", "--out", "run"]
    assert main(["run", *WORDS, *given]) == 0
    assert "nets_of_mine:small" in capsys.readouterr().out
    (prune,) = [row for row in runlog.read("run") if row["kind"] == "prune"]
    assert prune["channels"]["0"]["before"] == 8  # the recipe's width is that of another net
    assert json.loads(Path("run/config.json").read_text())["data_dir"] == str(place / "images")
    nets_of_mine = importlib.import_module("nets_of_mine")
    small = load("run/small.safetensors", nets_of_mine.small)  # its arguments are in the file
    assert small.spec["config"] == {
        "builder": "nets_of_mine:small", "num_classes": 3, "width": 1.0, "image_size": 16,
    }  # fmt: skip
    assert main(["run", *WORDS, *given]) == 0
    assert main(["export", "run", "--format", "pt2"]) == 0
    assert {path.name for path in Path("run").glob("*.pt2")} == {"dense.pt2", "pruned.pt2"}
    assert main(["export", "run/small.safetensors", "--format", "pt2", "--out", "alone"]) == 2
    (complaint,) = capsys.readouterr().err.splitlines()[-1:]
    assert "do add --model package.module:function" in complaint
    words = ["--format", "pt2", "--out", "alone", "--model", "nets_of_mine:small"]
    assert main(["export", "run/small.safetensors", *words]) == 0
    capsys.readouterr()
    text = Path("nets_of_mine.py").read_text().replace("nn.ReLU(),\n        nn.Conv", "nn.Conv")
    Path("nets_of_mine.py").write_text(text)
    monkeypatch.delitem(sys.modules, "nets_of_mine")
    assert "got another net than that of run" in the_line(capsys, "run", *WORDS, *given)
    assert "got another net than that of run" in the_line(capsys, "resume", "run")


def test_a_finished_run_whose_builder_is_gone_is_still_told(place, capsys, monkeypatch):
    given = ["--model", "nets_of_mine:plain", "--data-dir", "images", "--out", "run"]
    assert main(["run", *WORDS, *given]) == 0
    Path("nets_of_mine.py").unlink()
    monkeypatch.delitem(sys.modules, "nets_of_mine")
    importlib.invalidate_caches()
    capsys.readouterr()
    assert main(["resume", "run"]) == 0
    assert "test accuracy" in capsys.readouterr().out
    assert "nets_of_mine" in the_line(capsys, "run", *WORDS, *given[:-1], "other")


def test_weights_that_a_builder_draws_from_numpy_are_drawn_by_the_seed(place):
    text = (
        MODULE
        + """
def drawn(num_classes):
    import random
    import numpy as np
    net = plain(num_classes)
    with torch.no_grad():
        net[0].weight += np.random.rand() + random.random()
    return net
"""
    )
    Path("nets_of_mine.py").write_text(text)
    config = CONFIG.replace(model="nets_of_mine:drawn", baseline="none")
    result = run(config, "run", data=toy(image_shape=(3, 16, 16)))
    assert run(config, "run", data=toy(image_shape=(3, 16, 16))) == result


BUILDERS = {
    "nets_of_yours:small": "got module nets_of_yours, which cannot be imported (ModuleNotFound",
    "nets_of_mine:tiny": "nets_of_mine has no tiny; need a function of it (small, plain, nothing",
    "nets_of_mine:nothing": "got a str from nets_of_mine:nothing; need an nn.Module",
    "nets_of_mine:five": "got nets_of_mine:five, a int; need a function",
    "nets_of_mine:classless": "got TypeError from nets_of_mine:classless(num_classes=3)",
    "nets_of_mine:broken": "got NameError from nets_of_mine:broken(num_classes=3)",
    "nets_of_mine.small": "got model nets_of_mine.small; need package.module:function",
    "nets_of_mine:": "got model nets_of_mine:; need package.module:function",
    "nets_of_mine:plain": "got width 0.5 for nets_of_mine:plain, which has no argument width",
}


@pytest.mark.parametrize("name", BUILDERS)
def test_a_builder_that_is_none_is_told_in_one_line(place, capsys, name):
    wide = ["--width", "0.5"] if "width" in BUILDERS[name] else []
    given = ["--data-dir", "images", "--out", "run", *wide]
    assert BUILDERS[name] in the_line(capsys, "run", "--model", name, *WORDS, *given)
    assert not Path("run").exists()


def test_a_sweep_and_a_resumed_run_build_the_net_by_its_name(place, capsys):
    config = SearchConfig().replace(
        data="folder", data_dir="images", val=6, batch=8, model="nets_of_mine:plain",
        weight_epochs=1, arch_epochs=2, fine_tune_epochs=1, precision="float32", arch_lr=5.0,
    )  # fmt: skip
    assert config.width == 1.0
    with pytest.raises(Stop):
        run(config, "run", on_row=stopped_at("arch_stage", 1))
    assert main(["resume", "run"]) == 0
    assert sweep(config, [1e-2, 1e-3], [0], "sweep") == {}
    again: dict[str, dict] = {}
    assert sweep(config, [1e-2, 1e-3, 3e-2], [0], "sweep", jobs=2, on_row=again.__setitem__) == {}
    assert again.keys() - {"seed0/shared"} == {"seed0/price0.03"}


def test_a_method_that_wants_more_channels_asks_the_builder_for_them(place, monkeypatch):
    monkeypatch.setitem(METHODS, "wider", Wider)
    config = CONFIG.replace(method="wider", model="nets_of_mine:small", batch=8)
    result = run(config, "run", data=toy(image_shape=(3, 16, 16)))
    assert result["macs"][1] > result["macs"][0]
    (row,) = [row for row in runlog.read("run") if row["kind"] == "prune"]
    assert row["channels"]["0"]["after"] == 9
    with pytest.raises(ValueError, match="nets_of_mine:plain, which has no argument width"):
        run(config.replace(model="nets_of_mine:plain"), "other", data=toy(image_shape=(3, 16, 16)))
    assert not Path("other").exists()


def test_a_net_that_was_given_is_asked_for_by_resume_and_export(tmp_path, capsys, monkeypatch):
    config = CONFIG.replace(baseline="none", weight_epochs=1)
    stop = stopped_at("arch_stage", 1)
    with pytest.raises(Stop):
        run(config, tmp_path / "run", net=net(), data=toy(), on_row=stop)
    line = the_line(capsys, "resume", str(tmp_path / "run"))
    assert "images that dnal.run was given" in line
    run(config, tmp_path / "run", net=net(), data=toy())
    assert main(["resume", str(tmp_path / "run")]) == 0
    capsys.readouterr()
    assert "or give --model its builder" in the_line(capsys, "export", str(tmp_path / "run"))
    words = ["--model", f"{Net.__module__}:Net", "--format", "pt2", "--out", str(tmp_path / "out")]
    assert main(["export", str(tmp_path / "run"), *words]) == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"dense.pt2", "pruned.pt2"}


def one_size(num_classes: int) -> nn.Module:
    """A net for images of 12 x 10 and no others."""
    return nn.Sequential(
        nn.Conv2d(3, 7, 3), nn.BatchNorm2d(7), nn.ReLU(), nn.Conv2d(7, 5, 3), nn.BatchNorm2d(5),
        nn.ReLU(), nn.Flatten(), nn.Linear(5 * 8 * 6, num_classes),
    )  # fmt: skip


@pytest.mark.parametrize("order", ["conv-bn-ss-relu", "conv-bn-relu-ss", "conv-ss-bn-relu"])
def test_a_net_for_images_of_one_size_is_exported_whatever_the_order(tmp_path, order):
    config = CONFIG.replace(model=f"{Net.__module__}:one_size", order=order)
    result = run(config, tmp_path / "run", data=toy())
    nets, image_shape = nets_in(tmp_path / "run")
    assert [cost(net, image_shape).macs for net in nets.values()] == result["macs"]


# Images that have moved ---------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["option", "environment", "back", "cwd"])
@pytest.mark.parametrize("end", ["arch_stage", "fine_tune"])
def test_a_run_goes_on_where_its_images_are_now(place, capsys, monkeypatch, how, end):
    config = SearchConfig().replace(
        data="folder", data_dir="images", val=6, batch=8, model="nets_of_mine:plain",
        weight_epochs=1, arch_epochs=2, fine_tune_epochs=2, precision="float32",
    )  # fmt: skip
    with pytest.raises(Stop):
        run(config, "run", on_row=stopped_at(end, 1))
    if how == "cwd":
        (place / "elsewhere").mkdir()
        monkeypatch.chdir(place / "elsewhere")
        monkeypatch.syspath_prepend(str(place))
        assert main(["resume", "../run"]) == 0
        return
    shutil.move("images", "moved")
    assert str(place / "images") in the_line(capsys, "resume", "run")
    if how == "back":
        shutil.copytree("moved", "other")
        shutil.move("other/train/class 0", "other/train/class 3")
        shutil.move("other/test/class 0", "other/test/class 3")
        line = the_line(capsys, "resume", "run", "--data-dir", "other")
        assert "got images" in line
        shutil.move("moved", "images")
        assert main(["resume", "run"]) == 0
        return
    if how == "environment":
        monkeypatch.setenv("DNAL_DATA", "moved")
    assert main(["resume", "run", *(["--data-dir", "moved"] if how == "option" else [])]) == 0
    assert json.loads(Path("run/config.json").read_text())["data_dir"] == str(place / "moved")
    monkeypatch.delenv("DNAL_DATA", raising=False)
    assert main(["resume", "run"]) == 0
