"""What a network costs: parameters, multiply-adds, activation memory, time.

Read ``cost`` first. ``layer_table`` shows where the cost sits, ``authors_counting`` counts as the
paper's tables do, ``latency`` and ``latency_pair`` measure. A gate (any module whose class is
called ``ScaledSigmoid``) is a tool of the search and costs nothing here; in ``latency`` it runs.
"""

import copy
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.GroupNorm, nn.LayerNorm)


@dataclass(frozen=True)
class Cost:
    """Cost of one image: ``params``, ``macs`` (1 multiply-add = 1), ``peak_activation_bytes``."""

    params: int
    macs: int
    peak_activation_bytes: int

    def __str__(self) -> str:
        return (
            f"{_short(self.params)} parameters, {_short(self.macs)} MACs, "
            f"{self.peak_activation_bytes / 1e6:.3g} MB of activations at the peak"
        )


def cost(net: nn.Module, image_shape: Sequence[int] = (3, 32, 32)) -> Cost:
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

    The net is left as it was: parameters, buffers, running statistics, training flags.
    Raises: ValueError for an image_shape that is not three positive ints or that the net rejects.
    """
    images = _images(net, image_shape)
    counter, recorder = FlopCounterMode(display=False), _Recorder(images)
    with evaluating(net), torch.no_grad(), recorder.without_gates(net), counter, recorder:
        outputs = _run(net, images)
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
    return [_row(name, layer, output) for name, layer, output in _layer_calls(net, image_shape)]


class AuthorsCount(NamedTuple):
    """The two numbers of the paper's result tables, see ``authors_counting``."""

    flops: int
    params: int


def authors_counting(net: nn.Module, image_shape: Sequence[int] = (3, 32, 32)) -> AuthorsCount:
    """FLOPs and parameters in the convention of the paper's tables, for comparison with them only.

    ``flops``: MACs of convolutions and linear layers (1 multiply-add = 1), plus 1 per output
    channel of a convolution (their batch norm, not multiplied by the pixels), plus 1 per bias.
    ``params``: weights and biases of convolutions and linear layers, plus 2 per output channel of
    a convolution. BatchNorm1d and gates do not count.

    Source: the summary script of the authors' repository [guo2022dnal]; gives the printed 313.47 M
    and 14.99 M (VGG16), 125.49 M and 0.85 M (ResNet56), 91.17 M and 2.30 M (MobileNetV2).
    Differs: their script leaves out the norms of ResNet50's shortcuts; here every convolution
    counts alike.
    Raises: ValueError as ``layer_table`` does.
    """
    flops, params = 0, 0
    counted: set[nn.Module] = set()
    for name, layer, output in _layer_calls(net, image_shape):
        if not isinstance(layer, nn.Conv2d | nn.Linear):
            continue
        row = _row(name, layer, output)
        channels = layer.out_channels if isinstance(layer, nn.Conv2d) else 0
        biases = 0 if layer.bias is None else layer.bias.numel()
        flops += int(row["macs"]) + channels + biases
        if layer not in counted:
            counted.add(layer)
            params += int(row["params"]) + 2 * channels
    return AuthorsCount(flops, params)


@dataclass(frozen=True)
class Latency:
    """Seconds per batch: median, 10th and 90th percentile over the repetitions.

    ``device`` is where it ran, ``threads`` the number of CPU threads that torch could use.
    """

    median_s: float
    p10_s: float
    p90_s: float
    device: str
    threads: int

    def __str__(self) -> str:
        spread = f"{1e3 * self.p10_s:.3g} to {1e3 * self.p90_s:.3g}"
        threads = f"{self.threads} thread" + ("s" if self.threads != 1 else "")
        return f"{1e3 * self.median_s:.3g} ms ({spread}) on {self.device}, {threads}"


def latency(
    net: nn.Module,
    image_shape: Sequence[int] = (3, 32, 32),
    batch: int = 1,
    *,
    channels_last: bool = False,
    budget_s: float = 1.0,
    min_repeats: int = 10,
) -> Latency:
    """Time of one forward pass of ``batch`` images in evaluation mode, on the net's own device.

    After a warm-up (a fifth of ``budget_s``) passes are timed until ``budget_s`` seconds are spent
    and at least ``min_repeats`` are done. ``channels_last`` times a copy in that memory format.
    Everything in the net is timed, gates too: prune first, or switch them off.

    Raises: ValueError as ``cost`` does, and for batch, budget_s or min_repeats not above 0.
    """
    times = interleaved([net], image_shape, batch, channels_last, budget_s, min_repeats)
    return _summary(net, times[0])


def latency_pair(
    first: nn.Module,
    second: nn.Module,
    image_shape: Sequence[int] = (3, 32, 32),
    batch: int = 1,
    *,
    channels_last: bool = False,
    budget_s: float = 2.0,
    min_repeats: int = 10,
) -> tuple[Latency, Latency]:
    """Latencies of two nets, timed in turns in one run, so that their ratio is fair.

    A machine that slows down meanwhile slows both; which net goes first alternates. ``budget_s``
    is for the two together, the rest is as in ``latency``.
    """
    nets = [first, second]
    times = interleaved(nets, image_shape, batch, channels_last, budget_s, min_repeats)
    return _summary(first, times[0]), _summary(second, times[1])


class _Recorder(TorchDispatchMode):
    """Notes which activations each operation reads and makes; an activation is a storage."""

    def __init__(self, images: Tensor) -> None:
        super().__init__()
        # The weak references keep an address from being used again, not the memory alive.
        self.numbers: dict[StorageWeakRef, int] = {}
        self.born: list[tuple[int, int]] = []  # (operation, bytes) of each activation
        self.last_read: list[int | None] = []  # operation, None if nobody reads it
        self.operations = 0
        self.is_paused = False
        self._note_birth(images)
        self.last_read[0] = 0  # the image is there even if nobody reads it

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
        for tensor in _tensors(outputs):
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


def _layer_calls(
    net: nn.Module, image_shape: Sequence[int]
) -> list[tuple[str, nn.Module, torch.Size]]:
    """(name, layer, shape of its output) per call of a layer that owns parameters."""
    images = _images(net, image_shape)
    names = {
        layer: name
        for name, layer in net.named_modules()
        if any(True for _ in layer.parameters(recurse=False)) and not _is_gate(layer)
    }
    for layer, name in names.items():
        if not isinstance(layer, (nn.Conv2d, nn.Linear, *NORMS)):
            raise ValueError(
                f"got {type(layer).__name__} at {name!r}; need Conv2d, Linear or a norm wherever "
                "there are parameters; use cost() for the totals"
            )
    calls: list[tuple[str, nn.Module, torch.Size]] = []

    def note(layer: nn.Module, args: tuple, output: Tensor) -> None:
        calls.append((names[layer], layer, output.shape))

    handles = [layer.register_forward_hook(note) for layer in names]
    try:
        with evaluating(net), torch.no_grad():
            _run(net, images)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _row(name: str, layer: nn.Module, output: torch.Size) -> dict[str, int | str]:
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


def interleaved(
    nets: list[nn.Module],
    image_shape: Sequence[int],
    batch: int,
    channels_last: bool,
    budget_s: float,
    min_repeats: int,
) -> list[list[float]]:
    """Seconds of every timed pass of several nets, timed in turns; a list per net.

    Each timed pass follows an untimed one of the same net, as in a service that runs one net.

    Raises: ValueError for a budget of no seconds or no repetition.
    """
    if not budget_s > 0 or min_repeats < 1:
        raise ValueError(f"got budget_s {budget_s}, min_repeats {min_repeats}; need both above 0")
    passes = []
    with ExitStack() as stack:
        for net in nets:
            images = _images(net, image_shape, batch)
            if channels_last:  # a copy: the caller's parameters keep their memory format
                net = copy.deepcopy(net).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
                images = images.contiguous(memory_format=torch.channels_last)
            stack.enter_context(evaluating(net))
            passes.append((net, images))
        stack.enter_context(torch.inference_mode())
        for net, images in passes:
            _run(net, images)
        _rounds(passes, budget_s / 5, 1)
        return _rounds(passes, budget_s, min_repeats)


def _rounds(
    passes: list[tuple[nn.Module, Tensor]], budget_s: float, min_repeats: int
) -> list[list[float]]:
    """Time all passes in turns, back and forth, until the budget is spent."""
    times: list[list[float]] = [[] for _ in passes]
    order = list(range(len(passes)))
    end = time.perf_counter() + budget_s
    while len(times[0]) < min_repeats or time.perf_counter() < end:
        for index in order:
            net, images = passes[index]
            net(images)  # untimed: the other net has emptied the caches
            start = _now(images.device)
            net(images)
            times[index].append(_now(images.device) - start)
        order.reverse()
    return times


def _now(device: torch.device) -> float:
    """Clock in seconds, read once the device has done all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _summary(net: nn.Module, times: list[float]) -> Latency:
    """Percentiles of the times, and where they were measured."""
    quantiles = torch.tensor([0.5, 0.1, 0.9], dtype=torch.float64)
    median_s, p10_s, p90_s = torch.tensor(times, dtype=torch.float64).quantile(quantiles).tolist()
    device = _like(net).device
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    return Latency(median_s, p10_s, p90_s, where, torch.get_num_threads())


def _images(net: nn.Module, image_shape: Sequence[int], batch: int = 1) -> Tensor:
    """Random images on the device and in the dtype of the net."""
    shape = tuple(image_shape)
    if len(shape) != 3 or not all(isinstance(size, int) and size > 0 for size in shape):
        raise ValueError(
            f"got image_shape {image_shape!r}; need three positive ints: channels, height, width"
        )
    if not isinstance(batch, int) or batch < 1:
        raise ValueError(f"got batch {batch!r}; need an int of at least 1")
    images = torch.rand(batch, *shape, generator=torch.Generator().manual_seed(0))
    return images.to(_like(net))


def _like(net: nn.Module) -> Tensor:
    """A tensor with the device and dtype of the net's first floating-point weight or buffer."""
    tensors = (*net.parameters(), *net.buffers())
    return next((t for t in tensors if t.is_floating_point()), torch.zeros(()))


def _run(net: nn.Module, images: Tensor) -> Any:
    """The net's output; a shape that it cannot take becomes a ValueError."""
    try:
        return net(images)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"got image_shape {tuple(images.shape[1:])}, which the net cannot take ({reason}); "
            "need the shape it was built for"
        ) from error


@contextmanager
def evaluating(net: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block; afterwards every module has its own flag back."""
    flags = [(module, module.training) for module in net.modules()]
    net.eval()
    try:
        yield
    finally:
        for module, flag in flags:
            module.training = flag


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
