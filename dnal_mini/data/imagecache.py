"""Image folders decoded once into a checksummed cache of uint8 arrays.

Images are decoded by threads and kept as one ``.npy`` file a split, with a note of checksums beside
it. First: ``prepare``. Which files: ``folders.py``.
"""

import hashlib
import json
import os
import re
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
import torch
from torch import Tensor

from dnal_mini.data.folders import open_image, refusal
from dnal_mini.refused import line_of

if TYPE_CHECKING:
    from PIL import Image

DECODER = 2  # raised when the same files come out as other pixels
DEEP = re.compile(r";16[BLN]")  # in what Pillow calls the samples of a file: 16 bits per channel


@dataclass(frozen=True)
class CachedSplit:
    """The images of one split: their files by class, and how and where they are kept decoded."""

    place: Path  # the folder of the split
    files: list[list[Path]]
    size: tuple[int, int]  # height, width
    resize: bool  # else other sizes are refused
    caches: tuple[Path, ...]  # folders, the preferred one first

    @property
    def labels(self) -> Tensor:
        """The place of its class for each image, int64 (n,)."""
        counts = torch.tensor([len(files) for files in self.files])
        return torch.arange(len(self.files)).repeat_interleave(counts)

    @property
    def flat(self) -> list[Path]:
        """The files of all classes, one class after the other."""
        return [path for files in self.files for path in files]

    @cached_property
    def source(self) -> str:
        """A checksum of where the files are and of their sizes in bytes."""
        names = [path.relative_to(self.place).as_posix() for path in self.flat]
        sizes = [path.stat().st_size for path in self.flat]
        lines = [f"{name} {size}\n" for name, size in zip(names, sizes, strict=True)]
        text = f"{DECODER}\n{''.join(lines)}"
        return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()

    @property
    def kind(self) -> str:
        """What the names of all its caches begin with."""
        height, width = self.size
        return f"{self.place.name}-{height}x{width}-{'resized' if self.resize else 'native'}"

    def cached(self) -> Tensor | None:
        """Images (n, 3, height, width) of the first cache that has them, or None."""
        name = f"{self.kind}-{self.source[:16]}.npy"
        found = (_read_cache(folder / name, self.source) for folder in self.caches)
        return next((images for images in found if images is not None), None)

    def decode(self) -> np.ndarray:
        """The same from the files. Raises: ValueError, also if they could not be cached."""
        if not any(map(_is_writable, self.caches)):
            raise refusal(
                self.caches[-1], "no write permission", "a place for decoded images",
                "set XDG_CACHE_HOME, or pass another cache",
            )  # fmt: skip
        return _decode(self.place, self.flat, self.size, self.resize)

    def write(self, images: np.ndarray) -> None:
        """Put decoded images into the first cache that can be written."""
        folder = next(filter(_is_writable, self.caches))
        _write_cache(folder, self.kind, self.source, images)


def prepare(splits: Sequence[CachedSplit]) -> list[Tensor]:
    """The images of each split, uint8 (n, 3, height, width): cached, or else decoded and cached.

    Nothing is written before all are decoded.
    Raises: ValueError for an image that cannot be used, a damaged cache, no place to write one.
    """
    cached = [split.cached() for split in splits]
    new = {k: split.decode() for k, split in enumerate(splits) if cached[k] is None}
    for k, images in new.items():
        splits[k].write(images)
    found = ((torch.from_numpy(new[k]) if c is None else c) for k, c in enumerate(cached))
    return list(found)


def image_size_of(path: Path) -> tuple[int, int]:
    """Height and width of an image."""
    with warnings.catch_warnings(action="ignore"):
        height, width = _read_image(path, None).shape[1:]
    return height, width


def _read_image(path: Path, size: tuple[int, int] | None, resize: bool = False) -> np.ndarray:
    """One image as uint8 (3, height, width); other sizes than ``size`` are resized or refused.

    Of several frames the first, turned as its EXIF orientation says.
    """
    from PIL import ExifTags, Image, ImageOps

    try:
        with open_image(path) as image:
            mode, deep = image.mode, _is_deep(image)
            pixels: Image.Image = image
            if mode == "P" and "transparency" in image.info:  # from here to RGB it would warn
                pixels = image.convert("RGBA")
            if not deep:  # no copy where none is needed: most of the time of small images
                if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
                    pixels = ImageOps.exif_transpose(pixels)
                if pixels.mode != "RGB":
                    pixels = pixels.convert("RGB")
                pixels.load()
    except Exception as error:  # a damaged file can raise nearly anything in a decoder
        raise refusal(
            path, line_of(error), "an image that can be read", "replace or remove it"
        ) from error
    if deep:
        got = f"{mode} pixels of more than 8 bits"
        raise refusal(path, got, "8 bits per channel", "convert it, or remove it")
    if size is not None and pixels.size != size[::-1]:
        if not resize:
            found, wanted = (f"{height}x{width}" for height, width in (pixels.size[::-1], size))
            do = "resize all by --data folder --image-size SIDE (image_size=), or remove it"
            raise refusal(path, f"{found} pixels", f"{wanted} as the others", do)
        pixels = pixels.resize(size[::-1], Image.Resampling.BILINEAR)
    return np.asarray(pixels).transpose(2, 0, 1)


def _is_deep(image: "Image.Image") -> bool:
    """True for more than 8 bits per channel, which Pillow would cut for some modes."""
    for coder, _, _, args in getattr(image, "tile", ()):
        first, *others = args if isinstance(args, tuple) else (args,)
        if DEEP.search(str(first)) or (coder == "ppm" and others[0] > 255):
            return True
    return image.mode[0] in "IF"


def _decode(place: Path, files: list[Path], size: tuple[int, int], resize: bool) -> np.ndarray:
    """All files as uint8 (n, 3, height, width), read by threads."""
    shape = (len(files), 3, *size)
    try:
        images = np.empty(shape, np.uint8)
    except (MemoryError, ValueError) as error:  # a product beyond the largest int is a ValueError
        got = f"{len(files)} images of {size[0]}x{size[1]} pixels"
        do = "make them smaller: --data folder --image-size SIDE (image_size=)"
        raise refusal(place, got, "memory for all of them", do) from error

    def decode(start: int) -> None:
        for index in range(start, min(start + 256, len(files))):
            images[index] = _read_image(files[index], size, resize)

    quiet = warnings.catch_warnings(action="ignore")  # Pillow's, of odd pictures that it can read
    with quiet, ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        list(pool.map(decode, range(0, len(files), 256)))
    return images


def cache_folders(root: Path, cache: Path | str | None) -> tuple[Path, ...]:
    """Where a cache of ``root`` may be, the preferred place first; never in a git checkout."""
    here = root.resolve()
    private = f"{here.name}-{hashlib.sha256(str(here).encode()).hexdigest()[:12]}"
    if cache is not None:
        return (Path(cache).expanduser() / private,)
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser())
    in_checkout = any((folder / ".git").exists() for folder in (here, *here.parents))
    beside = () if in_checkout else (here / ".dnal_cache",)
    return (*beside, home / "dnal_mini" / private)


def _is_writable(folder: Path) -> bool:
    """True if files can be made in ``folder``, which need not exist yet."""
    while not folder.exists():
        folder = folder.parent
    return folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_cache(path: Path, source: str) -> Tensor | None:
    """Cached images of ``source``, None if there are none.

    Raises:
        ValueError: the cache is not what was written.
    """
    note = path.with_suffix(".json")
    if not (path.exists() and note.exists()):
        return None
    try:
        record = json.loads(note.read_bytes())
        wanted, found = (record["source_sha256"], record["images_sha256"]), (source, _sha256(path))
        if wanted == found:
            return torch.from_numpy(np.load(path, allow_pickle=False))
        reason = f"sha256 {found[1][:12]}"
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = line_of(error)
    raise refusal(
        path, f"a damaged cache ({reason})", "the file as it was written, with its .json",
        "delete it, and the images are decoded again",
    )  # fmt: skip


def _write_cache(folder: Path, kind: str, source: str, images: np.ndarray) -> None:
    """Images, then checksums, each renamed into place when complete; old ones are removed."""
    path = folder / f"{kind}-{source[:16]}.npy"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _replace(path, partial(np.save, arr=images, allow_pickle=False))
        record = {"source_sha256": source, "images_sha256": _sha256(path), "count": len(images)}
        note = json.dumps(record, indent=1).encode()
        _replace(path.with_suffix(".json"), lambda file: file.write(note))
        for old in folder.glob(f"{kind}-*"):
            if old.stem != path.stem and old.suffix in {".npy", ".json"}:
                old.unlink(missing_ok=True)
    except OSError as error:
        raise refusal(
            path, str(error.strerror), f"{images.nbytes} bytes for the decoded images",
            "make room, set XDG_CACHE_HOME, or pass another cache",
        ) from error  # fmt: skip


def _replace(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Let ``write`` fill a file beside ``path``, then rename it to ``path``."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            write(file)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
