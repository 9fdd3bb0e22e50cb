"""Learning rates as functions of the share of a stage that is done, in [0, 1)."""

import math
from collections.abc import Callable
from typing import Literal

Schedule = Callable[[float], float]
ScheduleName = Literal["constant", "cosine", "one-cycle"]


def constant(lr: float) -> Schedule:
    """The same learning rate at every step."""
    return lambda done: lr


def cosine(lr: float) -> Schedule:
    """From ``lr`` down to 0 along half a cosine."""
    return lambda done: lr * (1 + math.cos(math.pi * done)) / 2


def one_cycle(lr: float, warm_up: float = 0.25, start: float = 0.04) -> Schedule:
    """From ``start * lr`` up to ``lr`` in a straight line, then down to 0 along half a cosine.

    ``warm_up``: share of the stage that goes upwards. Source: Smith and Topin 2019, the shape that
    is usual since.
    """

    def rate(done: float) -> float:
        if done < warm_up:
            return lr * (start + (1 - start) * done / warm_up)
        return cosine(lr)((done - warm_up) / (1 - warm_up))

    return rate


SCHEDULES: dict[ScheduleName, Callable[[float], Schedule]] = {
    "constant": constant,
    "cosine": cosine,
    "one-cycle": one_cycle,
}
