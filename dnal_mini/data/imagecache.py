"""Image folders decoded once into a checksummed cache of uint8 arrays.

A folder holds ``train/<class>/*`` and ``test/<class>/*``. Images are decoded by threads and kept as
one ``.npy`` file a split, with a note of checksums beside it. First: ``load_split``.
"""

import hashlib
import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

SUFFIXES = {".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}


def line_of(error: BaseException) -> str:
    """First line of an error's text, or its type."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def names_in(folder: Path) -> list[str]:
    """Sorted names in a folder, hidden ones left out.

    Raises: ValueError for a folder that is not there or cannot be read.
    """
    try:
        return sorted(path.name for path in folder.iterdir() if path.name[0] != ".")
    except OSError as error:
        raise ValueError(
            f"{folder}: got {error.strerror}; need a readable folder with images in"
            " train/<class>/ and test/<class>/; check the path"
        ) from error


def image_files(folder: Path) -> list[Path]:
    """Image files of one class by name.

    Raises: ValueError for a folder without an image.
    """
    files = [folder / name for name in names_in(folder) if Path(name).suffix.lower() in SUFFIXES]
    if not files:
        raise ValueError(
            f"{folder}: got no images; need at least one ({', '.join(sorted(SUFFIXES))});"
            " add images, or remove the folder from train and test"
        )
    return files


def class_names(root: Path) -> tuple[str, ...]:
    """Class folders of train, sorted. Opens no image.

    Raises: ValueError if there are none, test has other ones, or one of test is empty.
    """
    train, test = (
        [name for name in names_in(root / split) if (root / split / name).is_dir()]
        for split in ("train", "test")
    )
    if not train:
        raise ValueError(f"{root / 'train'}: got no class folders; need train/<class>/; add them")
    for there, here, split in ((train, test, "test"), (test, train, "train")):
        absent = ", ".join(sorted(set(there) - set(here)))
        if absent:
            raise ValueError(
                f"{root / split}: got no class folder {absent}; need the same classes in train and"
                " test; add it, or remove it from the other"
            )
    for name in test:
        image_files(root / "test" / name)
    return tuple(train)


def image_size_of(path: Path) -> tuple[int, int]:
    """Height and width of an image."""
    height, width = _read_image(path, None).shape[1:]
    return height, width


def _read_image(path: Path, size: tuple[int, int] | None, resize: bool = False) -> np.ndarray:
    """One image as uint8 (3, height, width); other sizes than ``size`` are resized or refused."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            if image.mode[0] in "IF":
                raise ValueError(f"{image.mode} pixels, which do not fit in 8 bits")
            pixels = image.convert("RGB")
            if size is not None and pixels.size != size[::-1]:
                if not resize:
                    raise ValueError(f"{pixels.height}x{pixels.width} pixels")
                pixels = pixels.resize(size[::-1], Image.Resampling.BILINEAR)
            return np.asarray(pixels).transpose(2, 0, 1)
    except Exception as error:  # a damaged file can raise nearly anything in a decoder
        wanted = f"{size[0]}x{size[1]}" if size else "one size"
        raise ValueError(
            f"{path}: got {line_of(error)}; need 8-bit pixels, {wanted} for all images; replace or"
            " remove it (image_folder(image_size=...) resizes)"
        ) from error


def _decode(files: list[Path], size: tuple[int, int], resize: bool) -> np.ndarray:
    """All files as uint8 (n, 3, height, width), read by threads."""
    images = np.empty((len(files), 3, *size), np.uint8)

    def decode(start: int) -> None:
        for index in range(start, min(start + 256, len(files))):
            images[index] = _read_image(files[index], size, resize)

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        list(pool.map(decode, range(0, len(files), 256)))
    return images


def load_split(
    root: Path,
    classes: tuple[str, ...],
    size: tuple[int, int],
    resize: bool,
    caches: tuple[Path, ...],
    split: str,
) -> tuple[Tensor, Tensor]:
    """Images and labels of one split from the first cache that has them, or decoded and cached."""
    files = [image_files(root / split / name) for name in classes]
    labels = torch.arange(len(files)).repeat_interleave(torch.tensor([len(f) for f in files]))
    flat = [path for of_class in files for path in of_class]
    listing = "".join(f"{f.parent.name}/{f.name} {f.stat().st_size}\n" for f in flat)
    source = hashlib.sha256(listing.encode(errors="surrogateescape")).hexdigest()
    kind = f"{split}-{size[0]}x{size[1]}-{'resized' if resize else 'native'}"
    for folder in caches:
        images = _read_cache(folder / f"{kind}-{source[:16]}.npy", source)
        if images is not None:
            return images, labels
    writable = next(filter(_is_writable, caches), None)
    if writable is None:
        raise ValueError(
            f"{caches[-1]}: got no write permission; need a place for decoded images;"
            " pass another folder as cache"
        )
    decoded = _decode(flat, size, resize)
    _write_cache(writable, kind, source, decoded)
    return torch.from_numpy(decoded), labels


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
        record = json.loads(note.read_text())
        wanted, found = (record["source_sha256"], record["images_sha256"]), (source, _sha256(path))
        if wanted == found:
            return torch.from_numpy(np.load(path, allow_pickle=False))
        reason = f"sha256 {found[1][:12]}"
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = line_of(error)
    raise ValueError(
        f"{path}: got a damaged cache ({reason}); need the file as it was written, with its .json;"
        " delete it, and the images are decoded again"
    )


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
        raise ValueError(
            f"{path}: got {error.strerror}; need {images.nbytes} bytes for the decoded images;"
            " make room, or pass another folder as cache"
        ) from error


def _replace(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Let ``write`` fill a file beside ``path``, then rename it to ``path``."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            write(file)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
