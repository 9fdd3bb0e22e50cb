"""What the spec in a file must be before anything is built from it. Read ``check``.

A checksum tells a file that was damaged; one that was forged has a right one. So sizes are looked
at before memory is asked for, and kinds before they are used.
"""

import math
from collections.abc import Collection, Iterator
from dataclasses import fields
from typing import Any

from dnal_mini.graph.inputs import INTEGERS
from dnal_mini.pruning.plan import Report
from dnal_mini.refused import LARGEST_SEED, Refused, need_shape, shown

LARGEST = 2**20  # channels of a layer, columns of a channel
LARGEST_IMAGE = 2**28  # numbers
FLAGS = {"bias", "gone", "affine", "in_place"}
COUNTS = {"num_features", "stride", "columns", "zeros", "groups"}
CHOICES = {"inputs", "in", "out"}  # indices, each once
MAPS = {"gather", "scatter", "source"}  # -1: a channel of zeros


def check(spec: dict[str, Any], path: object) -> None:
    """Raises: ValueError for a part of a spec that no version of ``save`` writes."""
    for place, value in _faults(spec):
        raise Refused(
            f"got {path} whose spec says {place} {shown(value)}; need what save() writes; do save "
            "the net again, and take files from those alone whom you trust"
        )


def _faults(spec: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Every place of a spec that is not as it can be, with what stands there."""
    if (parts := spec.get("example_inputs")) is not None:
        if not isinstance(parts, list) or not all(map(_is_argument, parts)):
            yield "example_inputs", parts
    elif not _is_shape(spec["image_shape"]):
        yield "image_shape", spec["image_shape"]
    if not isinstance(spec["config"], dict | None):
        yield "config", spec["config"]
    for name in ("modules", "keep", "report", "extra_state"):
        if not isinstance(spec.get(name, {}), dict):
            yield name, spec[name]
            return
    for name, entry in spec["modules"].items():
        if not isinstance(entry, dict):
            yield f"modules {name}", entry
            return
        yield from ((f"modules {name} {key}", entry[key]) for key in entry if not _fits(key, entry))
    for name, axes in spec.get("keep", {}).items():
        if not isinstance(axes, dict):
            yield f"keep {name}", axes
            return
        good = (axis.isdecimal() and _is_choice(index) for axis, index in axes.items())
        yield from ((f"keep {name}", axes) for fits in good if not fits)
    known = {field.name for field in fields(Report)}
    for name, rows in spec["report"].items():
        if name not in known or not isinstance(rows, list):
            yield f"report {name}", rows
    yield from _faults_of_papers(spec)


def _faults_of_papers(spec: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """The same of the certificate and the probe."""
    told = spec["certificate"]
    if not _is_number(told.get("absolute") if isinstance(told, dict) else told):
        yield "certificate", told
    if (probe := spec.get("probe")) is None:
        return
    if not isinstance(probe, dict) or not isinstance(probe.get("outputs"), list):
        yield "probe", probe
        return
    if not _is_count(probe.get("seed"), 0, LARGEST_SEED):
        yield "seed of the probe", probe.get("seed")
    for note in probe["outputs"]:
        numbers = note.get("numbers") if isinstance(note, dict) else None
        if not isinstance(numbers, list) or not all(map(_is_number, numbers)):
            yield "numbers of the probe", numbers
        elif not _is_number(note.get("largest")) or not isinstance(note.get("shape"), list):
            yield "note of the probe", note


def _is_shape(shape: Any, dims: Collection[int] = range(1, 5)) -> bool:
    try:
        return math.prod(need_shape(shape, dims)) <= LARGEST_IMAGE
    except Refused:
        return False


def _is_argument(part: Any) -> bool:
    """True for an argument of a forward as ``graph/inputs.py`` writes it down."""
    if not isinstance(part, dict):
        return isinstance(part, bool | int | str | None) or _is_number(part)
    if part.keys() == {"shape", "low", "high"}:
        ends = _is_number(part["low"]) and _is_number(part["high"])
        return ends and _is_shape(part["shape"], range(9))
    return (
        part.keys() == {"values", "dtype"}
        and part["dtype"] in INTEGERS
        and _is_grid(part["values"])
    )


def _is_grid(values: Any) -> bool:
    """True for whole numbers in lists of equal length, in any number of them."""
    if isinstance(values, list):
        sizes = {len(row) if isinstance(row, list) else -1 for row in values}
        return len(sizes) <= 1 and all(map(_is_grid, values))
    return type(values) in (int, bool) and abs(values) < 2**63


def _fits(key: str, entry: dict[str, Any]) -> bool:
    """True for a word of an entry of "modules" with a value that it can have, of any format."""
    value = entry[key]
    if key in FLAGS:
        return value is True
    if key in COUNTS:
        return _is_count(value, 1, LARGEST)
    if key in CHOICES:
        return _is_choice(value)
    if key in MAPS:
        return isinstance(value, list) and all(_is_count(i, -1, LARGEST) for i in value)
    return key == "of" and isinstance(value, dict) and {*map(type, value.values())} <= {str}


def _is_choice(index: Any) -> bool:
    """True for indices that come once each."""
    whole = isinstance(index, list) and all(_is_count(i, 0, LARGEST**2) for i in index)
    return whole and len({*index}) == len(index)


def _is_count(value: Any, least: int, most: int) -> bool:
    return type(value) is int and least <= value <= most


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < math.inf
