"""A copy of any network, whatever its owner keeps in it."""

import copy
from types import TracebackType
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dnal_mini.refused import Refused


def copied(net: nn.Module) -> nn.Module:
    """A deep copy that takes tensors with a history as numbers and shares what has no copy.

    A net may keep an activation of its last call, or a lock, a file, a generator.
    Raises: ValueError if a module in it cannot be copied.
    """
    shared: dict[int, Any] = {}
    while True:
        try:
            with _Detached():
                return copy.deepcopy(net, dict(shared))
        except Exception as error:  # each class has its own way to say that it has no copy
            one = _without_copy(error.__traceback__)
            if isinstance(one, nn.Module) or one is None or id(one) in shared:
                raise Refused(
                    f"got a {type(net).__name__} that cannot be copied ({error}); need one that "
                    "copy.deepcopy takes"
                ) from error
            shared[id(one)] = one


class _Detached(TorchFunctionMode):
    """Copies of tensors that are no leaves, which torch refuses to copy."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__deepcopy__ and not args[0].is_leaf:
            x, memo = args
            return memo.setdefault(id(x), x.detach().clone())
        return func(*args, **(kwargs or {}))


def _without_copy(place: TracebackType | None) -> Any:
    """The object that copy.deepcopy was at when it failed."""
    found = None
    while place is not None:
        if place.tb_frame.f_code is copy.deepcopy.__code__:
            found = place.tb_frame.f_locals["x"]
        place = place.tb_next
    return found
