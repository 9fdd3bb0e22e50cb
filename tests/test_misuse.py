"""A mistake in a call ends in one line that names its cause, and leaves nothing behind.

One row a mistake: what is called, and words of the line. Those of commands: ``test_misuse_of_cli``.
"""

import copy
import functools
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from systems import device, pipe
from torch import Tensor, nn

import dnal_mini as dnal
from dnal_mini.data.sources import digits, image_folder, toy_images
from dnal_mini.gating import gate_report
from dnal_mini.refused import Refused
from dnal_mini.runs import aggregate, runlog, tables
from dnal_mini.search.sweep import sweep

SHAPE = (3, 9, 7)
NAN, INF, HUGE = math.nan, math.inf, 10**30


@functools.cache
def net() -> nn.Module:
    """Five classes of images of nine rows and seven columns; nobody changes it."""
    torch.manual_seed(0)
    parts = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1)
    return nn.Sequential(*parts, nn.Flatten(), nn.Linear(8, 5)).eval()


def gated(**set_by_hand: object) -> nn.Module:
    """The net with trained gates, and what a user sets their attributes to."""
    made = dnal.add_gates(net())
    for gate in dnal.gates(made).values():
        gate.s.data = torch.linspace(-9, 9, 8)
        for name, value in set_by_hand.items():
            holder = gate.s if name == "s" else gate
            setattr(holder, "data" if name == "s" else name, value)
    return made


@functools.cache
def small() -> dnal.Pruned:
    return dnal.prune(gated(), SHAPE)


class TwoImages(nn.Module):
    """A net that wants two images at a time."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y


class Keyed(nn.Module):
    """A net that wants a dict."""

    def forward(self, x: dict) -> Tensor:
        return x["image"]


def config(**changes: object) -> dnal.SearchConfig:
    brief = {"weight_epochs": 1, "arch_epochs": 1, "fine_tune_epochs": 1, "val": 8, "width": 0.05}
    return dnal.recipes.digits().replace(data="toy", baseline="none", **brief | changes)


def with_numbers(value: float) -> nn.Module:
    broken = copy.deepcopy(net())
    broken[0].weight.data[0, 0, 0, 0] = value
    return broken


def folder(name: str) -> str:
    Path(name).mkdir()
    return name


def file(name: str, content: bytes = b"hello") -> str:
    Path(name).write_bytes(content)
    return name


def soft(made: nn.Module) -> nn.Module:
    dnal.set_gates(made, mode="soft", delta=0.1)
    return made


TAKES_A_NET: dict[str, Callable] = {
    "add_gates": dnal.add_gates,
    "gates": dnal.gates,
    "set_gates": lambda given: dnal.set_gates(given, mode="soft"),
    "gate_report": gate_report,
    "prune": lambda given: dnal.prune(given, SHAPE),
    "analyse": lambda given: dnal.analyse(given, SHAPE),
    "cost": lambda given: dnal.cost(given, SHAPE),
    "latency": lambda given: dnal.latency(given, SHAPE, budget_s=0.01),
    "deploy": dnal.deploy,
    "export": lambda given: dnal.export(given, "net.pt2", SHAPE),
    "compare": lambda given: dnal.compare(given, net(), SHAPE, (1,), ("eager",)),
    "compare to": lambda given: dnal.compare(net(), given, SHAPE, (1,), ("eager",)),
}
NO_NETS = {
    "None": (lambda: None, "None; need an nn.Module; do pass the network itself"),
    "name": (lambda: "vgg16", "'vgg16'; need an nn.Module"),
    "class": (lambda: nn.Linear, "; need an nn.Module; do build it first"),
    "weights": (lambda: net().state_dict(), "(OrderedDict); need an nn.Module"),
}
TAKES_A_SHAPE: dict[str, Callable] = {
    "add_gates": lambda shape: dnal.add_gates(net(), image_shape=shape),
    "prune": lambda shape: dnal.prune(gated(), shape),
    "analyse": lambda shape: dnal.analyse(net(), shape),
    "cost": lambda shape: dnal.cost(net(), shape),
    "latency": lambda shape: dnal.latency(net(), shape, budget_s=0.01),
    "export": lambda shape: dnal.export(net(), "net.pt2", shape),
    "compare": lambda shape: dnal.compare(net(), net(), shape, (1,), ("eager",)),
}
NO_SHAPES = {
    "None": (None, "image_shape None; need positive ints"),
    "side": (32, "image_shape 32; need positive ints"),
    "text": ("399", "image_shape '399'; need positive ints"),
    "two": ((9, 7), "got image_shape (9, 7)"),
    "batch": ((1, *SHAPE), "got image_shape (1, 3, 9, 7)"),
    "floats": ((3.0, 9.0, 7.0), "image_shape (3.0, 9.0, 7.0); need positive ints"),
    "negative": ((3, -9, 7), "image_shape (3, -9, 7); need positive ints"),
    "zero": ((3, 0, 7), "image_shape (3, 0, 7); need positive ints"),
    "nan": ((3, NAN, 7), "image_shape (3, nan, 7); need positive ints"),
    "bool": ((3, True, 7), "image_shape (3, True, 7); need positive ints"),
    "images": (torch.zeros(1, *SHAPE), "(Tensor); need positive ints"),
    "huge": ((3, 10**9, 10**9), "1000000000); need at most"),
    "channels": ((4, 9, 7), "image_shape (4, 9, 7)"),
    "too small": ((3, 1, 1), "Kernel size can't be greater"),
}
MISUSES: dict[str, tuple[Callable, str]] = {
    "add_gates to the result of prune": (lambda: dnal.add_gates(small()), "do pass its .module"),
    "add_gates twice": (lambda: dnal.add_gates(gated()), "has gates already"),
    "add_gates without a norm": (lambda: dnal.add_gates(nn.Linear(3, 3)), "no BatchNorm to gate"),
    "order: another word": (lambda: dnal.add_gates(net(), "conv"), "order 'conv'; need one of"),
    "order: None": (lambda: dnal.add_gates(net(), None), "order None; need one of"),
    "order: list": (lambda: dnal.add_gates(net(), ["conv"]), "order ['conv']; need one of"),
    "where: names": (lambda: dnal.add_gates(net(), where=["1"]), "where ['1']; need a function"),
    "where: of one": (
        lambda: dnal.add_gates(net(), where=lambda name: True), "too many positional arguments"
    ),
    "mode: another word": (lambda: dnal.set_gates(gated(), "on"), "mode 'on'; need one of off"),
    "mode: bool": (lambda: dnal.set_gates(gated(), True), "mode True; need one of off"),
    "delta: nan": (lambda: dnal.set_gates(gated(), delta=NAN), "delta nan; need a finite"),
    "delta: inf": (lambda: dnal.set_gates(gated(), delta=INF), "delta inf; need a finite"),
    "delta: 0": (lambda: dnal.set_gates(gated(), delta=0), "delta 0; need a finite"),
    "delta: negative": (lambda: dnal.set_gates(gated(), delta=-5.0), "delta -5.0; need"),
    "delta: text": (lambda: dnal.set_gates(gated(), delta="5"), "delta '5'; need a finite"),
    "delta: bool": (lambda: dnal.set_gates(gated(), delta=True), "delta True; need a finite"),
    "delta: 1e-50": (lambda: dnal.set_gates(gated(), delta=1e-50), "1e-50, which is 0 in the dt"),
    "delta: 1e39": (lambda: dnal.set_gates(gated(), delta=1e39), "1e+39, which is inf in the"),
    "delta in half precision": (
        lambda: dnal.set_gates(gated().half(), delta=1e5), "which is inf in the dtype of"
    ),
    "threshold: 1": (lambda: dnal.set_gates(gated(), threshold=1), "threshold 1; need a finite"),
    "threshold: nan": (lambda: dnal.set_gates(gated(), threshold=NAN), "threshold nan; need"),
    "threshold: text": (lambda: dnal.set_gates(gated(), threshold="1"), "threshold '1'; need"),
    "gate of no channel": (lambda: dnal.ScaledSigmoid(0), "channels 0; need an int of at least 1"),
    "gate of -1 channels": (lambda: dnal.ScaledSigmoid(-1), "channels -1; need an int"),
    "gate of 1.5 channels": (lambda: dnal.ScaledSigmoid(1.5), "channels 1.5; need an int"),
    "gate with threshold nan": (lambda: dnal.ScaledSigmoid(3, NAN), "threshold nan; need"),
    "gate.mode by hand, forward": (
        lambda: gated(mode="on")(torch.zeros(1, *SHAPE)), "gate mode 'on'; need one of off, soft"
    ),
    "gate.mode by hand, prune": (
        lambda: dnal.prune(gated(mode="on"), SHAPE), "mode of 1.gate 'on'; need one of off, soft"
    ),
    "gate.mode by hand, analyse": (
        lambda: dnal.analyse(gated(mode=None), SHAPE), "mode None; need one of off, soft"
    ),
    "gate.delta by hand, 0": (
        lambda: dnal.prune(gated(delta=torch.tensor(1e-50)), SHAPE), "delta of 1.gate 0.0; need"
    ),
    "gate.delta by hand, nan": (
        lambda: gate_report(gated(delta=torch.tensor(NAN))), "delta of 1.gate nan; need a finite"
    ),
    "gate.delta by hand, negative": (
        lambda: dnal.prune(gated(delta=torch.tensor(-5.0)), SHAPE), "delta of 1.gate -5.0; need"
    ),
    "gate.delta by hand, many": (
        lambda: dnal.prune(gated(delta=torch.ones(8)), SHAPE), "delta of 1.gate tensor([1., 1.,"
    ),
    "gate.threshold by hand": (
        lambda: dnal.prune(gated(threshold=NAN), SHAPE), "threshold of 1.gate nan; need"
    ),
    "s: NaN": (
        lambda: dnal.prune(gated(s=torch.full((8,), NAN)), SHAPE), "s of 1.gate of shape (8,) with"
    ),
    "s: one NaN": (
        lambda: gate_report(gated(s=torch.tensor([NAN, *[1.0] * 7]))), "with 1 NaN; need a number"
    ),
    "s: of another layer": (
        lambda: dnal.prune(gated(s=torch.ones(5)), SHAPE), "of shape (5,) with 0 NaN; need a numb"
    ),
    "s: NaN, analyse": (
        lambda: dnal.analyse(gated(s=torch.full((8,), NAN)), SHAPE), "with 8 NaN; need a number"
    ),
    "gate_report in no bins": (lambda: gate_report(gated(), 0), "bins 0; need an int"),
    "gate_report in 1.5 bins": (lambda: gate_report(gated(), 1.5), "bins 1.5; need an int"),
    "gate_report in 10**12 bins": (lambda: gate_report(gated(), 10**12), "need an int"),
    "schedule of 0": (lambda: dnal.delta_schedule(0), "epochs 0; need an int of at least 1"),
    "schedule of 1.5": (lambda: dnal.delta_schedule(1.5), "epochs 1.5; need an int"),
    "schedule of a text": (lambda: dnal.delta_schedule("5"), "epochs '5'; need an int"),
    "schedule without end": (lambda: dnal.delta_schedule(10**12), "need an int of at least 1 up"),
    "schedule to nan": (lambda: dnal.delta_schedule(3, delta_max=NAN), "delta_max nan; need"),
    "schedule to 0": (lambda: dnal.delta_schedule(3, delta_max=0), "delta_max 0; need a finite"),
    "schedule of a form": (lambda: dnal.delta_schedule(3, "lin"), "form 'lin'; need one of pap"),
    "prune: max_gap nan": (
        lambda: dnal.prune(soft(gated()), SHAPE, max_gap=NAN), "max_gap nan; need a finite number"
    ),
    "prune: max_gap -1": (lambda: dnal.prune(gated(), SHAPE, max_gap=-1), "max_gap -1; need"),
    "prune: max_gap inf": (lambda: dnal.prune(gated(), SHAPE, max_gap=INF), "max_gap inf; need"),
    "prune: max_gap text": (lambda: dnal.prune(gated(), SHAPE, max_gap="1"), "max_gap '1'; need"),
    "prune: soft gates": (lambda: dnal.prune(soft(gated()), SHAPE), "binarisation gap"),
    "prune: 1.5 channels": (
        lambda: dnal.prune(gated(), SHAPE, min_channels=1.5), "min_channels 1.5; need an int"
    ),
    "prune: no channel": (lambda: dnal.prune(gated(), SHAPE, min_channels=0), "min_channels 0;"),
    "prune: nan channels": (
        lambda: dnal.prune(gated(), SHAPE, min_channels=NAN), "min_channels nan; need an int"
    ),
    "prune: round to 0": (lambda: dnal.prune(gated(), SHAPE, round_to=0), "round_to 0; need"),
    "prune: round to '8'": (lambda: dnal.prune(gated(), SHAPE, round_to="8"), "round_to '8'; ne"),
    "prune: residual": (lambda: dnal.prune(gated(), SHAPE, "tied"), "residual 'tied'; need one of"),
    "prune: absorb": (lambda: dnal.prune(gated(), SHAPE, absorb="no"), "absorb 'no'; need True"),
    "prune: untrained gates": (lambda: dnal.prune(dnal.add_gates(net()), SHAPE), "all have s = 0"),
    "prune: NaN": (lambda: dnal.prune(with_numbers(NAN), SHAPE), "NaN or infinite numbers in 0.w"),
    "prune: fresh norms": (
        lambda: dnal.prune(copy.deepcopy(net()).train(), SHAPE), "has seen no batch"
    ),
    "prune: meta": (
        lambda: dnal.prune(copy.deepcopy(net()).to("meta"), SHAPE), "0.weight on the meta device"
    ),
    "analyse: meta": (lambda: dnal.analyse(copy.deepcopy(net()).to("meta"), SHAPE), "meta device"),
    "export: meta": (
        lambda: dnal.export(copy.deepcopy(net()).to("meta"), "net.pt2", SHAPE), "meta device"
    ),
    "latency: meta": (
        lambda: dnal.latency(copy.deepcopy(net()).to("meta"), SHAPE), "on the meta device"
    ),
    "cost: a net of two": (lambda: dnal.cost(TwoImages(), SHAPE), "missing 1 required positional"),
    "cost: a net of a dict": (lambda: dnal.cost(Keyed(), SHAPE), "which the net cannot take"),
    "prune: a net of two": (lambda: dnal.prune(TwoImages(), SHAPE), "required positional"),
    "export: a net of two": (lambda: dnal.export(TwoImages(), "n.pt2", SHAPE), "positional argu"),
    "latency: batch 0": (lambda: dnal.latency(net(), SHAPE, 0), "batch 0; need an int"),
    "latency: batch 2.5": (lambda: dnal.latency(net(), SHAPE, 2.5), "batch 2.5; need an int"),
    "latency: batch True": (lambda: dnal.latency(net(), SHAPE, True), "batch True; need an int"),
    "latency: batch 10**30": (lambda: dnal.latency(net(), SHAPE, HUGE), "batch 100000"),
    "latency: no time": (lambda: dnal.latency(net(), SHAPE, budget_s=0), "budget_s 0; need a"),
    "latency: nan s": (lambda: dnal.latency(net(), SHAPE, budget_s=NAN), "budget_s nan; need a"),
    "latency: inf s": (lambda: dnal.latency(net(), SHAPE, budget_s=INF), "budget_s inf; need a"),
    "latency: repeats": (lambda: dnal.latency(net(), SHAPE, min_repeats=0), "min_repeats 0; need"),
    "compare: a batch": (lambda: dnal.compare(net(), net(), SHAPE, 5), "batches 5; need a tuple"),
    "compare: batch 0": (lambda: dnal.compare(net(), net(), SHAPE, (0,)), "batch 0; need an int"),
    "compare: no batch": (lambda: dnal.compare(net(), net(), SHAPE, ()), "batches (); need a tu"),
    "compare: a form": (
        lambda: dnal.compare(net(), net(), SHAPE, (1,), "eager"), "forms 'eager'; need a tuple"
    ),
    "compare: another form": (
        lambda: dnal.compare(net(), net(), SHAPE, (1,), ("fast",)), "form 'fast'; need one of"
    ),
    "compare: masked": (lambda: dnal.compare(net(), gated(), SHAPE), "masked, not pruned"),
    "deploy: gates": (lambda: dnal.deploy(gated()), "with 1 gates; need one without"),
    "export: suffix": (lambda: dnal.export(net(), "net.txt", SHAPE), "'net.txt'; need .pt2 or"),
    "export: no name": (lambda: dnal.export(net(), "", SHAPE), "path ''; need the path"),
    "export: None": (lambda: dnal.export(net(), None, SHAPE), "path None; need the path"),
    "export: no folder": (lambda: dnal.export(net(), "no/n.pt2", SHAPE), "got folder no; need one"),
    "export: gates": (lambda: dnal.export(gated(), "net.pt2", SHAPE), "prune it first"),
    "export: half": (
        lambda: dnal.export(copy.deepcopy(net()).half(), "n.pt2", SHAPE), "a net in torch.float16"
    ),
    "save: a module": (lambda: dnal.save(net(), "s"), "; need what prune() or load() returns"),
    "save: None": (lambda: dnal.save(None, "s"), "got None; need what prune() or load() returns"),
    "save: to None": (lambda: dnal.save(small(), None), "path None; need the path"),
    "save: to 5": (lambda: dnal.save(small(), 5), "path 5; need the path"),
    "save: to ''": (lambda: dnal.save(small(), ""), "path ''; need the path"),
    "save: a null byte": (lambda: dnal.save(small(), "a\0b"), "path 'a\\x00b'; need the path"),
    "save: a long name": (lambda: dnal.save(small(), "x" * 300), "xxx… (str); need the path"),
    "save: no folder": (lambda: dnal.save(small(), "no/s"), "in a folder that is not there"),
    "load: None": (lambda: dnal.load(None, net), "path None; need the path"),
    "load: 5": (lambda: dnal.load(5, net), "path 5; need the path"),
    "Budget: none": (lambda: dnal.Budget(), "got budget none; need one of"),
    "Budget: two": (lambda: dnal.Budget(macs=0.3, params=0.3), "budget macs and params; need one"),
    "Budget: 0": (lambda: dnal.Budget(macs=0), "budget.macs 0; need a share"),
    "Budget: nan": (lambda: dnal.Budget(macs=NAN), "budget.macs nan; need a share"),
    "Budget: text": (lambda: dnal.Budget(macs="0.3"), "budget.macs '0.3'; need a share"),
    "Budget: list": (lambda: dnal.Budget(params=[0.3]), "budget.params [0.3]; need a share"),
    "config: no budget": (lambda: config(budget=0.3), "budget 0.3; need a value of type"),
    "config: budget of x": (lambda: config(budget={"x": 1}), "budget 'x'; need one of macs"),
    "config: field": (lambda: config(colour=1), "field 'colour'; need"),
    "config: method": (lambda: config(method="none"), "method 'none'; need one of"),
    "config: method 5": (lambda: config(method=5), "method 5; need one of"),
    "config: lr": (lambda: config(weight_lr=1e300), "weight_lr 1e+300; need 1e-12 to 1e+30"),
    "config: lr nan": (lambda: config(weight_lr=NAN), "weight_lr nan; need"),
    "config: epochs": (lambda: config(arch_epochs=HUGE), "need 1 to 1e+06"),
    "config: batch": (lambda: config(batch=HUGE), "need 2 to 1e+09"),
    "config: width": (lambda: config(width=1e308), "width 1e+308; need 1e-12 to 64"),
    "config: seed": (lambda: config(seed=-1), "seed -1; need 0 to"),
    "config: name up": (lambda: config(name="../../x"), "name '../../x'; need a name without /"),
    "config: name ..": (lambda: config(name=".."), "name '..'; need a name without /"),
    "config: no name": (lambda: config(name=""), "name ''; need a name"),
    "config: null name": (lambda: config(name="a\0b"), "name 'a\\x00b'; need a name"),
    "config: long name": (lambda: config(name="x" * 300), "(str); need a name"),
    "toy: none": (lambda: toy_images(train=0), "train 0; need an int of at least 1"),
    "toy: 10**9": (lambda: toy_images(train=10**9), "train 1000000000; need an int"),
    "toy: classes": (lambda: toy_images(num_classes=0), "num_classes 0; need an int"),
    "toy: shape": (lambda: toy_images(image_shape=(3,)), "image_shape (3,); need positive ints"),
    "toy: noise": (lambda: toy_images(noise=NAN), "noise nan; need a finite number"),
    "digits: val": (lambda: digits(val=1.5), "val, train_images) 1.5; need an int"),
    "digits: all": (lambda: digits(val=10**9), "1000000000 images to draw; need 1 to"),
    "digits: seed": (lambda: digits(seed="x"), "seed 'x'; need an int"),
    "images: 5": (lambda: image_folder(5), "data folder 5; need the path"),
    "images: a side": (lambda: image_folder(".", "32"), "image_size '32'; need an int"),
    "images: one of a pair": (lambda: image_folder(".", (5,)), "image_size (5,); need a side, or"),
    "images: nothing there": (lambda: image_folder("nowhere"), "nowhere: got No such file"),
    "run: a recipe": (lambda: dnal.run(dnal.recipes.digits, "r"), "need a SearchConfig; do call"),
    "run: a name": (lambda: dnal.run("digits", "r"), "config 'digits'; need a SearchConfig"),
    "run: a net by name": (lambda: dnal.run(config(), "r", net="vgg16"), "net 'vgg16'; need an nn"),
    "run: a class": (lambda: dnal.run(config(), "r", net=nn.Linear), "do build it first"),
    "run: images by name": (lambda: dnal.run(config(), "r", data="folder"), "got data"),
    "run: one loader": (lambda: dnal.run(config(), "r", data=([1],)), "got data"),
    "run: loaders of lists": (lambda: dnal.run(config(), "r", data=([], [], [])), "got"),
    "run: 5 for images": (lambda: dnal.run(config(), "r", data=5), "got data"),
    "model: no function": (lambda: dnal.run(config(model="os:nothing"), "r"), "nothing"),
    "model: no module": (lambda: dnal.run(config(model="no_such_module:f"), "r"), "no_such_module"),
    "model: no net": (lambda: dnal.run(config(model="os:getcwd"), "r"), "getcwd"),
    "model: another name": (lambda: config(model="vgg61"), "model 'vgg61'; need vgg16"),
    "model: None": (lambda: config(model=None), "model None; need a value of type str"),
    "weights: nothing there": (lambda: dnal.run(config(weights="no.safetensors"), "r"), "no.safet"),
    "weights: a letter": (
        lambda: dnal.run(config(weights=__file__), "r"), "test_misuse.py"
    ),
    "run: into None": (lambda: dnal.run(config(), None), "out None; need the path"),
    "run: into ''": (lambda: dnal.run(config(), ""), "out ''; need the path"),
    "run: a null byte": (lambda: dnal.run(config(), "a\0b"), "out 'a\\x00b'; need the path"),
    "run: until": (lambda: dnal.run(config(), "r", until="all"), "until 'all'; need one of weig"),
    "run: progress": (lambda: dnal.run(config(), "r", progress=5), "progress 5; need a function"),
    "run: on_row": (lambda: dnal.run(config(), "r", on_row="x"), "on_row 'x'; need a function"),
    "run: meta": (lambda: dnal.run(config(device="meta"), "r"), "device 'meta', which is not"),
    "run: mps": (lambda: dnal.run(config(device="mps"), "r"), "device 'mps', which is not here"),
    "run: cuda:99": (lambda: dnal.run(config(device="cuda:99"), "r"), "device 'cuda:99', which"),
    "run: no device": (lambda: dnal.run(config(device=""), "r"), "device '', which is not here"),
    "run: val": (lambda: dnal.run(config(val=10**6), "r"), "need an int of at least 1 up to"),
    "run: batch": (lambda: dnal.run(config(batch=10**9), "r"), "batch"),
    "run: weights_from": (lambda: dnal.run(config(weights_from="no"), "r"), "got weights_from"),
    "sweep: no value": (lambda: sweep(config(), [], [0], "s"), "got no gate_price; need one or"),
    "sweep: twice": (lambda: sweep(config(), [1e-3, 1e-3], [0], "s"), "gate_price 0.001 twice"),
    "sweep: seed twice": (lambda: sweep(config(), [1e-3], [0, 0], "s"), "seed 0 twice"),
    "sweep: nan": (lambda: sweep(config(), [NAN], [0], "s"), "gate_price nan; need a finite"),
    "sweep: text": (lambda: sweep(config(), ["x"], [0], "s"), "gate_price 'x'; need a finite"),
    "sweep: a number": (lambda: sweep(config(), 1e-3, [0], "s"), "gate_price 0.001; need a list"),
    "sweep: a seed": (lambda: sweep(config(), [1e-3], ["0"], "s"), "seed '0'; need an int"),
    "sweep: jobs 0": (lambda: sweep(config(), [1], [0], "s", jobs=0), "jobs 0; need an int"),
    "sweep: jobs 1.5": (lambda: sweep(config(), [1], [0], "s", jobs=1.5), "jobs 1.5; need an int"),
    "sweep: 10**6 jobs": (lambda: sweep(config(), [1], [0], "s", jobs=10**6), "up to 1024"),
    "sweep: a field": (lambda: sweep(config(), [1], [0], "s", field="width"), "field 'width'; "),
    "sweep: into ''": (lambda: sweep(config(), [1], [0], ""), "out ''; need the path"),
    "sweep: no config": (lambda: sweep(None, [1], [0], "s"), "config None; need a SearchConfig"),
    "record: None": (lambda: tables.final_table(None), "record None; need the path"),
    "record: rows": (lambda: tables.final_table([5]), "row 5; need a dict"),
    "record: no rows": (lambda: tables.final_table([]), "a record of 0 rows"),
    "records: rows": (lambda: aggregate.tables([[{"kind": 5}]]), "row {'kind': 5}; need a dict"),
    "record: a folder": (lambda: runlog.plain(object()), "got a object for a record"),
}  # fmt: skip
for name in ("vgg16", "resnet56", "mobilenetv2"):
    build = getattr(dnal.models, name)
    for key, value in {"no": 0, "2.5": 2.5, "True": True, "'10'": "10", "10**12": 10**12}.items():
        MISUSES[f"{name} of {key} classes"] = (functools.partial(build, value), "num_classes")
    for value in (0, -1, NAN, INF, "1", 1e308):
        MISUSES[f"{name} of width {value}"] = (functools.partial(build, 10, value), "width")
for value in (8, -32, 32.0, "32", 10**9):
    MISUSES[f"vgg16 of size {value}"] = (
        functools.partial(dnal.models.vgg16, 10, 0.05, value), f"image_size {value!r}; need an int"
    )  # fmt: skip
for name, call in TAKES_A_NET.items():
    MISUSES |= {
        f"{name} of no net but {what}": (lambda call=call, make=make: call(make()), words)
        for what, (make, words) in NO_NETS.items()
    }
for name, call in TAKES_A_SHAPE.items():
    MISUSES |= {
        f"{name}: shape {what}": (lambda call=call, shape=shape: call(shape), words)
        for what, (shape, words) in NO_SHAPES.items()
        if (name, shape) != ("add_gates", None)  # which finds one
    }


def refused(do: Callable, words: str) -> None:
    """It ends in one line with the words, and the folder is as before."""
    before = sorted(Path().rglob("*"))
    with pytest.raises(Refused) as caught:
        do()
    line = str(caught.value)
    assert "\n" not in line
    assert "got " in line
    assert "; need " in line
    assert words in line
    assert sorted(Path().rglob("*")) == before


@pytest.fixture(autouse=True)
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder to stand in, so that nothing half-written can hide; no data by chance."""
    net(), small()
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DNAL_DATA", raising=False)


@pytest.mark.timeout(30)
@pytest.mark.parametrize("name", MISUSES)
def test_a_mistake_ends_in_one_line_with_its_cause(name: str):
    refused(*MISUSES[name])


FILES: dict[str, tuple[Callable[[], str], str]] = {
    "nothing": (lambda: "none", "which is not there; need a file that save() wrote"),
    "a folder": (lambda: folder("f"), "got f, which is no regular file; need"),
    "a pipe": (lambda: pipe("f"), "got f, which is no regular file; need"),
    "a device": (lambda: device("/dev/zero"), "got /dev/zero, which is no regular file; need"),
    "empty": (lambda: file("f", b""), "got f, cut short or damaged"),
    "a letter": (lambda: file("f"), "got f, cut short or damaged"),
    "a huge header": (lambda: file("f", b"\xff" * 64), "got f, cut short or damaged"),
}


@pytest.mark.timeout(30)
@pytest.mark.parametrize("what", FILES)
def test_no_saved_net_ends_in_one_line_with_its_cause(what: str):
    make, words = FILES[what]
    path = make()
    with pytest.raises((Refused, FileNotFoundError)) as caught:
        dnal.load(path, net)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_places_that_cannot_be_written_are_told_and_left_alone():
    for path in (folder("f.pt2"), pipe("g.pt2")):
        refused(lambda path=path: dnal.export(net(), path, SHAPE), f"{path}, which is no regular")
        refused(lambda path=path: dnal.save(small(), path), f"{path}, which is no regular")
    letter = file("letter")
    for out in (letter, f"{letter}/run"):
        refused(lambda out=out: dnal.run(config(), out), "letter")
        refused(lambda out=out: sweep(config(), [1e-3], [0], out), "letter")
    assert Path(letter).read_text() == "hello"


BUILDERS: dict[str, tuple[object, str]] = {
    "None": (None, "build None; need a function"),
    "name": ("vgg16", "build 'vgg16'; need a function"),
    "net": (nn.Linear(3, 3), "build Linear(in_features=3"),
    "nothing": (lambda: None, "what build() gives: None; need an nn.Module"),
    "class": (lambda: nn.Linear, "; need an nn.Module; do build it first"),
    "wants more": (lambda a, b: net(), "missing a required argument: 'a'"),
    "another": (lambda: nn.Linear(3, 3), "need the architecture"),
}


@pytest.mark.parametrize("what", BUILDERS)
def test_a_builder_that_gives_no_such_net_ends_in_one_line(what: str):
    build, words = BUILDERS[what]
    dnal.save(small(), "s.safetensors")
    refused(lambda: dnal.load("s.safetensors", build), words)


def test_there_are_enough_mistakes_and_a_fault_is_none():
    assert len(MISUSES) + len(FILES) + len(BUILDERS) >= 300
    with pytest.raises(ZeroDivisionError):  # the user's own function: its place is wanted
        dnal.add_gates(net(), where=lambda name, norm: 1 / 0)
    dnal.save(small(), "s")
    with pytest.raises(ZeroDivisionError):
        dnal.load("s", lambda: 1 / 0)
