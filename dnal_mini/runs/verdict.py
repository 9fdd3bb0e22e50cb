"""Verdicts: what a few seeds can tell about a difference; one rule for the whole book.

Two ways are compared seed by seed: one difference for each seed that both have. Student's t, with
the spread of these differences themselves, gives an interval for their mean. As a page that asks
twenty questions at 5 % tells a false story by chance, the 5 % are shared among all its questions
(Bonferroni). An interval that holds 0 does not say "equal": it says that it cannot be told.
"""

import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass

from dnal_mini.refused import Refused

BETTER, WORSE, OPEN, SAME = "better", "worse", "cannot be told", "the same"
LEVEL = 0.05  # chance of a page without any true difference to tell a story


@dataclass(frozen=True)
class Verdict:
    """A mean difference, its interval and the word for it."""

    word: str
    mean: float
    low: float
    high: float
    ahead: int
    seeds: int


def two_sided(t: float, degrees: int) -> float:
    """Chance that Student's t, with so many degrees of freedom, is further from 0 than ``t``.

    The finite sums for whole degrees of freedom. Source: student1908.
    """
    angle = math.atan(abs(t) / math.sqrt(degrees))
    odd, term, total = degrees % 2, 1.0, 0.0
    for k in range(1, (degrees - odd) // 2 + 1):  # cos, cos^3, ... or 1, cos^2, ...
        total += term * math.cos(angle) ** (2 * k - 2 + odd)
        term *= (2 * k - 1 + odd) / (2 * k + odd)
    within = math.sin(angle) * total
    return 1 - (2 / math.pi * (angle + within) if odd else within)


def quantile(level: float, degrees: int) -> float:
    """The t that is exceeded, to either side, with chance ``level``."""
    low, high = 0.0, 1.0
    while two_sided(high, degrees) > level:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if two_sided(middle, degrees) > level else (low, middle)
    return (low + high) / 2


def verdict(differences: Iterable[float], among: int) -> Verdict:
    """What the differences of some seeds tell, if a page asks ``among`` questions.

    Positive differences speak for "better". One seed tells nothing: its interval is infinite.
    Source: dunn1961. Raises: Refused for no difference, or a page with fewer than one question.
    """
    values = [float(value) for value in differences]
    if not values or among < 1:
        raise Refused(
            f"got {len(values)} differences among {among} questions; need at least one of each; "
            "do leave out what has no run"
        )
    n, mean = len(values), statistics.fmean(values)
    half, ahead = math.inf, sum(value > 0 for value in values)
    if n > 1:
        half = quantile(LEVEL / among, n - 1) * statistics.stdev(values) / math.sqrt(n)
    word = OPEN if abs(mean) <= half else BETTER if mean > 0 else WORSE
    word = word if any(values) else SAME
    return Verdict(word, mean, mean - half, mean + half, ahead, n)
