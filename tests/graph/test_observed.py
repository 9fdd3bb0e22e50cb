"""What a run of a net shows: its copies, its images, who reads what, where two nets differ."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dnal_mini.gating import add_gates, gates, set_gates
from dnal_mini.graph.copies import copied
from dnal_mini.graph.inputs import taken_by
from dnal_mini.graph.observed import convolutions_at_the_end, difference
from dnal_mini.pruning.preview import analyse


class Keeps(nn.Module):
    """Holds its last activation, a lock, a generator, and its layers in a list of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.last = nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Conv2d(5, 4, 1)
        self.lock, self.names = threading.Lock(), (name for name in "abc")
        self.chain: list[Any] = [(self.conv, self.norm), threading.Lock()]

    def forward(self, x: Tensor) -> Tensor:
        conv, norm = self.chain[0]
        self.kept = {"deep": [norm(conv(x))]}
        return self.last(self.kept["deep"][0].relu())


def test_a_net_that_keeps_what_has_no_copy_is_copied():
    net = Keeps()
    net(torch.randn(2, 3, 9, 7))
    other = copied(net)
    assert other.chain[0][0] is other.conv is not net.conv
    assert other.lock is net.lock
    assert other.kept["deep"][0].is_leaf
    assert torch.equal(other.kept["deep"][0], net.kept["deep"][0])
    assert net.kept["deep"][0].grad_fn is not None
    gated = add_gates(net)
    set_gates(gated, mode="hard")
    assert not torch.equal(gated.eval()(x := torch.randn(2, 3, 9, 7)), net.eval()(x))


def test_a_module_without_a_copy_is_refused():
    class Single(nn.Conv2d):
        def __deepcopy__(self, memo: dict) -> "Single":
            raise TypeError("there is one of me")

    with pytest.raises(ValueError, match=r"^got a Sequential that cannot be copied \(there is one"):
        copied(nn.Sequential(Single(3, 4, 1)))


@pytest.mark.parametrize(
    ("net", "shape"),
    [
        (nn.Conv2d(4, 5, 3), (4, 32, 32)),
        (nn.Sequential(nn.Conv1d(2, 5, 40), nn.BatchNorm1d(5)), (2, 64)),
        (nn.Conv3d(1, 5, 3), (1, 32, 32, 32)),
        (nn.Sequential(nn.Linear(7, 5), nn.BatchNorm1d(5)), (7,)),
        (nn.Sequential(nn.Conv2d(1, 2, 1), nn.Flatten(), nn.Linear(2 * 28 * 28, 3)), (1, 28, 28)),
        (nn.Sequential(nn.ConvTranspose2d(6, 5, 2), nn.BatchNorm2d(5)), (6, 32, 32)),
        (nn.Sequential(nn.Conv2d(1, 2, 1), nn.Flatten(), nn.Linear(2 * 13 * 17, 3)), None),
        (nn.Sequential(nn.BatchNorm2d(5)), (5, 32, 32)),
        (nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, 2)), (5,)),
        (nn.ReLU(), None),
        (nn.Conv2d(4, 5, 3).to("meta"), None),
    ],
)
def test_images_of_a_usual_size_are_found(net: nn.Module, shape: tuple[int, ...] | None):
    inputs = taken_by(net.double())
    assert shape == (None if inputs is None else tuple(inputs[0].shape[1:]))
    if inputs is not None:
        (images,) = inputs
        assert (len(images), images.dtype) == (2, torch.float64)
        assert torch.equal(images, taken_by(net)[0])


def test_looking_for_images_and_gating_leave_a_net_alone():
    net = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Dropout(), nn.Conv2d(5, 4, 1))
    before, random = copied(net).state_dict(), torch.get_rng_state()
    gated = add_gates(net)
    assert torch.equal(torch.get_rng_state(), random)
    for name, tensor in (*net.state_dict().items(), *gated.state_dict().items()):
        assert "gate" in name or torch.equal(tensor, before[name]), name
    assert all(module.training for module in (*net.modules(), *gated.modules()))


class Ends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.body = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.side, self.last = nn.Conv2d(4, 2, 1), nn.Conv2d(4, 3, 3, padding=1)

    def forward(self, x: Tensor) -> dict[str, Any]:
        y = self.first(x).relu()
        y = y + self.body(y)
        return {"image": x - self.last(y), "more": [self.side(y).mean((2, 3)).softmax(1)]}


def test_convolutions_get_gates_where_there_is_no_norm_but_not_the_last_ones():
    net = Ends().requires_grad_(False)  # a frozen one, too
    images = torch.randn(2, 3, 9, 7)
    assert convolutions_at_the_end(net, (images,)) == {"last", "side"}
    gated = add_gates(net)
    assert list(gates(gated)) == ["first.gate", "body.gate"]
    assert list(gates(add_gates(net, where=lambda name, layer: name != "body"))) == ["first.gate"]
    set_gates(gated, mode="soft")
    halved = net.first(images).relu() / 2
    expected = images - net.last(halved + net.body(halved) / 2)
    torch.testing.assert_close(gated(images)["image"], expected)


def test_differences_are_those_of_all_tensors_and_of_what_cannot_be_compared():
    images = torch.ones(2, 3)
    net = nn.Linear(3, 2, bias=False)
    nn.init.constant_(net.weight, 1.0)
    other = copied(net)
    other.weight.data[1, 2] = 1.5
    assert difference(net, net, (images,)) == 0
    assert difference(net, other, (images,)) == pytest.approx(0.5 / 3)
    for wrong in (nn.Linear(3, 3), nn.Linear(4, 2)):
        assert difference(net, wrong, (images,)) == float("inf")
    other.weight.data[0] = torch.nan
    assert difference(net, other, (images,)) == float("inf")
    assert difference(other, copied(other), (images,)) == 0
    assert difference(nn.Linear(4, 2), net, images) == 0  # it does not run itself


class Finds(nn.Module):
    """Finds its norm by ``way``, or looks at what it is."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.conv, self.norm, self.last = nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Conv2d(5, 4, 1)
        self.way, norm = way, self.norm
        self.find = lambda: norm

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        if self.way == "class" and type(self.norm) is nn.BatchNorm2d:
            x = x * 2
        return self.last((self.find() if self.way == "lambda" else self.norm)(x))


@pytest.mark.parametrize(
    ("way", "why"), [("class", "differs by"), ("lambda", "calls norm of the original")]
)
@pytest.mark.parametrize("ask", [add_gates, lambda net: analyse(net, (3, 16, 16))])
def test_a_forward_that_gates_would_change_is_refused_with_the_cause(
    ask: Callable, way: str, why: str
):
    with pytest.raises(ValueError, match=rf"^got a Finds whose copy [^\n]*{why}.*; need a forward"):
        ask(Finds(way))
    assert len(gates(add_gates(Finds("self")))) == 1
