"""The price that ends at a wanted cost: a few short searches, each with its price.

``next_price`` knows numbers only. ``price_for`` does the searching; ``budget.nearest`` closes the
small gap that is left.
"""

import contextlib
import math
from collections.abc import Callable
from dataclasses import replace

from dnal_mini.config import Budget
from dnal_mini.graph.copies import copied
from dnal_mini.methods.contract import Method, Subject
from dnal_mini.search.stages import run_stage
from dnal_mini.training.stage import Stage

TOLERANCE = 0.1  # of the target, relative: a probe within it is good enough


MAX_PROBES = 10


SLOPE = -0.75  # of log-odds(share) over log(price), until probes show a steeper one


STEEPEST = -4.0


EDGE = 0.2  # of the interval between two probes, on either side


Probe = tuple[float, float]  # gate price, share of the dense MACs that it leaves


def is_hit(share: float, target: float, tolerance: float = TOLERANCE) -> bool:
    """True if a share of the MACs is within ``tolerance`` of the target, relative to the target."""
    return abs(share / target - 1) <= tolerance


def best_probe(probes: list[Probe], target: float) -> Probe:
    """The probe whose share is nearest to the target in log-odds."""
    return min(probes, key=lambda probe: abs(_log_odds(probe[1]) - _log_odds(target)))


def next_price(probes: list[Probe], target: float, first: float) -> float:
    """The price to try next.

    Over the logarithm of the price the log-odds of the share fall, slowly at first and then faster.
    As long as all probes are on one side of the target, the next one goes on from the nearest with
    a slope no flatter than ``SLOPE``, so that it does not leap over the edge. Between a probe above
    the target and one below, it goes where the line between them says, but not too near to either.
    """
    if not probes:
        return first
    goal = _log_odds(target)
    points = sorted((math.log(price), _log_odds(share) - goal) for price, share in probes)
    above = [point for point in points if point[1] > 0]  # too many MACs: the price must rise
    below = [point for point in points if point[1] <= 0]
    if above and below:
        (low, over), (high, under) = max(above), min(below)
        new = low + (high - low) * over / (over - under)
        if low < high:
            margin = (high - low) * EDGE
            new = min(max(new, low + margin), high - margin)
        return math.exp(new)
    (x, y), *others = sorted(points, key=lambda point: abs(point[1]))
    slope = SLOPE
    if others and others[0][0] != x:
        slope = min((others[0][1] - y) / (others[0][0] - x), SLOPE)
    return math.exp(x - y / max(slope, STEEPEST))


def _log_odds(share: float) -> float:
    share = min(max(share, 1e-6), 1 - 1e-6)
    return math.log(share / (1 - share))


def price_for(
    budget: Budget,
    method: Method,
    stages: tuple[Stage, ...],
    subject: Subject,
    share: Callable[[Subject], float],
) -> float:
    """The price whose stages end near the budget, from that of the stages on.

    A probe is the method's stages from the same weights with a price of its own; it ends as soon as
    the method calls itself settled. ``share(subject)``: cost of the net that a method would cut,
    over the dense one's. ``subject`` is untouched; probes are kept in the record, and not repeated.
    """
    folder, column = subject.session.folder, f"{budget.metric}_share"
    probes = [(row["price_asked"], row[column]) for row in folder.rows("probe")]
    while not _hits(probes, budget.share) and len(probes) < MAX_PROBES:
        price = next_price(probes, budget.share, stages[-1].price or 1e-4)
        trial = replace(subject, net=copied(subject.net))
        for stage in stages:
            own = f"_{stage.name}" if len(stages) > 1 else ""
            probe = replace(stage, name=f"probe_{len(probes) + 1}{own}", price=price)
            work, epochs = method.work(probe, trial), 0
            rows = run_stage(trial.net, trial.data, probe, work, trial.session)
            with contextlib.closing(rows):
                for row in rows:
                    folder.log([row])
                    epochs = row["epoch"]
                    if stage is stages[-1] and method.settled(row):
                        break
            folder.forget(probe.name)
        found = {"price_asked": price, column: share(trial), "epochs_of_search": epochs}
        folder.write("probe", **found)
        probes.append((price, found[column]))
    price, nearest = best_probe(probes, budget.share)
    if not _hits(probes, budget.share):
        text = f"no price found for {budget.share:g} of the {budget.metric}; nearest: {nearest:.3g}"
        folder.log([{"kind": "warning", "stage": stages[-1].name, "epoch": 0, "text": text}])
    return price


def _hits(probes: list[Probe], target: float) -> bool:
    return any(is_hit(share, target) for _, share in probes)
