"""Three DataLoaders as an image set: what is taken, what is told, and how it is known again."""

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from dnal_mini.data.loaders import labels_of, loaded_set, repeatable


def images(count: int, seed: int = 0) -> Tensor:
    return torch.rand(count, 3, 5, 4, generator=torch.Generator().manual_seed(seed))


def tensors(count: int = 23, classes: int = 3, seed: int = 0) -> TensorDataset:
    return TensorDataset(images(count, seed), torch.arange(count) % classes)


class Noisy(Dataset):
    """Noise from one of three sources on each image; ``own``: from one that no seed reaches."""

    def __init__(self, source: str, shift: float = 0.0, labels: int = 3, count: int = 23) -> None:
        self.source, self.images = source, images(count) + shift
        self.labels = np.arange(count) % labels
        self.own = random.Random()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, place: int) -> tuple[Tensor, int]:
        draws = {
            "torch": lambda: float(torch.rand(())), "python": random.random,
            "numpy": np.random.rand, "own": self.own.random,
        }  # fmt: skip
        return self.images[place] + draws[self.source](), int(self.labels[place])


class Stream(IterableDataset):
    def __init__(self, count: int = 23) -> None:
        self.count = count

    def __iter__(self):
        for k in range(self.count):
            yield images(1, k)[0], k % 3


class LongStream(Stream):
    def __len__(self) -> int:
        return 23


def triple(dataset: Dataset, batch: int = 7, **options) -> list[DataLoader]:
    train = DataLoader(dataset, batch, **options)
    return [train, DataLoader(tensors(9), 5), DataLoader(tensors(8), 5)]


def passed(part, seed: int = 1) -> list[Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return [batch for batch, _ in part.shuffled(7, draw)]


@pytest.mark.parametrize("source", ["torch", "python", "numpy"])
@pytest.mark.parametrize("generator", [None, torch.Generator()])
def test_an_epoch_is_repeated_by_its_seed_and_another_is_another(source, generator):
    found = loaded_set(triple(Noisy(source), shuffle=True, generator=generator))
    once, again, other = passed(found.train), passed(found.train), passed(found.train, 2)
    assert [len(batch) for batch in once] == [7, 7, 7]  # the incomplete one is left out
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
    assert not torch.equal(once[0], other[0])
    places = [loaded_set(triple(tensors(), shuffle=True)).train, found.train]
    assert not torch.equal(passed(places[0])[0], images(7))  # shuffled


def test_the_callers_random_numbers_go_on_as_if_nothing_had_been_read():
    def draws() -> list[float]:
        return [float(torch.rand(())), random.random(), float(np.random.rand())]  # noqa: NPY002

    states = torch.get_rng_state(), random.getstate(), np.random.get_state()  # noqa: NPY002
    expected = draws()
    torch.set_rng_state(states[0])
    random.setstate(states[1])
    np.random.set_state(states[2])  # noqa: NPY002
    found = loaded_set(triple(Noisy("numpy"), shuffle=True))
    found.fingerprint()
    passed(found.train)
    list(found.val.in_order(5))
    assert draws() == expected


def test_every_image_is_evaluated_once_and_sizes_are_those_of_the_loaders():
    found = loaded_set(triple(tensors()))
    assert sum(len(labels) for _, labels in found.val.in_order(500)) == 9
    assert (len(found.train), len(found.val), len(found.test)) == (23, 9, 8)
    assert (found.image_shape, found.num_classes, found.train.batch_size) == ((3, 5, 4), 3, 7)
    some = loaded_set(triple(tensors(), sampler=SubsetRandomSampler([1, 4, 9])))
    assert (len(some.train), some.train.steps(7)) == (3, 1)
    often = loaded_set(triple(tensors(), sampler=WeightedRandomSampler([1.0] * 23, 50)))
    assert (len(often.train), often.train.steps(7)) == (50, 7)
    stream = loaded_set(triple(LongStream()), 3)
    assert (len(stream.train), [len(batch) for batch in passed(stream.train)]) == (23, [7, 7, 7])


SETS: dict[str, Callable[[], Dataset]] = {
    "tensors": tensors,
    "noise of torch": lambda: Noisy("torch"),
    "noise of numpy": lambda: Noisy("numpy"),
    "noise of its own": lambda: Noisy("own"),
    "other pixels": lambda: Noisy("torch", shift=0.5),
    "other labels": lambda: Noisy("torch", labels=2),
    "one more": lambda: Noisy("torch", count=24),
    "a part": lambda: Subset(Noisy("torch"), list(range(0, 22))),
    "another part": lambda: Subset(Noisy("torch"), list(range(1, 23))),
    "a stream": LongStream,
}


def test_the_same_images_have_the_same_fingerprint_and_others_another():
    found = {name: loaded_set(triple(make()), 3).fingerprint() for name, make in SETS.items()}
    again = {name: loaded_set(triple(make(), shuffle="stream" not in name), 3).fingerprint()
             for name, make in SETS.items()}  # fmt: skip
    assert found == again
    assert len({*found.values()}) == len(SETS)
    assert all(len(told) == 16 for told in found.values())
    limits = [triple(tensors(), sampler=SubsetRandomSampler(places)) for places in ([1, 2], [1, 3])]
    assert len({loaded_set(limited).fingerprint() for limited in limits}) == 2
    other_test = [*triple(tensors())[:2], DataLoader(tensors(8, seed=3), 5)]
    assert loaded_set(other_test).fingerprint() != found["tensors"]


def test_labels_are_read_without_the_images_where_they_are_told():
    class Unread(Noisy):
        def __getitem__(self, place: int):
            raise AssertionError("an image was read")

    expected = [k % 3 for k in range(23)]
    assert labels_of(Unread("torch")).tolist() == expected
    assert labels_of(Subset(Unread("torch"), [4, 2])).tolist() == [1, 2]
    both = labels_of(ConcatDataset([Unread("torch"), tensors(2)]))
    assert both.tolist() == [*expected, 0, 1]
    told = Unread("torch")
    told.target_transform = lambda label: label + 1
    assert labels_of(told) is None
    told = Unread("torch")
    told.labels = ["ant"] * 23
    assert labels_of(told) is None
    shifted = Noisy("torch")
    shifted.labels, shifted.targets = None, [9] * 23  # which are not those of its items
    shifted.__class__ = type("Shifted", (Noisy,), {"__getitem__": lambda s, k: (s.images[k], 2)})
    part = loaded_set(triple(shifted), 3).train
    assert part.labels is None


class Untold(Dataset):
    """Says nothing but its items."""

    def __init__(self, label: int = 2) -> None:
        self.label = label

    def __len__(self) -> int:
        return 23

    def __getitem__(self, place: int) -> tuple[Tensor, int]:
        return images(1, place)[0], self.label


def pairs(*fields) -> Callable:
    return lambda items: fields


WRONG = {
    "one": (lambda: triple(tensors())[:1], "got data, a list of 1; need an ImageSet or three"),
    "a path": (lambda: "images", "got data, a str; need an ImageSet or three DataLoaders"),
    "a dataset": (lambda: [tensors()] * 3, "got a TensorDataset for train; need a torch"),
    "endless": (lambda: triple(Stream()), "train loader without a length .*is a Stream"),
    "empty": (lambda: triple(tensors(0)), "got an empty train loader"),
    "dict": (lambda: triple(tensors(), collate_fn=lambda b: {"x": b}), "train loader .* a dict"),
    "three": (
        lambda: triple(tensors(), collate_fn=pairs(*[images(2)] * 3)), "that is a tuple of 3",
    ),
    "uint8": (
        lambda: triple(tensors(), collate_fn=pairs(images(2).byte(), torch.zeros(2).long())),
        r"images of torch.uint8 and shape \(2, 3, 5, 4\).*do add ToTensor",
    ),
    "flat": (
        lambda: triple(tensors(), collate_fn=pairs(torch.rand(2, 60), torch.zeros(2).long())),
        r"shape \(2, 60\)",
    ),
    "soft": (
        lambda: triple(tensors(), collate_fn=pairs(images(2), torch.rand(2, 3))),
        r"labels of torch.float32 and shape \(2, 3\)",
    ),
    "few": (
        lambda: triple(tensors(), collate_fn=pairs(images(2), torch.zeros(1).long())),
        "one whole number for each of 2 images",
    ),
    "shapes": (
        lambda: [*triple(tensors())[:2], DataLoader(TensorDataset(torch.rand(4, 3, 6, 6),
                                                                  torch.zeros(4).long()))],
        r"images of \(3, 6, 6\) from the test loader and \(3, 5, 4\) from train",
    ),
    "untold": (lambda: triple(Untold()), "does not tell its labels.*do pass net="),
    "label": (
        lambda: [triple(tensors())[0], DataLoader(tensors(9, 5)), DataLoader(tensors(8))],
        "got label 4 from the val loader; need 0 to 2",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_loaders_that_cannot_be_used_are_told_in_one_line(name):
    make, cause = WRONG[name]
    with pytest.raises(ValueError, match=cause) as refusal:
        loaded_set(make())
    assert "\n" not in str(refusal.value)


def test_a_label_that_no_dataset_tells_is_told_when_it_comes():
    found = loaded_set(triple(Untold(label=3)), 3)
    with pytest.raises(ValueError, match="got label 3 from the train loader; need 0 to 2"):
        passed(found.train)
    ours = float(torch.rand(()))
    with repeatable(5):
        inside = [float(torch.rand(())), random.random()]
    with repeatable(5):
        assert [float(torch.rand(())), random.random()] == inside
    assert ours not in inside


def test_a_loader_that_ends_early_is_told():
    class Short(LongStream):
        def __iter__(self):
            yield from list(super().__iter__())[:9]

    found = loaded_set(triple(Short()), 3)
    with pytest.raises(ValueError, match="train loader that ended after 2 batches; need 3"):
        passed(found.train)
