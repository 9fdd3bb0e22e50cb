"""Image folders decoded once into a checksummed cache of uint8 arrays.

Images are decoded by threads and kept as one ``.npy`` file a split, with a note of checksums beside
it. First: ``load_split``. Which folders: ``folders.py``.
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

from dnal_mini.data.folders import image_files, line_of, refusal


def image_size_of(path: Path) -> tuple[int, int]:
    """Height and width of an image."""
    height, width = _read_image(path, None).shape[1:]
    return height, width


def _read_image(path: Path, size: tuple[int, int] | None, resize: bool = False) -> np.ndarray:
    """One image as uint8 (3, height, width); other sizes than ``size`` are resized or refused."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            mode = image.mode
            pixels: Image.Image = image
            if mode == "P" and "transparency" in image.info:  # from here to RGB it would warn
                pixels = image.convert("RGBA")
            if mode[0] not in "IF":
                pixels = pixels.convert("RGB")
    except Exception as error:  # a damaged file can raise nearly anything in a decoder
        raise refusal(
            path, line_of(error), "an image that can be read", "replace or remove it"
        ) from error
    if mode[0] in "IF":
        raise refusal(path, f"{mode} pixels", "8 bits per channel", "convert it, or remove it")
    if size is not None and pixels.size != size[::-1]:
        if not resize:
            found, wanted = (f"{height}x{width}" for height, width in (pixels.size[::-1], size))
            do = "resize all by --data folder --image-size SIDE (image_size=), or remove it"
            raise refusal(path, f"{found} pixels", f"{wanted} as the others", do)
        pixels = pixels.resize(size[::-1], Image.Resampling.BILINEAR)
    return np.asarray(pixels).transpose(2, 0, 1)


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
        raise refusal(
            caches[-1], "no write permission", "a place for decoded images",
            "set XDG_CACHE_HOME, or pass another cache",
        )  # fmt: skip
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
