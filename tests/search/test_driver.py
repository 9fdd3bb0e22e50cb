"""The three stages, the policy against collapse, and runs that are interrupted and resumed."""

import copy
import dataclasses

import pytest
import torch
from small_runs import CONFIG, Stop, changed, stopped_at, told
from torch import nn

from dnal_mini.config import Budget, SearchConfig
from dnal_mini.data.sources import toy_images
from dnal_mini.gating import add_gates, gates, set_gates
from dnal_mini.models import MODELS
from dnal_mini.pruning.netfile import load
from dnal_mini.pruning.pruner import prune
from dnal_mini.runs import runlog
from dnal_mini.search.budget import impose
from dnal_mini.search.driver import run
from dnal_mini.search.floors import collapse_floors, keep_alive
from dnal_mini.search.inputs import build, load_data
from dnal_mini.search.stages import arch_stage, fine_tune, weight_stage


def gated_net(config: SearchConfig = CONFIG):
    data = load_data(config)
    return add_gates(build(config, data), config.order), data


def weights(net: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in net.named_parameters() if ".gate." not in name}


def test_stage_one_trains_weights_and_no_gate():
    net, data = gated_net()
    before = weights(net)
    list(weight_stage(net, data, CONFIG))
    assert all(not torch.equal(before[name], after) for name, after in weights(net).items())
    assert all(gate.s.grad is None and not gate.s.any() for gate in gates(net).values())


@pytest.mark.parametrize("order", ["conv-bn-ss-relu", "conv-bn-relu-ss", "conv-ss-bn-relu"])
def test_stage_two_trains_gates_and_no_weight(order):
    net, data = gated_net(changed(order=order))
    before, statistics = net.state_dict(), copy.deepcopy(dict(net.named_buffers()))
    before = {name: value.clone() for name, value in before.items()}
    rows = list(arch_stage(net, data, changed(order=order)))
    for name, p in net.named_parameters():
        if name.endswith(".s"):
            assert not torch.equal(before[name], p), name
        else:
            assert torch.equal(before[name], p), name
            assert p.grad is None
    moved = [n for n, b in net.named_buffers() if "running" in n and not b.equal(statistics[n])]
    assert moved  # batch statistics: the running ones go on
    assert [row["delta"] for row in rows if row["kind"] == "epoch"] == pytest.approx([1, 100, 1e4])


def test_stage_two_may_train_the_classifier_as_the_authors_do():
    config = changed(freeze_classifier=False)
    net, data = gated_net(config)
    before = weights(net)
    list(arch_stage(net, data, config))
    moved = {name for name, after in weights(net).items() if not torch.equal(before[name], after)}
    assert moved == {name for name in before if name.startswith("classifier")}


def test_gates_are_decided_at_the_end_of_stage_two():
    net, data = gated_net()
    rows = [row for row in arch_stage(net, data, CONFIG) if row["kind"] == "epoch"]
    assert rows[0]["undecided"] > 0.9
    assert rows[-1]["undecided"] < 0.05
    assert sum(rows[-1]["histogram"]) == sum(len(gate.s) for gate in gates(net).values())


def test_a_higher_price_keeps_fewer_channels():
    kept = []
    for price in (0.0, 3e-2):
        config = changed(gate_price=price)
        net, data = gated_net(config)
        list(weight_stage(net, data, config))
        kept.append([row for row in arch_stage(net, data, config) if "kept" in row][-1]["kept"])
    assert kept[1] < kept[0]


def test_the_two_objectives_charge_differently():
    prices = []
    for objective in ("paper", "code"):
        config = changed(objective=objective, arch_lr=1e-9)
        net, data = gated_net(config)
        prices.append([row["price"] for row in arch_stage(net, data, config) if "price" in row])
    channels = sum(len(gate.s) for gate in gates(gated_net()[0]).values())
    assert prices[0] == pytest.approx([1e-3 * channels / 2] * 3, rel=1e-3)  # s stays near 0
    assert prices[1] == pytest.approx(prices[0], rel=1e-3)
    config = changed(objective="code", arch_lr=5.0)
    net, data = gated_net(config)
    last = [row for row in arch_stage(net, data, config) if "price" in row][-1]
    expected = 1e-3 * sum(float(torch.sigmoid(g.s.detach()).sum()) for g in gates(net).values())
    assert last["price"] == pytest.approx(expected, rel=0.05)


# --- collapse ------------------------------------------------------------------------------


def test_every_layer_of_a_chain_is_vital_and_no_branch_is():
    chain = add_gates(MODELS["vgg16"](width=0.07))
    for norm in (m for m in chain.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.uniform_(norm.bias, 0.1, 1)  # a dead layer is then followed by constants, not 0
    floors = collapse_floors(chain, (3, 32, 32), 0.5)
    assert floors.keys() == gates(chain).keys()
    assert floors["features.bn13.gate"] == 18
    assert collapse_floors(chain, (3, 32, 32), 0.0) == dict.fromkeys(gates(chain), 1)
    residual = add_gates(MODELS["resnet56"](width=0.25))
    assert list(collapse_floors(residual, (3, 16, 16), 0.0)) == ["stem.bn.gate"]


def test_a_layer_that_closes_whole_gets_its_best_channels_back():
    net = add_gates(MODELS["vgg16"](width=0.07))
    values = {name: torch.linspace(-0.5, 0.5, len(gate.s)) for name, gate in gates(net).items()}
    values["features.bn9.gate"] -= 1
    masks = {name: value > 0 for name, value in values.items()}
    kept, opened = keep_alive(masks, values, collapse_floors(net, (3, 32, 32), 0.0))
    assert opened == {"features.bn9.gate": 1}
    dead = kept.pop("features.bn9.gate")
    assert dead.nonzero().flatten().tolist() == [len(dead) - 1]
    assert all(torch.equal(mask, masks[name]) for name, mask in kept.items())
    assert not masks["features.bn9.gate"].any()  # what it was given is left alone
    impose(net, masks | {"features.bn9.gate": dead})
    assert [gate.is_open.tolist() for gate in gates(net).values()] == [
        (masks | {"features.bn9.gate": dead})[name].tolist() for name in gates(net)
    ]


def test_a_ruinous_price_is_warned_of_and_leaves_every_layer_its_floor():
    config = changed(gate_price=10.0, floor=0.2)
    net, data = gated_net(config)
    rows = list(arch_stage(net, data, config))
    warnings = [row for row in rows if row["kind"] == "warning"]
    assert warnings
    assert "features.bn13.gate" in warnings[-1]["text"]
    floors = collapse_floors(net, data.image_shape, config.floor)
    for name, gate in gates(net).items():  # held while they were trained
        assert int(gate.is_open.sum()) >= floors[name]
    set_gates(net, mode="hard")
    small = prune(net)
    assert not small.report.notes  # nothing died as a whole
    rows = list(fine_tune(small.module, data, config))
    assert rows[-1]["loss"] < 2


# --- runs ------------------------------------------------------------------------------------


def tensors(path) -> dict[str, torch.Tensor]:
    return load(path, MODELS["vgg16"]).module.state_dict()


def test_a_run_writes_its_record_and_opens_the_test_set_once_at_the_end(tmp_path, monkeypatch):
    opened = []

    def counted(**options):
        data = toy_images(**options)

        def load_test():
            record = runlog.read(tmp_path / "run" / "record.jsonl")
            opened.append([row.get("stage") for row in record][-1])
            return data.load_test()

        return dataclasses.replace(data, load_test=load_test)

    monkeypatch.setattr("dnal_mini.search.inputs.toy_images", counted)
    result = run(CONFIG, tmp_path / "run")
    rows = runlog.read(tmp_path / "run" / "record.jsonl")
    assert opened == ["fine_tune"]
    kinds = [row["kind"] for row in rows if row["kind"] != "warning"]
    assert kinds == ["run"] + ["epoch"] * (1 + 2 + 3) + ["prune"] + ["epoch"] * 2 + ["result"]
    assert result == rows[-1]
    assert result["macs"][1] < result["macs"][0]
    assert result["macs_ratio"] == result["macs"][0] / result["macs"][1]
    assert result["hard_accuracy"] == pytest.approx(result["pruned_accuracy"], abs=0.05)
    (cut,) = [row for row in rows if row["kind"] == "prune"]
    assert cut["certificate"] < 1e-8
    assert rows[0]["config"]["gate_price"] == CONFIG.method.gate_price
    assert run(CONFIG, tmp_path / "run") == result  # finished: read, not repeated


@pytest.mark.parametrize(("stage", "epoch"), [("baseline", 2), ("arch_stage", 2), ("fine_tune", 1)])
def test_an_interrupted_run_ends_as_an_uninterrupted_one(finished, tmp_path, stage, epoch):
    with pytest.raises(Stop):
        run(CONFIG, tmp_path / "cut", on_row=stopped_at(stage, epoch))
    resumed = run(CONFIG, tmp_path / "cut")
    assert told(resumed) == told(runlog.read(finished)[-1])
    ours = tensors(tmp_path / "cut" / "small.safetensors")
    for name, value in tensors(finished / "small.safetensors").items():
        assert torch.equal(value, ours[name]), name
    losses = [[row["loss"] for row in runlog.epochs(path)] for path in (finished, tmp_path / "cut")]
    assert losses[0] == losses[1]


def test_bad_data_or_device_writes_nothing(tmp_path):
    for bad in (
        changed(data="cifar10", data_dir=str(tmp_path / "none")),
        changed(device="cuda:77"),
        changed(batch=1000),
    ):
        with pytest.raises(ValueError, match=r"^.*got "):
            run(bad, tmp_path / "run")
        assert not (tmp_path / "run").exists()


def test_a_joint_run_has_one_stage_in_place_of_two_and_no_dense_network(tmp_path):
    config = changed(optimisation="joint", baseline="none")
    result = run(config, tmp_path / "joint")
    stages = {row["stage"] for row in runlog.epochs(tmp_path / "joint")}
    assert stages == {"joint_stage", "fine_tune"}
    assert (result["dense_is"], result["dense_accuracy"]) == (None, None)
    assert runlog.read(tmp_path / "joint")[-2]["kind"] == "epoch"
    with pytest.raises(ValueError, match="need --baseline none"):
        changed(optimisation="joint")

    half = changed(
        optimisation="joint", baseline="none", budget=Budget(macs=0.5), target_by="shift",
        weights_from=str(tmp_path / "joint"),
    )  # fmt: skip
    result = run(half, tmp_path / "half")
    assert result["macs"][1] / result["macs"][0] == pytest.approx(0.5, abs=0.1)
    taken = [row for row in runlog.epochs(tmp_path / "half") if row.get("taken_over")]
    assert {row["stage"] for row in taken} == {"joint_stage"}


def test_a_target_by_shift_keeps_the_price_and_probes_nothing(tmp_path):
    config = changed(budget=Budget(macs=0.5), target_by="shift", baseline="none")
    result = run(config, tmp_path / "run")
    rows = runlog.read(tmp_path / "run")
    assert not [row for row in rows if row["kind"] == "probe"]
    assert result["gate_price"] == CONFIG.method.gate_price
    assert result["macs"][1] / result["macs"][0] == pytest.approx(0.5, abs=0.1)


def test_a_run_until_the_gates_ends_before_the_cut(tmp_path):
    last = run(changed(baseline="none"), tmp_path / "run", until="gates")
    assert (last["kind"], last["stage"], last["epoch"]) == ("epoch", "arch_stage", 3)
    assert not (tmp_path / "run" / "pruned.safetensors").exists()
    assert run(changed(baseline="none"), tmp_path / "run")["kind"] == "result"
