"""Captures by structure: two networks that differ in their numbers alone share one.

Read ``structure_of``. A search asks hundreds of times what would be left of the same network.
"""

import types
from collections import OrderedDict
from collections.abc import Hashable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from dnal_mini.graph.capture import Capture, capture
from dnal_mini.graph.copies import copied
from dnal_mini.layers.channelmap import ChannelMap
from dnal_mini.refused import Refused

ROOM = 16  # captures that are kept


_kept: "OrderedDict[Hashable, Capture]" = OrderedDict()


def captured(net: nn.Module, inputs: Sequence[Any]) -> Capture:
    """``capture``, or the one that was made of a network of the same structure.

    What has been learned of its operations (``Capture.stubborn``) is then known, too.
    """
    key = structure_of(net, inputs)
    if key is None:
        return capture(net, inputs)
    if key not in _kept:
        _kept[key] = _captured(net, inputs)
    _kept.move_to_end(key)
    while len(_kept) > ROOM:
        _kept.popitem(last=False)
    return _kept[key]


def _captured(net: nn.Module, inputs: Sequence[Any]) -> Capture:
    """In float64, in which nets are cut, also if this one is of float32: the same operations."""
    if {t.dtype for t in (*net.parameters(), *net.buffers())} & {torch.float32}:
        wide = [x.double() if _is_single(x) else x for x in inputs]
        with suppress(Refused, TypeError):  # a forward, or a device, that is of float32 alone
            return capture(copied(net).double(), wide)
    return capture(net, inputs)


def _is_single(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype == torch.float32


class _Unknown(Exception):
    """A module holds something that a forward may depend on in unknown ways."""


def structure_of(net: nn.Module, inputs: Sequence[Any]) -> Hashable | None:
    """All that a forward can depend on but the numbers in tensors; None if that is not plain.

    Classes, names, attributes that are numbers, words, functions or nests of them, the shapes and
    types of tensors; float32 counts as float64.
    """
    numbers = {module: place for place, module in enumerate(net.modules())}
    try:
        parts = tuple(
            (name, type(module), numbers[module], *_attributes(module, numbers))
            for name, module in net.named_modules(remove_duplicate=False)
        )
        return parts, tuple(_plain(value, numbers) for value in inputs)
    except _Unknown:
        return None


HOOKS = ("_forward_hooks", "_forward_pre_hooks")
INNER = {
    "training", "_parameters", "_buffers", "_modules", "_non_persistent_buffers_set",
    "_backward_pre_hooks", "_backward_hooks", "_is_full_backward_hook", *HOOKS,
    "_forward_hooks_with_kwargs", "_forward_hooks_always_called",
    "_forward_pre_hooks_with_kwargs", "_state_dict_hooks", "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks",
}  # fmt: skip


def _attributes(module: nn.Module, numbers: Mapping[nn.Module, int]) -> tuple:
    if any(getattr(module, hooks) for hooks in HOOKS):
        raise _Unknown
    own = tuple(
        (name, _plain(value, numbers)) for name, value in vars(module).items() if name not in INNER
    )
    tensors = tuple(
        (name, _plain(tensor, numbers))
        for named in (module._parameters, module._buffers)
        for name, tensor in named.items()
    )
    source = tuple(module.source.tolist()) if isinstance(module, ChannelMap) else ()
    return own, tensors, source


def _plain(value: Any, numbers: Mapping[nn.Module, int]) -> Hashable:
    """Raises: _Unknown for a value that cannot be compared."""
    if isinstance(value, Tensor):
        dtype = torch.float64 if _is_single(value) else value.dtype
        return tuple(value.shape), dtype, value.device
    if isinstance(value, nn.Module):
        if value not in numbers:
            raise _Unknown
        return "module", numbers[value]
    if isinstance(value, Mapping):
        return tuple((_plain(k, numbers), _plain(v, numbers)) for k, v in value.items())
    if isinstance(value, list | tuple):
        return type(value), tuple(_plain(part, numbers) for part in value)
    if isinstance(value, set | frozenset):
        return frozenset(_plain(part, numbers) for part in value)
    known = (int, float, complex, str, bytes, type(None), type, torch.dtype, torch.device,
             types.BuiltinFunctionType, types.FunctionType)  # fmt: skip
    if isinstance(value, known):
        return type(value), value
    raise _Unknown
