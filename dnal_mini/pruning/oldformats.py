"""Specs of older files, as this version writes them."""

from typing import Any

from torch import nn

from dnal_mini.pruning.surgery import tables_of


def in_format_3(spec: dict[str, Any], net: nn.Module) -> dict[str, Any]:
    """The spec of a file of format 1, 2 or 3 in format 3; ``net`` is what it is to cut.

    Formats 1 and 2 named a layer, not its tensors: {"out", "in"} with {"columns"} for each of
    "in", {"of"} for parameters elsewhere; {"zeros", "stride"} where a branch ended.
    """
    if spec["format"] == 3:
        return spec
    layers = dict(net.named_modules(remove_duplicate=False))
    keep: dict[str, dict[str, Any]] = {}
    modules: dict[str, dict[str, Any]] = {}
    for name, old in spec["modules"].items():
        layer = layers.get(name, nn.Identity())
        inputs, columns = old.get("in"), old.get("columns", 1)
        if inputs is not None:
            inputs = [i * columns + column for i in inputs for column in range(columns)]
        elif spec["format"] == 1 and getattr(layer, "groups", 1) > 1:
            inputs = old.get("out")  # a depthwise layer was cut by its outputs alone
        tensors, entry = tables_of(name, layer, old.get("out"), inputs, old.get("of"))
        entry |= {key: old[key] for key in ("gather", "scatter", "bias", "gone") if key in old}
        if "zeros" in old:
            entry |= {"source": [-1] * old["zeros"], "stride": old["stride"]}
        elif "source" in old:
            entry |= {"source": old["source"], "stride": getattr(layer, "stride", 1)}
        keep |= tensors
        modules |= {name: entry} if entry else {}
    certificate = spec["certificate"]
    if spec["format"] == 1:
        certificate = {"absolute": certificate}
    return spec | {"format": 3, "keep": keep, "modules": modules, "certificate": certificate}
