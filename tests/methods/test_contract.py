"""Three kinds of method go through one driver: a scorer, a widther that expands, a designer.

The widther and the designer are stubs of this file: what the driver knows of a method is what the
contract says.
"""

import json
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from small_nets import make_shallow

from dnal_mini.config import Budget, SearchConfig
from dnal_mini.data.sources import toy_images
from dnal_mini.gating import gates
from dnal_mini.measure.cost import cost
from dnal_mini.methods import METHODS
from dnal_mini.methods.contract import Architecture, Designer, Method, Scorer, Subject, Widther
from dnal_mini.models import MODELS
from dnal_mini.pruning.netfile import load
from dnal_mini.runs import runlog, tables
from dnal_mini.search.driver import run
from dnal_mini.search.widths import architecture

DATA = toy_images(seed=0, val=32, image_shape=(3, 32, 32))


@dataclass(frozen=True)
class Expand(Method):
    """The second half of MorphNet: all widths by one factor; here the first layer gets more."""

    factor: float = 0.5

    name: ClassVar[str] = "expand"

    def widths(self, subject: Subject) -> dict[str, int]:
        counts = [(name, len(gate.s)) for name, gate in gates(subject.net).items()]
        (first, count), *others = counts
        return {first: 2 * count + 1} | {n: max(1, round(self.factor * c)) for n, c in others}


@dataclass(frozen=True)
class Sketch(Method):
    """Draws a network of another kind than the dense one."""

    name: ClassVar[str] = "sketch"

    def design(self, subject: Subject) -> Architecture:
        return Architecture("mobilenetv2", (("width", 0.15),))


@pytest.fixture
def stubs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stubs in the table of methods: all that a new method has to do."""
    for stub in (Expand, Sketch):
        monkeypatch.setitem(METHODS, stub.name, stub)


def tiny(**fields) -> SearchConfig:
    return SearchConfig().replace(
        name="toy", data="toy", val=32, width=0.07, weight_epochs=1, fine_tune_epochs=2, batch=64,
        precision="float32", channels_last=False, **fields,
    )  # fmt: skip


def test_each_kind_is_known_by_what_it_says():
    kinds = (Scorer, Widther, Designer)
    for method in (*METHODS.values(), Expand, Sketch):
        assert sum(isinstance(method(), kind) for kind in kinds) == 1, method.name
    assert all(isinstance(method(), Scorer) for method in METHODS.values())


def test_a_widther_that_expands_gets_exactly_its_widths_and_new_weights(stubs, tmp_path):
    config = tiny(method="expand", factor=0.75)
    result = run(config, tmp_path / "run")
    small = load(tmp_path / "run" / "small.safetensors", MODELS["vgg16"]).module
    dense = MODELS["vgg16"](num_classes=4, width=0.07)
    wide = {n: m.out_channels for n, m in dense.named_modules() if isinstance(m, torch.nn.Conv2d)}
    wanted = {n: max(1, round(0.75 * c)) for n, c in wide.items()}
    wanted["features.conv1"] = 2 * wide["features.conv1"] + 1  # more than the dense net has
    found = {n: m.out_channels for n, m in small.named_modules() if isinstance(m, torch.nn.Conv2d)}
    assert found == wanted
    assert result["macs"] == [cost(dense).macs, cost(small).macs]
    rows = runlog.read(tmp_path / "run")
    (cut,) = [row for row in rows if row["kind"] == "prune"]
    assert Architecture.of(cut["architecture"]).builder == "vgg16"
    epochs = {row["stage"]: row["epochs"] for row in runlog.epochs(rows)}
    assert epochs["fine_tune"] == 1 + 2  # from new weights: as many as the dense net in all
    assert "hard_accuracy" not in result  # no gates were trained
    assert "expand" in tables.final_table(rows)


def test_a_designer_may_draw_another_network(stubs, monkeypatch, tmp_path):
    make_shallow(monkeypatch)

    class Stop(Exception):
        pass

    def stop(row):
        if row["kind"] == "prune":
            raise Stop

    config = tiny(method="sketch")
    whole = run(config, tmp_path / "whole")
    with pytest.raises(Stop):
        run(config, tmp_path / "cut", on_row=stop)
    again = run(config, tmp_path / "cut")  # the drawn net is read back, not drawn again
    assert again["fine_tuned_accuracy"] == whole["fine_tuned_accuracy"]
    small = load(tmp_path / "whole" / "small.safetensors", MODELS["mobilenetv2"])
    assert small.spec["builder"] == "MobileNetV2"
    assert whole["macs"] == [
        cost(MODELS["vgg16"](4, 0.07)).macs, cost(MODELS["mobilenetv2"](4, 0.15)).macs,
    ]  # fmt: skip


def test_an_architecture_is_json_there_and_back_and_a_key_of_a_dict():
    drawn = Architecture("vgg16", (("width", 0.5),), (("features.bn1.gate", 7),))
    again = Architecture.of(drawn.json())
    assert again == drawn
    assert len({drawn: 1, again: 2}) == 1
    assert json.loads(drawn.json())["widths"] == {"features.bn1.gate": 7}
    assert cost(again.build(5)) == cost(MODELS["vgg16"](5, 0.5))


def test_widths_that_do_not_fit_are_told():
    config = tiny()
    names = list(gates_of(config))
    with pytest.raises(ValueError, match=f"got widths that do not fit at {names[2]}"):
        architecture(dict.fromkeys(names, 3) | {names[2]: 0}, config, DATA)
    with pytest.raises(ValueError, match="got widths that do not fit at other"):
        architecture(dict.fromkeys([*names, "other"], 3), config, DATA)


def gates_of(config: SearchConfig) -> dict:
    from dnal_mini.gating import add_gates

    return gates(add_gates(MODELS[config.model](num_classes=4, width=config.width)))


def test_a_budget_may_be_of_parameters(tmp_path):
    result = run(tiny(method="uniform", budget=Budget(params=0.4)), tmp_path / "run")
    assert result["params"][1] / result["params"][0] == pytest.approx(0.4, abs=0.05)
