"""What the rows of a record may hold, so that tables can be made of them. Read ``wrong_field``.

A record may come from anywhere: an editor, another program, a disk that failed. Fields that no
table reads are not looked at.
"""

from collections.abc import Callable, Mapping
from typing import Any

from dnal_mini.refused import Refused

HUGE = 1e100  # no count and no time is larger; its square still is a float
Fits = Callable[[Any], bool]


def number(value: Any, low: float = -HUGE, high: float = HUGE) -> bool:
    """True for a finite number of a range; NaN is in none."""
    return type(value) in (int, float) and low <= value <= high


def count(value: Any) -> bool:
    """True for a whole number from 0 on."""
    return type(value) is int and number(value, 0)


def share(value: Any) -> bool:
    """True for what an accuracy can be."""
    return number(value, 0, 1)


def pair(value: Any) -> bool:
    """True for what the dense and the pruned network have of something."""
    return isinstance(value, list) and len(value) == 2 and all(map(count, value)) and value[0] > 0


def word(value: Any) -> bool:
    """True for a text."""
    return isinstance(value, str)


def numbers(value: Any) -> bool:
    """True for numbers by name."""
    return isinstance(value, dict) and all(number(v) or v is None for v in value.values())


def times(value: Any) -> bool:
    """True for the latencies of networks."""
    nets = [net for net in value.values() if isinstance(net, dict)] if type(value) is dict else []
    return bool(nets) and all(number(net.get("median_s"), 0) for net in nets)


FIELDS: Mapping[str, Mapping[str, Fits]] = {  # that tables read, by kind of row
    "run": {"config": lambda value: isinstance(value, dict)},
    "epoch": {"stage": word, "epoch": count, "epochs": count, "seconds": number},
    "warning": {"stage": word, "epoch": count, "text": word},
    "result": {"macs": pair, "params": pair},
}
MAY_BE_NULL: Mapping[str, Mapping[str, Fits]] = {
    "run": {"device": lambda value: isinstance(value, dict), "commit": word},
    "epoch": dict.fromkeys(("loss", "delta", "kept", "undecided", "gate_price", "lr"), number),
    "result": {"seconds": numbers, "latency_s": times, "gate_price": number, "dense_is": word,
               "test_images": count},
    "config": {"name": word, "model": word, "seed": count, "method": word, "budget": numbers,
               "gate_price": number},
}  # fmt: skip


def wrong_field(row: Mapping[str, Any], kind: str | None = None) -> str | None:
    """The name of a field with a value that it cannot have; None if all that are there fit."""
    kind = kind or row["kind"]
    for name, fits in FIELDS.get(kind, {}).items():
        if name in row and not fits(row[name]):
            return name
    others = dict(MAY_BE_NULL.get(kind, {}))
    if kind in FIELDS:
        others |= {name: share for name in row if name.endswith("_accuracy")}
    for name, fits in others.items():
        if row.get(name) is not None and not fits(row[name]):
            return name
    return wrong_field(row["config"], "config") if kind == "run" and "config" in row else None


def need_fields(row: Mapping[str, Any], *names: str) -> None:
    """Raises: ValueError for a row that lacks one of the fields, or has null there."""
    for name in names:
        if row.get(name) is None:
            raise Refused(
                f"got a row of kind {row['kind']!r} without {name}; need what dnal run writes "
                "there; do restore the record, or start the run again in a new folder"
            )
