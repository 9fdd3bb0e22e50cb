"""The microscope sees what autograd and finite differences say, and disturbs nothing."""

import copy

import pytest
import torch
from torch.nn import functional as F

from dnal_mini.data.imageset import Split
from dnal_mini.data.sources import toy_images
from dnal_mini.gating import add_gates, gates, open_gates, set_gates
from dnal_mini.measure.microscope import look, summary
from dnal_mini.models import MODELS
from dnal_mini.training.loop import as_input
from dnal_mini.training.stage import Feed

EXACT = Feed(precision="float64")
DATA = toy_images(train=48, seed=2, image_shape=(3, 32, 32))


def soft_net(order="conv-bn-ss-relu", delta=3.0):
    torch.manual_seed(0)
    net = add_gates(MODELS["vgg16"](num_classes=4, width=0.1), order).double()
    for gate in gates(net).values():
        torch.nn.init.uniform_(gate.s, -0.4, 0.4)
    set_gates(net, mode="soft", delta=delta)
    return net.train()


@pytest.mark.parametrize("order", ["conv-bn-ss-relu", "conv-bn-relu-ss", "conv-ss-bn-relu"])
def test_slope_times_pull_is_the_gradient_of_the_loss(order):
    net = soft_net(order)
    seen = look(net, DATA.train, DATA, batch=48, feed=EXACT)
    x = as_input(DATA.train.images, DATA, torch.float64, False)
    price = 0.01
    loss = F.cross_entropy(net(x), DATA.train.labels) + price * open_gates(net)
    loss.backward()
    for name, gate in gates(net).items():
        ours = -seen[name]["slope"] * (seen[name]["pull"] - price)
        assert torch.allclose(ours, gate.s.grad, rtol=1e-6, atol=1e-12), name


def test_a_pull_is_what_opening_a_gate_wins():
    net = soft_net()
    seen = look(net, DATA.train, DATA, batch=48, feed=EXACT)["features.bn4.gate"]
    gate, x = net.features.bn4.gate, as_input(DATA.train.images, DATA, torch.float64, False)
    losses = []
    for step in (-1e-6, 1e-6):
        moved = copy.deepcopy(net)
        p = float(gate.p[2].detach()) + step
        moved.features.bn4.gate.s.data[2] = torch.logit(torch.tensor(p, dtype=torch.float64)) / 3
        with torch.no_grad():
            losses.append(float(F.cross_entropy(moved(x), DATA.train.labels)))
    slope = (losses[0] - losses[1]) / 2e-6
    assert float(seen["pull"][2]) == pytest.approx(slope, rel=1e-2)


def test_looking_changes_nothing():
    net = soft_net().eval()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    look(net, DATA.train, DATA, batch=16, feed=EXACT)
    assert not net.training
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in net.parameters())


def test_pulls_are_means_over_whole_batches():
    net = soft_net()

    def first(count):
        split = Split(DATA.train.images[:count], DATA.train.labels[:count])
        seen = look(net, split, DATA, batch=16, feed=EXACT)
        return seen["features.bn2.gate"]["pull"]

    second = Split(DATA.train.images[16:32], DATA.train.labels[16:32])
    other = look(net, second, DATA, batch=16, feed=EXACT)["features.bn2.gate"]["pull"]
    assert torch.allclose(first(32), (first(16) + other) / 2)
    assert torch.equal(first(32), first(47))  # the last 15 fill no batch


def test_a_summary_counts_what_was_seen():
    one = {
        "s": torch.tensor([-1.0, 0, 1, 2]).double(),
        "p": torch.tensor([1e-6, 0.5, 0.95, 1 - 1e-6]).double(),
        "slope": torch.tensor([0.0, 2.0, 1.0, 0.0]).double(),
        "pull": torch.tensor([9.0, 0.5, -1.0, 0.25]).double(),
    }
    found = summary({"layer": one}, gate_price=0.3, bins=4)["layer"]
    assert found["histogram"] == [1, 0, 1, 2]
    assert (found["undecided"], found["frozen"], found["worth"]) == (0.25, 0.5, 0.5)
    assert found["gradient"] == pytest.approx((2 * 0.2 + 1.3) / 4)
    assert found["data_gradient"] == pytest.approx((2 * 0.5 + 1.0) / 4)
    assert found["pull"] == pytest.approx([-0.0625, 0.375, 2.625])


def test_gates_that_are_not_soft_and_too_few_images_are_refused():
    net = soft_net()
    with pytest.raises(ValueError, match="need at least a batch, 64"):
        look(net, DATA.train, DATA)
    set_gates(net, mode="hard")
    with pytest.raises(ValueError, match="not soft"):
        look(net, DATA.train, DATA, batch=16)
