"""The rule of the book: printed tables of t, laws, and pages on which nothing is true."""

import math
import random

import pytest

from dnal_mini.refused import Refused
from dnal_mini.runs import verdict as rule


@pytest.mark.parametrize(
    ("level", "degrees", "t"),  # from a printed table of Student's t
    [
        (0.05, 1, 12.706), (0.05, 2, 4.303), (0.05, 3, 3.182), (0.05, 4, 2.776), (0.05, 9, 2.262),
        (0.05, 30, 2.042), (0.01, 2, 9.925), (0.01, 5, 4.032), (0.001, 2, 31.599),
    ],
)  # fmt: skip
def test_quantiles_are_the_printed_ones(level: float, degrees: int, t: float):
    assert rule.quantile(level, degrees) == pytest.approx(t, abs=6e-4)


def test_two_degrees_of_freedom_have_a_closed_form():
    for level in (0.3, 0.05, 0.001):
        within = 1 - level
        assert rule.quantile(level, 2) == pytest.approx(within * math.sqrt(2 / (1 - within**2)))


@pytest.mark.parametrize(
    ("values", "among", "word"),
    [
        ([1.0, 1.1, 0.9], 1, "better"),
        ([-1.0, -1.1, -0.9], 1, "worse"),
        ([1.0, -1.1, 0.9], 1, "cannot be told"),
        ([1.0, 1.3, 0.7], 1, "better"),  # t is 5.77: beyond 4.30 for one question,
        ([1.0, 1.3, 0.7], 2, "cannot be told"),  # within 6.21 for two
        ([9.0], 1, "cannot be told"),
        ([0.0, 0.0], 1, "the same"),
    ],
)
def test_words(values: list[float], among: int, word: str):
    found = rule.verdict(values, among)
    assert (found.word, found.seeds) == (word, len(values))
    assert found.ahead == sum(value > 0 for value in values)
    assert found.low <= found.mean <= found.high


def test_one_page_of_twenty_tells_a_story_where_nothing_is_true():
    chance, pages, among, stories = random.Random(0), 1000, 7, 0
    for _ in range(pages):
        asked = [[chance.gauss(0, 1) for _ in range(3)] for _ in range(among)]
        stories += any(rule.verdict(values, among).word != rule.OPEN for values in asked)
    assert abs(stories / pages - 0.05) < 0.02


def test_nothing_to_judge_is_refused():
    for values, among in (([], 3), ([1.0], 0)):
        with pytest.raises(Refused, match="need at least one"):
            rule.verdict(values, among)
