"""The gate price that ends at a wanted number of MACs: a few short searches, each with its price.

Knows numbers only. ``search.run`` does the searching, with ``--target-macs``. Read ``next_price``.
"""

import math

TOLERANCE = 0.02  # of the target, relative: a probe within it is good enough
MAX_PROBES = 10
SLOPE = -0.75  # of log-odds(share) over log(price), until two probes have measured it
STEEPEST, FLATTEST = -4.0, -0.1
Probe = tuple[float, float]  # gate price, share of the dense MACs that it leaves


def is_hit(share: float, target: float, tolerance: float = TOLERANCE) -> bool:
    """True if a share of the MACs is within ``tolerance`` of the target, relative to the target."""
    return abs(share / target - 1) <= tolerance


def best_probe(probes: list[Probe], target: float) -> Probe:
    """The probe whose share is nearest to the target in log-odds."""
    return min(probes, key=lambda probe: abs(_log_odds(probe[1]) - _log_odds(target)))


def next_price(probes: list[Probe], target: float, first: float) -> float:
    """The price to try next.

    Over the logarithm of the price, the log-odds of the share fall on a line, nearly: the price
    goes along it. With one probe its slope is a guess (``SLOPE``), with more it goes through the
    two best ones. Between a probe above the target and one below, it stays between them.
    """
    if not probes:
        return first
    goal = _log_odds(target)
    points = sorted((math.log(price), _log_odds(share) - goal) for price, share in probes)
    nearest = sorted(points, key=lambda point: abs(point[1]))
    x, y = nearest[0]
    slope = SLOPE
    if len(points) > 1 and nearest[1][0] != x:
        slope = (nearest[1][1] - y) / (nearest[1][0] - x)
    slope = min(max(slope, STEEPEST), FLATTEST)
    new = x - y / slope
    above = [at for at, over in points if over > 0]  # too many MACs: the price must rise
    below = [at for at, over in points if over < 0]
    if above and below and max(above) < min(below):
        low, high = max(above), min(below)
        margin = (high - low) / 10
        new = min(max(new, low + margin), high - margin)
    return math.exp(new)


def _log_odds(share: float) -> float:
    share = min(max(share, 1e-6), 1 - 1e-6)
    return math.log(share / (1 - share))
