"""Network slimming: the price is that of the scales, the rank global, the run the driver's."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dnal_mini.config import Budget, SearchConfig
from dnal_mini.data.sources import toy_images
from dnal_mini.gating import add_gates, gates
from dnal_mini.methods.contract import Subject
from dnal_mini.methods.slimming import Slimming, gated_norms
from dnal_mini.models import MODELS
from dnal_mini.runs import runlog
from dnal_mini.search.driver import run
from dnal_mini.training.loop import as_input
from dnal_mini.training.stage import Stage

DATA = toy_images(seed=0, val=32, image_shape=(3, 32, 32))
CONFIG = SearchConfig().replace(
    name="toy", data="toy", val=32, width=0.07, weight_epochs=1, fine_tune_epochs=1, batch=64,
    precision="float32", channels_last=False, method="slimming", slimming_epochs=2,
    budget=Budget(macs=0.5),
)  # fmt: skip


def subject(model: str = "vgg16", width: float = 0.07, order: str = "conv-bn-ss-relu") -> Subject:
    return Subject(add_gates(MODELS[model](4, width), order), DATA)


def test_the_gradient_of_a_scale_is_that_of_the_loss_plus_the_price_times_its_sign():
    """Liu et al. 2017: s * sign(gamma) is added to the gradient of every scale."""
    given, price = subject(), 3e-3
    net, norms = given.net, dict(gated_norms(given.net))
    with torch.no_grad():
        for norm in norms.values():
            norm.weight[::2] *= -1
    x = as_input(DATA.train.images, DATA, torch.float32, False)
    F.cross_entropy(net(x), DATA.train.labels).backward()
    plain = {name: norm.weight.grad.clone() for name, norm in norms.items()}
    net.zero_grad()
    work = Slimming().work(Stage("sparse_stage", 1, 0.1), given)
    loss = F.cross_entropy(net(x), DATA.train.labels) + price * work.penalty()
    loss.backward()
    for name, norm in norms.items():
        expected = plain[name] + price * norm.weight.detach().sign()
        torch.testing.assert_close(norm.weight.grad, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("model", MODELS)
def test_a_channel_is_worth_the_size_of_its_scale(model):
    given = subject(model, 0.25)
    for norm in (norm for _, norm in gated_norms(given.net)):
        nn.init.normal_(norm.weight)
    values = Slimming().values(given)
    assert list(values) == list(gates(given.net))
    name = list(values)[3]
    own = given.net.get_submodule(name.removesuffix(".gate")).weight
    assert torch.equal(values[name], own.detach().abs())
    with torch.no_grad():
        own[2] = 0.0
    assert Slimming().alive(given)[name].tolist() == [k != 2 for k in range(len(own))]


def test_the_price_shrinks_the_scales_and_a_run_meets_its_budget(tmp_path):
    means = {}
    for price in (0.0, 0.3):
        config = CONFIG.replace(scale_price=price, slimming_lr=0.1)
        result = run(config, tmp_path / f"{price}")
        rows = [r for r in runlog.epochs(tmp_path / f"{price}") if r["stage"] == "sparse_stage"]
        means[price] = rows[-1]["mean_scale"]
        assert result["macs"][1] / result["macs"][0] == pytest.approx(0.5, abs=0.08)
        assert [row["price"] > 0 for row in rows] == [price > 0] * 2
        assert result["scale_price"] == price
    assert means[0.3] < 0.8 * means[0.0]


def test_the_dense_rival_trains_its_weights_as_long(tmp_path):
    result = run(CONFIG, tmp_path / "run")
    epochs = {row["stage"]: row["epochs"] for row in runlog.epochs(tmp_path / "run")}
    assert epochs == {"weight_stage": 1, "baseline": 3, "sparse_stage": 2, "fine_tune": 1}
    assert result["dense_is"] == "baseline"


def test_a_gate_without_a_scaled_norm_in_front_is_refused():
    with pytest.raises(ValueError, match="need one: do --order conv-bn-ss-relu"):
        Slimming().values(subject(order="conv-bn-relu-ss"))
    net = add_gates(nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5, affine=False)))
    with pytest.raises(ValueError, match=r"got gate 1\.gate without a norm that has scales"):
        Slimming().values(Subject(net, DATA))
