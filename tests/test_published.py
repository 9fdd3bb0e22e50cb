"""The published CIFAR-10 rows that the book quotes: whole, as printed, and in accord with laws."""

import csv
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest

from dnal_mini.measure.authors import authors_counting
from dnal_mini.models import MODELS

PATH = Path(__file__).parents[1] / "book" / "data" / "published_cifar10.csv"
PRICES = ["1e-5", "5e-5", "1e-4", "2e-4", "3e-4", "4e-4", "5e-4"]
NETWORKS = ["vgg16", "resnet56", "mobilenetv2"]
NUMBERS = ["macs_m", "macs_times", "params_m", "params_times", "top1_percent", "top5_percent"]
MAY_LACK = {"params_m", "params_times", "top5_percent"}  # only in the rows of rivals
Row = dict[str, str]


def published() -> list[Row]:
    """All rows of the file; each value as it is printed."""
    with PATH.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def series(network: str, kind: str = "dnal", rows: list[Row] | None = None) -> list[Row]:
    """The rows of a network and kind, in the order of the file."""
    rows = published() if rows is None else rows
    return [row for row in rows if (row["network"], row["kind"]) == (network, kind)]


def wrong_ratios(rows: list[Row]) -> list[tuple[str, str, str]]:
    """Cells whose printed ratio is not printed baseline over printed value, rounded."""
    wrong = []
    for row in rows:
        (dense,) = series(row["network"], "baseline", rows)
        for size, times in (("macs_m", "macs_times"), ("params_m", "params_times")):
            if (
                row[size]
                and abs(float(dense[size]) / float(row[size]) - float(row[times])) > 0.0051
            ):
                wrong.append((row["network"], row["method"] + row["gate_price"], times))
    return wrong


def test_there_are_21_dnal_rows_3_baselines_and_17_rivals():
    assert Counter(row["kind"] for row in published()) == {"dnal": 21, "baseline": 3, "rival": 17}
    assert Counter(row["network"] for row in published()) == dict(
        zip(NETWORKS, (11, 15, 15), strict=True)
    )


@pytest.mark.parametrize("network", NETWORKS)
def test_each_network_has_the_seven_prices_of_the_paper(network):
    assert [row["gate_price"] for row in series(network)] == PRICES
    assert {row["gate_price"] for row in series(network, "rival")} == {""}


def test_every_row_names_its_source_and_lacks_nothing_but_what_rivals_did_not_print():
    for row in published():
        assert row["source"].startswith("guo2022dnal: ")
        lacks = {name for name in NUMBERS if not row[name]}
        assert not lacks or (row["kind"] == "rival" and lacks <= MAY_LACK), row
        assert all(float(row[name]) > 0 for name in set(NUMBERS) - lacks)


def test_the_printed_ratios_follow_from_the_printed_sizes():
    assert wrong_ratios(published()) == []


@pytest.mark.parametrize(
    ("network", "price", "column", "value"),
    [
        ("vgg16", "3e-4", "macs_m", "27.97"),
        ("resnet56", "5e-4", "params_times", "112.43"),
        ("mobilenetv2", "1e-5", "params_m", "1.34"),
    ],
)
def test_two_digits_in_the_wrong_order_are_noticed(network, price, column, value):
    rows = published()
    (row,) = [row for row in series(network, rows=rows) if row["gate_price"] == price]
    assert sorted(row[column]) == sorted(value) != row[column]
    row[column] = value
    assert len(wrong_ratios(rows)) == 1


@pytest.mark.parametrize("network", NETWORKS)
def test_the_baseline_is_the_network_that_we_build(network):
    (row,) = series(network, "baseline")
    counted = authors_counting(MODELS[network]())
    assert [f"{count / 1e6:.2f}" for count in counted] == [row["macs_m"], row["params_m"]]


@pytest.mark.parametrize("network", NETWORKS)
def test_sizes_fall_with_the_price(network):
    rows = [*series(network, "baseline"), *series(network)]
    for larger, smaller in pairwise(rows):
        assert float(larger["macs_m"]) > float(smaller["macs_m"])
        assert float(larger["params_m"]) > float(smaller["params_m"])


def test_accuracy_falls_with_the_price_but_for_two_steps_and_one_start():
    rises = [
        (network, smaller["gate_price"])
        for network in NETWORKS
        for larger, smaller in pairwise([*series(network, "baseline"), *series(network)])
        if float(smaller["top1_percent"]) > float(larger["top1_percent"])
    ]
    assert rises == [("vgg16", "1e-5"), ("vgg16", "1e-4"), ("mobilenetv2", "5e-5")]


def test_an_accuracy_is_a_percentage_and_five_guesses_are_better_than_one():
    for row in published():
        top1, top5 = float(row["top1_percent"]), float(row["top5_percent"] or 100)
        assert 80 < top1 < top5 <= 100
