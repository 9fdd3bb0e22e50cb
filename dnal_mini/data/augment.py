"""What is done to a whole batch of images at once: shifted, mirrored, normalised."""

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor


def augment(images: Tensor, generator: torch.Generator, pad: int = 4, flip: bool = True) -> Tensor:
    """Each image (n, c, h, w) shifted by up to ``pad`` pixels, and mirrored with probability 1/2.

    The shift is a random crop of the image in a border of ``pad`` zeros, so it belongs before
    ``normalise``. The generator may live on the CPU (same draws for every device) or with the
    images; neither makes the host wait for the device.
    """
    n, _, height, width = images.shape
    draw = partial(torch.randint, generator=generator, device=generator.device)
    draws = torch.cat((draw(2 * pad + 1, (2, n)), draw(2, (1, n))))
    down, right, mirrored = _moved(draws, images.device)
    if flip:
        images = torch.where(mirrored.bool()[:, None, None, None], images.flip(-1), images)
    if pad == 0:
        return images
    windows = F.pad(images, (pad, pad, pad, pad)).unfold(2, height, 1).unfold(3, width, 1)
    return windows[torch.arange(n, device=images.device), :, down, right]


def normalise(
    images: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """``(images / 255 - mean) / std`` per channel; uint8 (n, c, h, w) to ``dtype``.

    Computed in float32 or better, and rounded once to ``dtype``.
    """
    exact = torch.promote_types(dtype, torch.float32)
    spread = torch.tensor([mean, std], dtype=torch.float64)
    factors = torch.stack((1 / (255 * spread[1]), -spread[0] / spread[1]))
    scale, shift = _moved(factors.to(exact), images.device)[:, :, None, None]
    return images.to(exact).mul_(scale).add_(shift).to(dtype)


def _moved(values: Tensor, device: torch.device) -> Tensor:
    """``values`` on ``device``; from pinned memory to a GPU, so that the host does not wait."""
    if values.device.type == "cpu" and device.type == "cuda":
        values = values.pin_memory()
    return values.to(device, non_blocking=True)
