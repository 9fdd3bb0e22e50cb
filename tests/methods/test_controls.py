"""Rules that choose channels without a search, and what a run by a rule or from scratch does."""

import pytest
import torch
from small_runs import changed
from torch import nn

from dnal_mini.config import Budget
from dnal_mini.data.sources import toy_images
from dnal_mini.gating import add_gates, gates
from dnal_mini.methods import METHODS
from dnal_mini.methods.contract import Subject, Values
from dnal_mini.methods.controls import filter_norms
from dnal_mini.models import MODELS, restart
from dnal_mini.runs import runlog
from dnal_mini.search.driver import run
from dnal_mini.search.inputs import load_data

DATA = toy_images(seed=0, val=32, image_shape=(3, 32, 32))


def values(net: nn.Module, rule: str, seed: int = 0) -> Values:
    return METHODS[rule]().values(Subject(net, DATA, seed))


@pytest.mark.parametrize("order", ["conv-bn-ss-relu", "conv-bn-relu-ss", "conv-ss-bn-relu"])
@pytest.mark.parametrize("model", MODELS)
def test_the_norm_of_a_filter_is_that_of_the_convolution_that_makes_the_channel(model, order):
    net = MODELS[model](width=0.25)
    plain = {n: m for n, m in net.named_modules() if isinstance(m, nn.Conv2d)}
    gated = add_gates(net, order)
    names = {"vgg16": "features.bn5", "resnet56": "blocks.11.bn2", "mobilenetv2": "head.bn"}
    convs = {
        "vgg16": "features.conv5",
        "resnet56": "blocks.11.conv2",
        "mobilenetv2": "head.conv",
    }
    found = filter_norms(gated)
    assert list(found) == list(gates(gated))
    own = next(name for name in found if name.startswith(names[model]))
    expected = [float(w.detach().abs().sum()) for w in plain[convs[model]].weight]
    assert found[own].tolist() == pytest.approx(expected, rel=1e-5)


def test_uniform_ranks_let_every_layer_keep_the_same_share():
    net = add_gates(MODELS["vgg16"](width=0.25))
    found = values(net, "uniform", seed=3)
    assert list(found) == list(gates(net))
    for cut, share in ((0.0, 0.5), (0.25, 0.25), (-0.4, 0.9)):
        kept = [float((value > cut).float().mean()) for value in found.values()]
        assert kept == pytest.approx([share] * len(kept), abs=1 / 16)
    orders = [value.argsort().tolist() for value in found.values()]
    assert orders[0] != sorted(orders[0])  # which ones is left to chance


def test_a_rule_depends_on_its_seed_and_the_norm_on_the_weights_alone():
    def scores(rule, seed):
        torch.manual_seed(7)
        net = add_gates(MODELS["vgg16"](width=0.1))
        return torch.cat(list(values(net, rule, seed).values()))

    for rule in ("random", "uniform"):
        assert torch.equal(scores(rule, 1), scores(rule, 1))
        assert not torch.equal(scores(rule, 1), scores(rule, 2))
    assert torch.equal(scores("l1-norm", 1), scores("l1-norm", 2))


def test_a_filter_that_is_larger_is_ranked_higher():
    net = add_gates(MODELS["vgg16"](width=0.1))
    conv = net.features.conv3
    conv.weight.data[4] *= 10
    conv.weight.data[2] /= 10
    found = values(net, "l1-norm")["features.bn3.gate"]
    assert (int(found.argmax()), int(found.argmin())) == (4, 2)
    assert float(found.mean()) == pytest.approx(0, abs=1e-6)


def test_a_gate_without_its_convolution_is_refused():
    net = add_gates(nn.Sequential(nn.Conv2d(3, 4, 1), nn.PixelShuffle(2), nn.BatchNorm2d(1)))
    with pytest.raises(ValueError, match="without a convolution of 1 channels"):
        filter_norms(net)


@pytest.mark.parametrize("rule", ["random", "uniform", "l1-norm"])
def test_a_run_by_a_rule_meets_its_target_without_a_search(tmp_path, rule):
    config = changed(method=rule, budget=Budget(macs=0.5), baseline="none")
    result = run(config, tmp_path / "run")
    stages = {row["stage"] for row in runlog.epochs(tmp_path / "run")}
    assert stages == {"weight_stage", "fine_tune"}
    assert result["macs"][1] / result["macs"][0] == pytest.approx(0.5, abs=0.08)  # narrow layers


def test_a_rule_needs_a_budget():
    with pytest.raises(ValueError, match="need one: it ranks channels"):
        changed(method="random")


def test_from_scratch_keeps_the_architecture_and_no_weight(finished, tmp_path):
    run(changed(tuned_from="scratch", weights_from=str(finished)), tmp_path / "scratch")
    first, scratch = runlog.read(finished), runlog.read(tmp_path / "scratch")
    cuts = [next(r for r in rows if r["kind"] == "prune") for rows in (first, scratch)]
    assert cuts[0]["channels"] == cuts[1]["channels"]
    taken = {row["stage"] for row in runlog.epochs(scratch) if row.get("taken_over")}
    assert taken == {"weight_stage", "baseline", "arch_stage"}  # nothing of it was trained again
    tuned = [[r["loss"] for r in runlog.epochs(rows) if r["stage"] == "fine_tune"] for rows in (
        first, scratch)]  # fmt: skip
    assert tuned[0] != tuned[1]


@pytest.mark.parametrize("model", MODELS)
def test_a_restarted_net_is_as_new(model):
    net = MODELS[model](width=0.2)
    for tensor in net.state_dict().values():
        tensor.fill_(3)
    restart(net, seed=11)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        new = MODELS[model](width=0.2)
    for name, value in net.state_dict().items():
        fresh = new.state_dict()[name].float()
        assert not (value == 3).all(), name
        if value.numel() > 200:
            assert float(value.std()) == pytest.approx(float(fresh.std()), rel=0.35), name
        elif fresh.unique().numel() == 1:  # a constant of the builder's
            assert torch.equal(value.float(), fresh), name
    one, other = MODELS[model](width=0.2), MODELS[model](width=0.2)
    restart(one, seed=5)
    restart(other, seed=5)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_a_part_of_the_training_images_has_the_classes_of_the_whole():
    whole, part = load_data(changed()), load_data(changed(train_images=64))
    assert (len(whole.train), len(part.train)) == (128, 64)
    assert part.train.labels.bincount().tolist() == [16] * 4
    assert torch.equal(part.val.labels, whole.val.labels)
    other = load_data(changed(train_images=64, seed=1)).train.labels
    assert not torch.equal(part.train.labels, other)
