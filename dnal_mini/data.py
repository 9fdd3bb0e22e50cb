"""Image sets as whole tensors: train and val in memory, test opened on first use.

Sources: ``digits`` (embedded), ``toy_images`` (drawn from a seed), ``cifar10`` and ``image_folder``
(decoded once into a checksummed cache). ``augment`` and ``normalise`` treat a whole batch at once.
No data loader and no worker process: a batch is ``split.images[indices]``. First: ``ImageSet``.
"""

import importlib.machinery
import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dnal_mini.imagecache import (
    cache_folders,
    class_names,
    image_files,
    image_size_of,
    line_of,
    load_split,
)

# Customary for CIFAR-10: over its 50,000 training images, per channel.
CIFAR10_MEAN = (0.4914, 0.4824, 0.4467)
CIFAR10_STD = (0.2471, 0.2435, 0.2616)


@dataclass(frozen=True, eq=False)
class Split:
    """Images (n, c, h, w) as uint8 and labels (n,) as int64, on one device."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

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
        channels, height, width = self.train.images.shape[1:]
        return channels, height, width


def digits(seed: int = 0, val: int = 180) -> ImageSet:
    """Scikit-learn's 1,797 handwritten digits, enlarged from 1x8x8 to 3x32x32; needs no network.

    The 360 test images are the same for every seed.
    """
    from sklearn.datasets import load_digits

    source = load_digits()
    small = torch.from_numpy(source.images).float()[:, None] * (255 / 16)
    large = F.interpolate(small, size=(32, 32), mode="bilinear", align_corners=False)
    images = large.round().to(torch.uint8).expand(-1, 3, -1, -1).contiguous()
    whole = Split(images, torch.from_numpy(source.target).long())
    others, held = carve(whole.labels, 360, seed=0)
    names = tuple(str(name) for name in source.target_names)
    return _image_set("digits", names, whole.take(others), partial(whole.take, held), seed, val)


def toy_images(
    train: int = 128,
    val: int = 32,
    test: int = 32,
    num_classes: int = 4,
    image_shape: tuple[int, int, int] = (3, 16, 16),
    noise: float = 0.1,
    seed: int = 0,
) -> ImageSet:
    """Images drawn from ``seed``: one smooth mirror-symmetric pattern per class, plus noise.

    ``noise`` is the standard deviation for pixels in [0, 1]. Class sizes differ by one at most.
    """
    channels, height, width = image_shape
    generator = torch.Generator().manual_seed(4 * seed)
    coarse = torch.rand(num_classes, channels, 4, 4, generator=generator)
    smooth = F.interpolate(coarse, (height, width), mode="bilinear", align_corners=False)
    patterns = (smooth + smooth.flip(-1)) / 2

    def draw(count: int, stream: int) -> Split:
        generator = torch.Generator().manual_seed(4 * seed + stream)
        labels = torch.arange(count) % num_classes
        noisy = torch.normal(patterns[labels], noise, generator=generator)
        return Split((noisy * 255).round().clamp(0, 255).to(torch.uint8), labels)

    shown = draw(train, 1)
    names = tuple(f"pattern {label}" for label in range(num_classes))
    stats = channel_statistics(shown.images)
    return ImageSet("toy", names, *stats, shown, draw(val, 2), partial(draw, test, 3))


def cifar10(
    root: Path | str | None = None,
    *,
    download: bool = False,
    seed: int = 0,
    val: int = 5000,
    cache: Path | str | None = None,
) -> ImageSet:
    """CIFAR-10 from ``train/<class>/*`` and ``test/<class>/*``, or from torchvision's archive.

    ``root`` defaults to the environment variable DNAL_DATA. With ``download`` torchvision fetches
    and verifies the archive if ``root`` has no folder ``train``. ``cache``: see ``image_folder``.
    ``mean`` and ``std`` are the customary constants.

    Raises:
        ValueError: no usable data in ``root``, or anything else that ``image_folder`` refuses.
    """
    constants = (CIFAR10_MEAN, CIFAR10_STD)
    path = _data_root(root)
    if not (path / "train").is_dir():
        whole, load_test, names = _cifar10_archive(path, download)
        return _image_set("cifar10", names, whole, load_test, seed, val, constants)
    names = class_names(path)
    if len(names) != 10:
        raise ValueError(f"{path}: got {len(names)} classes; need CIFAR-10's 10; use image_folder")
    load = partial(_from_folder, path, names, (32, 32), False, cache_folders(path, cache))
    return _image_set("cifar10", names, load("train"), partial(load, "test"), seed, val, constants)


def image_folder(
    root: Path | str | None = None,
    image_size: tuple[int, int] | None = None,
    *,
    seed: int = 0,
    val: int | None = None,
    cache: Path | str | None = None,
) -> ImageSet:
    """Any set in the layout ``train/<class>/*``, ``test/<class>/*``, as 8-bit RGB without alpha.

    ``root`` defaults to the environment variable DNAL_DATA. ``image_size`` (height, width) resizes
    each image, bilinear, aspect not kept; without it all images must have one size. ``val`` is by
    default a tenth of the training images.

    Decoded images are kept in ``.dnal_cache`` inside ``root``, or in the user's cache folder where
    ``root`` is read-only or in a git checkout, or in the folder ``cache``. They are decoded again
    when a file's name or size (in bytes) has changed; a change that keeps both goes unnoticed.

    Raises:
        ValueError: folder missing or empty, a class missing in test, an image that cannot be read,
            a cache that is damaged, no place to write one.
    """
    path = _data_root(root)
    names = class_names(path)
    resize, caches = image_size is not None, cache_folders(path, cache)
    height, width = image_size or image_size_of(image_files(path / "train" / names[0])[0])
    load = partial(_from_folder, path, names, (height, width), resize, caches)
    whole = load("train")
    count = max(1, len(whole) // 10) if val is None else val
    return _image_set(path.resolve().name, names, whole, partial(load, "test"), seed, count)


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
        raise ValueError(
            f"got val={count}; need 1 to {most}, so that each class keeps one of the {len(labels)}"
            " training images; change val"
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


def fix_torchvision() -> None:
    """Make ``import torchvision`` work where its compiled library cannot be loaded.

    The package index pairs a CPU-only torch with a torchvision built for CUDA. Its import then
    stops at operators that only its library declares. Here that library is loaded exactly as
    torchvision would load it; if (and only if) this fails, the operators are declared, without code
    behind them. Never imports torchvision; may be called any number of times.
    """
    if "torchvision" in sys.modules or hasattr(torch.ops.torchvision, "nms"):
        return
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None or os.name == "nt":  # Windows' index pairs CPU with CPU
        return
    kinds = (importlib.machinery.ExtensionFileLoader, importlib.machinery.EXTENSION_SUFFIXES)
    library = importlib.machinery.FileFinder(str(Path(spec.origin).parent), kinds).find_spec("_C")
    try:
        if library is not None and library.origin is not None:
            torch.ops.load_library(library.origin)
            return
    except OSError:
        pass  # the broken pair: libraries that this one stands on are not there
    for name in ("nms", "qnms"):
        schema = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
        torch.library.define(f"torchvision::{name}", schema)


def _from_folder(*arguments: Any) -> Split:
    """One split of an image folder; arguments as for ``load_split``."""
    return Split(*load_split(*arguments))


def _image_set(
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


def _moved(values: Tensor, device: torch.device) -> Tensor:
    """``values`` on ``device``; from pinned memory to a GPU, so that the host does not wait."""
    if values.device.type == "cpu" and device.type == "cuda":
        values = values.pin_memory()
    return values.to(device, non_blocking=True)


def _cifar10_archive(
    root: Path, download: bool
) -> tuple[Split, Callable[[], Split], tuple[str, ...]]:
    """Training images, a function that reads the test images, class names."""
    if not download and not (root / "cifar-10-batches-py").is_dir():
        raise ValueError(
            f"{root}: got no CIFAR-10; need train/<class>/ and test/<class>/, or the unpacked"
            " archive cifar-10-batches-py; pass another root, or download=True"
        )
    fix_torchvision()
    try:
        from torchvision.datasets import CIFAR10
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{root}: got no torchvision; need it to read or fetch the CIFAR-10 archive;"
            " pip install torchvision"
        ) from error

    def load(train: bool) -> tuple[Split, tuple[str, ...]]:
        try:
            found = CIFAR10(str(root), train=train, download=download and train)
        except (OSError, RuntimeError) as error:
            raise ValueError(
                f"{root}: got {line_of(error)}; need the CIFAR-10 archive as published; delete"
                " what is there, and pass download=True"
            ) from error
        images = torch.from_numpy(found.data).permute(0, 3, 1, 2).contiguous()
        return Split(images, torch.tensor(found.targets)), tuple(found.classes)

    whole, names = load(train=True)
    return whole, lambda: load(train=False)[0], names


def _data_root(root: Path | str | None) -> Path:
    path = root or os.environ.get("DNAL_DATA")
    if path is None or path == "":
        raise ValueError("got no data folder; need one; pass root, or set DNAL_DATA")
    return Path(path).expanduser()
