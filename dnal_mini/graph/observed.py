"""What running a network shows of it, whatever its forward code looks like; knows no gate."""

from collections.abc import Collection, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves

from dnal_mini.graph.capture import keeping_buffers
from dnal_mini.graph.copies import copied
from dnal_mini.graph.inputs import again, like
from dnal_mini.graph.layer import CONVS
from dnal_mini.graph.ops import ACTIVATIONS
from dnal_mini.graph.outputs import tensors_in


def run(net: nn.Module, inputs: Sequence[Any], train: bool = False) -> list[Tensor]:
    """The tensors that a net returns in a mode, its random numbers always the same ones.

    The net stays in that mode; its buffers are what they were.
    """
    net.train(train)
    device = like(net).device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        with keeping_buffers(net):
            return tensors_in(net(*again(inputs)))


@torch.no_grad()
def difference(
    net: nn.Module, other: nn.Module, inputs: Sequence[Any], train: bool = False
) -> float:
    """Largest difference between what two nets return, relative to the largest number.

    Infinite where the other raises, returns other shapes or is not finite where the first is.
    0 if the first cannot run in that mode. Both nets are run: see ``run``.
    """
    try:
        expected = run(net, inputs, train)
    except Exception:  # it wants more than images, or a larger batch
        return 0.0
    try:
        found = run(other, inputs, train)
    except Exception:  # whatever the user's forward raises
        return float("inf")
    if [t.shape for t in expected] != [t.shape for t in found]:
        return float("inf")
    largest = 0.0
    for a, b in (
        (a.detach().double(), b.detach().double()) for a, b in zip(expected, found, strict=True)
    ):
        gap = (a - b).abs().nan_to_num(nan=float("inf"))
        gap[(a == b) | (a.isnan() & b.isnan())] = 0
        size = a[a.isfinite()].abs().max() if bool(a.isfinite().any()) else a.new_ones(())
        largest = max(largest, float((gap / size.clamp(min=1e-12)).max()) if gap.numel() else 0.0)
    return largest


def same(net: nn.Module, other: nn.Module, inputs: Sequence[Any]) -> bool:
    """True if copies of two nets compute the same in eval mode, but for rounding."""
    return difference(copied(net), copied(other), inputs) <= tolerance(net)


def tolerance(net: nn.Module) -> float:
    """The largest difference that rounding explains."""
    return torch.finfo(like(net).dtype).eps ** 0.5


class _Watched(Tensor):
    """A tensor that notes who makes tensors of it."""

    reads: list[str]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.__name__.rstrip("_")
        with torch._C.DisableTorchFunctionSubclass():
            watched = [t for t in tree_leaves((args, kwargs)) if isinstance(t, cls)]
            if not (name in ACTIVATIONS and len(watched) == 1 and watched[0] is args[0]):
                name = ""
            elif func(torch.zeros_like(args[0]), *args[1:], **kwargs).any():
                name = ""  # a sigmoid
            result = func(*args, **kwargs)
            for x in watched if tensors_in(result) else ():
                x.reads.append(name)
                if x is result:  # overwritten: what is read of it from now on is the result
                    x.__class__ = Tensor
        return result


def _watched(outputs: list[Any], layer: nn.Module, args: Any, output: Any) -> None:
    """A forward hook: from now on the output notes who reads it."""
    if type(output) is Tensor:
        output.__class__ = _Watched
        output.reads = []  # type: ignore[attr-defined]
    outputs.append(output)


def _reads(
    net: nn.Module, inputs: Sequence[Any], train: bool, layers: Collection[str]
) -> dict[str, list]:
    """Each output of each layer in one run of a net; it notes its reads, if it is a tensor."""
    seen: dict[str, list[Any]] = {name: [] for name in layers}
    hooks = [
        net.get_submodule(name).register_forward_hook(partial(_watched, outputs))
        for name, outputs in seen.items()
    ]
    try:
        for tensor in run(net, inputs, train):
            if isinstance(tensor, _Watched):
                tensor.reads.append("")
    finally:
        for hook in hooks:
            hook.remove()
    return seen


@torch.no_grad()
def activations_behind(
    net: nn.Module, inputs: Sequence[Any], layers: Collection[str]
) -> dict[str, str]:
    """The activation that alone reads what a layer puts out, by the layer's name.

    Only where it is the same in every call and in both modes, and makes zeros of zeros.
    """
    trial, ways = copied(net), {name: set[tuple[str, ...]]() for name in layers}
    for train in (False, True):
        with suppress(Exception):  # in train mode it may want more than images: eval mode decides
            for name, outputs in _reads(trial, inputs, train, layers).items():
                ways[name] |= {tuple(getattr(output, "reads", ())) for output in outputs}
    alone = {name: next(iter(way)) for name, way in ways.items() if len(way) == 1}
    return {name: way[0] for name, way in alone.items() if len(way) == 1 and way[0]}


@torch.no_grad()
def norms_behind(net: nn.Module, inputs: Sequence[Any], layers: Collection[str]) -> dict[str, str]:
    """The BatchNorm that alone reads what a layer puts out, by the layer's name, in eval mode.

    Only where both are called once, and the norm's channels are the layer's: not those of a
    linear layer with rows.
    """
    trial, read = copied(net), dict[str, list[Any]]()
    for name, module in trial.named_modules():
        if isinstance(module, _BatchNorm):

            def note(norm: nn.Module, args: Any, name: str = name) -> None:
                read.setdefault(name, []).append(args[0] if args else None)

            module.register_forward_pre_hook(note)
    found: dict[str, str] = {}
    for name, outputs in _reads(trial, inputs, False, layers).items():
        linear = isinstance(trial.get_submodule(name), nn.Linear)
        if len(outputs) != 1 or len(getattr(outputs[0], "reads", ())) != 1:
            continue
        for norm, (first, *more) in read.items():
            if first is outputs[0] and not more and not (linear and first.dim() != 2):
                found[name] = norm
    return found


def convolutions_at_the_end(net: nn.Module, inputs: Sequence[Any]) -> set[str]:
    """Convolutions from which the net's output is reached through no other layer with weights."""
    trial, made = copied(net), {}
    for tensor in trial.parameters():
        tensor.requires_grad_(tensor.is_floating_point())
    for name, module in trial.named_modules():
        if isinstance(module, CONVS):

            def note(layer: nn.Module, args: Any, output: Tensor, name: str = name) -> None:
                made[output.grad_fn] = name

            module.register_forward_hook(note)
    with torch.enable_grad():
        stack: list[Any] = [tensor.grad_fn for tensor in run(trial, inputs)]
    found, passed = set(), {None}
    while stack:
        node = stack.pop()
        if node in made:
            found.add(made[node])
        elif node not in passed and not any(w in node.name().lower() for w in ("conv", "mm")):
            stack += [before for before, _ in node.next_functions]
        passed.add(node)
    return found
