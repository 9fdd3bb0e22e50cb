"""A layer that does nothing any more, where forward code looks at what is there."""

from typing import Any

from torch import nn

from dnal_mini.layers.mixed import Mixed, adopt_inside


class Hollow(Mixed):
    """What a layer becomes that is gone: it hands its input on, and has no tensors.

    Its class and attributes go on saying what they said, wherever the user keeps it.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return (*args, *kwargs.values())[0]

    def _load_from_state_dict(self, *args: Any) -> None:
        pass  # a BatchNorm's own would ask for a counter

    def reset_parameters(self) -> None:
        """There are none."""


def hollow(layer: nn.Module) -> nn.Module:
    """Make a layer, or a whole block, a hollow one, in place; returns it."""
    for module in layer.modules():
        adopt_inside(module, Hollow)
        for tensors in (module._parameters, module._buffers):
            tensors.update(dict.fromkeys(tensors))
    return layer
