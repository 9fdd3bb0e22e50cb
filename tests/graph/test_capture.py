"""What a network's forward leaves behind: a graph, and a refusal that names the true cause."""

import collections
import copy
import dataclasses
import gc
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel

from dnal_mini.graph import cache
from dnal_mini.graph.cache import captured, structure_of
from dnal_mini.graph.capture import capture
from dnal_mini.graph.outputs import tensors_in
from dnal_mini.graph.places import shape_of
from dnal_mini.refused import Refused

IMAGES = (torch.rand(2, 3, 8, 8),)


class Net(nn.Module):
    """Convolution, norm, and whatever else is done to them."""

    def __init__(self, middle: Any = lambda net, x: x) -> None:
        super().__init__()
        self.conv, self.bn, self.middle = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), middle

    def forward(self, x: Tensor) -> Any:
        return self.middle(self, F.relu(self.bn(self.conv(x))))


def kinds(graph: Any) -> list[str]:
    return [str(node.target).split(".")[1] for node in graph.nodes if node.op == "call_function"]


def test_a_forward_is_its_operations_with_named_tensors():
    graph = capture(Net().eval(), IMAGES)
    assert kinds(graph) == ["conv2d", "batch_norm", "relu"]
    assert [layer.name for layer in graph.layers.values()] == ["conv", "bn"]
    assert shape_of(graph.nodes[-2]) == (2, 4, 6, 6)
    assert set(graph.tensors.values()) >= {"conv.weight", "bn.running_mean"}


def test_the_net_is_left_as_it_was():
    net = Net()
    net.bn.eval()
    before, flags = {k: v.clone() for k, v in net.state_dict().items()}, [net.training, False]
    capture(net, IMAGES)
    assert [net.training, net.bn.training] == flags
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_a_part_that_only_train_mode_calls_is_seen():
    def middle(net: nn.Module, x: Tensor) -> Any:
        return (x, net.aux(x)) if net.training else x

    net = Net(middle)
    net.aux = nn.Conv2d(4, 2, 1)
    assert [layer.name for layer in capture(net, IMAGES).layers.values()] == ["conv", "bn", "aux"]


def test_a_part_that_wants_larger_images_in_train_mode_is_left_out_and_said():
    net = Net(lambda net, x: (x, net.aux(x)) if net.training else x)
    net.aux = nn.Conv2d(4, 2, 7)
    graph = capture(net, IMAGES)
    assert [layer.name for layer in graph.layers.values()] == ["conv", "bn"]
    assert "aux is not called" in graph.notes[0]


def test_an_overwritten_tensor_is_read_as_it_is_afterwards():
    def middle(net: nn.Module, x: Tensor) -> Tensor:
        x[:, 0] = 0
        return x + 1

    graph = capture(Net(middle), IMAGES)
    assert [node.name for node in graph.written] == ["relu"]


Pair = collections.namedtuple("Pair", "first second")


@dataclasses.dataclass
class Logits:
    logits: Tensor
    name: str = "head"


class Bag:
    def __init__(self, x: Tensor) -> None:
        self.x, self.count = x, 3


@pytest.mark.parametrize(
    "wrap", [Logits, Bag, lambda x: Pair(x, 3), lambda x: {"a": [x], "b": None}, lambda x: (x, 7)]
)
def test_a_tensor_is_found_in_whatever_a_forward_returns(wrap):
    graph = capture(Net(lambda net, x: wrap(x)), IMAGES)
    (output,) = (node for node in graph.nodes if node.op == "output")
    assert [node.name for node in output.all_input_nodes] == ["relu"]
    x = torch.rand(3)
    assert tensors_in(wrap(x))[0] is x


def branch(net: nn.Module, x: Tensor) -> Tensor:
    if x.mean() > 0.5:  # the line to be named
        return x
    return -x


def raises(net: nn.Module, x: Tensor) -> Tensor:
    raise KeyError("no such thing")


def lazy() -> nn.Module:
    return nn.Sequential(nn.LazyConv2d(3, 1), nn.BatchNorm2d(3))


def quantised() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.Sequential(torch.ao.nn.quantized.dynamic.Linear(3, 4))


def on_two_devices() -> nn.Module:
    net = Net()
    net.bn.to("meta")
    return net


REFUSED = {
    "wrapped": (lambda: nn.DataParallel(Net()), "DataParallel around a network.*pass net.module"),
    "averaged": (lambda: AveragedModel(Net()), "AveragedModel around a network.*pass net.module"),
    "compiled": (lambda: torch.compile(Net()), "OptimizedModule around.*pass net._orig_mod"),
    "scripted": (lambda: torch.jit.script(nn.ReLU()), "scripted module"),
    "scripted part": (lambda: nn.Sequential(torch.jit.script(nn.ReLU())), "scripted module in 0"),
    "lazy": (lazy, "lazy layers in 0"),
    "quantised": (quantised, "quantised layer in 0"),
    "meta": (lambda: Net().to("meta"), "meta device"),
    "two devices": (on_two_devices, "cpu and meta"),
    "no module": (lambda: F.relu, "a function; need an nn.Module"),
    "branch": (lambda: Net(branch), r"branch on the numbers.*test_capture.py:\d+: if x.mean"),
    "raises": (lambda: Net(raises), "no such thing' at test_capture.py.*raise KeyError"),
    "noise": (lambda: Net(lambda net, x: x + torch.rand(1)), r"random numbers in eval mode"),
    "dropout": (lambda: Net(lambda net, x: F.dropout(x)), r"dropout at test_capture.py:"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*torch.jit.*", "ignore:Lazy")
@pytest.mark.parametrize("case", REFUSED)
def test_a_refusal_is_one_line_with_the_true_cause(case):
    make, words = REFUSED[case]
    with pytest.raises(Refused, match=rf"^got [^\n]*{words}[^\n]*$"):
        capture(make(), IMAGES)


def test_what_a_forward_prints_is_not_seen(capsys):
    capture(Net(lambda net, x: (print("hello"), x)[1]), IMAGES)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("searched", [True, False])
def test_garbage_is_searched_for_afterwards_as_before(searched):
    seen = []
    net = Net(lambda net, x: (seen.append(gc.isenabled()), x)[1])
    (gc.enable if searched else gc.disable)()
    try:
        capture(net, IMAGES)
        assert gc.isenabled() is searched
    finally:
        gc.enable()
    assert not any(seen)


# --- by structure ----------------------------------------------------------------------------


def test_nets_of_one_structure_share_a_capture_whatever_their_numbers(monkeypatch):
    monkeypatch.setattr(cache, "_kept", collections.OrderedDict())
    shared = lambda net, x: x  # noqa: E731 - the same function in both
    assert captured(Net(shared), IMAGES) is captured(Net(shared), IMAGES)
    assert captured(Net(shared), IMAGES) is not captured(Net(shared), (torch.rand(2, 3, 9, 9),))


def test_a_net_is_captured_once_for_both_precisions_and_as_it_is_cut(monkeypatch):
    monkeypatch.setattr(cache, "_kept", collections.OrderedDict())
    net = changed(lambda net: None)
    found = captured(net, IMAGES)
    (norm,) = (n for n in found.nodes if "batch_norm" in str(n.target))
    assert norm.meta["val"].dtype == torch.float64
    assert captured(copy.deepcopy(net).double(), [x.double() for x in IMAGES]) is found
    assert {p.dtype for p in net.parameters()} == {torch.float32}


def test_a_forward_that_is_of_float32_alone_is_captured_so(monkeypatch):
    monkeypatch.setattr(cache, "_kept", collections.OrderedDict())
    mix = torch.rand(6, 5)  # a plain attribute: no net.double() finds it
    found = captured(Net(lambda net, x: x @ mix), IMAGES)
    assert [n.meta["val"].dtype for n in found.nodes if n.users][-1] == torch.float32


def changed(change: Any) -> nn.Module:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
    change(net)
    return net


CHANGES = {
    "stride": lambda net: setattr(net[0], "stride", (2, 2)),
    "class": lambda net: net.__setitem__(2, nn.ReLU6()),
    "width": lambda net: net.__setitem__(0, nn.Conv2d(3, 4, 1, bias=False)),
    "flag": lambda net: setattr(net, "flag", True),
    "function": lambda net: setattr(net, "act", F.gelu),
    "words": lambda net: setattr(net, "plan", [1, ("a", 2.5)]),
    "precision": lambda net: net.half(),
    "another order": lambda net: setattr(net, "chain", [net[1], net[0]]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_net_of_another_structure_has_another_key(change):
    plain = structure_of(changed(lambda net: None), IMAGES)
    assert plain == structure_of(changed(lambda net: None), IMAGES) is not None
    assert structure_of(changed(CHANGES[change]), IMAGES) not in (plain, None)


@pytest.mark.parametrize(
    "change",
    [
        lambda net: setattr(net, "rule", Bag(torch.rand(1))),
        lambda net: net[0].register_forward_hook(lambda module, x, y: y * 2),
        lambda net: setattr(net, "outside", [nn.Conv2d(3, 4, 1)]),
    ],
)
def test_what_cannot_be_compared_is_captured_anew(change):
    assert structure_of(changed(change), IMAGES) is None
