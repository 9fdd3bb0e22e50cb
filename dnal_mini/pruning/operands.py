"""What the rules ask of a node: its one tensor, its results on vectors of values."""

from typing import Any

from torch import Tensor, fx
from torch.fx.node import map_arg

from dnal_mini.graph.places import like
from dnal_mini.pruning.facts import Analysis
from dnal_mini.pruning.provenance import Broken, Shadow


def single(node: fx.Node, analysis: Analysis) -> tuple[fx.Node, Shadow]:
    """The one tensor that an operation reads.

    Raises: Broken if it reads several, or a tuple of them.
    """
    tensors = [n for n in node.all_input_nodes if n in analysis.facts]
    shadow = analysis.values[tensors[0]]
    if len(tensors) > 1 or not isinstance(shadow, Shadow):
        raise Broken("not one tensor")
    return tensors[0], shadow


def on_values(node: fx.Node, analysis: Analysis, vectors: dict[fx.Node, Tensor]) -> Tensor:
    """Run an elementwise operation on vectors of channel values instead of tensors."""

    def look(n: fx.Node) -> Any:
        return vectors[n].clone() if n in vectors else analysis.values[n].detach().double().cpu()

    return like(node, *map_arg(node.args, look), **map_arg(node.kwargs, look)).double()
