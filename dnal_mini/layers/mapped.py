"""A layer with a ``ChannelMap`` in front of it or behind, and all that it says of itself true."""

from typing import Any

from torch import nn

from dnal_mini.layers.channelmap import ChannelMap
from dnal_mini.layers.mixed import Mixed, adopt

ROLES = ("gather", "scatter")  # in front of the layer, behind it


class Mapped(Mixed):
    """What a layer becomes that reads some channels only, or puts its own in their places.

    ``gather`` and ``scatter``, where there is one, are modules of the layer. They hold no state.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        x, *more = (*args, *kwargs.values())
        x = self.gather(x) if hasattr(self, "gather") else x
        x = super().forward(x, *more)  # type: ignore[misc]
        return self.scatter(x) if hasattr(self, "scatter") else x


def put_map(layer: nn.Module, role: str, channels: ChannelMap) -> ChannelMap:
    """Put a ChannelMap in front of a layer (gather) or behind it (scatter), in place.

    Where there is one already, the new one stands between it and the layer. Returns what is there.
    """
    if not isinstance(layer, Mapped):
        adopt(layer, Mapped)
    if there := getattr(layer, role, None):
        inner, outer = (channels, there) if role == "scatter" else (there, channels)
        source = inner.source[outer.source.clamp(min=0)].masked_fill(outer.source < 0, -1)
        channels = ChannelMap(source).to(source.device)
    setattr(layer, role, channels)
    return channels
