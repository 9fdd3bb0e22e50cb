"""Three DataLoaders as an image set: their batches are taken as they come.

They arrive normalised and augmented; nothing is cropped, mirrored or normalised here. Read
``loaded_set``, then ``LoaderPart``.
"""

import copy
import hashlib
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import ConcatDataset, DataLoader, IterableDataset, Subset, TensorDataset

from dnal_mini.data.imageset import Batches, ImageSet
from dnal_mini.refused import Refused

PARTS = ("train", "val", "test")
ITEMS = 64  # of each dataset, for the fingerprint
CPU = torch.device("cpu")
WHOLE_NUMBERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


@dataclass(frozen=True, eq=False)
class LoaderPart:
    """The batches of one DataLoader, moved to a device; what each word means says ``Part``.

    Randomness of the loader and of its transforms (torch's, numpy's and Python's own generators,
    and the loader's ``generator``) is seeded anew for every pass, so that a resumed run sees what
    an uninterrupted one sees; not that of persistent workers, nor of generators of the user's own.
    """

    loader: DataLoader
    name: str
    device: torch.device = CPU
    num_classes: int = 0  # 0: not known yet

    seekable: ClassVar[bool] = False

    @cached_property
    def labels(self) -> Tensor | None:
        """Labels of the whole dataset where it keeps them, and gives its items the same ones."""
        dataset: Any = self.loader.dataset
        told = labels_of(dataset)
        if told is None:
            return None
        for place in spread(len(told), 8):
            with repeatable(place):
                item = dataset[place]
            if not isinstance(item, list | tuple) or item[-1] != int(told[place]):
                return None
        return told

    @cached_property
    def _first(self) -> tuple[Tensor, Tensor]:
        with repeatable(0):
            return self._checked(next(iter(self.loader), None))

    def __len__(self) -> int:
        loader = self.loader
        iterable = isinstance(loader.dataset, IterableDataset)
        return len(loader.dataset if iterable else loader.sampler)  # type: ignore[arg-type]

    @property
    def batch_size(self) -> int:
        """Images of a batch; with a batch sampler of the user's: of the first one."""
        return self.loader.batch_size or len(self._first[1])

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height, width of the first batch."""
        channels, height, width = self._first[0].shape[1:]
        return channels, height, width

    def to(self, device: torch.device | str) -> "LoaderPart":
        """The same loader with its batches on ``device``."""
        return self._with(device=torch.device(device))

    def _with(self, **changes: Any) -> "LoaderPart":
        """A copy that need not look at a batch again."""
        part = copy.copy(self)
        vars(part).update(changes)
        return part

    def steps(self, batch: int) -> int:
        """Whole batches, by the loader's own size; with a batch sampler of the user's: all."""
        size = self.loader.batch_size
        return max(1, len(self) // size) if size else len(self.loader)

    def shuffled(self, batch: int, draw: torch.Generator, first: int = 0) -> Batches:
        """In the loader's order, which is shuffled if the loader shuffles."""
        assert first == 0, "not seekable"
        return self._batches(draw.initial_seed(), self.steps(batch))

    def in_order(self, batch: int, first: int = 0, every: int = 1) -> Batches:
        """All that the loader gives."""
        assert every == 1, "refused with several processes"
        return self._batches(0)

    def _batches(self, seed: int, steps: int | None = None) -> Batches:
        with repeatable(seed, self.loader.generator):
            found = 0
            for batch in islice(self.loader, steps):
                found += 1
                images, labels = self._checked(batch)
                if self.name != "test":  # which comes last: a strange label is told no more
                    check_labels(labels, self.num_classes, self.name)
                device = self.device
                yield images.to(device, non_blocking=True), labels.to(device).long()
        if found < (steps or 1):
            raise Refused(
                f"got a {self.name} loader that ended after {found} batches; need "
                f"{steps or 1}, as its length says; do mend its sampler or dataset"
            )

    def _checked(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Raises: ValueError for a batch that is no pair of images and labels."""
        if batch is None:
            raise Refused(f"got an empty {self.name} loader; need images; do look at its dataset")
        pair = isinstance(batch, list | tuple) and len(batch) == 2
        if not pair or not all(isinstance(part, Tensor) for part in batch):
            got = f"{type(batch).__name__} of {len(batch)}" if hasattr(batch, "__len__") else batch
            raise Refused(
                f"got a batch from the {self.name} loader that is a {got}; need two tensors, "
                "(images, labels); do change its collate_fn or dataset"
            )
        images, labels = batch
        if images.dim() != 4 or not images.is_floating_point():
            raise Refused(
                f"got images of {images.dtype} and shape {tuple(images.shape)} from the "
                f"{self.name} loader; need floating-point (n, c, h, w), normalised; do add "
                "ToTensor and Normalize to its transform"
            )
        if labels.shape != images.shape[:1] or labels.dtype not in WHOLE_NUMBERS:
            raise Refused(
                f"got labels of {labels.dtype} and shape {tuple(labels.shape)} from the "
                f"{self.name} loader; need one whole number for each of {len(images)} images"
            )
        return images, labels

    def marks(self) -> Iterator[bytes]:
        """Lengths, what the sampler is limited to, labels, and 64 items, evenly spread by index.

        Each item is read under a seed of its own, so that random augmentation comes out the same;
        where it does not (generators of its own), only shape and label of the item count. Of a
        stream, the first 64 items. Labels are those that the dataset keeps, else the items'.
        """
        dataset: Any = self.loader.dataset
        total = len(dataset)
        yield repr((self.name, len(self), total)).encode()
        if (limited := getattr(self.loader.sampler, "indices", None)) is not None:
            yield repr(torch.as_tensor(limited).tolist()).encode()
        if self.labels is not None:
            yield self.labels.numpy().tobytes()
        if isinstance(dataset, IterableDataset):
            with repeatable(0):
                yield from (_bytes_of(item) for item in islice(dataset, ITEMS))
            return
        for place in spread(total, ITEMS):
            found = []
            for _ in range(2):
                with repeatable(place):
                    found.append(dataset[place])
            once, again = map(_bytes_of, found)
            yield once if once == again else _bytes_of(found[0], pixels=False)


@dataclass(frozen=True, eq=False)
class LoaderSet(ImageSet):
    """Three loaders as a set; ``mean`` and ``std`` are not asked for."""

    def fingerprint(self) -> str:
        """16 hex digits that tell sets apart; of all three datasets, each as ``marks`` says.

        The images of test are looked at for this, and by no net before the end.
        """
        digest = hashlib.sha256()
        for part in (self.train, self.val, self.load_test()):
            for mark in part.marks():
                digest.update(hashlib.sha256(mark).digest())
        return digest.hexdigest()[:16]


def loaded_set(
    loaders: Sequence[DataLoader], num_classes: int = 0, device: torch.device | str = "cpu"
) -> LoaderSet:
    """The set of a train, a val and a test loader; one batch of each is looked at.

    ``num_classes``: of the net, if there is one; else as the labels of train say.
    Raises: ValueError for anything else than three loaders of (images, labels) of one shape.
    """
    parts = [LoaderPart(each, name) for each, name in zip(checked(loaders), PARTS, strict=True)]
    shapes = {part.name: part.image_shape for part in parts}
    for name, shape in shapes.items():
        if shape != shapes["train"]:
            raise Refused(
                f"got images of {shape} from the {name} loader and {shapes['train']} from train; "
                "need one shape; do resize them in its transform"
            )
    count = num_classes or _count_classes(parts[0])
    for part in parts:
        if part.labels is not None:
            check_labels(part.labels, count, part.name)
    place = torch.device(device)
    train, val, test = (part._with(device=place, num_classes=count) for part in parts)
    names = tuple(str(label) for label in range(count))
    kind = type(train.loader.dataset).__name__
    return LoaderSet(kind, names, (), (), train, val, lambda: test)


def checked(loaders: Any) -> Sequence[DataLoader]:
    """The three loaders. Raises: ValueError for what is no such triple."""
    if not isinstance(loaders, list | tuple) or len(loaders) != 3:
        count = f" of {len(loaders)}" if isinstance(loaders, list | tuple) else ""
        raise Refused(
            f"got data, a {type(loaders).__name__}{count}; need an ImageSet or three DataLoaders, "
            "(train, val, test)"
        )
    for loader, name in zip(loaders, PARTS, strict=True):
        if not isinstance(loader, DataLoader):
            raise Refused(
                f"got a {type(loader).__name__} for {name}; need a torch DataLoader; do wrap it: "
                "DataLoader(dataset, batch_size=...)"
            )
        try:
            empty = len(loader) == 0
        except TypeError:
            raise Refused(
                f"got a {name} loader without a length (its dataset is a "
                f"{type(loader.dataset).__name__}); need to know when an epoch ends; do give the "
                "dataset a __len__"
            ) from None
        if empty:
            raise Refused(f"got an empty {name} loader; need images; do look at its dataset")
    return loaders


def check_labels(labels: Tensor, count: int, name: str) -> None:
    """Raises: ValueError for a label that is none of the classes."""
    least, most = (int(label) for label in torch.aminmax(labels))
    if least < 0 or most >= count:
        raise Refused(
            f"got label {least if least < 0 else most} from the {name} loader; need 0 to "
            f"{count - 1}: there are {count} classes, by the net or by the labels of train"
        )


def spread(total: int, most: int) -> list[int]:
    """At most so many places, evenly spread over ``total``."""
    count = min(total, most)
    return [k * total // count for k in range(count)]


def _count_classes(train: LoaderPart) -> int:
    """Classes of the labels. Raises: ValueError if the dataset does not tell them."""
    classes = getattr(train.loader.dataset, "classes", None)
    if train.labels is not None and len(train.labels):
        most = int(train.labels.max()) + 1
        return max(most, len(classes)) if isinstance(classes, list | tuple) else most
    if isinstance(classes, list | tuple) and classes:
        return len(classes)
    raise Refused(
        f"got a train dataset ({type(train.loader.dataset).__name__}) that does not tell its "
        "labels; need the number of classes; do pass net=, or give the dataset .targets"
    )


def labels_of(dataset: Any) -> Tensor | None:
    """All labels where they are to be had without reading an image; None where they are not.

    ``.targets`` or ``.labels`` of a dataset without ``target_transform``, the last of ``.tensors``,
    and those inside a Subset or ConcatDataset.
    """
    if isinstance(dataset, Subset):
        whole = labels_of(dataset.dataset)
        return None if whole is None else whole[torch.as_tensor(list(dataset.indices))]
    if isinstance(dataset, ConcatDataset):
        found = [labels_of(each) for each in dataset.datasets]
        known = [each for each in found if each is not None]
        return torch.cat(known) if len(known) == len(found) else None
    if getattr(dataset, "target_transform", None) is not None:
        return None
    tensors = dataset.tensors[-1:] if isinstance(dataset, TensorDataset) else ()
    for labels in (*tensors, *(getattr(dataset, name, None) for name in ("targets", "labels"))):
        try:
            told = torch.as_tensor(labels)
        except (TypeError, ValueError, RuntimeError):  # None, words, or of several lengths
            continue
        if told.shape == (len(dataset),) and not told.is_floating_point():
            return told.long().cpu()
    return None


@contextmanager
def repeatable(seed: int, generator: torch.Generator | None = None) -> Iterator[None]:
    """Torch, numpy and Python draw from a seed inside, and go on as before afterwards.

    ``generator``, a loader's own, is seeded too and stays so.
    """
    ours, theirs = random.getstate(), np.random.get_state()  # noqa: NPY002 - what transforms use
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002
        if generator is not None:
            generator.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(ours)
            np.random.set_state(theirs)  # noqa: NPY002


def _bytes_of(item: Any, pixels: bool = True) -> bytes:
    """What is in an item, whatever it is made of."""
    parts = []
    for leaf in tree_leaves(item):
        told = leaf.detach().cpu().contiguous() if isinstance(leaf, Tensor) else leaf
        if isinstance(told, Tensor) and told.dim() == 0:
            told = told.item()
        size = getattr(told, "shape", getattr(told, "size", None))
        if hasattr(told, "tobytes") or isinstance(told, Tensor):
            parts.append(repr((type(leaf).__name__, tuple(size or ()))).encode())
            if pixels:
                raw = told.view(torch.uint8).numpy() if isinstance(told, Tensor) else told
                parts.append(raw.tobytes())
        else:
            parts.append(repr(told).encode())
    return b"\n".join(parts)
