"""Gates behind activations, however the user's code calls these, against the product by hand."""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dnal_mini.gating import add_gates, set_gates
from dnal_mini.layers.gated_norm import Gated, GatedLate
from dnal_mini.pruning.foldgates import drop_gates

ACT = {
    "module": nn.ReLU(),
    "in place": nn.ReLU(inplace=True),
    "function": F.relu,
    "keyword": lambda x: F.relu(input=x),
    "function in place": lambda x: F.relu(x, inplace=True),
    "in place by position": lambda x: F.leaky_relu(x, 0.2, True),
    "method": lambda x: x.relu(),
    "method in place": lambda x: x.relu_(),
    "as a statement": lambda x: (nn.ReLU6(inplace=True)(x), x)[1],
    "silu, which keeps its input": lambda x: F.silu(x, inplace=True),
    "gelu": nn.GELU(),
    "slopes": nn.PReLU(5),
}
NONE_ALONE = {
    "none": lambda x: x + 1,
    "two readers": lambda x: F.relu(x) + x,
    "read before": lambda x: x.square() + F.relu(x),
    "does not keep 0": torch.sigmoid,
    "returned": lambda x: x,
    "of two norms": lambda x: F.relu(torch.cat([x, x], 1))[:, 3:8],
}


class One(nn.Module):
    """A convolution, a norm, what is behind it, a convolution."""

    def __init__(self, behind: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.norm, self.last = nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Conv2d(5, 4, 1)
        self.behind = behind

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.behind(self.norm(self.conv(x))))


def gated(behind: Callable[[Tensor], Tensor]) -> nn.Module:
    torch.manual_seed(0)
    net = add_gates(One(behind).double(), "conv-bn-relu-ss")
    for tensor in (net.norm.weight, net.norm.bias, net.norm.gate.s):
        nn.init.normal_(tensor)
    return net


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("name", ACT)
def test_the_gate_multiplies_what_the_activation_makes(name: str, train: bool):
    net, x = gated(ACT[name]).train(train), torch.randn(4, 3, 6, 7, dtype=torch.float64)
    other = copy.deepcopy(net)  # with the gates off, and the product by hand
    by_hand = other.norm.gate.s.detach().clone().requires_grad_()
    values = other.behind(other.norm(other.conv(x)))
    expected = other.last(values * torch.sigmoid(3 * by_hand)[:, None, None])
    set_gates(net, mode="soft", delta=3.0)
    assert isinstance(net.norm, GatedLate)
    found = net(x)
    torch.testing.assert_close(found, expected)
    found.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(net.norm.gate.s.grad, by_hand.grad)
    for part in ("conv", "norm", "last"):
        own = getattr(net, part).weight.grad
        torch.testing.assert_close(own, getattr(other, part).weight.grad)


@pytest.mark.parametrize("name", NONE_ALONE)
def test_without_one_activation_alone_the_norm_has_the_gate_itself(name: str):
    net, x = gated(NONE_ALONE[name]), torch.randn(4, 3, 6, 7, dtype=torch.float64)
    expected = net.last(
        net.behind(net.norm(net.conv(x)) * torch.sigmoid(net.norm.gate.s)[:, None, None])
    )
    set_gates(net, mode="soft")
    assert type(net.norm).habit is Gated
    torch.testing.assert_close(net(x), expected)


@pytest.mark.parametrize("name", [*ACT, *NONE_ALONE])
@pytest.mark.parametrize("train", [False, True])
def test_dropped_gates_leave_the_same_function(name: str, train: bool):
    net = gated({**ACT, **NONE_ALONE}[name])
    net.norm.gate.s.data[:] = torch.tensor([1, -1, 1, -1, 1.0])
    set_gates(net, mode="hard")
    plain, x = drop_gates(net).train(train), torch.randn(4, 3, 6, 7, dtype=torch.float64)
    torch.testing.assert_close(plain(x), net.train(train)(x))
    assert type(plain.norm) is nn.BatchNorm2d


class Auxiliary(One):
    """In train mode the norm's output goes to a second head, too; functional dropout besides."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x))
        extra = y.mean() if self.training else 0.0
        return self.last(F.dropout(F.relu(y), 0.5, training=self.training)) + extra


def test_a_gate_stands_where_both_modes_allow_it_and_randomness_stays_the_modes():
    net = add_gates(Auxiliary(F.relu).double(), "conv-bn-relu-ss")
    assert (type(net), type(net.norm).habit) == (Auxiliary, Gated)
    x, outputs = torch.randn(4, 3, 6, 7, dtype=torch.float64), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outputs.append(net.train()(x))
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])
    assert torch.equal(net.eval()(x), net(x))


def test_a_norm_called_twice_gates_each_of_its_activations():
    class Twice(One):
        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.norm(self.conv(x)))
            return self.last(F.relu(self.norm(x)))

    net = add_gates(Twice(F.relu).double(), "conv-bn-relu-ss")
    x = torch.randn(4, 3, 6, 7, dtype=torch.float64)
    p = torch.sigmoid(net.norm.gate.s)[:, None, None]
    expected = net.last(p * F.relu(net.norm(p * F.relu(net.norm(net.conv(x))))))
    set_gates(net, mode="soft")
    torch.testing.assert_close(net.eval()(x), expected, rtol=1, atol=1)


def test_a_copy_and_a_pickle_gate_with_their_own_s():
    net, x = gated(F.relu), torch.randn(4, 3, 6, 7, dtype=torch.float64)
    set_gates(net, mode="soft")
    before = net.eval()(x)
    net.behind = nn.ReLU()
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert torch.equal(other(x), before)
        other.norm.gate.s.data.zero_()
        assert not torch.equal(other(x), before)
        assert torch.equal(net(x), before)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # the compiler reads it
@pytest.mark.parametrize("mode", ["off", "soft"])
def test_compiled_code_gates_behind_its_activation_too(mode: str):
    net, x = gated(F.relu).eval(), torch.randn(4, 3, 6, 7, dtype=torch.float64)
    set_gates(net, mode=mode, delta=2.0)
    outputs = net(x), torch.compile(net, backend="aot_eager")(x)
    torch.testing.assert_close(outputs[1], outputs[0])
    gradients = [torch.autograd.grad(y.square().sum(), net.conv.weight)[0] for y in outputs]
    torch.testing.assert_close(gradients[1], gradients[0])
