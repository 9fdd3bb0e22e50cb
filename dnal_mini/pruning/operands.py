"""What the rules ask of a node: its numbers, its one tensor, its name."""

import copy
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from dnal_mini.graph.ops import name_of
from dnal_mini.pruning.facts import Analysis, Unknown
from dnal_mini.pruning.prepare import call
from dnal_mini.pruning.provenance import Broken, Shadow


def number(node: fx.Node, graph: fx.GraphModule, values: dict[fx.Node, Any]) -> Any:
    """Value of a node that returns sizes or arithmetic on sizes.

    Raises: Broken if it needs the numbers in a tensor.
    """

    def look(n: fx.Node) -> Any:
        value = values[n]
        if isinstance(value, Tensor | Unknown):
            raise Broken("a number out of a tensor")
        return torch.empty(value.shape, device="meta") if isinstance(value, Shadow) else value

    result = call(node, graph, map_arg(node.args, look), map_arg(node.kwargs, look))
    if isinstance(result, Tensor):
        raise Broken("a tensor made of sizes")
    return result


def others(node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    """Arguments of a node without its tensors, sizes worked out: must not depend on the widths."""

    def look(n: fx.Node) -> Any:
        value = values.get(n)
        return None if isinstance(value, Shadow | Tensor) else value

    return map_arg((node.args, dict(node.kwargs)), look)


def single(node: fx.Node, analysis: Analysis) -> tuple[fx.Node, Shadow]:
    """The one tensor that an operation reads.

    Raises: Broken if it reads several, or a tuple of them.
    """
    tensors = [n for n in node.all_input_nodes if n in analysis.facts]
    shadow = analysis.values[tensors[0]]
    if len(tensors) > 1 or not isinstance(shadow, Shadow):
        raise Broken("not one tensor")
    return tensors[0], shadow


def name_at(node: fx.Node, analysis: Analysis) -> str:
    if node.op == "call_module":
        return type(analysis.module(node)).__name__.lower()
    return name_of(node)


def on_values(node: fx.Node, analysis: Analysis, vectors: dict[fx.Node, Tensor]) -> Tensor:
    """Run an elementwise operation on vectors of channel values instead of tensors."""

    def look(n: fx.Node) -> Any:
        return vectors[n].clone() if n in vectors else analysis.values[n]

    args, kwargs = map_arg(node.args, look), map_arg(node.kwargs, look)
    if node.op == "call_module":
        return copy.deepcopy(analysis.module(node)).cpu().double()(*args).detach()
    return call(node, analysis.graph, args, kwargs).double()


def sizes(arguments: Any, values: dict[fx.Node, Any]) -> Any:
    """Arguments with the numbers that nodes stand for."""
    return map_arg(arguments, lambda n: values[n])
