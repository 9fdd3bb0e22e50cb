"""Nets that no pruner can take are told so by ``add_gates`` already, in one line with the cause.

What only looks odd is taken, and cut exactly.
"""

import random
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from small_nets import outputs, relative_difference, settled
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

import dnal_mini as dnal
from dnal_mini.gating import add_gates, gates, set_gates
from dnal_mini.pruning.pruner import prune
from dnal_mini.refused import Refused

SHAPE = (3, 9, 7)
HERE = r"test_bad_input\.py:\d+: "


class Net(nn.Module):
    """A convolution, a norm, what a test puts in the middle, a head."""

    def __init__(self, middle: Callable[[nn.Module, Tensor], Tensor] = lambda net, x: x) -> None:
        super().__init__()
        self.conv, self.bn, self.fc = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 5)
        self.middle, self.count = middle, 0

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.conv(x)).relu()
        x = self.middle(self, x)
        return self.fc(x.mean((2, 3)))


class NoForward(Net):
    """As the module of a training framework that has a ``training_step`` alone."""

    forward = nn.Module.forward


def changed(change: Callable[[nn.Module], object]) -> nn.Module:
    net = Net()
    change(net)
    return net


def branches(net: nn.Module, x: Tensor) -> Tensor:
    if x.mean() > 0.5:
        return x
    return -x


def leaves_torch(net: nn.Module, x: Tensor) -> Tensor:
    return x + torch.from_numpy(x.detach().numpy())


def raises(net: nn.Module, x: Tensor) -> Tensor:
    raise KeyError("no such thing")


def draws(net: nn.Module, x: Tensor) -> Tensor:
    return x + torch.randn_like(x)


def drops(net: nn.Module, x: Tensor) -> Tensor:
    return F.dropout(x)


def draws_elsewhere(net: nn.Module, x: Tensor) -> Tensor:
    return x * random.random()


def counts(net: nn.Module, x: Tensor) -> Tensor:
    net.count += 1
    return x if net.count % 2 else -x


def by_exact_class(net: nn.Module, x: Tensor) -> Tensor:
    return x * (2 if type(net.bn) is nn.BatchNorm2d else 1)


def distributed() -> nn.Module:
    """As every process of a group has it; there is no group here."""
    net = DistributedDataParallel.__new__(DistributedDataParallel)
    nn.Module.__init__(net)
    net.module = Net()
    return net


def quantised() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        last = torch.ao.nn.quantized.dynamic.Linear(8, 5)
    return changed(lambda net: setattr(net, "fc", last))


def not_a_number(net: nn.Module) -> None:
    net.conv.weight.data[0, 0, 0, 0] = float("nan")


def infinite_statistics(net: nn.Module) -> None:
    net.bn.running_var[2] = float("inf")


REFUSED = {
    "DataParallel": (lambda: nn.DataParallel(Net()), "DataParallel around.*pass net.module"),
    "distributed": (distributed, "DistributedDataParallel around.*pass net.module"),
    "averaged": (lambda: AveragedModel(Net()), "AveragedModel around.*pass net.module"),
    "compiled": (lambda: torch.compile(Net()), "OptimizedModule around.*pass net._orig_mod"),
    "without forward": (NoForward, r'NoForward.*missing the required "forward" function'),
    "scripted": (lambda: torch.jit.script(nn.Sequential(nn.BatchNorm2d(3))), "scripted module"),
    "traced": (lambda: torch.jit.trace(Net().eval(), torch.rand(1, *SHAPE)), "scripted module"),
    "scripted part": (
        lambda: changed(lambda net: setattr(net, "act", torch.jit.script(nn.ReLU()))),
        "scripted module in act",
    ),
    "quantised": (quantised, "quantised layer in fc"),
    "lazy": (lambda: nn.Sequential(nn.Conv2d(3, 8, 1), nn.LazyBatchNorm2d()), "lazy layers in 1"),
    "meta": (lambda: Net().to("meta"), "meta device"),
    "two devices": (lambda: changed(lambda net: net.bn.to("meta")), "cpu and meta"),
    "NaN": (lambda: changed(not_a_number), "NaN or infinite numbers in conv.weight"),
    "infinite": (lambda: changed(infinite_statistics), "infinite numbers in bn.running_var"),
    "branch": (lambda: Net(branches), rf"branch on the numbers.*{HERE}if x.mean\(\) > 0.5"),
    "numpy": (lambda: Net(leaves_torch), rf"numpy\(\).*{HERE}return x \+ torch.from_numpy"),
    "raises": (lambda: Net(raises), rf"no such thing' at {HERE}raise KeyError"),
    "noise": (
        lambda: Net(draws),
        rf"random numbers in eval.*\(randn_like at {HERE}x = self.mid",
    ),
    "dropout": (lambda: Net(drops), rf"random numbers.*\(dropout at {HERE}x = self.middle"),
    "noise of others": (lambda: Net(draws_elsewhere), "gives one image two answers"),
    "exact class": (lambda: Net(by_exact_class), "does not look at what a layer is made of"),
    "counts": (lambda: Net(counts), "gives one image two answers"),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*torch.jit.*", "ignore:Lazy")
@pytest.mark.parametrize("case", REFUSED)
def test_add_gates_tells_in_one_line_why_nobody_could_cut_the_net(case: str):
    build, words = REFUSED[case]
    net = build()
    with pytest.raises(Refused, match=rf"^got [^\n]*{words}[^\n]*$"):
        add_gates(net, image_shape=SHAPE)


SHAPES = {
    "two numbers": ((9, 7), "channels, height, width|which fails"),
    "floats": ((3.0, 9.0, 7.0), r"image_shape \(3.0, 9.0, 7.0\); need positive ints"),
    "zero": ((3, 0, 7), "need positive ints"),
    "too small": ((3, 2, 2), r"Kernel size can't be greater.* at test_bad_input\.py"),
    "channels": ((4, 9, 7), r"which fails.* at test_bad_input\.py"),
}


@pytest.mark.parametrize("case", SHAPES)
def test_add_gates_tells_what_images_the_net_does_not_take(case: str):
    shape, words = SHAPES[case]
    with pytest.raises(Refused, match=rf"^got [^\n]*{words}[^\n]*$"):
        add_gates(Net(), image_shape=shape)


def prints(net: nn.Module, x: Tensor) -> Tensor:
    print("seen", x.shape)
    return x


def keeps(net: nn.Module, x: Tensor) -> Tensor:
    net.__dict__.setdefault("seen", []).append(x)
    return x


def by_a_number(net: nn.Module, x: Tensor) -> Tensor:
    return x * (x.max().item() + 1)


def moves_an_average(net: nn.Module, x: Tensor) -> Tensor:
    net.ema.mul_(0.9).add_(x.mean((0, 2, 3)).detach())
    return x + net.ema[:, None, None].sigmoid()


def average() -> nn.Module:
    net = Net(moves_an_average)
    net.register_buffer("ema", torch.zeros(8))
    return net


def slopes_of_the_norm() -> nn.Module:
    """A parameter that a norm and another layer share."""
    net = Net(lambda net, x: net.act(x))
    net.act = nn.PReLU(8)
    net.act.weight = net.bn.weight
    return net


def two_norms_share() -> nn.Module:
    net = Net(lambda net, x: net.bn2(net.conv2(x)))
    net.conv2, net.bn2 = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
    net.bn2.weight = net.bn.weight
    return net


TAKEN = {
    "prints": lambda: Net(prints),
    "keeps": lambda: Net(keeps),
    "by a number": lambda: Net(by_a_number),
    "moves an average": average,
    "slopes of the norm": slopes_of_the_norm,
    "two norms share": two_norms_share,
    "bias of the norm": lambda: changed(lambda net: setattr(net.conv, "bias", net.bn.bias)),
}


@pytest.mark.parametrize("case", TAKEN)
def test_what_only_looks_odd_is_gated_and_cut(case: str):
    torch.manual_seed(1)
    net = add_gates(settled(TAKEN[case]()).eval(), image_shape=SHAPE)
    for gate in gates(net).values():
        gate.s.data = torch.tensor([1.0, -1, 1, 1, -1, -1, 1, 1])
    set_gates(net, mode="hard")
    small = prune(net, SHAPE)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    for look in (dnal.cost, dnal.analyse, lambda *given: dnal.latency(*given, budget_s=0.01)):
        look(net, SHAPE)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    images = torch.randn(3, *SHAPE)
    assert relative_difference(outputs(net, images), outputs(small.module, images)) <= 1e-10
