"""What a gate costs in MACs, the share of them that is left, and stages with other settings."""

import itertools

import pytest
import torch
from torch import nn

from dnal_mini.config import SearchConfig
from dnal_mini.data.sources import toy_images
from dnal_mini.gating import add_gates, gates, open_gates, set_gates
from dnal_mini.measure.cost import cost
from dnal_mini.methods.marginal import macs_weights
from dnal_mini.models import MODELS
from dnal_mini.pruning.pruner import prune
from dnal_mini.search.budget import nearest, share_of
from dnal_mini.search.stages import arch_stage, weight_stage

CONFIG = SearchConfig().replace(
    name="toy", data="toy", val=32, width=0.07, weight_epochs=2, arch_epochs=3, fine_tune_epochs=1,
    batch=64, arch_lr=1.0, gate_price=1e-3, precision="float32", channels_last=False,
)  # fmt: skip
DATA = toy_images(seed=0, val=32, image_shape=(3, 32, 32))


def chain() -> nn.Module:
    """Two gated convolutions of odd widths, the second on a quarter of the spots."""
    return add_gates(
        nn.Sequential(
            nn.Conv2d(3, 7, 3, padding=1), nn.BatchNorm2d(7), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(7, 5, 3, padding=1), nn.BatchNorm2d(5), nn.ReLU(), nn.Flatten(),
            nn.Linear(5 * 4 * 4, 3),
        )
    )  # fmt: skip


def test_the_weight_of_a_gate_is_what_closing_one_channel_saves():
    weights = macs_weights(chain(), (3, 8, 8))
    first = 9 * 3 * 64 + 9 * 5 * 16  # its own filter, and its part of the next ones
    second = 9 * 7 * 16 + 16 * 3  # and its part of the classifier
    mean = (7 * first + 5 * second) / 12
    assert list(weights.values()) == pytest.approx([first / mean, second / mean])
    assert list(weights) == list(gates(chain()))


def test_a_price_by_macs_sums_the_weighted_gates():
    net = chain()
    names = list(gates(net))
    set_gates(net, mode="soft")
    total = open_gates(net, "paper", {names[0]: 2.0, names[1]: 0.25})
    assert float(total.detach()) == pytest.approx((7 * 2 + 5 * 0.25) / 2)
    total.backward()
    ratio = gates(net)[names[0]].s.grad[0] / gates(net)[names[1]].s.grad[0]
    assert float(ratio) == pytest.approx(8)


def test_the_share_of_macs_is_that_of_the_pruned_net():
    net = chain()
    set_gates(net, mode="soft", delta=1e4)
    torch.manual_seed(1)
    for gate in gates(net).values():
        nn.init.uniform_(gate.s, -1, 1)
    hard = chain()
    hard.load_state_dict(net.state_dict())
    set_gates(hard, mode="hard")
    small = prune(hard.eval(), (3, 8, 8))
    expected = cost(small.module, (3, 8, 8)).macs / cost(chain(), (3, 8, 8)).macs
    masks = {name: gate.is_open for name, gate in gates(net).items()}
    assert share_of(net, (3, 8, 8), "macs", "scatter")(masks) == expected
    assert 0 < expected < 1
    params = sum(p.numel() for p in small.module.parameters())
    whole = cost(chain(), (3, 8, 8)).params
    assert share_of(net, (3, 8, 8), "params", "scatter")(masks) == params / whole
    assert all(gate.mode == "soft" for gate in gates(net).values())  # the net is left alone


def test_a_price_by_macs_spares_the_cheap_layers():
    kept = {}
    for per in ("gate", "macs"):
        config = CONFIG.replace(price_per=per, gate_price=5e-3)
        torch.manual_seed(0)
        net = add_gates(MODELS["vgg16"](width=0.07))
        list(weight_stage(net, DATA, config))
        list(arch_stage(net, DATA, config))
        found = [float(gate.is_open.float().mean()) for gate in gates(net).values()]
        kept[per] = sum(found[-5:]) / sum(found[:5])  # the last layers see few spots
    assert kept["macs"] > kept["gate"]


@pytest.mark.parametrize("schedule", ["constant", "cosine", "one-cycle"])
def test_the_learning_rate_of_a_stage_follows_its_schedule(schedule):
    config = CONFIG.replace(weight_schedule=schedule, nesterov=True, weight_lr=0.01)
    rows = list(weight_stage(add_gates(MODELS["vgg16"](width=0.07)), DATA, config))
    steps = len(DATA.train) // 64
    last = (len(rows) - 1 / steps) / len(rows)  # share of the stage before the last step
    expected = {
        "constant": 0.01,
        "cosine": 0.005 * (1 + torch.cos(torch.tensor(torch.pi * last)).item()),
        "one-cycle": 0.005 * (1 + torch.cos(torch.tensor(torch.pi * (last - 0.25) / 0.75)).item()),
    }
    assert rows[-1]["lr"] == pytest.approx(expected[schedule], rel=1e-4)


@pytest.mark.parametrize("metric", ["macs", "params"])
@pytest.mark.parametrize("target", [0.15, 0.4, 0.85])
def test_the_masks_that_meet_a_budget_are_the_best_of_all(target, metric):
    net = chain()
    torch.manual_seed(2)
    values = {name: torch.rand(len(gate.s)) * 2 - 1 for name, gate in gates(net).items()}
    share = share_of(net, (3, 8, 8), metric, "scatter")
    ranked = sorted(float(v) for value in values.values() for v in value.tolist())
    shares = [
        share({name: value > (low + high) / 2 for name, value in values.items()})
        for low, high in itertools.pairwise(ranked)
    ]
    masks, cut_at = nearest(values, share, target)
    assert abs(share(masks) - target) == pytest.approx(min(abs(s - target) for s in shares))
    for name, value in values.items():
        assert torch.equal(masks[name], value.double() > cut_at)


def joint(**fields) -> SearchConfig:
    return CONFIG.replace(optimisation="joint", baseline="none", **fields)


def test_joint_optimisation_trains_weights_and_gates_in_every_epoch():
    net = add_gates(MODELS["vgg16"](num_classes=DATA.num_classes, width=0.07))
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    rows = [row for row in arch_stage(net, DATA, joint()) if row["kind"] == "epoch"]
    assert all(not torch.equal(before[name], p) for name, p in net.named_parameters())
    assert [row["stage"] for row in rows] == ["joint_stage"] * 5  # two and three epochs
    assert [row["delta"] for row in rows] == pytest.approx([1, 10, 100, 1000, 1e4])
    assert all(row["price"] > 0 for row in rows)


def test_in_joint_optimisation_each_kind_of_parameter_has_its_own_rate():
    def moved(**rates) -> tuple[bool, bool]:
        net = add_gates(MODELS["vgg16"](num_classes=DATA.num_classes, width=0.07))
        first = net.features.conv1.weight.detach().clone()
        list(arch_stage(net, DATA, joint(weight_epochs=1, arch_epochs=1, **rates)))
        shift = float((net.features.conv1.weight - first).detach().abs().max())
        return shift > 1e-4, float(net.features.bn1.gate.s.detach().abs().max()) > 1e-4

    assert moved(weight_lr=0.1, arch_lr=1e-9) == (True, False)
    assert moved(weight_lr=1e-9, weight_decay=0.0, arch_lr=1.0) == (False, True)


def test_weight_decay_on_s_pulls_it_to_zero():
    def sizes(decay: float) -> float:
        torch.manual_seed(0)
        net = add_gates(MODELS["vgg16"](num_classes=DATA.num_classes, width=0.07))
        config = CONFIG.replace(arch_weight_decay=decay, arch_lr=0.1)
        list(arch_stage(net, DATA, config))
        return sum(float(gate.s.detach().abs().sum()) for gate in gates(net).values())

    assert sizes(3.0) < 0.8 * sizes(0.0)
