"""What the preview says of a channel is what ``prune`` does with it."""

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import random_nets
import torch
from small_nets import NETS, SHAPE, make_shallow, settled
from torch import Tensor, nn

import dnal_mini as dnal
from dnal_mini.models import MODELS
from dnal_mini.pruning import preview
from dnal_mini.refused import Refused


def block(inputs: int, outputs: int, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, 3, padding=1, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())


class Net(nn.Module):
    """Blocks a and b, what ``meet`` does with them, a head of its own norm and five classes."""

    def __init__(self, a: nn.Module, b: nn.Module, width: int, meet: Any) -> None:
        super().__init__()
        self.a, self.b, self.meet = a, b, meet
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.meet(self.a, self.b, x))


def halves(a: nn.Module, b: nn.Module, x: Tensor) -> Tensor:
    first, second = b(a(x)).chunk(2, 1)
    return torch.cat((second, first), 1)


CASES = {
    "chain": lambda: Net(block(3, 7), block(7, 11), 11, lambda a, b, x: b(a(x))),
    "residual": lambda: Net(block(3, 7), block(7, 7), 7, lambda a, b, x: (t := a(x)) + b(t)),
    "bare trunk": lambda: Net(
        nn.Conv2d(3, 7, 1), block(7, 7), 7, lambda a, b, x: (t := a(x)) + b(t)
    ),
    "tie": lambda: Net(
        nn.Conv2d(3, 7, 1), block(7, 7), 7, lambda a, b, x: (t := a(x)) + (u := b(t)) + u
    ),
    "wall": lambda: Net(block(3, 7), block(7, 11), 11, lambda a, b, x: b(a(x).cumsum(1))),
    "chunk": lambda: Net(block(3, 7), block(7, 10), 10, halves),
    "groups": lambda: Net(block(3, 6), block(6, 9, groups=3), 9, lambda a, b, x: b(a(x))),
    "depthwise": lambda: Net(block(3, 7), block(7, 7, groups=7), 7, lambda a, b, x: b(a(x))),
    "sigmoid": lambda: Net(
        block(3, 7), block(7, 9), 9, lambda a, b, x: b(a[1](a[0](x)).sigmoid())
    ),
    "one channel": lambda: Net(block(3, 1), block(1, 7), 7, lambda a, b, x: b(a(x))),
    "no norm": lambda: Net(nn.Conv2d(3, 7, 1), nn.Conv2d(7, 9, 1), 9, lambda a, b, x: b(a(x))),
}  # fmt: skip


def net_of(name: str) -> nn.Module:
    torch.manual_seed(3)
    return settled(MODELS[name](**NETS[name]) if name in NETS else CASES[name]())


def width(net: nn.Module, name: str) -> int:
    """Outputs of a layer, which the surgery may have wrapped between two index operations."""
    layer = net.get_submodule(name)
    inside = [m for m in layer.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    return int(inside[0].weight.shape[0])


def first_closed(net: nn.Module, shape: Sequence[int] = SHAPE) -> nn.Module:
    """A gated copy in which channel 0 of every gate is closed and all others are open."""
    try:
        gated = dnal.add_gates(net, image_shape=shape)
    except Refused:  # a net of one layer
        gated = net
    dnal.set_gates(gated, mode="hard")
    for gate in dnal.gates(gated).values():
        gate.s.data.fill_(1)
        gate.s.data[0] = -1
    return gated


@pytest.mark.parametrize("name", [*CASES, *NETS])
def test_a_channel_goes_if_and_only_if_prune_takes_it_out(name: str, monkeypatch):
    make_shallow(monkeypatch)
    net = net_of(name)
    told, small = preview.analyse(net, SHAPE), dnal.prune(first_closed(net), SHAPE).module
    assert len(told.layers) == sum(isinstance(m, nn.Conv2d | nn.Linear) for m in net.modules())
    for row in told.layers:
        before = width(net, row["layer"])
        assert width(small, row["layer"]) == before - row["can_go"], row
        assert row["channels"] == before
        assert row["can_go"] is (row["why"] == "")


SEEDS = [n if n < 66 else pytest.param(n, marks=pytest.mark.slow) for n in range(60, 80)]


@pytest.mark.parametrize("seed", SEEDS)
def test_the_same_holds_for_random_nets_by_what_the_surgery_was_told(seed: int):
    net = random_nets.settle(random_nets.build(random_nets.program(seed)), seed)
    told = preview.analyse(net, random_nets.SHAPE)
    spec = dnal.prune(first_closed(net, random_nets.SHAPE), random_nets.SHAPE).spec
    keep, cut = spec["keep"], spec["modules"]
    for row in told.layers:
        name = row["layer"]
        parents = [name.rsplit(".", k)[0] for k in range(name.count(".") + 1)]
        if any({"gone", "source"} & set(cut.get(parent, {})) for parent in parents):
            continue  # a branch that is dead as a whole
        outputs = "1" if isinstance(net.get_submodule(name), nn.ConvTranspose2d) else "0"
        stays = 0 in keep.get(f"{name}.weight", {}).get(outputs, [0])
        assert row["can_go"] is not stays, (row, keep.get(f"{name}.weight"))


WHY = {  # of the layers a, b and of the classes
    "chain": ("", "", "no gate"),
    "residual": ("", "", "no gate"),
    "bare trunk": ("no gate", "", "no gate"),
    "tie": ("no gate", "tied", "no gate"),
    "wall": ("walled", "", "no gate"),
    "chunk": ("", "held", "no gate"),
    "groups": ("held", "held", "no gate"),
    "depthwise": ("", "", "no gate"),
    "sigmoid": ("constant", "", "no gate"),
    "one channel": ("held", "", "no gate"),
    "no norm": ("", "", "no gate"),
}


@pytest.mark.parametrize("name", CASES)
def test_the_reason_why_a_channel_stays_is_the_real_one(name: str):
    told = preview.analyse(CASES[name](), SHAPE)
    assert tuple(row["why"] for row in told.layers) == WHY[name]
    assert told.walls == (["cumsum in forward"] if name == "wall" else [])


def test_the_net_is_left_alone_and_gates_that_were_never_trained_count_as_open():
    net = CASES["chain"]()
    gated = dnal.add_gates(net)
    dnal.set_gates(gated, mode="soft", threshold=0.9)
    before = copy.deepcopy(gated.state_dict())
    assert str(preview.analyse(gated, SHAPE)) == str(preview.analyse(net, SHAPE))
    torch.testing.assert_close(gated.state_dict(), before, rtol=0, atol=0)
    assert gated.training
    assert {gate.mode for gate in dnal.gates(gated).values()} == {"soft"}


def test_trained_gates_count_as_they_stand():
    gated = dnal.add_gates(CASES["chain"]())
    first, second = dnal.gates(gated).values()
    with torch.no_grad():
        first.s.copy_(torch.tensor([1, -1, -1, 1, 1, 1, 1.0]))
        second.s.copy_(torch.tensor([-1.0] * 10 + [1.0]))
    told = preview.analyse(gated, SHAPE)
    assert [row["channels"] for row in told.layers] == [5, 1, 5]
    assert [row["can_go"] for row in told.layers] == [True, True, False]


def test_gates_of_another_place_are_asked_where_they_stand():
    net = CASES["chain"]()
    only = dnal.add_gates(net, where=lambda name, norm: name.startswith("b"))
    assert [row["why"] for row in preview.analyse(only, SHAPE).layers] == ["no gate", "", "no gate"]
    late = dnal.add_gates(CASES["sigmoid"](), "conv-bn-relu-ss")
    told = preview.analyse(late, SHAPE)  # the gate of a norm before a sigmoid is its own
    assert [row["why"] for row in told.layers] == ["constant", "", "no gate"]


def test_the_page_begins_with_a_summary_and_is_narrow():
    page = str(preview.analyse(CASES["wall"](), SHAPE)).splitlines()
    assert page[0] == "1 of 3 layers can lose channels; 1 stands at a wall; 1 has no gate"
    assert page[2].startswith("a.0 ")
    assert page[2].endswith(" 7  stays: walled, by a wall or the output")
    assert page[3].split() == ["b.0", "11", "goes"]
    assert page[-1] == "wall: cumsum in forward"
    deep = nn.Sequential()
    deep.add_module("a_name_of_more_than_fifty_letters_is_cut_at_its_beginning", block(3, 5))
    lines = str(preview.analyse(deep, SHAPE)).splitlines()
    assert max(map(len, lines)) <= 100
    assert lines[2].startswith("…")
    assert "letters_is_cut_at_its_beginning.0 " in lines[2]


@pytest.mark.parametrize("shape", [(3, 16, 16), (5, 16, 16)])
def test_what_prune_refuses_is_refused_in_the_same_words(shape):
    net = CASES["chain"]()
    gated = dnal.add_gates(net).eval()
    if shape[0] == 3:  # later, or add_gates would tell
        net.meet = gated.meet = lambda a, b, x: b(a(x)) if x.sum() > 0 else b(a(x)) * 2
    for gate in dnal.gates(gated).values():
        close_all = torch.ones_like(gate.s)
        gate.s.data.copy_(close_all)
    with pytest.raises(ValueError, match="got") as refused:
        dnal.prune(gated, shape)
    with pytest.raises(ValueError, match="got") as told:
        preview.analyse(net, shape)
    assert str(told.value) == str(refused.value)
