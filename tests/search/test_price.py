"""The price for a wanted number of MACs: on worlds with a known answer, and in a real search."""

import itertools
import math
import random
from pathlib import Path

import pytest
from small_runs import Stop, changed
from torch import nn

from dnal_mini.config import Budget
from dnal_mini.runs import runlog
from dnal_mini.search.driver import run
from dnal_mini.search.floors import collapse_floors
from dnal_mini.search.price import MAX_PROBES, TOLERANCE, best_probe, is_hit, next_price


def search(world, target: float, first: float = 1e-4) -> list[tuple[float, float]]:
    """Probes until one hits, as ``search.run`` makes them."""
    probes: list[tuple[float, float]] = []
    while len(probes) < MAX_PROBES and not any(is_hit(share, target) for _, share in probes):
        price = next_price(probes, target, first)
        probes.append((price, world(price)))
    return probes


def straight(slope: float, level: float):
    """A world whose share of MACs is a logistic function of the price's logarithm."""
    return lambda price: 1 / (1 + math.exp(-(slope * math.log(price / 2e-4) + level)))


@pytest.mark.parametrize("target", [0.03, 0.3, 0.9])
def test_in_a_straight_world_four_probes_are_enough(target):
    for slope, level in ((-0.8, 0.3), (-1.3, -0.4), (-0.75, 0.0)):
        probes = search(straight(slope, level), target)
        assert len(probes) <= 4
        assert is_hit(probes[-1][1], target)


def test_in_crooked_noisy_worlds_the_target_is_hit_nearly_always():
    missed, lengths = 0, []
    for seed in range(60):
        draw = random.Random(seed)
        slope, level, phase = draw.uniform(-1.2, -0.5), draw.uniform(-0.5, 0.5), draw.uniform(0, 6)

        def world(price, a=slope, b=level, phase=phase):
            noise = random.Random(round(price * 1e9)).gauss(0, 0.02)
            bent = 0.1 * math.sin(3 * math.log(price) + phase) + noise
            return 1 / (1 + math.exp(-(a * math.log(price / 2e-4) + b + bent)))

        target = draw.choice([0.1, 0.3, 0.6])
        probes = search(world, target)
        lengths.append(len(probes))
        missed += not is_hit(best_probe(probes, target)[1], target)
    assert missed <= 1
    assert sum(lengths) / len(lengths) < 5


def test_a_cliff_behind_a_plain_is_found():
    """What a quarter of VGG16 does: shares of 0.61, 0.32, 0.11 at prices 1e-4, 5.5e-4, 2.5e-3."""
    corners = [(1e-5, 0.8), (1e-4, 0.55), (5.5e-4, 0.37), (1.2e-3, 0.13), (5e-3, 0.03), (1, 0.001)]

    def world(price):
        pairs = list(itertools.pairwise(corners))
        (p, a), (q, b) = next((pair for pair in pairs if pair[1][0] >= price), pairs[-1])
        way = math.log(price / p) / math.log(q / p)
        return math.exp((1 - way) * math.log(a) + way * math.log(b))

    for target in (0.1, 0.2, 0.3, 0.45, 0.6):
        for first in (1e-5, 1e-4, 1e-3):
            probes = search(world, target, first)
            assert is_hit(probes[-1][1], target), (target, probes)
            assert len(probes) <= 8


def test_between_a_probe_above_and_one_below_the_next_price_lies_between_them():
    probes = [(1e-5, 0.8), (1e-2, 0.05)]
    assert 1e-5 < next_price(probes, 0.3, 1e-4) < 1e-2
    assert best_probe([(1e-5, 0.8), (1e-3, 0.31), (1e-2, 0.05)], 0.3) == (1e-3, 0.31)
    assert next_price([], 0.3, 7e-4) == 7e-4


def test_a_hit_is_relative_to_the_target():
    assert is_hit(0.3 * (1 + 0.99 * TOLERANCE), 0.3)
    assert not is_hit(0.3 * (1 + 1.01 * TOLERANCE), 0.3)
    assert not is_hit(0.03, 0.035)


CONFIG = changed(
    arch_epochs=4, fine_tune_epochs=1, baseline="none", arch_lr=1.0, budget=Budget(macs=0.4)
)


ASKED: list[str] = []  # the nets whose floors were asked for, by class


def counted(net: nn.Module, *given) -> dict[str, int]:
    ASKED.append(type(net).__name__)
    return collapse_floors(net, *given)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that has found its price."""
    folder = tmp_path_factory.mktemp("price") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        for name in ("driver", "stages", "floors"):
            patch.setattr(f"dnal_mini.search.{name}.collapse_floors", counted)
        run(CONFIG, folder)
    return folder


def test_a_run_with_a_target_finds_its_price_and_says_so(whole):
    rows = runlog.read(whole)
    result = rows[-1]
    probes = [(row["price_asked"], row["macs_share"]) for row in rows if row["kind"] == "probe"]
    assert probes[0][0] == CONFIG.method.gate_price
    assert len(probes) <= MAX_PROBES
    assert result["gate_price"] == best_probe(probes, 0.4)[0]
    assert not list(whole.glob("probe*"))
    assert abs(result["macs"][1] / result["macs"][0] / 0.4 - 1) <= 0.03
    (cut,) = [row for row in rows if row["kind"] == "prune"]
    assert cut["shift"] != 0


def test_the_floors_are_computed_once_in_a_run_with_a_budget_and_probes(whole):
    rows = runlog.read(whole)
    assert len([row for row in rows if row["kind"] == "probe"]) >= 2
    assert ASKED == ["VGG16"]


def test_a_search_for_a_price_that_is_interrupted_goes_on(whole, tmp_path):
    def stop(row):
        if row["kind"] == "probe" or (row.get("stage") == "probe_2" and row["epoch"] == 2):
            raise Stop

    for _ in range(2):
        with pytest.raises(Stop):
            run(CONFIG, tmp_path / "cut", on_row=stop)
    run(CONFIG, tmp_path / "cut")
    found = [
        [(row["price_asked"], row["macs_share"]) for row in runlog.read(folder)
         if row["kind"] == "probe"]
        for folder in (whole, tmp_path / "cut")
    ]  # fmt: skip
    assert len(found[0]) >= 2
    assert found[0] == found[1]
