"""Pruned torchvision classifiers against the hard-gated ones they come from.

The cases are those of ``benchmarks/prune_zoo.py``, which writes them to a record file.
"""

import importlib.util
import itertools
from pathlib import Path

import pytest
import torch
from torch import nn

import dnal_mini as dnal

pytest.importorskip("torchvision")  # an extra; after dnal_mini, which repairs its operators


def benchmark(name: str):
    """A script of the benchmarks folder as a module."""
    path = Path(__file__).parents[2] / "benchmarks" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


zoo = benchmark("prune_zoo")
# Sums; chunks, shuffles and depthwise layers; concatenations; squeeze-and-excitation. The others
# wait in the slow lane, at each of the shares that the benchmark closes.
DIFFERENT = ["resnet18", "shufflenet_v2_x0_5", "googlenet", "mobilenet_v3_small"]


@pytest.mark.parametrize("name", DIFFERENT)
def test_a_torchvision_net_gets_smaller_and_keeps_its_function(name: str):
    for row in zoo.zoo_rows(name, keep=0.5):
        assert not zoo.complaint(row)
        assert row["live"] > 1e-3, "the output must depend on the image"
        assert row["macs"][1] < row["macs"][0]
        assert row["params"][1] < row["params"][0]


@pytest.mark.parametrize(
    "name", ["squeezenet1_1", pytest.param("convnext_tiny", marks=pytest.mark.slow)]
)
def test_a_net_without_norms_loses_zero_filters_or_names_its_walls(name: str):
    for row in zoo.zoo_rows(name, keep=0.5, residuals=("scatter",)):
        assert not zoo.complaint(row)
        assert row["live"] > 1e-3
        assert row["walls"] or row["macs"][1] < row["macs"][0]


@pytest.mark.parametrize("keep", zoo.KEEPS)
def test_every_filter_that_squeezenet_can_miss_goes(keep: float):
    net = zoo.close_at_random(zoo.zoo_net("squeezenet1_1", 1), (3, 64, 64), keep, 1)
    small = dnal.prune(net, (3, 64, 64)).module
    for conv in (module for module in small.modules() if isinstance(module, nn.Conv2d)):
        dead = (conv.weight == 0).flatten(1).all(1) & (conv.bias == 0)
        assert not dead.any() or len(dead) == 1


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("name", "keep"),
    [*zip((*zoo.model_names(), *zoo.other_names()), itertools.cycle(zoo.KEEPS), strict=False)],
)
def test_every_model_of_the_zoo_keeps_its_function(name: str, keep: float):
    for row in zoo.zoo_rows(name, keep):
        assert not zoo.complaint(row)


def test_a_gated_zoo_net_comes_back_bit_by_bit_from_its_float64_run():
    net = zoo.close_at_random(zoo.zoo_net("mnasnet0_5", 0), (3, 64, 64), 0.5, 0)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    (output,) = zoo.outputs(net, torch.randn(2, 3, 64, 64).double())
    assert output.dtype == torch.float64
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_the_complaint_names_what_is_wrong():
    sound = {"error": None, "difference": 1e-15, "sharp": True, "same_class": True, "gates_left": 0}
    sound |= {"macs": [30, 20], "params": [7, 5], "walls": []}
    assert not zoo.complaint(sound)
    assert zoo.complaint(sound | {"error": "ValueError: no"}) == "ValueError: no"
    assert "differ" in zoo.complaint(sound | {"difference": 1e-8})
    assert not zoo.complaint(sound | {"difference": 1e-8, "sharp": False})
    assert "differ" in zoo.complaint(sound | {"difference": float("nan")})
    assert "class" in zoo.complaint(sound | {"same_class": False})
    assert "gates left" in zoo.complaint(sound | {"gates_left": 2})
    assert "params grow" in zoo.complaint(sound | {"params": [7, 8]})
    assert "no wall" in zoo.complaint(sound | {"macs": [30, 30]})
    assert not zoo.complaint(sound | {"macs": [30, 30], "walls": ["softmax"]})
