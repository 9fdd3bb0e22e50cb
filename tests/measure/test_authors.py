"""The paper's and the authors' forms: their laws, and the register that names them all."""

import csv
import json
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from small_nets import NETS, SHAPE, draw_gates, gated, outputs, relative_difference, settled
from small_runs import changed
from torch import nn

from dnal_mini import recipes
from dnal_mini.config import SearchConfig
from dnal_mini.gating import add_gates, gates, set_gates
from dnal_mini.layers.scaled_sigmoid import ScaledSigmoid
from dnal_mini.measure.authors import (
    authors_counting,
    masked_copy,
    masked_counting,
    masked_rule,
    open_share,
    printed_gate_gradient,
)
from dnal_mini.models import MODELS
from dnal_mini.pruning.pruner import prune
from dnal_mini.runs import runlog
from dnal_mini.runs.aggregate import differences
from dnal_mini.search.driver import run

ROOT = Path(__file__).parents[2]
DATA = ROOT / "book" / "data"
IDS = [f"formula {k}" for k in range(1, 8)] + [f"step {k}" for k in range(1, 21)]
IDS += [f"setting {k}" for k in range(1, 21)] + [f"size {k}" for k in range(1, 10)]
IDS += [f"count {k}" for k in range(1, 6)]


def rows_of(name: str) -> list[dict[str, str]]:
    """The rows of a table of the book."""
    with (DATA / name).open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


# --- the formula as printed ------------------------------------------------------------------


def test_the_printed_gradient_is_zero_where_every_gate_starts_and_the_right_one_is_not():
    s = torch.tensor([0.0, 1 / 40, 0.3], dtype=torch.float64, requires_grad=True)
    (right,) = torch.autograd.grad(torch.sigmoid(20 * s).sum(), s)
    printed = printed_gate_gradient(s.detach(), 20.0)
    by_hand = [0.0, 400 * (1 / 40) * 0.5, 400 * 0.3 * (1 - 6)]
    torch.testing.assert_close(printed, torch.tensor(by_hand, dtype=torch.float64))
    assert float(right[0]) == 20 / 4
    assert float(right[2]) > 0 > float(printed[2]), "even the sign is wrong"


# --- the scripts' rule of cutting -------------------------------------------------------------


def chain() -> nn.Module:
    """Conv, depthwise conv, conv, linear behind 2 x 3 pixels; closed: 1 of 5, 2 of 5, 3 of 7."""
    net = nn.Sequential(
        *(nn.Conv2d(3, 5, 1), nn.BatchNorm2d(5), nn.ReLU()),
        *(nn.Conv2d(5, 5, 3, padding=1, groups=5, bias=False), nn.BatchNorm2d(5), nn.ReLU()),
        *(nn.Conv2d(5, 7, 1, bias=False), nn.BatchNorm2d(7), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(7 * 6, 4)),
    )
    net = add_gates(settled(net), where=lambda name, norm: name != "1")
    for gate, closed in zip(gates(net).values(), ([0, 3], [1, 2, 6]), strict=True):
        gate.s.data.fill_(9).index_fill_(0, torch.tensor(closed), -9)
    set_gates(net, mode="hard")
    return net


def test_the_rule_cuts_the_filter_its_depthwise_partner_and_the_next_inputs():
    masks = masked_rule(chain())
    first, depthwise, last, head = (masks[name] for name in ("0", "3", "6", "10"))
    assert first.flatten(1).all(1).tolist() == [False, True, True, False, True]
    assert depthwise.flatten(1).all(1).tolist() == [False, True, True, False, True]
    assert last[:, :, 0, 0].sum(0).tolist() == [0, 4, 4, 0, 4]
    assert last[:, :, 0, 0].sum(1).tolist() == [3, 0, 0, 3, 3, 3, 0]
    assert head.sum(1).tolist() == [4 * 6] * 4
    assert not head[:, 6:18].any(), "channels 1 and 2, six pixels each"


def test_the_masked_count_by_hand():
    flops, params = masked_counting(chain(), (3, 2, 3))
    weights = {"first": 3 * 3, "depthwise": 3 * 9, "last": 3 * 4, "head": 24 * 4}
    assert params == sum(weights.values()) + 2 * (3 + 3 + 4) + 3 + 4
    assert flops == 6 * (9 + 27 + 12) + 96 + (3 + 3 + 4) + 3 + 4
    assert open_share(chain()) == 7 / 12


@pytest.mark.parametrize("name", NETS)
def test_with_all_gates_open_the_masked_count_is_the_plain_one(name):
    net = gated(name, keep=1.0)
    assert open_share(net) == 1
    assert masked_counting(net, SHAPE) == authors_counting(MODELS[name](**NETS[name]), SHAPE)


def test_in_a_plain_chain_the_rule_is_exact():
    net = gated("vgg16", keep=0.6)
    small = prune(net, SHAPE).module
    assert masked_counting(net, SHAPE) == authors_counting(small, SHAPE)
    images = torch.randn(2, *SHAPE)
    same = zip(outputs(masked_copy(net), images), outputs(net, images), strict=True)
    assert all(torch.equal(masked, plain) for masked, plain in same)


@pytest.mark.parametrize("name", ["resnet56", "mobilenetv2"])
def test_across_skips_the_rule_counts_too_little_and_changes_the_function(name):
    net = gated(name, keep=0.6)
    exact = authors_counting(prune(net, SHAPE).module, SHAPE)
    masked = masked_counting(net, SHAPE)
    assert masked.flops < 0.98 * exact.flops
    images = torch.randn(2, *SHAPE)
    assert relative_difference(outputs(net, images), outputs(masked_copy(net), images)) > 1e-4


def test_the_masked_copy_leaves_its_argument_alone():
    net = gated("resnet56", keep=0.5)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    changed = masked_copy(net).state_dict()
    assert all(torch.equal(net.state_dict()[name], value) for name, value in before.items())
    assert any(not torch.equal(changed[name], value) for name, value in before.items())


def test_a_gate_that_does_not_fit_the_next_layer_is_named():
    net = nn.Sequential(nn.Conv2d(3, 5, 1), ScaledSigmoid(5), nn.Conv2d(2, 3, 1))
    with pytest.raises(ValueError, match="got 5 gates 1 before 2; need equal widths"):
        masked_rule(net)


def test_gates_of_a_net_are_drawn_as_the_share_says():
    net = add_gates(MODELS["vgg16"](width=0.5))
    draw_gates(net, 0.3)
    assert open_share(net) == pytest.approx(0.3, abs=4 * (0.21 / 2112) ** 0.5)


# --- what a setting changes, from records -----------------------------------------------------


def result(seed: int, accuracy: float, macs: int, **config: object) -> list[dict]:
    """A record as short as it gets."""
    setting = {"name": "made", "seed": seed} | config
    last = {"fine_tuned_accuracy": accuracy, "hard_accuracy": accuracy / 2, "macs": [1000, macs]}
    return [{"kind": "run", "format": 1, "config": setting}, {"kind": "result"} | last]


def store(folder: Path, name: str, rows: list[dict]) -> None:
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_variant_is_compared_with_the_base_run_of_the_same_seed(tmp_path):
    store(tmp_path, "base-seed0.jsonl", result(0, 0.80, 500))
    store(tmp_path, "base-seed1.jsonl", result(1, 0.60, 300))
    store(tmp_path, "base-seed5.jsonl", result(5, 0.10, 900))
    other = {"threshold": 0.9, "weights_from": "elsewhere", "name": "made", "baseline": "none"}
    store(tmp_path, "threshold-seed1.jsonl", result(1, 0.63, 200, **other))
    store(tmp_path, "threshold-seed0.jsonl", result(0, 0.79, 450, **other))
    store(tmp_path, "threshold-seed7.jsonl", result(7, 0.99, 999, **other))
    unfinished = result(0, 0.5, 500, objective="code")[:1]
    store(tmp_path, "price-form-seed0.jsonl", unfinished)
    store(tmp_path, "base-seed7.jsonl", result(7, 0.10, 900)[:1])
    (row,) = differences(tmp_path.glob("[pt]*.jsonl"), tmp_path.glob("base*.jsonl"))
    assert row["variant"] == "threshold"
    assert row["changed"] == {"threshold": 0.9}
    assert row["seeds"] == [0, 1]
    assert row["accuracy"] == pytest.approx([-0.01, 0.03])
    assert row["hard_accuracy"] == pytest.approx([-0.005, 0.015])
    assert row["macs_kept"] == pytest.approx([-0.05, -0.10])


def test_without_records_or_a_base_run_there_is_nothing_to_say(tmp_path):
    assert differences((tmp_path / "missing").glob("*"), tmp_path.glob("base*")) == []
    store(tmp_path, "threshold-seed0.jsonl", result(0, 0.8, 500, threshold=0.9))
    assert differences(tmp_path.glob("*"), tmp_path.glob("base*")) == []


def test_records_of_real_runs_are_read(finished, tmp_path):
    other = run(changed(objective="code"), tmp_path / "price-form")
    (row,) = differences([tmp_path / "price-form"], [finished])
    assert row["changed"] == {"objective": "code"}
    base = runlog.read(finished)[-1]
    share = [last["macs"][1] / last["macs"][0] for last in (base, other)]
    assert row["macs_kept"] == pytest.approx([share[1] - share[0]])


# --- the tables of the book -------------------------------------------------------------------


def test_the_register_holds_every_discrepancy_once():
    assert [row["id"] for row in rows_of("register.csv")] == IDS


def test_every_row_of_the_register_says_all_three_sides_and_where_to_look():
    for row in rows_of("register.csv"):
        assert all(row[side] for side in ("topic", "paper", "scripts", "ours", "probe")), row["id"]
        assert row["source"].startswith("guo2022dnal"), row["id"]


def test_the_register_names_settings_and_values_that_exist():
    fields = SearchConfig().settings().keys()
    named = [row for row in rows_of("register.csv") if row["field"]]
    assert {row["field"] for row in named} <= fields
    assert len(named) > 20
    assert SearchConfig().replace(name="paper") == recipes.vgg16_cifar10().replace(
        name="paper", data="digits", val=180
    ), "the defaults that the page shows are those of the paper's recipe"


def test_the_register_names_tests_that_exist():
    named = [row["test"] for row in rows_of("register.csv") if row["test"]]
    assert len(named) > 20
    for test in named:
        file, _, name = test.partition("::")
        assert f"def {name}(" in (ROOT / "tests" / file).read_text(encoding="utf-8"), test


def test_there_are_52_published_rows_on_imagenet():
    rows = rows_of("published_imagenet.csv")
    counts = {"vgg16": 10, "resnet50": 21, "mobilenetv2": 4, "supernet": 17}
    assert Counter(row["network"] for row in rows) == counts
    assert Counter(row["kind"] for row in rows) == {"baseline": 4, "dnal": 8, "rival": 40}
    assert all(row["source"].startswith("guo2022dnal: ") for row in rows)


def test_the_printed_imagenet_ratios_follow_from_the_printed_sizes():
    rows = rows_of("published_imagenet.csv")
    dense = {row["network"]: row for row in rows if row["kind"] == "baseline"}
    checked = 0
    for row in rows:
        for size, times in (("macs", "macs_times"), ("params_m", "params_times")):
            if row[times]:
                ratio = float(dense[row["network"]][size]) / float(row[size])
                assert ratio == pytest.approx(float(row[times]), rel=2e-3, abs=6e-3), row
                checked += 1
    assert checked > 50


def test_a_dearer_imagenet_row_is_smaller_and_less_accurate():
    rows = [row for row in rows_of("published_imagenet.csv") if row["kind"] in ("baseline", "dnal")]
    for larger, smaller in pairwise(rows):
        if larger["network"] == smaller["network"]:
            for column in ("macs", "params_m", "top1_percent"):
                if larger[column]:
                    assert float(larger[column]) > float(smaller[column]), smaller
