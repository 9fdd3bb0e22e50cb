"""The tensors in whatever a forward returns."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn


def tensors_in(output: Any) -> list[Tensor]:
    """All tensors of a nest of tuples, lists, mappings, dataclasses and objects, in order."""
    return list(_tensors(output, set()))


def _tensors(output: Any, seen: set[int]) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
        return
    parts: Iterable[Any] = ()
    if isinstance(output, Mapping):
        parts = output.values()
    elif isinstance(output, list | tuple):
        parts = output
    elif hasattr(output, "__dict__") and not isinstance(output, type | nn.Module):
        own = not type(output).__module__.startswith("torch")  # a dataclass, or a user's class
        parts = vars(output).values() if own else ()
    if id(output) not in seen:
        seen.add(id(output))
        for part in parts:
            yield from _tensors(part, seen)


class TensorsOnly(nn.Module):
    """A network whose output is the list of its tensors, whatever it wraps them in."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.training = net.training

    def forward(self, *inputs: Any) -> list[Tensor]:
        return tensors_in(self.net(*inputs))
