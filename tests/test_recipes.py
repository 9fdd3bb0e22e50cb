"""Every recipe is built and run; the paper's say what the paper says."""

import pytest
from small_nets import make_shallow

from dnal_mini.recipes import RECIPES
from dnal_mini.search.driver import run


@pytest.mark.parametrize("deep", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_goes_the_whole_road_on_toy_images(name, deep, monkeypatch, tmp_path):
    if not deep:
        make_shallow(monkeypatch)
    recipe = RECIPES[name]().replace(
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
    assert (recipe.weight_epochs, recipe.weight_lr) == (100, 0.1)
    assert (recipe.method.arch_epochs, recipe.method.arch_lr) == (20, 0.1)
    assert (recipe.method.delta_max, recipe.method.objective) == (1e4, "paper")
    assert recipe.order == "conv-bn-ss-relu"


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_says_how_to_run_it_or_what_it_follows(name):
    text = RECIPES[name].__doc__ or ""
    assert "dnal run" in text or "vgg16_cifar10" in text
