"""Image sets: splits, image folders and their cache, batch augmentation, the torchvision import."""

import json
import os
import pickle
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import replace
from hashlib import md5
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from dnal_mini.data import imagecache
from dnal_mini.data.augment import augment, normalise
from dnal_mini.data.imagecache import _sha256
from dnal_mini.data.imageset import Split, carve, channel_statistics
from dnal_mini.data.sources import (
    CIFAR10_MEAN,
    CIFAR10_STD,
    cifar10,
    digits,
    image_folder,
    toy_images,
)
from dnal_mini.data.torchvision import fix_torchvision

CLASSES = ("ant", "bee", "cow")
SIZES = {"train": (5, 7, 11), "test": (2, 3, 2)}


def pixels(split: str, label: int, index: int, size: tuple[int, int] = (6, 9)) -> np.ndarray:
    """The image that belongs into a file, worked out from its place alone."""
    seed = [len(split), label, index]
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


def write_folder(root: Path, size: tuple[int, int] = (6, 9)) -> Path:
    """An image folder of 23 training and 7 test images, 6 rows x 9 columns."""
    for split, counts in SIZES.items():
        for label, (name, count) in enumerate(zip(CLASSES, counts, strict=True)):
            (root / split / name).mkdir(parents=True)
            for index in range(count):
                path = root / split / name / f"{index:02d}.png"
                Image.fromarray(pixels(split, label, index, size)).save(path)
    return root


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user-cache"))
    monkeypatch.delenv("DNAL_DATA", raising=False)
    return write_folder(tmp_path / "set")


def expected(split: str, size: tuple[int, int] = (6, 9)) -> tuple[Tensor, Tensor]:
    """Images and labels of a split in the order of class, then file name."""
    places = [(label, i) for label, count in enumerate(SIZES[split]) for i in range(count)]
    images = np.stack([pixels(split, label, i, size) for label, i in places]).transpose(0, 3, 1, 2)
    return torch.from_numpy(np.ascontiguousarray(images)), torch.tensor([p[0] for p in places])


def rows(images: Tensor) -> set[bytes]:
    return {image.numpy().tobytes() for image in images}


def one_line(error: pytest.ExceptionInfo[ValueError]) -> str:
    text = str(error.value)
    assert "\n" not in text
    assert "got " in text
    assert "; need " in text
    assert text.count(";") >= 2
    return text


# Splits


def test_carving_gives_each_class_its_share_to_within_one_image():
    labels = torch.tensor([0] * 11 + [1] * 23 + [2] * 47)[torch.randperm(81)]
    kept, drawn = carve(labels, 17, seed=3)
    assert sorted([*kept.tolist(), *drawn.tolist()]) == list(range(81))
    assert len(drawn) == 17
    shares = torch.bincount(labels[drawn]) - torch.tensor([11, 23, 47]) * 17 / 81
    assert shares.abs().max() < 1


def test_carving_depends_on_the_seed_and_on_nothing_else():
    labels = torch.arange(60) % 7
    torch.manual_seed(1)
    _, first = carve(labels, 13, seed=5)
    torch.manual_seed(2)
    _, again = carve(labels, 13, seed=5)
    _, other = carve(labels, 13, seed=6)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_every_image_of_a_class_is_drawn_equally_often():
    labels = torch.arange(20) % 2
    counts = torch.zeros(20)
    for seed in range(400):
        counts[carve(labels, 6, seed)[1]] += 1
    # binomial: mean 120, standard deviation 9.2
    assert counts.min() > 75
    assert counts.max() < 165


@pytest.mark.parametrize("count", [-1, 0, 20, 22, 30])
def test_carving_refuses_to_empty_a_class(count: int):
    labels = torch.tensor([0] * 20 + [1] + [2])
    with pytest.raises(ValueError, match=f"got {count} images to draw") as error:
        carve(labels, count, seed=0)
    one_line(error)


def test_large_classes_give_what_classes_of_one_image_cannot():
    labels = torch.cat((torch.zeros(31, dtype=torch.long), torch.arange(1, 40)))
    for count in range(1, 31):
        kept, drawn = carve(labels, count, seed=0)
        assert len(drawn) == count
        assert len(labels[kept].unique()) == 40


def test_carving_leaves_an_image_to_the_rarest_classes():
    labels = torch.tensor([0] * 20 + [1] + [2])
    kept, _ = carve(labels, 19, seed=0)
    assert labels[kept].tolist() == [0, 1, 2]


def test_a_split_moves_as_a_whole():
    split = Split(torch.zeros(5, 3, 2, 7, dtype=torch.uint8), torch.arange(5))
    moved = split.to("meta")
    assert (moved.images.device.type, moved.labels.device.type) == ("meta", "meta")
    assert len(moved) == 5
    assert split.images.device.type == "cpu"


def test_a_batch_is_the_images_and_labels_at_its_indices():
    images = torch.randint(0, 256, (5, 3, 2, 7), dtype=torch.uint8)
    split = Split(images, torch.tensor([4, 3, 1, 0, 2]))
    found, labels = split.batch(torch.tensor([3, 0, 3]))
    assert torch.equal(found, torch.stack([images[3], images[0], images[3]]))
    assert labels.tolist() == [0, 4, 0]
    assert (split.image_shape, split.device.type) == ((3, 2, 7), "cpu")


def test_statistics_equal_numpys():
    images = torch.randint(0, 256, (11, 3, 5, 7), dtype=torch.uint8)
    images[:, 1] = 200
    mean, std = channel_statistics(images)
    truth = images.numpy() / 255
    np.testing.assert_allclose(mean, truth.mean((0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(std[::2], truth.std((0, 2, 3))[::2], rtol=1e-12)
    assert std[1] == 1 / 255


# Embedded and drawn sets


def test_digits_are_scikit_learns_enlarged():
    from sklearn.datasets import load_digits

    found = digits(seed=3, val=101)
    assert (len(found.train), len(found.val), len(found.test)) == (1797 - 360 - 101, 101, 360)
    assert found.image_shape == (3, 32, 32)
    assert found.classes == tuple("0123456789")
    whole = load_digits()
    splits = (found.train, found.val, found.test)
    means = torch.cat([split.images.double().mean((1, 2, 3)) for split in splits])
    # enlarging by 4 keeps the mean of an image but for its border: compare what the sets add up to
    assert means.mean().item() == pytest.approx(whole.images.mean() * 255 / 16, rel=0.02)
    labels = torch.cat([split.labels for split in splits])
    assert torch.equal(torch.bincount(labels), torch.from_numpy(np.bincount(whole.target)))
    assert torch.equal(found.test.images[:, 0], found.test.images[:, 2])


def test_digits_share_the_test_images_but_not_the_validation_images():
    one, two = digits(seed=1), digits(seed=2)
    assert torch.equal(one.test.images, two.test.images)
    assert not torch.equal(one.val.images, two.val.images)
    assert rows(one.val.images).isdisjoint(rows(one.train.images))


def test_digits_keep_the_place_of_the_pixels():
    from sklearn.datasets import load_digits

    found = digits()
    shrunk = nn.functional.avg_pool2d(found.test.images[:, :1].double(), 4).flatten(1)
    source = torch.from_numpy(load_digits().images).flatten(1) * (255 / 16)
    distances = torch.cdist(shrunk, source)
    labels = torch.from_numpy(load_digits().target)
    assert torch.equal(labels[distances.argmin(1)], found.test.labels)


def test_toy_images_have_the_sizes_asked_for():
    toy = toy_images(23, 11, 13, num_classes=5, image_shape=(2, 9, 7), seed=4)
    assert (len(toy.train), len(toy.val), len(toy.test)) == (23, 11, 13)
    assert (toy.num_classes, toy.image_shape) == (5, (2, 9, 7))
    assert toy.train.images.dtype == torch.uint8
    assert torch.bincount(toy.test.labels).tolist() == [3, 3, 3, 2, 2]


def test_toy_images_depend_on_the_seed_alone():
    one, again, other = (toy_images(seed=seed) for seed in (5, 5, 6))
    assert torch.equal(one.train.images, again.train.images)
    assert torch.equal(one.load_test().images, one.load_test().images)
    assert torch.equal(one.test.images, again.test.images)
    assert not torch.equal(one.train.images, other.train.images)
    assert not torch.equal(one.train.images[:32], one.val.images)


def test_toy_classes_can_be_told_apart_from_few_examples():
    toy = toy_images(60, 30, 200, num_classes=6, image_shape=(3, 12, 10), seed=7)
    means = torch.stack(
        [toy.train.images[toy.train.labels == k].double().mean(0) for k in range(6)]
    )
    mirrored = toy.test.images.flip(-1).double()
    nearest = torch.cdist(mirrored.flatten(1), means.flatten(1)).argmin(1)
    assert (nearest == toy.test.labels).double().mean() > 0.95


def test_more_noise_makes_toy_images_vary_more():
    spreads = [
        toy_images(noise=noise).train.images[::4].double().std(0).mean() for noise in (0.02, 0.2)
    ]
    assert spreads[1] > 5 * spreads[0]


# Image folders


def test_a_folder_becomes_the_pixels_of_its_files(folder: Path):
    found = image_folder(folder, seed=1, val=6)
    images, labels = expected("train")
    assert found.classes == CLASSES
    assert found.image_shape == (3, 6, 9)
    together = torch.cat((found.train.images, found.val.images))
    assert rows(together) == rows(images)
    assert len(found.train) == 17
    position = {
        image.numpy().tobytes(): int(label) for image, label in zip(images, labels, strict=True)
    }
    for split in (found.train, found.val):
        assert [position[i.numpy().tobytes()] for i in split.images] == split.labels.tolist()
    assert torch.equal(found.test.images, expected("test")[0])
    assert torch.equal(found.test.labels, expected("test")[1])
    assert found.train.images.is_contiguous()


def test_statistics_of_a_folder_leave_the_validation_images_out(folder: Path):
    found = image_folder(folder, seed=1, val=6)
    np.testing.assert_allclose(
        found.mean, (found.train.images / 255.0).double().mean((0, 2, 3)), rtol=1e-6
    )


def test_a_tenth_is_the_default_validation_share(folder: Path):
    assert len(image_folder(folder).val) == 2


def test_a_broken_test_image_is_told_at_once_and_nobody_sees_the_pixels_of_sound_ones(
    folder: Path, monkeypatch: pytest.MonkeyPatch
):
    halve("test/bee/02.png")(folder)
    with pytest.raises(ValueError, match=r"test/bee/02\.png: got .*truncated"):
        image_folder(folder)
    Image.fromarray(pixels("test", 1, 2)).save(folder / "test" / "bee" / "02.png")
    found = image_folder(folder)
    reading = imagecache._read_cache
    monkeypatch.setattr(imagecache, "_read_cache", lambda *_: pytest.fail("read"))
    assert len(found.train) + len(found.val) == 23
    monkeypatch.setattr(imagecache, "_read_cache", reading)
    assert torch.equal(found.test.images, expected("test")[0])


def test_test_images_are_loaded_once(folder: Path):
    calls: list[int] = []
    found = image_folder(folder)
    counted = replace(found, load_test=lambda: (calls.append(1), found.load_test())[1])
    assert counted.test is counted.test
    assert calls == [1]


def test_the_environment_names_the_default_folder(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DNAL_DATA", str(folder))
    assert image_folder().name == "set"


def test_images_are_resized_when_a_size_is_given(folder: Path):
    found = image_folder(folder, image_size=(5, 13), val=6)
    assert found.image_shape == (3, 5, 13)
    assert found.test.images.shape == (7, 3, 5, 13)
    source = Image.fromarray(pixels("test", 0, 0)).resize((13, 5), Image.Resampling.BILINEAR)
    assert torch.equal(found.test.images[0], torch.from_numpy(np.array(source)).permute(2, 0, 1))


def test_grey_palette_and_transparent_images_become_rgb(folder: Path):
    grey = np.arange(54, dtype=np.uint8).reshape(6, 9)
    place = folder / "test" / "ant"
    Image.fromarray(grey).save(place / "00.png")
    Image.fromarray(pixels("test", 0, 1)).convert("RGBA").save(place / "01.png")
    Image.fromarray(grey).convert("P").save(place / "02.png", transparency=bytes(range(54)))
    images = image_folder(folder).test.images
    assert torch.equal(images[0], torch.from_numpy(grey).expand(3, 6, 9))
    assert torch.equal(images[1], expected("test")[0][1])
    assert torch.equal(images[2], images[0])


@pytest.mark.parametrize("image_size", [7, (7, 7)])
def test_a_side_is_a_height_and_a_width(folder: Path, image_size):
    enlarge("train/bee/03.png")(folder)
    found = image_folder(folder, image_size, val=6)
    assert found.image_shape == found.val.image_shape == found.test.image_shape == (3, 7, 7)
    with pytest.raises(ValueError, match="got image_size 0; need an int of at least 1 up to 65536"):
        image_folder(folder, 0)


def test_val_holds_the_test_images_where_there_is_no_test(folder: Path):
    (folder / "test").rename(folder / "val")
    found = image_folder(folder, val=6)
    assert torch.equal(found.test.images, expected("test")[0])
    assert rows(found.val.images) < rows(expected("train")[0])
    remove("val", "bee")(folder)
    with pytest.raises(ValueError, match="val: got no class folder bee") as error:
        image_folder(folder)
    assert "the same classes in train and val" in one_line(error)


def test_val_is_passed_over_where_there_is_a_test(folder: Path):
    (folder / "val" / "zebra").mkdir(parents=True)
    found = image_folder(folder, val=6)
    assert found.classes == CLASSES
    assert torch.equal(found.test.images, expected("test")[0])


def test_two_classes_of_one_grey_image_each_are_enough(tmp_path: Path):
    for label, name in enumerate(("no", "yes")):
        for split in ("train", "test"):
            place = tmp_path / "set" / split / name
            place.mkdir(parents=True)
            for index in range(2):
                grey = np.full((5, 7), 100 * label + 10 * index + len(split), np.uint8)
                Image.fromarray(grey).save(place / f"{index}.png")
    found = image_folder(tmp_path / "set", val=1)
    assert found.classes == ("no", "yes")
    assert found.test.images.unique().tolist() == [4, 14, 104, 114]
    assert torch.equal(found.test.images[3], torch.full((3, 5, 7), 114, dtype=torch.uint8))


# The cache


def cache_files(place: Path) -> list[Path]:
    return sorted(path for path in place.rglob("*") if path.is_file())


def forbid_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("decoded again")

    monkeypatch.setattr(imagecache, "_decode", refuse)


def test_the_second_load_comes_from_the_cache(folder: Path, monkeypatch: pytest.MonkeyPatch):
    first = image_folder(folder)
    assert torch.equal(first.test.images, expected("test")[0])
    forbid_decoding(monkeypatch)
    second = image_folder(folder)
    assert torch.equal(first.train.images, second.train.images)
    assert torch.equal(first.test.images, second.test.images)
    second.train.images[0] = 0  # warns, and the suite fails, if the memory is read-only


def test_the_cache_lies_beside_the_data_or_where_asked(folder: Path, tmp_path: Path):
    image_folder(folder)
    suffixes = [".json", ".npy"] * 2  # of test and of train
    assert [path.suffix for path in cache_files(folder / ".dnal_cache")] == suffixes
    image_folder(folder, cache=tmp_path / "elsewhere")
    assert [path.suffix for path in cache_files(tmp_path / "elsewhere")] == suffixes


def test_a_checkout_receives_no_cache(folder: Path, tmp_path: Path):
    (tmp_path / ".git").mkdir()
    before = cache_files(folder)
    image_folder(folder)
    assert cache_files(folder) == before
    assert len(cache_files(tmp_path / "user-cache")) == 4


def test_a_read_only_folder_sends_the_cache_to_the_user(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    allowed = os.access
    monkeypatch.setattr(
        os,
        "access",
        lambda path, mode: not Path(path).is_relative_to(folder) and allowed(path, mode),
    )
    image_folder(folder)
    assert not (folder / ".dnal_cache").exists()
    assert len(cache_files(tmp_path / "user-cache")) == 4


def test_a_changed_folder_is_decoded_again_and_the_old_cache_goes(folder: Path):
    image_folder(folder)
    old = cache_files(folder / ".dnal_cache")[2:]  # of train
    changed = pixels("test", 2, 9)
    Image.fromarray(changed).save(folder / "train" / "cow" / "11.png")
    found = image_folder(folder, val=6)
    assert len(found.train) == 18
    assert rows(torch.cat((found.train.images, found.val.images))) >= {
        changed.transpose(2, 0, 1).tobytes()
    }
    assert set(old).isdisjoint(cache_files(folder / ".dnal_cache"))
    assert len(cache_files(folder / ".dnal_cache")) == 4


def test_two_sets_share_a_cache_folder_in_peace(folder: Path, tmp_path: Path):
    other = write_folder(tmp_path / "second" / "set", size=(6, 9))
    (other / "train" / "ant" / "00.png").unlink()
    for root in (folder, other):
        image_folder(root, cache=tmp_path / "shared")
    assert len(cache_files(tmp_path / "shared")) == 8


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("suffix", [".npy", ".json"])
@pytest.mark.parametrize("damage", [cut, flip_a_bit, empty])
def test_a_damaged_cache_is_named_and_deleting_it_helps(
    folder: Path, damage: Callable[[Path], None], suffix: str
):
    good = image_folder(folder)
    path = next((folder / ".dnal_cache").glob(f"*{suffix}"))
    damage(path)
    with pytest.raises(ValueError, match="damaged cache") as error:
        image_folder(folder)
    text = one_line(error)
    assert "delete it" in text
    Path(text.split(": got")[0]).unlink()
    assert torch.equal(image_folder(folder).train.images, good.train.images)


def test_a_cache_of_pickled_objects_is_not_opened(folder: Path):
    image_folder(folder)
    path = next((folder / ".dnal_cache").glob("*.npy"))
    np.save(path, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    note = json.loads(path.with_suffix(".json").read_text())
    note["images_sha256"] = _sha256(path)
    path.with_suffix(".json").write_text(json.dumps(note))
    with pytest.raises(ValueError, match="damaged cache"):
        image_folder(folder)


def test_an_interrupted_write_leaves_nothing_behind(folder: Path, monkeypatch: pytest.MonkeyPatch):
    def stop(file: object, arr: np.ndarray, **_: object) -> None:
        file.write(b"half")  # type: ignore[attr-defined]
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(np, "save", stop)
        with pytest.raises(KeyboardInterrupt):
            image_folder(folder)
    assert cache_files(folder / ".dnal_cache") == []
    assert len(image_folder(folder, val=6).train) == 17


def test_a_full_disk_is_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(ValueError, match="No space left") as error:
        image_folder(folder)
    assert "cache" in one_line(error)


def test_no_place_for_a_cache_is_one_line_and_nothing_is_written(folder: Path, tmp_path: Path):
    (tmp_path / "file").write_text("in the way")
    before = cache_files(tmp_path)
    with pytest.raises(ValueError, match="no write permission") as error:
        image_folder(folder, cache=tmp_path / "file" / "cache")
    one_line(error)
    assert cache_files(tmp_path) == before


# Bad input


def remove(*parts: str) -> Callable[[Path], None]:
    return lambda folder: shutil.rmtree(folder.joinpath(*parts))


def rename(old: str, new: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        (folder / old).rename(folder / new)

    return spoil


def clear(*parts: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        for path in folder.joinpath(*parts).iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    return spoil


def write(place: str, content: bytes) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        (folder / place).write_bytes(content)

    return spoil


def halve(place: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        path = folder / place
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    return spoil


def enlarge(place: str) -> Callable[[Path], None]:
    return lambda folder: Image.new("RGB", (9, 8)).save(folder / place)


def deepen(place: str) -> Callable[[Path], None]:
    return lambda folder: Image.fromarray(np.full((6, 9), 999, np.uint16)).save(folder / place)


def one_class(folder: Path) -> None:
    for split in SIZES:
        for name in CLASSES[1:]:
            shutil.rmtree(folder / split / name)


def loose(folder: Path) -> None:
    """All images of train beside each other, as after unpacking an archive that has labels."""
    for name in CLASSES:
        for path in (folder / "train" / name).iterdir():
            path.rename(folder / "train" / f"{name}_{path.name}")
        (folder / "train" / name).rmdir()


def spread(place: str, content: bytes) -> Callable[[Path], None]:
    """Files of a content and of a suffix that say nothing, in the place of images."""

    def spoil(folder: Path) -> None:
        for path in (folder / place).iterdir():
            path.rename(path.with_suffix(".heic")).write_bytes(content)

    return spoil


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (remove(), "set"),
        (remove("train"), "set: got no train; need train/<class>/*; pass another folder as"),
        (remove("test"), "set: got no test and no val"),
        (clear("train"), "train: got no class folders"),
        (remove("test", "bee"), "test: got no class folder bee"),
        (remove("train", "bee"), "train: got no class folder bee"),
        (rename("test/cow", "test/cows"), "test: got no class folder cow"),
        (clear("train", "cow"), "train/cow: got no images"),
        (clear("test", "cow"), "test/cow: got no images"),
        (one_class, "train: got one class, ant; need two or more"),
        (loose, "train: got 23 images outside of class folders; need train/<class>/*; move"),
        (spread("train/bee", b"no image"), "train/bee: got no images but 7 .heic; need images (.b"),
        (write("train/bee/03.png", b""), "train/bee/03.png: got"),
        (write("train/bee/03.png", b"\x89PNG\r\n\x1a\n" + bytes(50)), "train/bee/03.png: got"),
        (halve("train/bee/03.png"), "train/bee/03.png: got"),
        (
            enlarge("train/bee/03.png"),
            "train/bee/03.png: got 8x9 pixels; need 6x9 as the others; resize all by",
        ),
        (enlarge("train/bee/03.png"), "--image-size SIDE"),
        (
            deepen("train/bee/03.png"),
            "train/bee/03.png: got I;16 pixels of more than 8 bits; need 8",
        ),
    ],
)
def test_bad_folders_give_one_line_that_names_the_place(
    folder: Path, spoil: Callable[[Path], None], named: str
):
    spoil(folder)
    with pytest.raises(ValueError, match=r".") as error:
        image_folder(folder)
    assert named in one_line(error)
    assert not (folder / ".dnal_cache").exists()


@pytest.mark.parametrize("load", [image_folder, cifar10])
@pytest.mark.parametrize("given", ["..", "train", "test"])
def test_a_folder_above_or_below_the_right_one_is_told_the_right_one(folder, given, load):
    with pytest.raises(ValueError, match=r".") as error:
        load((folder / given).resolve())
    text = one_line(error)
    assert text.startswith(f"{(folder / given).resolve()}: got no ")
    assert f"; pass {folder} as --data-dir" in text


def test_an_archive_is_to_be_unpacked_and_a_folder_that_is_not_there_says_so(tmp_path: Path):
    archive = tmp_path / "set.zip"
    archive.write_bytes(b"PK")
    for path, named in (
        (archive, "got Not a directory; "),
        (archive, "; unpack it and pass its folder as --data-dir"),
        (tmp_path / "none", "got No such file or directory; "),
    ):
        with pytest.raises(ValueError, match=r".") as error:
            image_folder(path)
        assert named in one_line(error)


def test_no_folder_at_all_is_one_line(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("DNAL_DATA", raising=False)
    with pytest.raises(ValueError, match="DNAL_DATA") as error:
        cifar10()
    one_line(error)


# CIFAR-10


def test_a_folder_of_other_classes_is_not_taken_for_cifar10(folder: Path):
    with pytest.raises(ValueError, match="got 3 classes") as error:
        cifar10(folder)
    one_line(error)


def test_cifar10_from_a_folder_has_its_customary_statistics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sys.modules[__name__], "CLASSES", tuple("abcdefghij"))
    monkeypatch.setattr(
        sys.modules[__name__], "SIZES", {"train": (2,) * 9 + (5,), "test": (1,) * 9 + (3,)}
    )
    root = write_folder(tmp_path / "cifar", size=(32, 32))
    found = cifar10(root, val=4)
    assert (len(found.train), len(found.val), found.name) == (19, 4, "cifar10")
    assert (found.mean, found.std) == (CIFAR10_MEAN, CIFAR10_STD)
    assert torch.equal(found.test.images, expected("test", (32, 32))[0])


@pytest.mark.skipif(find_spec("torchvision") is None, reason="torchvision is not installed")
def test_cifar10_reads_the_verified_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    fix_torchvision()
    from torchvision.datasets import CIFAR10

    names = [f"class {k}" for k in range(10)]
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (60, 3, 32, 32), dtype=np.uint8)

    def batch(name: str, content: object) -> list[str]:
        path = tmp_path / CIFAR10.base_folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(pickle.dumps(content))
        return [name, md5(path.read_bytes()).hexdigest()]

    parts = [slice(20 * k, 20 * k + 20) for k in range(3)]
    made = [
        batch(f"part_{k}", {"data": images[part].reshape(20, -1), "labels": list(range(10)) * 2})
        for k, part in enumerate(parts)
    ]
    meta = batch("names", {"label_names": names})
    monkeypatch.setattr(CIFAR10, "train_list", made[:2])
    monkeypatch.setattr(CIFAR10, "test_list", made[2:])
    monkeypatch.setattr(
        CIFAR10, "meta", {"filename": "names", "key": "label_names", "md5": meta[1]}
    )
    found = cifar10(tmp_path, val=10)
    assert rows(torch.cat((found.train.images, found.val.images))) == rows(
        torch.from_numpy(images[:40])
    )
    assert torch.equal(found.test.images, torch.from_numpy(images[40:]))
    assert found.classes == tuple(names)
    flip_a_bit(tmp_path / CIFAR10.base_folder / "part_0")
    with pytest.raises(ValueError, match="corrupted") as error:
        cifar10(tmp_path)
    assert "download=True" in one_line(error)


def test_a_folder_without_cifar10_is_one_line(tmp_path: Path):
    with pytest.raises(ValueError, match="got no CIFAR-10") as error:
        cifar10(tmp_path)
    assert "download=True" in one_line(error)


@pytest.mark.skipif(find_spec("torchvision") is None, reason="torchvision is not installed")
def test_a_download_without_a_network_is_one_line(tmp_path: Path):
    with pytest.raises(ValueError, match="need the CIFAR-10 archive") as error:
        cifar10(tmp_path / "new", download=True)
    one_line(error)


# Augmentation


def shifted(image: Tensor, down: int, right: int, mirrored: bool) -> Tensor:
    """One image moved within zeros, pixel by pixel."""
    _, height, width = image.shape
    out = torch.zeros_like(image)
    for row in range(height):
        for column in range(width):
            y, x = row + down, column + right
            if 0 <= y < height and 0 <= x < width:
                out[:, row, column] = image[:, y, width - 1 - x if mirrored else x]
    return out


def test_augmented_images_are_shifts_and_mirrors_drawn_evenly():
    image = torch.randperm(3 * 5 * 7).reshape(3, 5, 7).to(torch.uint8) + 1
    steps = range(-2, 3)
    places = {
        shifted(image, down, right, mirrored).numpy().tobytes(): (down, right, mirrored)
        for down in steps
        for right in steps
        for mirrored in (False, True)
    }
    assert len(places) == 50
    batch = image.expand(5000, 3, 5, 7)
    made = augment(batch, torch.Generator().manual_seed(0), pad=2)
    found = [places[one.numpy().tobytes()] for one in made]
    counts = [found.count(place) for place in places.values()]
    # multinomial: mean 100, standard deviation 9.9; chi-square of 49 degrees has 99.9 % below 86
    assert sum((count - 100) ** 2 / 100 for count in counts) < 86
    down, right, mirrored = np.corrcoef(np.array(found, dtype=float).T)
    assert max(abs(down[1]), abs(down[2]), abs(right[2])) < 0.06
    assert mirrored[2] == pytest.approx(1)


def test_each_image_of_a_batch_keeps_its_place():
    batch = torch.randint(1, 256, (13, 3, 5, 7), dtype=torch.uint8)
    made = augment(batch, torch.Generator().manual_seed(1), pad=1)
    for source, one in zip(batch, made, strict=True):
        options = [
            shifted(source, down, right, mirrored)
            for down in (-1, 0, 1)
            for right in (-1, 0, 1)
            for mirrored in (False, True)
        ]
        assert sum(torch.equal(one, option) for option in options) == 1


def test_without_padding_and_mirror_images_are_left_as_they_are():
    batch = torch.randint(0, 256, (11, 3, 5, 7), dtype=torch.uint8)
    assert torch.equal(augment(batch, torch.Generator(), pad=0, flip=False), batch)
    mirrored = augment(batch, torch.Generator().manual_seed(0), pad=0)
    same = (mirrored == batch).flatten(1).all(1)
    turned = (mirrored == batch.flip(-1)).flatten(1).all(1)
    assert (same ^ turned).all()
    assert same.any()
    assert turned.any()


def test_augmentation_repeats_with_its_generator_and_leaves_its_input():
    batch = torch.randint(0, 256, (17, 3, 5, 7), dtype=torch.uint8)
    before = batch.clone()
    generator = torch.Generator().manual_seed(3)
    one, two = augment(batch, generator), augment(batch, generator)
    torch.manual_seed(9)
    again = augment(batch, torch.Generator().manual_seed(3))
    assert torch.equal(one, again)
    assert not torch.equal(one, two)
    assert torch.equal(batch, before)
    assert one.dtype == torch.uint8
    assert one.is_contiguous()


def test_normalising_equals_the_formula():
    images = torch.randint(0, 256, (11, 3, 5, 7), dtype=torch.uint8)
    mean, std = (0.2, 0.4, 0.7), (0.1, 0.3, 0.5)
    columns = (1, 3, 1, 1)
    truth = (images.numpy() / 255 - np.reshape(mean, columns)) / np.reshape(std, columns)
    exact = normalise(images, mean, std, torch.float64)
    np.testing.assert_allclose(exact.numpy(), truth, rtol=1e-12, atol=1e-12)
    single = normalise(images, mean, std)
    np.testing.assert_allclose(single.numpy(), truth, rtol=1e-5, atol=1e-5)  # float32 rounding
    half = normalise(images, mean, std, torch.bfloat16)
    assert torch.equal(half, single.to(torch.bfloat16))
    assert images.dtype == torch.uint8


def test_normalising_keeps_the_memory_format():
    images = torch.randint(0, 256, (2, 3, 5, 7), dtype=torch.uint8)
    images = images.contiguous(memory_format=torch.channels_last)
    made = normalise(images, CIFAR10_MEAN, CIFAR10_STD, torch.bfloat16)
    assert made.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_makes_the_same_batch_without_waiting():
    batch = torch.randint(0, 256, (64, 3, 32, 32), dtype=torch.uint8)
    mean, std = CIFAR10_MEAN, CIFAR10_STD
    truth = normalise(augment(batch, torch.Generator().manual_seed(1)), mean, std)
    on_device = batch.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        generator = torch.Generator().manual_seed(1)
        made = normalise(augment(on_device, generator), mean, std)
        augment(on_device, torch.Generator("cuda").manual_seed(1))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(made.cpu(), truth)


# The torchvision import, each case in a process of its own


def run_python(code: str, first: Path | None = None) -> str:
    """What a fresh process prints, which finds packages in ``first`` before all others."""
    paths = [str(path) for path in (first, Path(__file__).parents[2]) if path]
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(code)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def write_torchvision(place: Path, library: bytes, code: str) -> Path:
    """A package torchvision with a compiled library of that content, which runs ``code``."""
    package = place / "torchvision"
    package.mkdir()
    (package / "_C.so").write_bytes(library)
    (package / "__init__.py").write_text(f"import torch\n{code}\n")
    return place


@pytest.mark.skipif(find_spec("torchvision") is None, reason="torchvision is not installed")
def test_the_installed_torchvision_imports_and_runs():
    out = run_python(
        """
        import sys
        import torch
        import dnal_mini.data.torchvision as data
        data.fix_torchvision()
        data.fix_torchvision()
        assert "torchvision" not in sys.modules
        import torchvision
        data.fix_torchvision()
        print(tuple(torchvision.models.resnet18()(torch.zeros(2, 3, 32, 32)).shape))
        """
    )
    assert out == "(2, 1000)"


def test_a_sound_torchvision_is_left_to_declare_its_operators(tmp_path: Path):
    declares = (
        "torch.ops.load_library(__file__.replace('__init__.py', '_C.so'))\n"
        "torch.library.define('torchvision::nms', '(Tensor a, Tensor b, float c) -> Tensor')"
    )
    library = Path(torch._C.__file__).read_bytes()  # any library that loads
    out = run_python(
        """
        import torch
        import dnal_mini.data.torchvision as data
        data.fix_torchvision()
        assert not hasattr(torch.ops.torchvision, "nms")
        import torchvision
        data.fix_torchvision()
        print(torch.ops.torchvision.nms.default._schema)
        """,
        write_torchvision(tmp_path, library, declares),
    )
    assert out == "torchvision::nms(Tensor a, Tensor b, float c) -> Tensor"


def test_a_torchvision_whose_library_cannot_load_finds_its_operators(tmp_path: Path):
    describes = "torch.library.register_fake('torchvision::nms', lambda a, b, c: a)"
    out = run_python(
        """
        import importlib.util
        import torch
        try:
            import torchvision
        except RuntimeError as error:
            print(error)
        find_spec = importlib.util.find_spec
        importlib.util.find_spec = lambda name: None
        import dnal_mini.data.torchvision as data
        data.fix_torchvision()  # as if torchvision were not installed: nothing happens
        assert not hasattr(torch.ops.torchvision, "nms")
        importlib.util.find_spec = find_spec
        data.fix_torchvision()  # helps after a failed import too
        import torchvision
        print(torchvision.__name__)
        """,
        write_torchvision(tmp_path, b"not a library", describes),
    )
    assert out == "operator torchvision::nms does not exist\ntorchvision"
