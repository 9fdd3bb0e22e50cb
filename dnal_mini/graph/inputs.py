"""Images for a network that nobody has told the size of."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dnal_mini.graph.capture import evaluating
from dnal_mini.graph.copies import copied
from dnal_mini.graph.layer import CONVS, TRANSPOSED
from dnal_mini.refused import Refused, need_shape

SIDES = (32, 28, 64, 224, 96, 128, 16, 24, 40, 48, 80, 84, 100, 112, 160, 192, 227, 256, 299)


DIMS_OF_NORM: dict[type, int] = {nn.BatchNorm1d: 0, nn.BatchNorm3d: 3}


LARGEST = 299**2  # numbers of a channel: no volume of 224 voxels a side is tried


def example_images(
    net: nn.Module, image_shape: Sequence[int] | None = None, batch: int = 2
) -> Tensor | None:
    """Random images that a net takes in eval mode, on its device and in its dtype; always the same.

    Without ``image_shape`` the first convolution or linear layer tells channels and dimensions,
    and usual sides are tried. None if the net takes none of these, or is on no real device. The
    net is left alone: copies of it are run.

    Raises: ValueError, with the forward's own reason, if it does not take an ``image_shape``.
    """
    shapes = _usual(net) if image_shape is None else [need_shape(image_shape)]
    like = next((p for p in net.parameters() if p.is_floating_point()), torch.zeros(()))
    if like.is_meta:
        return None
    trial = copied(net)
    for shape in shapes:
        draw = torch.Generator().manual_seed(0)
        images = torch.randn(batch, *shape, generator=draw).to(like)
        try:
            with torch.no_grad(), evaluating(trial), torch.random.fork_rng(devices=[]):
                trial(images.clone())
        except Exception as error:  # whatever the user's forward raises on such an image
            if image_shape:
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                raise Refused(
                    f"got image_shape {shape}, which fails: {reason}; need the shape that the net "
                    "was built for"
                ) from error
        else:
            return images
    return None


def _usual(net: nn.Module) -> Iterator[tuple[int, ...]]:
    """Shapes of one image that the first layer of a net would take."""
    kinds = (*CONVS, *TRANSPOSED, nn.Linear, _BatchNorm)
    layer: Any = next((m for m in net.modules() if isinstance(m, kinds)), None)
    if isinstance(layer, nn.Linear):
        yield (layer.in_features,)
    elif layer is not None:
        norm = isinstance(layer, _BatchNorm)
        dims = DIMS_OF_NORM.get(type(layer), 2) if norm else len(layer.kernel_size)
        channels = layer.num_features if norm else layer.in_channels
        sides = SIDES if dims else SIDES[:1]
        yield from ((channels, *[s] * dims) for s in sides if s**dims <= LARGEST)
