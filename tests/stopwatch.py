"""Two seconds with a stopwatch at the end of every run are too much for tests of something else."""

import functools

import pytest

from dnal_mini.measure.latency import latency_pair
from dnal_mini.search import driver


def shorten(patch: pytest.MonkeyPatch) -> None:
    """Let runs in this process time their two nets for a moment only, while ``patch`` lasts."""
    brief = functools.partial(latency_pair, budget_s=0.01, min_repeats=2)
    patch.setattr(driver, "latency_pair", brief)
