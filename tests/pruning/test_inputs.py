"""Networks whose forward takes more than images: several tensors, flags, frames of a film."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dnal_mini as dnal
from dnal_mini.graph.inputs import given, recorded, written
from dnal_mini.refused import Refused


def block(before: int, channels: int) -> nn.Sequential:
    conv = nn.Conv2d(before, channels, 3, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(channels), nn.ReLU())


class Two(nn.Module):
    """Two images of different channels, joined; a flag and a word that choose the way."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = block(3, 12), block(1, 8)
        self.both, self.end = block(20, 10), nn.Linear(10, 4)

    def forward(
        self, image: Tensor, depth: Tensor | None = None, how: str = "mean", twice: bool = False
    ) -> Tensor:
        depth = image[:, :1] * 0 if depth is None else depth
        x = self.both(torch.cat([self.left(image), self.right(depth)], 1))
        x = x.mean((2, 3)) if how == "mean" else x.amax((2, 3))
        return self.end(x * 2 if twice else x)


class Film(nn.Module):
    """Frames folded into the batch: (films, frames, channels, height, width)."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(block(3, 12), block(12, 10))
        self.over, self.end = nn.Linear(10, 8), nn.Linear(8, 3)

    def forward(self, film: Tensor) -> Tensor:
        films, frames = film.shape[:2]
        x = self.body(film.flatten(0, 1)).mean((2, 3))
        return self.end(self.over(x.view(films, frames, -1)).relu().mean(1))


class Tokens(nn.Module):
    """An image, whole numbers that choose a row of a table, a number for each image."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.table = block(3, 12), nn.Embedding(7, 12)
        self.more, self.end = block(12, 9), nn.Conv2d(9, 2, 1)

    def forward(self, image: Tensor, word: Tensor, *, noise: float = 0.5) -> Tensor:
        x = self.body(image) + self.table(word)[:, :, None, None]
        return self.end(self.more(x)) * noise


class Timed(nn.Module):
    """A number of each image, of which the forward takes the root."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.end = nn.Sequential(block(3, 12), block(12, 10)), nn.Conv2d(10, 2, 1)

    def forward(self, image: Tensor, time: Tensor) -> Tensor:
        return self.end(self.body(image) * time.sqrt()[:, None, None, None])


IMAGE, DEPTH = torch.rand(2, 3, 12, 10), torch.rand(2, 1, 12, 10)
CASES: dict[str, tuple[Any, Any]] = {
    "two": (Two, (IMAGE, DEPTH)),
    "without the second": (Two, (IMAGE, None, "max")),
    "by name": (Two, {"image": IMAGE, "depth": DEPTH, "twice": True}),
    "one tensor": (Two, IMAGE),
    "three of a batch": (Two, (torch.rand(3, 3, 9, 9), torch.rand(3, 1, 9, 9))),
    "film": (Film, (torch.rand(2, 5, 3, 12, 10),)),
    "one film": (Film, torch.rand(1, 5, 3, 12, 10)),
    "words": (Tokens, (IMAGE, torch.tensor([3, 6]))),
    "times": (Timed, (IMAGE, torch.tensor([0.1, 0.9]))),
}


def closed(net: nn.Module, inputs: Any) -> nn.Module:
    """A copy with gates, a third of them closed."""
    gated = dnal.add_gates(net, example_inputs=inputs)
    for number, gate in enumerate(dnal.gates(gated).values()):
        gate.s.data = torch.where(torch.arange(len(gate.s)) % 3 == number % 3, -1.0, 1.0)
    dnal.set_gates(gated, mode="hard")
    return gated


def call(net: nn.Module, inputs: Any) -> Tensor:
    if isinstance(inputs, dict):
        return net(**inputs)
    return net(*(inputs if isinstance(inputs, tuple) else (inputs,)))


@pytest.mark.parametrize("case", CASES)
def test_a_net_of_any_inputs_is_gated_cut_saved_and_deployed(case: str, tmp_path):
    build, inputs = CASES[case]
    torch.manual_seed(0)
    net = build().eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
    gated = closed(net, inputs)
    small = dnal.prune(gated, example_inputs=inputs)
    expected = call(gated, inputs)
    torch.testing.assert_close(call(small.module, inputs), expected)
    whole, cut = (dnal.cost(n, example_inputs=inputs) for n in (gated, small.module))
    assert cut.macs < 0.8 * whole.macs
    assert {trial["mode"] for trial in small.spec["trials"]} >= {"eval", "train"}
    dnal.save(small, tmp_path / "net.safetensors")
    again = dnal.load(tmp_path / "net.safetensors", build)
    assert torch.equal(call(again.module.eval(), inputs), call(small.module, inputs))
    for deployed in (again.deploy(), dnal.deploy(small.module, example_inputs=inputs)):
        assert not any(isinstance(m, nn.BatchNorm2d) for m in deployed.modules())
        torch.testing.assert_close(call(deployed, inputs), expected)
    rows = dnal.analyse(net, example_inputs=inputs).layers
    assert sum(row["can_go"] for row in rows) >= 2


def test_a_changed_batch_and_size_are_tried_where_the_net_takes_them():
    small = dnal.prune(closed(Two().eval(), (IMAGE, DEPTH)), example_inputs=(IMAGE, DEPTH))
    tried = [(tuple(t["image_shape"]), t["batch"], t["mode"]) for t in small.spec["trials"]]
    assert tried[:3] == [
        ((3, 12, 10), 2, "eval"), ((3, 7, 5), 3, "eval"), ((3, 7, 5), 4, "train")
    ]  # fmt: skip


def test_inputs_are_written_down_and_made_again():
    net = Two()
    what = given(net, (3, 32, 32), {"image": IMAGE, "how": "max"})
    assert written(recorded(what)) == what
    assert recorded(what)["example_inputs"][1:] == [None, "max", False]
    assert written(recorded(given(net, (3, 32, 32)))) == [3, 32, 32]


class ByName(nn.Module):
    def forward(self, x: Tensor, *, scale: float) -> Tensor:
        return x * scale


MISTAKES: dict[str, tuple[Any, str]] = {
    "empty": ((), "got example_inputs ()"),
    "number": (7, "got example_inputs 7"),
    "object": ((IMAGE, object()), "among example_inputs; need finite tensors"),
    "nan": ((IMAGE * torch.nan,), "among example_inputs; need finite tensors"),
    "complex": ((IMAGE + 1j,), "among example_inputs; need finite tensors"),
    "nest": (([IMAGE],), "among example_inputs; need finite tensors"),
    "no name of forward's": ({"picture": IMAGE}, "forward does not take (missing a required"),
    "too many": ((IMAGE, DEPTH, "mean", False, 3), "takes from 2 to 5 positional arguments"),
    "another size": ((IMAGE, DEPTH[..., 1:]), "got example_inputs of shapes [2, 3, 12, 10], [2, 1"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("name", ["add_gates", "prune", "cost", "deploy", "analyse"])
def test_a_mistake_in_the_inputs_is_one_line(name: str, mistake: str):
    inputs, need = MISTAKES[mistake]
    with pytest.raises(Refused) as caught:
        getattr(dnal, name)(Two().eval(), example_inputs=inputs)
    text = str(caught.value)
    assert "\n" not in text
    assert need in text or "got image_shape (3, 12, 10) and (1, 12, 9)" in text


def test_arguments_that_go_by_name_only_are_named():
    with pytest.raises(Refused, match="takes scale by name only"):
        dnal.cost(ByName(), example_inputs={"x": IMAGE, "scale": 2.0})
