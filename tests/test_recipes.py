"""Every recipe is built and run; the paper's say what the paper says."""

import dataclasses

import pytest

from dnal_mini.recipes import RECIPES
from dnal_mini.search.driver import run


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_goes_the_whole_road_on_toy_images(name, tmp_path):
    recipe = dataclasses.replace(
        RECIPES[name](),
        data="toy",
        val=32,
        width=0.07,
        train_images=0,
        weight_epochs=1,
        arch_epochs=1,
        fine_tune_epochs=1,
        batch=64,
        arch_lr=2.0,
    )
    assert RECIPES[name]().name == name
    result = run(recipe, tmp_path / "run")
    assert 0 <= result["fine_tuned_accuracy"] <= 1
    assert result["macs"][1] <= result["macs"][0]


@pytest.mark.parametrize("model", ["vgg16", "resnet56", "mobilenetv2"])
def test_paper_recipes_hold_what_the_paper_states(model):
    recipe = RECIPES[f"{model}_cifar10"]()
    assert (recipe.model, recipe.data, recipe.width) == (model, "cifar10", 1.0)
    assert (recipe.weight_epochs, recipe.arch_epochs) == (100, 20)
    assert (recipe.weight_lr, recipe.arch_lr) == (0.1, 0.1)
    assert (recipe.delta_max, recipe.objective, recipe.order) == (1e4, "paper", "conv-bn-ss-relu")


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_says_how_to_run_it_or_what_it_follows(name):
    text = RECIPES[name].__doc__ or ""
    assert "dnal run" in text or "vgg16_cifar10" in text
