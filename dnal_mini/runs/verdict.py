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


def quantile(level: float, degrees: int) -> float:
    """The t that is exceeded, to either side, with chance ``level``.

    Source: Student's distribution [student1908].
    """
    from scipy import stats

    return float(stats.t.isf(level / 2, degrees))


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
