"""Where images come from: digits (embedded), drawn toy images, CIFAR-10, any folder of classes."""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from dnal_mini.data.folders import listing, pass_instead, refusal
from dnal_mini.data.imagecache import CachedSplit, cache_folders, image_size_of, prepare
from dnal_mini.data.imageset import ImageSet, Split, carve, carved_set, channel_statistics
from dnal_mini.data.torchvision import fix_torchvision
from dnal_mini.refused import (
    LARGEST_SEED,
    LARGEST_SIDE,
    Refused,
    line_of,
    need_number,
    need_path,
    need_shape,
)

# Customary for CIFAR-10: over its 50,000 training images, per channel.
CIFAR10_MEAN = (0.4914, 0.4824, 0.4467)


CIFAR10_STD = (0.2471, 0.2435, 0.2616)
MOST_NUMBERS = 2**29  # of a split that is drawn: 2 GB on the way, as float32


def digits(seed: int = 0, val: int = 180) -> ImageSet:
    """Scikit-learn's 1,797 handwritten digits, enlarged from 1x8x8 to 3x32x32; needs no network.

    The 360 test images are the same for every seed.
    """
    from sklearn.datasets import load_digits

    need_number("seed", seed, 0, LARGEST_SEED, whole=True)
    source = load_digits()
    small = torch.from_numpy(source.images).float()[:, None] * (255 / 16)
    large = F.interpolate(small, size=(32, 32), mode="bilinear", align_corners=False)
    images = large.round().to(torch.uint8).expand(-1, 3, -1, -1).contiguous()
    whole = Split(images, torch.from_numpy(source.target).long())
    others, held = carve(whole.labels, 360, seed=0)
    names = tuple(str(name) for name in source.target_names)
    return carved_set("digits", names, whole.take(others), partial(whole.take, held), seed, val)


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
    need_number("noise", noise, 0)
    need_number("seed", seed, 0, LARGEST_SEED, whole=True)
    channels, height, width = need_shape(image_shape, dims=[3])
    most = MOST_NUMBERS // (channels * height * width)
    for name, count in {"train": train, "val": val, "test": test}.items():
        need_number(name, count, 1, most, whole=True)
    need_number("num_classes", num_classes, 1, 10**6, whole=True)
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
    path = _data_root(root)
    if (path / "train").is_dir():
        names, load, load_test = _folder(path, (32, 32), False, cache)
        if len(names) != 10:
            do = "pass --data folder (image_folder)"
            raise refusal(path, f"{len(names)} classes", "CIFAR-10's 10", do)
        whole = load()
    else:
        whole, load_test, names = _cifar10_archive(path, download)
    constants = (CIFAR10_MEAN, CIFAR10_STD)
    return carved_set("cifar10", names, whole, load_test, seed, val, constants)


def image_folder(
    root: Path | str | None = None,
    image_size: int | tuple[int, int] | None = None,
    *,
    seed: int = 0,
    val: int | None = None,
    cache: Path | str | None = None,
) -> ImageSet:
    """Any set in the layout ``train/<class>/*``, ``test/<class>/*``, as 8-bit RGB without alpha.

    ``root`` defaults to the environment variable DNAL_DATA. Without a folder ``test`` the images
    of ``val`` are the test images; those for validation are carved from train in any case, ``val``
    of them, by default a tenth. ``image_size``, a side or (height, width), resizes each image,
    bilinear, aspect not kept; without it all images must have the size of the first. An image is
    any file below a class folder whose suffix or first bytes say so; one warning counts the files
    that are not used, and why. Of several frames the first counts, turned as EXIF says.

    All images are decoded at once, those of the test too, so that a broken one is told here; the
    pixels of the test are read when they are asked for. Decoded images are kept in ``.dnal_cache``
    inside ``root``, or in the user's cache folder where ``root`` is read-only or in a git checkout,
    or in the folder ``cache``. They are decoded again when a file's name or size (in bytes) has
    changed; a change that keeps both goes unnoticed.

    Raises:
        ValueError: folder missing or empty, less than two classes, a class missing in test, an
            image that cannot be read or is of another size or of more than 8 bits, a cache that is
            damaged, no place to write one.
    """
    path = _data_root(root)
    size = _size(image_size)
    need_number("seed", seed, 0, LARGEST_SEED, whole=True)
    names, load, load_test = _folder(path, size, size is not None, cache)
    whole = load()
    count = max(1, len(whole) // 10) if val is None else val
    return carved_set(path.resolve().name, names, whole, load_test, seed, count)


def _folder(
    root: Path, size: tuple[int, int] | None, resize: bool, cache: Path | str | None
) -> tuple[tuple[str, ...], Callable[[], Split], Callable[[], Split]]:
    """Class names, functions that read the training and the test images.

    The first one has the test images decoded and cached too, so that a file that cannot be used is
    told before anything is trained; nobody sees their pixels before the second is called.
    """
    found = listing(root)
    size = size or image_size_of(found.train[0][0])
    caches = cache_folders(root, cache)
    train = CachedSplit(root / "train", found.train, size, resize, caches)
    test = CachedSplit(root / found.held, found.test, size, resize, caches)

    def load() -> Split:
        images, _ = prepare([train, test])
        return Split(images, train.labels)

    def load_test() -> Split:
        (images,) = prepare([test])
        return Split(images, test.labels)

    return found.classes, load, load_test


def _cifar10_archive(
    root: Path, download: bool
) -> tuple[Split, Callable[[], Split], tuple[str, ...]]:
    """Training images, a function that reads the test images, class names."""
    if not download and not (root / "cifar-10-batches-py").is_dir():
        raise refusal(
            root, "no CIFAR-10", "train/<class>/ and test/<class>/, or cifar-10-batches-py",
            f"{pass_instead(root)}, or none to download it (download=True)",
        )  # fmt: skip
    fix_torchvision()
    try:
        from torchvision.datasets import CIFAR10
    except ModuleNotFoundError as error:
        need = "it to read or fetch the CIFAR-10 archive"
        raise refusal(root, "no torchvision", need, "pip install torchvision") from error

    def load(train: bool) -> tuple[Split, tuple[str, ...]]:
        try:
            found = CIFAR10(str(root), train=train, download=download and train)
        except (OSError, RuntimeError) as error:
            damaged = isinstance(error, RuntimeError)
            do = "delete what is there" if damaged else "check the network"
            raise refusal(
                root, line_of(error), "the CIFAR-10 archive as published",
                f"{do} and download it again (download=True), or pass another --data-dir",
            ) from error  # fmt: skip
        images = torch.from_numpy(found.data).permute(0, 3, 1, 2).contiguous()
        return Split(images, torch.tensor(found.targets)), tuple(found.classes)

    whole, names = load(train=True)
    return whole, lambda: load(train=False)[0], names


def _data_root(root: Path | str | None) -> Path:
    path = root or os.environ.get("DNAL_DATA")
    if path is None or path == "":
        raise Refused("got no data folder; need one; pass --data-dir (root), or set DNAL_DATA")
    return need_path(path, "data folder").expanduser()


def _size(image_size: int | tuple[int, int] | None) -> tuple[int, int] | None:
    """Height and width of a side or a pair. Raises: ValueError for anything else."""
    if image_size is None:
        return None
    sides = image_size if isinstance(image_size, tuple | list) else (image_size, image_size)
    if len(sides) != 2:
        raise Refused(f"got image_size {image_size}; need a side, or (height, width)")
    height, width = (need_number("image_size", n, 1, LARGEST_SIDE, whole=True) for n in sides)
    return int(height), int(width)
