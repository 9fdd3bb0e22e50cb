"""Settings are checked when they are made."""

import dataclasses

import pytest

from dnal_mini.config import SearchConfig


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"weight_epochs": 0}, "weight_epochs 0; need 1 or more"),
        ({"arch_epochs": -2}, "arch_epochs -2"),
        ({"delta_max": 0.5}, "delta_max 0.5"),
        ({"gate_price": -1e-4}, "gate_price -0.0001; need 0 or more"),
        ({"gate_price": float("nan")}, "gate_price nan"),
        ({"model": "vgg19"}, "model 'vgg19'; need one of vgg16"),
        ({"batch": 12.5}, "batch 12.5; need a value of type int"),
        ({"seed": True}, "seed True"),
        ({"momentum": 1.5}, "momentum 1.5; need 0 to 1"),
    ],
)
def test_settings_out_of_range_are_named(fields, word):
    with pytest.raises(ValueError, match=rf"^got {word}"):
        SearchConfig(**fields)


def test_settings_cannot_be_changed_afterwards():
    with pytest.raises(dataclasses.FrozenInstanceError):
        SearchConfig().seed = 3


def test_the_baseline_takes_as_long_as_the_two_stages_it_is_compared_with():
    config = SearchConfig(weight_epochs=3, arch_epochs=5, fine_tune_epochs=7)
    stages = ("weight_stage", "arch_stage", "fine_tune", "baseline")
    assert [config.epochs(stage) for stage in stages] == [3, 5, 7, 12]
