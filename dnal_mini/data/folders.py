"""The layout of an image folder: which files are its images, and what is said of all others.

Read ``listing``. Opens only files whose name does not say what they are, and of those the header.
"""

import stat
import warnings
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dnal_mini.refused import Refused

if TYPE_CHECKING:
    from PIL import Image

SUFFIXES = {
    ".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff",
    ".webp",
}  # fmt: skip
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP")
Identity = tuple[int, int]  # device and inode: the same folder under any name


@dataclass(frozen=True)
class Listing:
    """The images of a folder: class names, and for both splits the files of each class."""

    classes: tuple[str, ...]
    train: list[list[Path]]
    held: str  # folder of the test images: test, else val
    test: list[list[Path]]


def refusal(place: Path, got: str, need: str, do: str) -> Refused:
    """One line: what was found at a place, what is needed, what to do."""
    return Refused(f"{place}: got {got}; need {need}; {do}")


def listing(root: Path) -> Listing:
    """All images below ``train/<class>`` and ``test/<class>`` (else ``val``), by class and path.

    An image is what its suffix calls so, or what its first bytes show to be one. A class folder
    is walked to its leaves; links are followed, but not to a folder that was walked already, holds
    the class or is another one. One warning counts what is not used, and why.

    Raises: ValueError for another layout, a class without an image, or what cannot be read.
    """
    classes, held = layout(root)
    splits = (root / "train", root / held)
    places = [split / name for split in splits for name in classes]
    above = {parent for path in (*splits, *places) for parent in path.resolve().parents}
    taken = {_identity(path) for path in (*splits, *places, *above)}
    left: Counter[str] = Counter()
    for split in splits:
        others = [name for name in names_in(split) if not (split / name).is_dir()]
        left["outside of class folders"] += len(others)
    with warnings.catch_warnings(action="ignore"):  # Pillow's, of headers that are no image's
        train, test = ([_images_of(s / name, taken, left) for name in classes] for s in splits)
    used = sum(map(len, (*train, *test)))
    if told := ", ".join(f"{count} {why}" for why, count in left.most_common() if count):
        got = f"{root}: used {used} of {used + left.total()} files"
        warnings.warn(f"{got}; not used: {told}", stacklevel=2)
    return Listing(classes, train, held, test)


def layout(root: Path) -> tuple[tuple[str, ...], str]:
    """Class folders of train, sorted, and the folder of the test images: test, else val.

    Raises: ValueError if there are less than two classes, or the test images have other ones.
    """
    names = names_in(root)
    if "train" not in names:
        raise refusal(root, "no train", "train/<class>/*", pass_instead(root))
    held = "test" if "test" in names else "val"
    if held not in names:
        raise refusal(
            root, "no test and no val", "images to test with", "add test/<class>/* beside train"
        )
    train, test = (_class_folders(root / split) for split in ("train", held))
    if len(train) < 2:
        raise refusal(root / "train", f"one class, {train[0]}", "two or more", "add the others")
    for there, here, split in ((train, test, held), (test, train, "train")):
        if absent := ", ".join(sorted(set(there) - set(here))):
            raise refusal(
                root / split, f"no class folder {absent}", f"the same classes in train and {held}",
                "add it, or remove it from the other",
            )  # fmt: skip
    return tuple(train), held


def pass_instead(root: Path) -> str:
    """What to do about a folder that is not of the layout: the place that may be meant."""
    within = sorted(path.parent for path in root.glob("*/train"))
    around = [root.parent] if (root.parent / "train").is_dir() else []
    return f"pass {next(iter([*within, *around]), 'another folder')} as --data-dir"


def names_in(folder: Path) -> list[str]:
    """Sorted names in a folder, hidden ones left out.

    Raises: ValueError for a folder that is not there or cannot be read.
    """
    try:
        return sorted(path.name for path in folder.iterdir() if path.name[0] != ".")
    except OSError as error:
        need = "a readable folder with train/<class>/* and test/<class>/*"
        do = "unpack it and pass its folder" if folder.is_file() else "pass another folder"
        raise refusal(folder, str(error.strerror), need, f"{do} as --data-dir") from error


def _class_folders(folder: Path) -> list[str]:
    """Names of the folders in train or test. Raises: ValueError if there are none."""
    names = names_in(folder)
    classes = [name for name in names if (folder / name).is_dir()]
    if not classes:
        images = sum(Path(name).suffix.lower() in SUFFIXES for name in names)
        got = f"{images} images outside of class folders" if images else "no class folders"
        do = "move the images of each class into a folder" if images else "add them"
        raise refusal(folder, got, f"{folder.name}/<class>/*", do)
    return classes


def _images_of(folder: Path, taken: Collection[Identity], left: Counter[str]) -> list[Path]:
    """Image files below a class folder, sorted; what else is there is added to ``left``.

    ``taken``: folders that are not walked from here. Raises: ValueError if there is no image.
    """
    found: list[Path] = []
    other: Counter[str] = Counter()
    todo, seen = [folder], set(taken)
    while todo:
        try:
            paths = list((here := todo.pop()).iterdir())
        except OSError as error:
            do = "make it readable, or remove it"
            raise refusal(here, str(error.strerror), "a readable folder", do) from error
        for path in paths:
            why = _why_not(path)
            if why == "folder" and (which := _identity(path)) not in seen:
                seen.add(which)
                todo.append(path)
            elif why:
                other["links to folders that are used already" if why == "folder" else why] += 1
            else:
                found.append(path)
    if not found:
        kinds = ", ".join(f"{count} {why}" for why, count in other.most_common(4))
        got, do = "no images", "add some, or remove the folder from train and test"
        if kinds:
            got, do = f"no images but {kinds}", "convert them to .png or .jpg"
        raise refusal(folder, got, f"images ({', '.join(sorted(SUFFIXES))})", do)
    left.update(other)
    return sorted(found)


def _why_not(path: Path) -> str:
    """Why a path is no image, in words that a number can stand before: "" if it is one."""
    if path.name[0] == ".":
        return "hidden"
    try:
        mode = path.stat().st_mode
    except PermissionError as error:
        raise refusal(path, "Permission denied", "access", "allow it, or remove it") from error
    except OSError:  # its target is not there, or is the link itself
        return "broken links"
    if stat.S_ISDIR(mode):
        return "folder"
    if not stat.S_ISREG(mode):  # to open a pipe would wait for its writer for ever
        return "pipes, sockets or devices"
    suffix = path.suffix.lower()
    return "" if suffix in SUFFIXES or _looks_like_an_image(path) else suffix or "without a suffix"


def _looks_like_an_image(path: Path) -> bool:
    """True for a file whose header is that of a picture, whatever its name."""
    from PIL import Image

    try:
        with open_image(path):
            return True
    except Image.DecompressionBombError:  # a picture; its size is told when it is to be decoded
        return True
    except OSError as error:  # Pillow's "cannot identify" is one without a number
        if error.errno is not None:
            do = "make it readable, or remove it"
            raise refusal(path, str(error.strerror), "a readable file", do) from error
        return False
    except Exception:  # a decoder can raise nearly anything at a header that is no picture's
        return False


def open_image(path: Path) -> "Image.Image":
    """A picture of one of ``FORMATS``, its header read: others, such as EPS, may run programs."""
    from PIL import Image

    Image.init()
    return Image.open(path, formats=[name for name in FORMATS if name in Image.OPEN])


def _identity(folder: Path) -> Identity:
    place = folder.stat()
    return place.st_dev, place.st_ino
