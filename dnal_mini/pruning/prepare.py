"""A network made ready for the analysis: operations, numbers, and which layers are read twice."""

import torch
from torch import Tensor, fx, nn

from dnal_mini.graph.cache import captured
from dnal_mini.graph.capture import Capture, evaluating, where
from dnal_mini.graph.exact import as_exact_as
from dnal_mini.graph.inputs import Given, again, drawn, like, told
from dnal_mini.refused import Refused


def prepare(net: nn.Module, image_shape: Given) -> Capture:
    """The network's operations on images of (channels, ...), or whatever it is given.

    Raises: ValueError if the forward cannot be followed or the image does not fit it.
    """
    inputs = drawn(image_shape, like(net), 0)
    try:
        return captured(net, inputs)
    except Refused:
        _run(net, inputs, image_shape)
        raise


def _run(net: nn.Module, inputs: tuple, image_shape: Given) -> None:
    """Raises: ValueError with the forward's own reason if it does not take such images."""
    try:
        with torch.no_grad(), evaluating(net), as_exact_as(net):
            net(*again(inputs))
    except Exception as error:  # whatever the user's forward raises
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise Refused(f"got {told(image_shape)}, which fails: {reason}{where(error)}") from error


def tensors_of(net: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers by each of their names."""
    return {
        **dict(net.named_parameters(remove_duplicate=False)),
        **dict(net.named_buffers(remove_duplicate=False)),
    }


def read_again(graph: Capture) -> tuple[dict[str, list[fx.Node]], set[str]]:
    """Layers that are called more than once, by name; layers whose tensors others read, too."""
    calls: dict[str, list[fx.Node]] = {}
    for node, layer in graph.layers.items():
        calls.setdefault(layer.name, []).append(node)
    lent = set()
    for placeholder in graph.tensors:
        readers = set(placeholder.users)
        names = {graph.layers[n].name for n in readers if n in graph.layers}
        roles = {role for n in readers if n in graph.layers
                 for role, name in graph.layers[n].roles.items()
                 if name == graph.tensors[placeholder]}  # fmt: skip
        if len(names) > 1 or len(roles) > 1 or any(n not in graph.layers for n in readers):
            lent |= names
    return {name: nodes for name, nodes in calls.items() if len(nodes) > 1}, lent
