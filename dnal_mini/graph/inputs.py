"""What a network is run on to be understood: images, or whatever else its forward takes.

Read ``drawn``. Images are of a shape that somebody tells, or of a usual one (``example_images``).
"""

import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dnal_mini.graph.capture import evaluating, where
from dnal_mini.graph.copies import copied
from dnal_mini.graph.layer import CONVS, TRANSPOSED
from dnal_mini.refused import Refused, need_shape, shown

INTEGERS = {"bool", "uint8", "int8", "int16", "int32", "int64"}


SIDES = (32, 28, 64, 224, 96, 128, 16, 24, 40, 48, 80, 84, 100, 112, 160, 192, 227, 256, 299)


DIMS_OF_NORM: dict[type, int] = {nn.BatchNorm1d: 0, nn.BatchNorm3d: 3}


LARGEST = 299**2  # numbers of a channel: no volume of 224 voxels a side is tried


@dataclass(frozen=True)
class Inputs:
    """All that a forward takes, by position, in JSON: how each of its arguments is made again.

    A tensor of floating point is drawn anew, between the smallest and the largest number of the
    example ({"shape", "low", "high"}); one of integers stays ({"values", "dtype"}); so does
    everything else.
    """

    parts: tuple[Any, ...]

    @property
    def shapes(self) -> list[list[int]]:
        """Of the tensors that are drawn, the batch among them."""
        return [part["shape"] for part in self.parts if _is_drawn(part)]


Given = Sequence[int] | Inputs  # the shape of one image, or all that a forward takes


def given(net: nn.Module, image_shape: Any, example_inputs: Any = None) -> Any:
    """``Inputs`` of a tensor, a tuple of arguments or a mapping of them; else the ``image_shape``.

    Raises: ValueError for an argument that is no finite tensor, number, word or None.
    """
    if example_inputs is None:
        return image_shape
    values: Any = example_inputs
    if isinstance(values, Tensor):
        values = (values,)
    if isinstance(values, Mapping):
        try:
            call = inspect.signature(net.forward).bind(**values)
        except TypeError as error:
            raise Refused(f"got example_inputs that forward does not take ({error})") from error
        call.apply_defaults()
        if call.kwargs:
            names = ", ".join(call.kwargs)
            raise Refused(f"got a forward that takes {names} by name only; need it by position")
        values = call.args
    if not isinstance(values, list | tuple) or not values:
        raise Refused(
            f"got example_inputs {shown(values)}; need a tensor, a tuple of what forward takes, or "
            "a dict of it"
        )
    whole = Inputs(tuple(_part(value) for value in values))
    if all(shape[:1] == [1] for shape in whole.shapes):  # one image does not show what mixes them
        with suppress(Refused):
            pair = Inputs(tuple(_doubled(part) for part in whole.parts))
            taken_by(net, pair)
            return pair
    return whole


def _doubled(part: Any) -> Any:
    return part | {"shape": [2, *part["shape"][1:]]} if _is_drawn(part) else part


def _part(value: Any) -> Any:
    if isinstance(value, Tensor) and 0 < value.numel() <= LARGEST**2:
        if value.is_floating_point() and bool(value.isfinite().all()):
            low, high = (float(end) for end in value.detach().aminmax())
            low, high = (low, high) if low < high else (-1.0, 1.0)
            return {"shape": list(value.shape), "low": low, "high": high}
        if str(value.dtype).removeprefix("torch.") in INTEGERS:
            return {"values": value.tolist(), "dtype": str(value.dtype).removeprefix("torch.")}
    if isinstance(value, bool | int | str | None) or (
        isinstance(value, float) and math.isfinite(value)
    ):
        return value
    raise Refused(
        f"got {shown(value)} among example_inputs; need finite tensors, numbers, words or None; do "
        "wrap the net if its forward takes other things"
    )


def _is_drawn(part: Any) -> bool:
    return isinstance(part, dict) and "shape" in part


def drawn(what: Given, like: Tensor, seed: int, batch: int | None = None) -> tuple[Any, ...]:
    """The arguments of one call, on the device and in the dtype of ``like``: random, by a seed.

    ``batch``: another one than the examples have, or of so many images; by default 2 of those.
    """
    draw = torch.Generator().manual_seed(seed)
    if not isinstance(what, Inputs):
        shape = (batch or 2, *need_shape(what))
        return (torch.randn(shape, generator=draw, dtype=like.dtype).to(like),)
    arguments = list(what.parts)
    for place, part in enumerate(arguments):
        if _is_drawn(part):
            shape = (batch or part["shape"][0], *part["shape"][1:]) if part["shape"] else ()
            noise = torch.rand(shape, generator=draw, dtype=like.dtype)
            noise = noise * (part["high"] - part["low"]) + part["low"]
            arguments[place] = noise.to(like)
        elif isinstance(part, dict):
            dtype = getattr(torch, part["dtype"])
            arguments[place] = torch.tensor(part["values"], dtype=dtype, device=like.device)
    return tuple(arguments)


def resized(what: Given, share: float) -> Given | None:
    """The same with images of another, odd size; None if there are none."""
    if isinstance(what, Inputs):
        parts = [
            part | {"shape": [*part["shape"][:-2], *_odd(part["shape"][-2:], share)]}
            if _is_drawn(part) and len(part["shape"]) > 3
            else part
            for part in what.parts
        ]
        return Inputs(tuple(parts)) if parts != list(what.parts) else None
    channels, *sides = what
    return (channels, *_odd(sides, share)) if sides else None


def _odd(sides: Sequence[int], share: float) -> list[int]:
    return [int(side * share) // 2 * 2 + 1 for side in sides]


def like(net: nn.Module) -> Tensor:
    """A tensor with the device and dtype of the net's first floating-point weight or buffer."""
    tensors = chain(net.parameters(), net.buffers())  # not one more than is looked at
    return next((t for t in tensors if t.is_floating_point()), torch.zeros(()))


def again(arguments: Sequence[Any]) -> tuple[Any, ...]:
    """Copies, for a forward that may overwrite them."""
    return tuple(x.clone() if isinstance(x, Tensor) else x for x in arguments)


def taken_by(
    net: nn.Module, what: Given | None = None, batch: int | None = None
) -> tuple[Any, ...] | None:
    """Arguments that a net takes in eval mode, on its device and in its dtype; always the same.

    Without a shape the first convolution or linear layer tells channels and dimensions, and usual
    sides are tried. None if the net takes none of these, or is on no real device. The net is left
    alone: copies of it are run.

    Raises: ValueError, with the forward's own reason, if it does not take what is given.
    """
    tried: Any = _usual(net) if what is None else [what]
    if like(net).is_meta:
        return None
    trial = copied(net)
    for one in tried:
        arguments = drawn(one, like(net), 0, batch)
        try:
            with torch.no_grad(), evaluating(trial), torch.random.fork_rng(devices=[]):
                trial(*again(arguments))
        except Exception as error:  # whatever the user's forward raises on such an image
            if what is not None:
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                raise Refused(
                    f"got {told(one)}, which fails: {reason}{where(error)}; need what the net was "
                    "built for"
                ) from error
        else:
            return arguments
    return None


def recorded(what: Given) -> dict[str, Any]:
    """What is given, in JSON: "image_shape", or None and "example_inputs"."""
    if isinstance(what, Inputs):
        return {"image_shape": None, "example_inputs": list(what.parts)}
    return {"image_shape": list(what)}


def written(record: Mapping[str, Any]) -> Given:
    """What ``recorded`` has written."""
    more = record.get("example_inputs")
    return record["image_shape"] if more is None else Inputs(tuple(more))


def told(what: Given) -> str:
    """What is given, in a message."""
    if isinstance(what, Inputs):
        return f"example_inputs of shapes {', '.join(map(str, what.shapes))}"
    return f"image_shape {tuple(what)}"


def _usual(net: nn.Module) -> Iterator[tuple[int, ...]]:
    """Shapes of one image that the first layer of a net would take."""
    kinds = (*CONVS, *TRANSPOSED, nn.Linear, _BatchNorm)
    layer: Any = next((m for m in net.modules() if isinstance(m, kinds)), None)
    if isinstance(layer, nn.Linear):
        yield (layer.in_features,)
    elif layer is not None:
        norm = isinstance(layer, _BatchNorm)
        dims = DIMS_OF_NORM.get(type(layer), 2) if norm else len(layer.kernel_size)
        channels = layer.num_features if norm else layer.in_channels
        sides = SIDES if dims else SIDES[:1]
        yield from ((channels, *[s] * dims) for s in sides if s**dims <= LARGEST)
