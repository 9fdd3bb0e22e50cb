"""The gate price that ends at a wanted number of MACs: a few short searches, each with its price.

Knows numbers only. ``search.run`` does the searching, with ``--target-macs``, and closes the small
gap that is left with ``stages.meet_target``. Read ``next_price``.
"""

import math

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
