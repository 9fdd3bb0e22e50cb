"""Which files of a folder are its images: by name or content, at any depth; all others are told."""

import os
import socket
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from systems import device, obeys_permissions, pipe

import dnal_mini as dnal
from dnal_mini.data.sources import image_folder
from tests.data.test_sources import expected, halve, one_line, pixels, rows, write_folder

ANT = Path("train") / "ant"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """23 images to train with and 7 to test with, of three classes."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user-cache"))
    return write_folder(tmp_path / "set")


def all_of(root: Path, **more: object) -> torch.Tensor:
    """The training images with those that were carved from them."""
    found = image_folder(root, **more)
    return torch.cat((found.train.images, found.val.images))


def told(root: Path) -> str:
    """The one warning that a folder gives, without its path."""
    with pytest.warns(UserWarning, match="used ") as caught:
        image_folder(root)
    (warning,) = caught
    text = str(warning.message)
    assert text.startswith(f"{root}: ")
    assert "\n" not in text
    return text.removeprefix(f"{root}: ")


def test_images_in_subfolders_and_under_other_names_are_the_same_images(folder: Path):
    (folder / ANT / "deep" / "deeper").mkdir(parents=True)
    (folder / ANT / "00.png").rename(folder / ANT / "deep" / "deeper" / "00.png")
    (folder / ANT / "01.png").rename(folder / ANT / "deep" / "no suffix")
    (folder / ANT / "02.png").rename(folder / ANT / "02.jfif")
    (folder / ANT / "03.png").rename(folder / ANT / "a.b.c")
    assert rows(all_of(folder)) == rows(expected("train")[0])
    found = image_folder(folder)  # from the cache
    assert int((found.train.labels == 0).sum() + (found.val.labels == 0).sum()) == 5


@pytest.mark.parametrize("suffix", [".gif", ".jfif", ".webp", ".avif", ".jp2", ".tif", ""])
def test_a_picture_is_told_by_its_content(folder: Path, suffix: str):
    kind = {".gif": "GIF", ".jfif": "JPEG", ".webp": "WEBP", ".avif": "AVIF", ".jp2": "JPEG2000"}
    Image.init()
    if (name := kind.get(suffix, "TIFF")) not in Image.SAVE:
        pytest.skip(f"this Pillow writes no {name}")
    path = folder / ANT / f"picture{suffix}"
    frames = [Image.new("RGB", (9, 6), colour) for colour in ("red", "blue")]
    more = {"save_all": True, "append_images": frames[1:]} if suffix == ".gif" else {}
    frames[0].save(path, name, **more)
    images = all_of(folder)
    assert len(images) == 24
    red = (images.float() - torch.tensor([255.0, 0, 0])[:, None, None]).abs().amax((1, 2, 3))
    assert (red < 20).sum() == 1  # of several frames the first


def test_a_picture_is_turned_as_its_exif_says(folder: Path):
    source = pixels("train", 0, 0, (9, 6))  # upright it is 6 x 9
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees, clockwise
    Image.fromarray(source).save(folder / ANT / "00.png", exif=exif)
    turned = np.ascontiguousarray(np.rot90(source, -1).transpose(2, 0, 1))
    assert turned.tobytes() in rows(all_of(folder))


def write_pipe(root: Path) -> None:
    pipe(root / ANT / "pipe.png")


def link_device(root: Path) -> None:
    link("train/ant/zero.png", device("/dev/zero"))(root)


def write_socket(root: Path) -> None:
    if not hasattr(socket, "AF_UNIX"):
        pytest.skip("this system has no sockets among its files")
    with socket.socket(socket.AF_UNIX) as server:
        here = Path.cwd()
        os.chdir(root / ANT)  # a socket's path is short
        server.bind("socket.png")
        os.chdir(here)


def link(name: str, target: str) -> Callable[[Path], None]:
    return lambda root: (root / name).symlink_to(target)


def write(name: str, content: bytes = b"hello") -> Callable[[Path], None]:
    def make(root: Path) -> None:
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(content)

    return make


STRANGE = [
    (write_pipe, "1 pipes, sockets or devices"),
    (write_socket, "1 pipes, sockets or devices"),
    (link_device, "1 pipes, sockets or devices"),
    (link("train/ant/gone.png", "nowhere.png"), "1 broken links"),
    (link("train/ant/self", "self"), "1 broken links"),
    (link("train/ant/up", ".."), "1 links to folders that are used already"),
    (link("train/ant/me", "."), "1 links to folders that are used already"),
    (link("train/ant/all", "../.."), "1 links to folders that are used already"),
    (link("train/ant/seen", "../../test/ant"), "1 links to folders that are used already"),
    (write("train/ant/notes.txt"), "1 .txt"),
    (write("train/ant/deep/NOTES.TXT"), "1 .txt"),
    (write("train/ant/README"), "1 without a suffix"),
    (write("train/ant/half", b"\x89PNG\r\n\x1a\n"), "1 without a suffix"),
    (write("train/ant/page.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n"), "1 .eps"),
    (write("train/ant/.DS_Store"), "1 hidden"),
    (write("train/ant/.thumbnails/00.png"), "1 hidden"),
    (write("train/labels.csv"), "1 outside of class folders"),
    (link("test/bee2", "nowhere"), "1 outside of class folders"),
]


@pytest.mark.timeout(20)  # a pipe that is opened waits for ever
@pytest.mark.parametrize(("make", "why"), STRANGE, ids=[str(k) for k in range(len(STRANGE))])
def test_what_is_not_used_is_counted_and_never_opened(folder: Path, make, why: str):
    make(folder)
    assert told(folder) == f"used 30 of 31 files; not used: {why}"
    with pytest.warns(UserWarning, match="used 30 of 31"):
        assert rows(all_of(folder)) == rows(expected("train")[0])


def test_all_that_is_not_used_stands_in_one_line_the_most_frequent_first(folder: Path):
    for make, _ in STRANGE:
        make(folder)
    text = told(folder)
    assert text.startswith("used 30 of 48 files; not used: 4 links to folders that are used alre")
    assert ", 3 pipes, sockets or devices, " in text


def test_a_hidden_folder_beside_the_classes_is_no_class(folder: Path):
    (folder / "train" / ".thumbnails").mkdir()
    assert image_folder(folder).classes == ("ant", "bee", "cow")


def test_a_class_may_be_a_link_and_a_folder_linked_twice_counts_once(folder: Path):
    (folder / "train" / "bee").rename(folder.parent / "elsewhere")
    (folder / "train" / "bee").symlink_to(folder.parent / "elsewhere")
    assert rows(all_of(folder)) == rows(expected("train")[0])
    (folder.parent / "more").mkdir()
    Image.fromarray(pixels("train", 9, 9)).save(folder.parent / "more" / "x.png")
    for name in ("one", "two"):
        (folder / ANT / name).symlink_to(folder.parent / "more")
    with pytest.warns(UserWarning, match="used 31 of 32 files; not used: 1 links to folders"):
        assert len(all_of(folder)) == 24


def png(path: Path, width: int, height: int, bits: int, colour: int, data: bytes) -> None:
    """A PNG file, chunk by chunk: also what Pillow itself would not write."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        end = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + end

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + head + body)


def deep(path: Path, colour: int, channels: int) -> None:
    """A PNG of 6 x 9 pixels of 16 bits, of which Pillow would keep the upper 8."""
    png(path, 9, 6, 16, colour, (b"\0" + bytes(2 * channels * 9)) * 6)


def bomb(path: Path) -> None:
    png(path, 60000, 60000, 8, 2, b"")


@pytest.mark.parametrize(
    ("name", "make", "part"),
    [
        ("03.png", lambda path: deep(path, 0, 1), "pixels of more than 8 bits; need 8 bits"),
        ("03.png", lambda path: deep(path, 2, 3), "got RGB pixels of more than 8 bits; need"),
        ("03.png", lambda path: deep(path, 4, 2), "A pixels of more than 8 bits; need"),
        ("03.png", lambda path: deep(path, 6, 4), "got RGBA pixels of more than 8 bits"),
        ("03.ppm", lambda p: p.write_bytes(b"P6 9 6 65535\n" + bytes(324)), "more than 8 bits"),
        ("03.tif", lambda p: Image.new("F", (9, 6)).save(p), "got F pixels of more than 8 bits"),
        ("03.tif", lambda p: Image.new("I", (9, 6)).save(p), "got I pixels of more than 8 bits"),
        ("bomb.png", bomb, "got Image size (3600000000 pixels) exceeds limit"),
        ("bomb", bomb, "got Image size (3600000000 pixels) exceeds limit"),
        ("03.jpg", lambda p: p.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n"), "got cannot identify"),
        ("03.gif", lambda p: p.write_bytes(b"GIF89a"), "03.gif: got "),
    ],
)
@pytest.mark.parametrize("split", ["train", "test"])
def test_a_picture_that_cannot_be_used_is_named_before_anything_is_written(
    folder: Path, split: str, name: str, make: Callable, part: str
):
    make(folder / split / "bee" / name)
    with pytest.raises(ValueError, match=r".") as error:
        image_folder(folder)
    assert f"{split}/bee/{name}: got " in one_line(error)
    assert part in one_line(error)
    assert not (folder / ".dnal_cache").exists()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr"])
def test_pictures_of_every_usual_kind_are_used(folder: Path, mode: str):
    source = Image.new("RGB", (9, 6), "white")
    ImageDraw.Draw(source).rectangle((2, 1, 5, 4), "black")
    made = source.convert("L" if mode == "LA" else "RGB").convert(mode)
    (folder / ANT / "00.png").unlink()
    made.save(folder / ANT / ("00.tif" if mode in ("CMYK", "YCbCr") else "00.png"))
    expected_one = torch.from_numpy(np.array(source)).permute(2, 0, 1)
    distances = (all_of(folder).int() - expected_one.int()).abs().amax((1, 2, 3))
    assert distances.min() <= 2  # of rounding in YCbCr
    assert len(distances) == 23


@pytest.mark.skipif(not obeys_permissions(), reason="this user may read everything")
@pytest.mark.parametrize("place", ["train/bee/03.png", "test/bee", "train/bee"])
def test_what_may_not_be_read_is_named(folder: Path, place: str):
    (folder / place).chmod(0)
    with pytest.raises(ValueError, match=r".") as error:
        image_folder(folder)
    (folder / place).chmod(0o700)
    assert f"{place}" in one_line(error)
    assert "Permission denied" in one_line(error)


def test_images_that_do_not_fit_into_memory_are_told(folder: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(np, "empty", full)
    with pytest.raises(ValueError, match=r"got 23 images of 6x9 .*; need memory .* --image-size"):
        image_folder(folder)


def test_a_run_is_refused_before_it_begins_for_a_broken_test_image(folder: Path):
    config = dnal.recipes.digits().replace(data="folder", data_dir=str(folder), val=3, batch=4)
    halve("test/cow/01.png")(folder)
    with pytest.raises(ValueError, match=r"test/cow/01\.png: got .*truncated"):
        dnal.run(config, folder.parent / "run")
    assert not (folder.parent / "run").exists()
