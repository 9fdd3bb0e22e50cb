"""The gate price that ends at a wanted number of MACs: a few short searches, each with its price.

Knows numbers only. ``search.run`` does the searching, with ``--target-macs``, and closes the small
gap that is left with ``stages.meet_target``. Read ``next_price``.
"""

import math

WITHIN = 0.1  # of the target, relative: a probe that is so little below it is good enough
MAX_PROBES = 10
SLOPE = -0.75  # of log-odds(share) over log(price), until probes show a steeper one
STEEPEST = -4.0
EDGE = 0.2  # of the interval between two probes, on either side
Probe = tuple[float, float]  # gate price, share of the dense MACs that it leaves


def is_hit(share: float, target: float) -> bool:
    """True if a share of the MACs is just below the target.

    Below, because the rest is then filled by opening gates. The weights are still those of the
    dense network, to which an opened channel is nothing new. To close more channels, with no
    gradient left that could make up for them, costs far more accuracy.
    """
    return (1 - WITHIN) * target <= share <= target


def best_probe(probes: list[Probe], target: float) -> Probe:
    """The probe nearest below the target, or, if none is below, the nearest."""
    below = [probe for probe in probes if probe[1] <= target]
    return min(below or probes, key=lambda probe: abs(_log_odds(probe[1]) - _log_odds(target)))


def next_price(probes: list[Probe], target: float, first: float) -> float:
    """The price to try next.

    Over the logarithm of the price the log-odds of the share fall, slowly at first and then faster.
    As long as all probes are on one side of the target, the next one goes on from the nearest with
    a slope no flatter than ``SLOPE``, so that it does not leap over the edge. Between a probe above
    the target and one below, it goes where the line between them says, but not too near to either.
    """
    if not probes:
        return first
    goal = _log_odds((1 - WITHIN / 2) * target)
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
