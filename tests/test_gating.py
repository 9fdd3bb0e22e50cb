"""The SS layer against closed forms, hand gradients and the laws of its three orders."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dnal_mini.gating import (
    add_gates,
    arch_parameters,
    delta_schedule,
    gate_report,
    gates,
    open_gates,
    set_gates,
    weight_parameters,
)
from dnal_mini.layers.gated_norm import Gated
from dnal_mini.layers.scaled_sigmoid import ScaledSigmoid
from dnal_mini.methods.dnal import hold_floors

ORDERS = ["conv-bn-ss-relu", "conv-bn-relu-ss", "conv-ss-bn-relu"]


def small_net(act: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    """Two gated layers of different widths and a linear head."""
    layers = [nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), act(), nn.Conv2d(5, 7, 3), nn.BatchNorm2d(7)]
    net = nn.Sequential(*layers, act(), nn.Flatten(), nn.Linear(7 * 5 * 7, 4)).double()
    for norm in (net[1], net[4]):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias)
    return net


def images(batch: int = 6) -> torch.Tensor:
    return torch.randn(batch, 3, 9, 11, dtype=torch.float64)


def randomise(net: nn.Module, scale: float = 1.0) -> None:
    for s in arch_parameters(net):
        nn.init.normal_(s, std=scale)


def test_gradients_are_those_of_the_formula():
    gate = ScaledSigmoid(5).double()
    set_gates(gate, mode="soft", delta=3.0)
    nn.init.normal_(gate.s)
    x = torch.randn(2, 5, 3, 7, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(2, 5, 3, 7, dtype=torch.float64)
    gate(x).backward(upstream)
    p = 1 / (1 + torch.exp(-3.0 * gate.s.detach()))
    by_hand = 3.0 * p * (1 - p) * (x.detach() * upstream).sum((0, 2, 3))
    torch.testing.assert_close(gate.s.grad, by_hand)
    torch.testing.assert_close(x.grad, p[:, None, None] * upstream)


def test_gradcheck_accepts_the_layer():
    gate = ScaledSigmoid(3).double()
    set_gates(gate, mode="soft", delta=2.5)
    x = torch.randn(2, 3, 2, 5, dtype=torch.float64, requires_grad=True)
    s = torch.randn(3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, s: torch.func.functional_call(gate, {"s": s}, (x,)), (x, s)
    )


def test_three_modes_at_the_start():
    gate = ScaledSigmoid(5)
    x = torch.randn(2, 5, 3, 3)
    for mode, gain in (("off", 1.0), ("soft", 0.5), ("hard", 0.0)):
        for delta in (1.0, 1e4):
            set_gates(gate, mode=mode, delta=delta)
            torch.testing.assert_close(gate(x), gain * x, rtol=0, atol=0)


def test_hard_mode_is_the_limit_of_soft_mode():
    gate = ScaledSigmoid(4)
    with torch.no_grad():
        gate.s.copy_(torch.tensor([-0.3, -0.01, 0.01, 0.3]))
    set_gates(gate, delta=1e4)
    torch.testing.assert_close(gate.p, gate.is_open.float(), rtol=0, atol=1e-6)
    assert gate.is_open.tolist() == [False, False, True, True]


def test_threshold_of_the_authors_closes_what_is_undecided():
    gate = ScaledSigmoid(3)
    with torch.no_grad():
        gate.s.copy_(torch.tensor([0.0, 2.0, 2.4]))  # sigmoid: 0.5, 0.88, 0.917
    assert gate.is_open.tolist() == [False, True, True]
    set_gates(gate, threshold=0.9)
    assert gate.is_open.tolist() == [False, False, True]


@pytest.mark.parametrize("order", ORDERS)
def test_new_gates_change_nothing_and_leave_the_argument_alone(order):
    net = small_net()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    gated = add_gates(net, order, image_shape=(3, 9, 11))
    x = images()
    torch.testing.assert_close(gated.eval()(x), net.eval()(x), rtol=0, atol=0)
    assert not gates(net)
    assert [len(gate.s) for gate in gates(gated).values()] == [5, 7]
    randomise(gated)
    for name, value in net.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("mode", ["soft", "hard"])
def test_folded_gate_equals_the_explicit_layer(train, mode):
    folded = add_gates(small_net())
    randomise(folded)
    set_gates(folded, mode=mode, delta=2.0)
    explicit = add_gates(small_net())
    explicit.load_state_dict(folded.state_dict())
    set_gates(explicit, mode=mode)
    for module in explicit.modules():
        if isinstance(module, Gated):
            module.folded = False
    x = images()
    outputs = [net.train(train)(x) for net in (folded, explicit)]
    torch.testing.assert_close(*outputs)
    for output in outputs:
        output.square().sum().backward()
    for a, b in zip(folded.parameters(), explicit.parameters(), strict=True):
        if mode == "hard" and a.grad is None and b.grad is None:
            continue  # a hard gate has no gradient
        torch.testing.assert_close(a.grad, b.grad)
    torch.testing.assert_close(folded[1].running_var, explicit[1].running_var)


@pytest.mark.parametrize(("act", "same"), [(nn.ReLU, True), (nn.ReLU6, False)])
def test_orders_after_the_norm_agree_with_relu_only(act, same):
    net = small_net(act)
    nets = [add_gates(net, order, image_shape=(3, 9, 11)) for order in ORDERS[:2]]
    randomise(nets[0], 0.7)
    for ours, theirs in zip(arch_parameters(nets[1]), arch_parameters(nets[0]), strict=True):
        ours.data.copy_(theirs.data)
    x = images()
    for gated in nets:
        set_gates(gated, mode="soft", delta=1.5)
        for norm in (m for m in gated.modules() if isinstance(m, nn.BatchNorm2d)):
            norm.weight.data.fill_(8)  # large enough to meet the clip at 6
        for module in gated.modules():
            if isinstance(module, Gated):
                module.folded = False
    a, b = (gated.train()(x) for gated in nets)
    assert bool((a == b).all()) is same


def test_norm_behind_the_gate_cancels_it():
    gated = add_gates(small_net(), "conv-ss-bn-relu")
    set_gates(gated, mode="soft")
    x = images()
    halved = gated.train()(x).detach()
    set_gates(gated, mode="off")
    full = gated.train()(x).detach()
    assert float((halved - full).abs().max()) < 1e-3 * float(full.abs().max())


def test_gate_follows_shared_and_functional_activations():
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.bn1 = nn.Conv2d(3, 5, 3, padding=1), nn.BatchNorm2d(5)
            self.conv2, self.bn2 = nn.Conv2d(5, 3, 3, padding=1), nn.BatchNorm2d(3)

        def forward(self, x):
            return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + x)

    block = Block().double().eval()
    gated = add_gates(block, "conv-bn-relu-ss")
    x = images()
    torch.testing.assert_close(gated(x), block(x), rtol=0, atol=0)
    set_gates(gated, mode="hard")  # every s is 0: all closed
    torch.testing.assert_close(gated(x), F.relu(x))


def test_where_and_the_nets_own_placement_choose_the_layers():
    net = small_net()
    assert list(gates(add_gates(net, where=lambda name, norm: norm.num_features > 5))) == ["4.gate"]
    net.gate_here = lambda name: name == "1"
    assert list(gates(add_gates(net))) == ["1.gate"]


def test_schedules_are_the_printed_ones():
    paper, code = delta_schedule(10), delta_schedule(10, "code")
    printed = [1, 2.783, 7.743, 21.54, 59.95, 166.8, 464.2, 1292, 3594, 10000]
    assert paper == pytest.approx(printed, rel=1e-3)
    assert code[:3] == pytest.approx([2.512, 6.310, 15.85], rel=1e-3)
    assert code[-1] == pytest.approx(1e4)
    assert delta_schedule(5, "linear", 9.0) == [1, 3, 5, 7, 9]
    assert delta_schedule(3, "constant", 30.0) == [30, 30, 30]
    assert delta_schedule(1, "linear") == delta_schedule(1, "constant") == [1e4]
    ratios = [b / a for a, b in zip(delta_schedule(20), delta_schedule(20)[1:], strict=False)]
    assert ratios == pytest.approx([1.6238] * 19, rel=1e-4)


def test_prices_have_the_derived_gradients():
    gated = add_gates(small_net())
    randomise(gated, 0.1)
    set_gates(gated, mode="soft", delta=50.0)
    for objective in ("paper", "code"):
        total = open_gates(gated, objective)
        gradients = torch.autograd.grad(total, list(arch_parameters(gated)))
        for gate, gradient in zip(gates(gated).values(), gradients, strict=True):
            delta = 50.0 if objective == "paper" else 1.0
            p = torch.sigmoid(delta * gate.s.detach())
            torch.testing.assert_close(gradient, delta * p * (1 - p))


def test_floors_shift_a_layer_and_keep_its_ranking():
    gated = add_gates(small_net())
    first, second = arch_parameters(gated)
    first.data = torch.tensor([-5.0, -1.0, -3.0, -2.0, -4.0])
    second.data = torch.tensor([-5.0, 1.0, -3.0, 2.0, -4.0, 0.0, 3.0])
    before = second.clone()
    hold_floors(gated, {"1.gate": 2, "4.gate": 4}, margin=0.25)
    assert first.tolist() == [-2.75, 1.25, -0.75, 0.25, -1.75]  # the second largest is at 0.25
    assert torch.equal(second, before)  # four are at 0 or above already
    hold_floors(gated, {"4.gate": 5}, margin=0.25)
    assert second.tolist() == [-1.75, 4.25, 0.25, 5.25, -0.75, 3.25, 6.25]


def test_report_counts_what_the_gates_do():
    gate = ScaledSigmoid(4)
    with torch.no_grad():
        gate.s.copy_(torch.tensor([-9.0, 0.0, 1.0, 9.0]))
    row = gate_report(nn.Sequential(gate))["0"]
    assert (row["channels"], row["open"]) == (4, 2)
    assert row["undecided"] == 0.5  # p = 0.5 and p = 0.73
    assert row["gap"] == 0.5
    assert row["soft"] == pytest.approx(0.5 + sum(1 / (1 + math.exp(-s)) for s in (-9, 1, 9)))
    assert row["histogram"] == [1, 0, 0, 0, 0, 1, 0, 1, 0, 1]


def test_parameters_are_split_without_rest():
    gated = add_gates(small_net())
    mine, rest = set(arch_parameters(gated)), set(weight_parameters(gated))
    assert mine | rest == set(gated.parameters())
    assert not mine & rest


@pytest.mark.parametrize(
    "call",
    [
        lambda net: add_gates(net, "bn-first"),
        lambda net: add_gates(add_gates(net)),
        lambda net: add_gates(net, where=lambda name, norm: False),
        lambda net: add_gates(nn.Linear(3, 5)),
        lambda net: set_gates(net, mode="open"),
        lambda net: set_gates(net, delta=0.0),
        lambda net: set_gates(net, delta=math.inf),
        lambda net: set_gates(net, threshold=1.0),
        lambda net: delta_schedule(0),
        lambda net: delta_schedule(5, delta_max=0.5),
        lambda net: delta_schedule(5, form="quadratic"),
    ],
)
def test_mistakes_get_one_line(call):
    with pytest.raises(ValueError, match=r"^got [^\n]+$"):
        call(small_net())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_gate_of_a_norm_without_numbers_is_like_the_rest_of_the_net(dtype: torch.dtype):
    norm = nn.BatchNorm2d(5, affine=False, track_running_stats=False)
    net = nn.Sequential(nn.Conv2d(3, 5, 3), norm, nn.Conv2d(5, 4, 1)).to(dtype)
    (gate,) = gates(add_gates(net)).values()
    assert (gate.s.dtype, gate.delta.dtype) == (dtype, dtype)
