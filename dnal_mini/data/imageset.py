"""Image sets as whole tensors: train and val in memory, test opened on first use.

No data loader and no worker process: a batch is ``split.batch(indices)``. First: ``ImageSet``.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from dnal_mini.refused import Refused


@dataclass(frozen=True, eq=False)
class Split:
    """Images (n, c, h, w) as uint8 and labels (n,) as int64, on one device."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def device(self) -> torch.device:
        """Where the images are."""
        return self.images.device

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height, width."""
        channels, height, width = self.images.shape[1:]
        return channels, height, width

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Images (n, c, h, w) and labels (n,) at ``indices`` (n,)."""
        return self.images[indices], self.labels[indices]

    def to(self, device: torch.device | str) -> "Split":
        """The same split with both tensors on ``device``."""
        return Split(self.images.to(device), self.labels.to(device))

    def take(self, indices: Tensor) -> "Split":
        """The images and labels at ``indices``, copied."""
        return Split(self.images[indices], self.labels[indices])


@dataclass(frozen=True, eq=False)
class ImageSet:
    """A classification set; ``mean`` and ``std`` are per channel, for pixels in [0, 1].

    ``val`` is carved from the training images by seed; nothing in ``test`` is looked at for it.
    """

    name: str
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    train: Split
    val: Split
    load_test: Callable[[], Split]

    @cached_property
    def test(self) -> Split:
        """The test split. Its images are read the first time that this is asked for."""
        return self.load_test()

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height, width."""
        return self.train.image_shape

    def fingerprint(self) -> str:
        """16 hex digits that tell sets apart, the same on every device; 0.01 s for 50,000 images.

        SHA-256 of class names, lengths, shapes, all labels and 64 images, evenly spread, of train
        and of val: a change that keeps all of these goes unnoticed.
        """
        digest = hashlib.sha256(repr(self.classes).encode())
        for split in (self.train, self.val):
            some = min(64, len(split))
            places = torch.arange(some) * len(split) // max(some, 1)
            images = split.images[places.to(split.device)].cpu().contiguous()
            digest.update(repr(tuple(split.images.shape)).encode())
            digest.update(split.labels.cpu().numpy().tobytes() + images.numpy().tobytes())
        return digest.hexdigest()[:16]


def carve(labels: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Indices that stay and ``count`` indices drawn by ``seed``, both ascending.

    Each class gives its proportional share, to within one image, and keeps at least one image;
    what classes of one image cannot give, the others do.

    Raises:
        ValueError: ``count`` is below 1 or would empty a class.
    """
    sizes = torch.bincount(labels)
    most = int((sizes - 1).clamp(min=0).sum())
    if not 1 <= count <= most:
        raise Refused(
            f"got {count} images to draw; need 1 to {most}, so that each class keeps one of its"
            f" {len(labels)} images; change --val (val=) or --train-images"
        )
    shares = sizes * count // len(labels)
    while missing := count - int(shares.sum()):
        lag = sizes * count - shares * len(labels)  # images still owed, times len(labels)
        lag[shares + 1 >= sizes] = torch.iinfo(lag.dtype).min
        order = torch.argsort(lag, descending=True, stable=True)[:missing]
        shares[order] += (shares + 1 < sizes)[order]
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.zeros(len(labels), dtype=torch.bool)
    for label, share in enumerate(shares.tolist()):
        members = torch.nonzero(labels == label).flatten()
        drawn[members[torch.randperm(len(members), generator=generator)[:share]]] = True
    return torch.nonzero(~drawn).flatten(), torch.nonzero(drawn).flatten()


def channel_statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel of uint8 images, for pixels in [0, 1].

    The deviation is at least one grey level (1/255), so that a constant channel can be normalised.
    """
    levels = torch.arange(256, dtype=torch.float64) / 255
    counts = torch.stack([torch.bincount(c.flatten(), minlength=256) for c in images.unbind(1)])
    shares = counts / counts.sum(1, keepdim=True, dtype=torch.float64)
    mean = shares @ levels
    variance = (shares * (levels - mean[:, None]) ** 2).sum(1)
    return tuple(mean.tolist()), tuple(variance.sqrt().clamp(min=1 / 255).tolist())


def carved_set(
    name: str,
    classes: tuple[str, ...],
    whole: Split,
    load_test: Callable[[], Split],
    seed: int,
    val: int,
    stats: tuple[tuple[float, ...], tuple[float, ...]] | None = None,
) -> ImageSet:
    kept, drawn = carve(whole.labels, val, seed)
    train = whole.take(kept)
    mean, std = stats or channel_statistics(train.images)
    return ImageSet(name, classes, mean, std, train, whole.take(drawn), load_test)
