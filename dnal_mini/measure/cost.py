"""What a network costs: parameters, multiply-adds, activation memory.

Read ``cost`` first. ``layer_table`` shows where the cost sits. A gate is a tool of the search and
costs nothing here.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from dnal_mini.graph.capture import evaluating, keeping_buffers
from dnal_mini.graph.inputs import Given, Inputs, drawn, given, like
from dnal_mini.graph.outputs import tensors_in
from dnal_mini.refused import UNFIT, Refused, line_of, need_module, need_number, need_shape

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.GroupNorm, nn.LayerNorm)


@dataclass(frozen=True)
class Cost:
    """Cost of one image: ``params``, ``macs`` (1 multiply-add = 1), ``peak_activation_bytes``.

    Example:
        >>> wide, slim = (dnal.cost(dnal.models.vgg16(width=width)) for width in (1.0, 0.5))
        >>> isinstance(wide, dnal.Cost), round(wide.macs / slim.macs, 2)
        (True, 3.98)
    """

    params: int
    macs: int
    peak_activation_bytes: int

    def __str__(self) -> str:
        return (
            f"{_short(self.params)} parameters, {_short(self.macs)} MACs, "
            f"{self.peak_activation_bytes / 1e6:.3g} MB of activations at the peak"
        )


def cost(
    net: nn.Module, image_shape: Sequence[int] = (3, 32, 32), *, example_inputs: Any = None
) -> Cost:
    """Parameters, multiply-adds and peak activation memory of one image of (c, h, w).

    ``params``: all parameters, trainable or frozen, shared ones once; no buffers, and not the
    scalars ``s`` of gates, since no gate is left in a finished network.
    ``macs``: convolutions, linear layers and other matrix products, as they really run. Norms,
    activations, pools, sums and gates count 0.
    ``peak_activation_bytes``: the net runs once, in evaluation mode, and each tensor is followed
    from the operation that makes it to the last one that reads it (for the net's output: to the
    end). While an operation runs, all it reads and all it makes is alive; the peak is the largest
    sum over the operations. Sizes are those in the net's dtype (4 bytes each in float32). The
    input image counts; views and in-place operations count once, with the tensor that they share
    memory with. Not counted: weights and what is computed from weights alone, gates, results that
    nobody reads, and an operation's own scratch memory.

    ``example_inputs``: what it costs to run them, all at once, in place of one image.

    The net is left as it was: parameters, buffers, running statistics, training flags.
    Raises: ValueError for an image_shape that is not of positive ints or that the net rejects.
    Example:
        >>> net = dnal.models.resnet56()
        >>> print(dnal.cost(net))
        853.02 k parameters, 125.49 M MACs, 0.197 MB of activations at the peak
        >>> dnal.cost(net, image_shape=(3, 64, 64)).macs / dnal.cost(net).macs > 3.9
        True
    """
    return cost_of(net, given(net, image_shape, example_inputs))


def cost_of(net: nn.Module, what: Given) -> Cost:
    """``cost``."""
    images: tuple = () if isinstance(what, Inputs) else (random_images(net, what),)
    inputs = images or drawn(what, like(net), 0)
    counter, recorder = FlopCounterMode(display=False), _Recorder(_tensors(inputs))
    with (
        evaluating(net),
        keeping_buffers(net),
        torch.no_grad(),
        recorder.without_gates(net),
        counter,
        recorder,
    ):
        outputs = output_of(net, *inputs)
    scalars = {id(s) for m in net.modules() if _is_gate(m) for s in m.parameters(recurse=False)}
    return Cost(
        params=sum(p.numel() for p in net.parameters() if id(p) not in scalars),
        macs=counter.get_total_flops() // 2,  # torch counts a multiply-add as two
        peak_activation_bytes=recorder.peak_bytes(outputs),
    )


def layer_table(
    net: nn.Module, image_shape: Sequence[int] = (3, 32, 32)
) -> list[dict[str, int | str]]:
    """One row per call of a convolution, linear or norm layer, in the order in which they run.

    Keys: ``name``, ``kind`` ("conv", "depthwise", "linear", "norm"), ``kernel`` and ``stride``
    ("3x3"; "" if not a convolution), ``groups``, ``macs``, ``params`` (of this layer alone),
    ``height`` and ``width`` of the output, ``in_channels``, ``out_channels``.
    The MACs are the closed form output pixels * weights, an independent check of ``cost``.

    Raises: ValueError as ``cost`` does, and for another kind of layer that owns parameters.
    """
    return [layer_row(name, layer, output) for name, layer, output in layer_calls(net, image_shape)]


class _Recorder(TorchDispatchMode):
    """Notes which activations each operation reads and makes; an activation is a storage."""

    def __init__(self, inputs: list[Tensor]) -> None:
        super().__init__()
        # The weak references keep an address from being used again, not the memory alive.
        self.numbers: dict[StorageWeakRef, int] = {}
        self.born: list[tuple[int, int]] = []  # (operation, bytes) of each activation
        self.last_read: list[int | None] = []  # operation, None if nobody reads it
        self.operations = 0
        self.is_paused = False
        for tensor in inputs:
            self._note_birth(tensor)
        self.last_read = [0] * len(inputs)  # they are there even if nobody reads them

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        results = func(*args, **(kwargs or {}))
        inputs = {StorageWeakRef(t.untyped_storage()) for t in _tensors((args, kwargs))}
        reads = [self.numbers[storage] for storage in inputs if storage in self.numbers]
        if self.is_paused or (inputs and not reads):  # a gate, or weights alone
            return results
        self.operations += 1
        for number in reads:
            self.last_read[number] = self.operations
        for result in _tensors(results):
            storage = StorageWeakRef(result.untyped_storage())
            if storage not in self.numbers and storage not in inputs:
                self._note_birth(result)
        return results

    def _note_birth(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        self.numbers[StorageWeakRef(storage)] = len(self.born)
        self.born.append((self.operations, storage.nbytes()))
        self.last_read.append(None)

    def peak_bytes(self, outputs: Any) -> int:
        """Largest sum of bytes alive during one operation; ``outputs`` live to the end."""
        for tensor in tensors_in(outputs):
            number = self.numbers.get(StorageWeakRef(tensor.untyped_storage()))
            if number is not None:
                self.last_read[number] = self.operations
        change = [0] * (self.operations + 2)  # of the bytes alive, per operation
        for (start, size), end in zip(self.born, self.last_read, strict=True):
            if end is not None:
                change[start] += size
                change[end + 1] -= size
        return max(accumulate(change))

    @contextmanager
    def without_gates(self, net: nn.Module) -> Iterator[None]:
        """Let every gate hand its input on, unseen."""

        def pause(gate: nn.Module, args: tuple) -> None:
            self.is_paused = True

        def hand_on(gate: nn.Module, args: tuple, output: Tensor) -> Tensor:
            self.is_paused = False
            return args[0]

        gates = [module for module in net.modules() if _is_gate(module)]
        handles = [gate.register_forward_pre_hook(pause) for gate in gates]
        handles += [gate.register_forward_hook(hand_on) for gate in gates]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def layer_calls(
    net: nn.Module, image_shape: Sequence[int]
) -> list[tuple[str, nn.Module, torch.Size]]:
    """(name, layer, shape of its output) per call of a layer that owns parameters."""
    images = random_images(net, image_shape)
    names = {
        layer: name
        for name, layer in net.named_modules()
        if any(True for _ in layer.parameters(recurse=False)) and not _is_gate(layer)
    }
    for layer, name in names.items():
        if not isinstance(layer, (nn.Conv2d, nn.Linear, *NORMS)):
            raise Refused(
                f"got {type(layer).__name__} at {name!r}; need Conv2d, Linear or a norm wherever "
                "there are parameters; use cost() for the totals"
            )
    calls: list[tuple[str, nn.Module, torch.Size]] = []

    def note(layer: nn.Module, args: tuple, output: Tensor) -> None:
        calls.append((names[layer], layer, output.shape))

    handles = [layer.register_forward_hook(note) for layer in names]
    try:
        with evaluating(net), keeping_buffers(net), torch.no_grad():
            output_of(net, images)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def layer_row(name: str, layer: nn.Module, output: torch.Size) -> dict[str, int | str]:
    """One row of the layer table; ``output`` is the shape for one image."""
    row: dict[str, int | str] = {"name": name, "kind": "norm", "kernel": "", "stride": ""}
    row |= {"groups": 1, "macs": 0, "params": sum(p.numel() for p in layer.parameters())}
    row["height"], row["width"] = (*output[2:], 1, 1)[:2]
    if isinstance(layer, nn.Conv2d):
        row["kind"] = "depthwise" if layer.groups == layer.in_channels > 1 else "conv"
        row["kernel"] = "x".join(map(str, layer.kernel_size))
        row["stride"] = "x".join(map(str, layer.stride))
        row["groups"] = layer.groups
        row["macs"] = prod(output[2:]) * layer.weight.numel()
        inputs, outputs = layer.in_channels, layer.out_channels
    elif isinstance(layer, nn.Linear):
        row["kind"], row["height"], row["width"] = "linear", 1, 1
        row["macs"] = prod(output[:-1]) * layer.weight.numel()
        inputs, outputs = layer.in_features, layer.out_features
    else:
        inputs = outputs = next(layer.parameters()).numel()
    return row | {"in_channels": inputs, "out_channels": outputs}


def random_images(net: nn.Module, image_shape: Sequence[int], batch: int = 1) -> Tensor:
    """Random images on the device and in the dtype of the net."""
    need_module(net)
    shape = need_shape(image_shape)
    need_number("batch", batch, 1, 10**9, whole=True)
    try:
        images = torch.rand(batch, *shape, generator=torch.Generator().manual_seed(0))
    except RuntimeError as error:  # torch has no class of its own for memory that is not there
        got = f"got batch {batch} of image_shape {shape} ({line_of(error)})"
        raise Refused(f"{got}; need images that fit into memory; do take less") from error
    return images.to(like(net))


def output_of(net: nn.Module, *inputs: Any) -> Any:
    """The net's output; a shape that it cannot take becomes a ValueError."""
    try:
        return net(*inputs)
    except (torch.OutOfMemoryError, Refused):
        raise
    except UNFIT as error:
        shapes = " and ".join(str(tuple(x.shape[1:])) for x in inputs if isinstance(x, Tensor))
        raise Refused(
            f"got image_shape {shapes}, which the net cannot take ({line_of(error)}); need the "
            "shape it was built for, and example_inputs if its forward takes more than images"
        ) from error


def _is_gate(module: nn.Module) -> bool:
    """True for the SS layer, known by its name so that this file stands alone."""
    return type(module).__name__ == "ScaledSigmoid"


def _tensors(tree: Any) -> list[Tensor]:
    """All tensors in nested tuples, lists and dicts."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _short(count: int) -> str:
    """Three or more digits and a unit: 14991946 becomes "14.99 M"."""
    for size, unit in ((10**9, " G"), (10**6, " M"), (10**3, " k")):
        if count >= size:
            return f"{count / size:.2f}{unit}"
    return str(count)
