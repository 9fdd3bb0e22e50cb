"""Image sets as whole tensors: train and val in memory, test opened on first use.

No data loader and no worker process: a batch is ``split.batch(indices)``. First: ``ImageSet``.
``loaders`` makes one of three DataLoaders, whose parts go by the same few words: ``Part``.
"""

import hashlib
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from dnal_mini.refused import Refused, need_number

Batches = Generator[tuple[Tensor, Tensor], None, None]  # images (n, c, h, w), labels (n,)


class Part(Protocol):
    """What training asks of the images of train, val or test.

    ``seekable``: an epoch can be taken up inside, where ``shuffled`` begins at a later batch.
    """

    seekable: ClassVar[bool]

    def __len__(self) -> int: ...

    @property
    def device(self) -> torch.device:
        """Where its batches are."""

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height, width."""

    def to(self, device: torch.device | str) -> "Part":
        """The same images on ``device``."""

    def steps(self, batch: int) -> int:
        """Batches of an epoch of training; the last, incomplete one is left out."""

    def shuffled(self, batch: int, draw: torch.Generator, first: int = 0) -> Batches:
        """The batches of an epoch from number ``first`` on, in an order that ``draw`` decides."""

    def in_order(self, batch: int, first: int = 0, every: int = 1) -> Batches:
        """Each image once; ``every``: only each such batch, from number ``first`` on."""

    def marks(self) -> Iterator[bytes]:
        """What tells it from other images."""


@dataclass(frozen=True, eq=False)
class Split:
    """Images (n, c, h, w) as uint8 and labels (n,) as int64, on one device."""

    images: Tensor
    labels: Tensor

    seekable: ClassVar[bool] = True

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

    def steps(self, batch: int) -> int:
        """See ``Part``."""
        return len(self) // batch

    def shuffled(self, batch: int, draw: torch.Generator, first: int = 0) -> Batches:
        """See ``Part``; the order of the whole epoch is drawn at once."""
        order = torch.randperm(len(self), generator=draw)[: self.steps(batch) * batch]
        order = order.to(self.device).view(-1, batch)
        return (self.batch(chosen) for chosen in order[first:])

    def in_order(self, batch: int, first: int = 0, every: int = 1) -> Batches:
        """See ``Part``."""
        chosen = torch.arange(len(self), device=self.device).split(batch)
        return (self.batch(each) for each in chosen[first::every])

    def marks(self) -> Iterator[bytes]:
        """Shape, all labels, and 64 images, evenly spread."""
        some = min(64, len(self))
        places = torch.arange(some) * len(self) // max(some, 1)
        images = self.images[places.to(self.device)].cpu().contiguous()
        yield repr(tuple(self.images.shape)).encode()
        yield self.labels.cpu().numpy().tobytes() + images.numpy().tobytes()


@dataclass(frozen=True, eq=False)
class ImageSet:
    """A classification set; ``mean`` and ``std`` are per channel, for pixels in [0, 1].

    ``val`` is carved from the training images by seed; nothing in ``test`` is looked at for it.
    """

    name: str
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    train: Part
    val: Part
    load_test: Callable[[], Part]

    @cached_property
    def test(self) -> Part:
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
        for part in (self.train, self.val):
            for mark in part.marks():
                digest.update(mark)
        return digest.hexdigest()[:16]


def carve(labels: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Indices that stay and ``count`` indices drawn by ``seed``, both ascending.

    Each class gives its proportional share, to within one image, and keeps at least one image;
    what classes of one image cannot give, the others do.

    Raises:
        ValueError: ``count`` is below 1 or would empty a class.
    """
    need_number("a count of images (val, train_images)", count, whole=True)
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
