"""Forward code that asks for float32 or less, run in float64 all the same."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

NARROW = (torch.float32, torch.float16, torch.bfloat16)
CASTS = {"float", "half", "bfloat16"}


class _Wide(TorchFunctionMode):
    """A tensor of float64 stays one, and new tensors of float32 are of float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in CASTS and args[0].dtype == torch.float64:
            return args[0]
        if torch.dtype in map(type, args):
            args = tuple(map(_widened, args))
        if kwargs:
            return func(*args, **{name: _widened(value) for name, value in kwargs.items()})
        return func(*args)


def _widened(value: Any) -> Any:
    return torch.float64 if type(value) is torch.dtype and value in NARROW else value


@contextmanager
def as_exact_as(net: nn.Module) -> Iterator[None]:
    """Inside the block a network of float64 computes in float64, whatever its forward casts to.

    So two networks can be compared to more digits than the user's code keeps. Others run as ever.
    """
    tensors = (t for t in chain(net.parameters(), net.buffers()) if t.is_floating_point())
    if next((t.dtype for t in tensors), None) != torch.float64:
        yield
        return
    with _Wide():
        yield
