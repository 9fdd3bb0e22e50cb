"""A network made ready for the analysis: operations, numbers, and which layers are read twice."""

from collections.abc import Sequence

import torch
from torch import Tensor, fx, nn

from dnal_mini.graph.cache import captured
from dnal_mini.graph.capture import BATCH, Capture, evaluating, where
from dnal_mini.graph.exact import as_exact_as
from dnal_mini.refused import Refused


def prepare(net: nn.Module, image_shape: Sequence[int]) -> Capture:
    """The network's operations on images of (channels, ...).

    Raises: ValueError if the forward cannot be followed or the image does not fit it.
    """
    inputs = images(net, image_shape)
    try:
        return captured(net, inputs)
    except Refused:
        _run(net, inputs, image_shape)
        raise


def _run(net: nn.Module, inputs: Sequence[Tensor], image_shape: Sequence[int]) -> None:
    """Raises: ValueError with the forward's own reason if it does not take such images."""
    try:
        with torch.no_grad(), evaluating(net), as_exact_as(net):
            net(*(x.clone() for x in inputs))
    except Exception as error:  # whatever the user's forward raises
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise Refused(
            f"got image_shape {tuple(image_shape)}, which fails: {reason}{where(error)}"
        ) from error


def images(net: nn.Module, image_shape: Sequence[int]) -> tuple[Tensor]:
    """What a network is run on to be understood: the same for every call, in its own precision."""
    own = next((p for p in net.parameters() if p.is_floating_point()), torch.zeros(()))
    draw = torch.Generator().manual_seed(0)
    return (torch.randn(BATCH, *image_shape, generator=draw).to(own),)


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
