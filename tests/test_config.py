"""Settings are checked when they are made."""

import dataclasses
import json
from dataclasses import fields

import pytest

from dnal_mini.config import MEANS, Budget, SearchConfig
from dnal_mini.methods import METHODS
from dnal_mini.methods.controls import Uniform
from dnal_mini.methods.dnal import DNAL


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"weight_epochs": -1}, "weight_epochs -1; need 0 or more"),
        ({"arch_epochs": -2}, "arch_epochs -2"),
        ({"delta_max": 0.5}, "delta_max 0.5"),
        ({"gate_price": -1e-4}, "gate_price -0.0001; need 0 or more"),
        ({"gate_price": float("nan")}, "gate_price nan"),
        ({"model": "vgg19"}, "model 'vgg19'; need vgg16"),
        ({"batch": 12.5}, "batch 12.5; need a value of type int"),
        ({"seed": True}, "seed True"),
        ({"momentum": 1.5}, "momentum 1.5; need 0 to 1"),
    ],
)
def test_settings_out_of_range_are_named(fields, word):
    with pytest.raises(ValueError, match=rf"^got {word}"):
        SearchConfig().replace(**fields)


def test_settings_cannot_be_changed_afterwards():
    with pytest.raises(dataclasses.FrozenInstanceError):
        SearchConfig().seed = 3


def epochs_of(config: SearchConfig) -> dict[str, int]:
    return {stage.name: stage.epochs for stage in config.stages()}


def test_the_dense_rival_trains_its_weights_for_as_long_as_the_cut_net():
    config = SearchConfig().replace(weight_epochs=3, arch_epochs=5, fine_tune_epochs=7)
    assert epochs_of(config) == {
        "weight_stage": 3, "baseline": 7, "arch_stage": 5, "fine_tune": 7,
    }  # fmt: skip
    longer = config.replace(baseline="all-epochs")
    assert epochs_of(longer)["baseline"] == 12  # the gates' epochs, too
    assert "baseline" not in epochs_of(config.replace(baseline="none"))
    budget = Budget(macs=0.5)
    slim = config.replace(method="slimming", slimming_epochs=11, budget=budget)
    assert epochs_of(slim) == {
        "weight_stage": 3, "baseline": 18, "sparse_stage": 11, "fine_tune": 7,
    }  # fmt: skip
    joint = config.replace(optimisation="joint", baseline="none")
    assert epochs_of(joint) == {"joint_stage": 8, "fine_tune": 7}
    rule = config.replace(method="random", budget=budget)
    assert epochs_of(rule) == {"weight_stage": 3, "baseline": 7, "fine_tune": 7}


def test_a_stage_says_after_which_one_it_comes_and_which_settings_matter_there():
    stages = {stage.name: stage for stage in SearchConfig().stages()}
    afters = {name: stage.after for name, stage in stages.items()}
    assert afters == {
        "weight_stage": "", "baseline": "weight_stage", "arch_stage": "weight_stage",
        "fine_tune": "arch_stage",
    }  # fmt: skip
    matters = stages["weight_stage"].settings
    assert {"width", "weight_epochs", "seed", "order", "batch"} <= matters
    assert not {"gate_price", "fine_tune_lr", "budget", "method", "name", "data_dir"} & matters
    assert {"gate_price", "delta_max", "budget", "floor"} <= stages["arch_stage"].settings
    every = set().union(*(stage.settings for stage in stages.values()))
    assert every == SearchConfig().settings().keys() - {"name", *MEANS}  # none is forgotten


@pytest.mark.parametrize(
    ("shares", "need"),
    [
        ({}, "budget none; need one of macs, params"),
        ({"macs": 0.3, "params": 0.4}, "budget macs and params; need one of"),
        *(({"macs": share}, f"budget.macs {share}; need a share") for share in (0, 1, 1.5, -0.1)),
        ({"params": float("nan")}, "budget.params nan; need a share"),
    ],
)
def test_a_budget_is_one_share_between_0_and_1(shares, need):
    with pytest.raises(ValueError, match=f"^got {need}"):
        Budget(**shares)
    assert (Budget(params=0.3).metric, Budget(params=0.3).share) == ("params", 0.3)


def test_flat_settings_go_there_and_back_for_every_method():
    budget = Budget(params=0.25)
    for name in METHODS:
        config = SearchConfig().replace(method=name, budget=budget, seed=7)
        flat = json.loads(json.dumps(config.settings()))
        assert (flat["method"], flat["budget"], flat["seed"]) == (name, {"params": 0.25}, 7)
        assert SearchConfig.of(flat) == config


def test_no_setting_of_a_method_is_called_as_one_of_the_run_or_of_another():
    names = [field.name for kind in (SearchConfig, *METHODS.values()) for field in fields(kind)]
    assert len(names) == len(set(names))


def test_a_field_of_another_method_and_an_unknown_method_are_told():
    config = SearchConfig().replace(method="l1-norm", budget=Budget(macs=0.3))
    with pytest.raises(ValueError, match=r"gate_price for method l1-norm.*do add --method dnal"):
        config.replace(gate_price=1e-3)
    with pytest.raises(ValueError, match="got method 'l1norm'; need l1-norm"):
        config.replace(method="l1norm")
    with pytest.raises(ValueError, match="got field 'gate_prise'; need gate_price"):
        config.replace(gate_prise=1e-3)


def test_settings_of_an_older_version_mean_what_they_meant():
    old = {"gate_price": 3e-4, "arch_epochs": 6, "target_macs": 0.0, "gates_from": "search"}
    config = SearchConfig.of(old | {"baseline": True})
    assert (config.method, config.budget) == (DNAL(gate_price=3e-4, arch_epochs=6), None)
    assert config.baseline == "all-epochs"
    rule = SearchConfig.of(old | {"gates_from": "uniform", "target_macs": 0.4, "baseline": False})
    assert (rule.method, rule.budget, rule.baseline) == (Uniform(), Budget(macs=0.4), "none")
