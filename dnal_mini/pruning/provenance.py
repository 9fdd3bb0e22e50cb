"""Which channel does every element of a tensor belong to? A tensor's shadow says.

The analysis must follow channels through ``view``, ``transpose``, ``chunk``, ``cat`` and whatever
else moves numbers without changing them. It knows no pattern for these (no "channel shuffle"):
it runs the very operation on *codes* instead of numbers, one whole number per element that names
the element's channel and its spot within the channel, and looks where the codes went. The same
is done twice: on the full network, to learn how channels are passed on, and on the widths of the
pruned network, to see whether the user's forward code still brings every channel to its place.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

SPOTS = 2**32  # code = channel * SPOTS + spot


class Broken(Exception):
    """A narrower tensor does not fit the forward code; the message says how."""


# What an operation may raise that is used in a way that its rule, or its width, does not cover.
REFUSALS = (Broken, RuntimeError, TypeError, ValueError, LookupError, AttributeError)


@dataclass(frozen=True)
class Shadow:
    """The channels of one tensor of ``shape`` (batch first).

    Uniform, the usual case: position p along ``axis`` holds the code ``keys[p]``, and every
    position has the same spots in the same order. Otherwise ``raw`` holds a code per element.
    """

    shape: tuple[int, ...]
    keys: Tensor | None  # (positions,), long
    axis: int = 1
    raw: Tensor | None = None

    @property
    def channels(self) -> Tensor:
        """Channel of each position (uniform), or of each element."""
        codes = self.keys if self.raw is None else self.raw
        assert codes is not None
        return codes // SPOTS

    @property
    def plain(self) -> bool:
        """True if each position along the channel axis is one channel."""
        return self.keys is not None and not bool((self.keys % SPOTS).any())

    def codes(self) -> Tensor:
        """A code for every element, as a tensor of ``shape``."""
        if self.raw is not None:
            return self.raw
        assert self.keys is not None
        others = [1 if d in (0, self.axis) else size for d, size in enumerate(self.shape)]
        spots = torch.arange(math.prod(others)).reshape(others)
        along = [-1 if d == self.axis else 1 for d in range(len(self.shape))]
        return (self.keys.reshape(along) + spots).expand(self.shape)

    def relabelled(self, labels: Tensor) -> "Shadow":
        """The same elements with channel c called ``labels[c]``.

        Raises: Broken for a channel whose label is -1: it should not be here.
        """
        codes = self.keys if self.raw is None else self.raw
        assert codes is not None
        named = labels[codes // SPOTS]
        if bool((named < 0).any()):
            raise Broken("a channel arrives where it does not belong")
        codes = named * SPOTS + codes % SPOTS
        if self.raw is None:
            return Shadow(self.shape, codes, self.axis)
        return Shadow(self.shape, None, raw=codes)

    def resized(self, shape: tuple[int, ...], axis: int | None = None) -> "Shadow":
        """Another number of spots per channel: after a convolution, pooling, mean."""
        assert self.keys is not None
        axis = self.axis if axis is None else axis
        return Shadow((*shape[:axis], len(self.keys), *shape[axis + 1 :]), self.keys, axis)


def fresh(count: int, shape: tuple[int, ...], axis: int = 1) -> Shadow:
    """Channels 0 .. count - 1 in order."""
    return Shadow((*shape[:axis], count, *shape[axis + 1 :]), torch.arange(count) * SPOTS, axis)


def held(channels: Tensor, shape: tuple[int, ...], axis: int = 1) -> Shadow:
    """The given channels, in this order."""
    return Shadow((*shape[:axis], len(channels), *shape[axis + 1 :]), channels * SPOTS, axis)


def read(codes: Tensor) -> Shadow:
    """The shadow that an operation on codes has left behind; uniform if it can be.

    Raises: Broken if the first axis is no longer the batch.
    """
    shape = tuple(codes.shape)
    if len(shape) < 2 or shape[0] == 1 or not bool((codes == codes[:1]).all()):
        raise Broken("images and channels are mixed")
    image = codes[0]
    channels = image // SPOTS
    varying = [d for d in range(image.dim()) if bool((channels != channels.narrow(d, 0, 1)).any())]
    if len(varying) > 1:
        return Shadow(shape, None, raw=codes)
    axis = varying[0] if varying else 0
    rows = image.movedim(axis, 0).reshape(image.shape[axis], -1)
    if rows.shape[1] == 1:
        return Shadow(shape, rows[:, 0], axis + 1)
    if not bool((rows % SPOTS == rows[:1] % SPOTS).all()):
        return Shadow(shape, None, raw=codes)
    return Shadow(shape, rows[:, 0] // SPOTS * SPOTS, axis + 1)


def rows_of_blocks(shadow: Shadow) -> list[Tensor]:
    """Blocks of channels that an operation has laid out as the rows of a grid; [] if it has not.

    The rows of a grid are of equal length, so a pruned network must keep as many channels of one
    block as of every other.
    """
    if shadow.raw is None:
        return []
    image = shadow.raw[0] // SPOTS
    varying = [d for d in range(image.dim()) if bool((image != image.narrow(d, 0, 1)).any())]
    if len(varying) < 2:
        return []
    blocks = [part.unique() for part in image.unbind(varying[0])]
    apart = sum(map(len, blocks)) == len(image.unique())
    return blocks if apart else [part.unique() for part in image.unbind(varying[-1])]
