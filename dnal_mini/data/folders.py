"""The layout of an image folder, and what is said to whoever has another one. Opens no image."""

from pathlib import Path

from dnal_mini.refused import Refused

SUFFIXES = {".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}


def refusal(place: Path, got: str, need: str, do: str) -> Refused:
    """One line: what was found at a place, what is needed, what to do."""
    return Refused(f"{place}: got {got}; need {need}; {do}")


def line_of(error: BaseException) -> str:
    """First line of an error's text, or its type."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def layout(root: Path) -> tuple[tuple[str, ...], str]:
    """Class folders of train, sorted, and the folder of the test images: test, else val.

    Raises: ValueError if there are less than two classes, the test images have other ones, or one
    of theirs is empty.
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
    for name in test:
        image_files(root / held / name)
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


def image_files(folder: Path) -> list[Path]:
    """Image files of one class by name.

    Raises: ValueError for a folder without an image.
    """
    names = names_in(folder)
    files = [folder / name for name in names if Path(name).suffix.lower() in SUFFIXES]
    if not files:
        got, do = "no images", "add some, or remove the folder from train and test"
        if inner := [name for name in names if (folder / name).is_dir()]:
            got, do = f"no images but a folder {inner[0]}", f"move its images to {folder}"
        elif names:
            kinds = sorted({Path(name).suffix or name for name in names})
            got, do = f"no images but {', '.join(kinds[:4])}", "convert them to .png or .jpg"
        raise refusal(folder, got, f"images ({', '.join(sorted(SUFFIXES))})", do)
    return files
