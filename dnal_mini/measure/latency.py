"""How long a forward pass takes, alone or beside another network, on the net's own device."""

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dnal_mini.graph.capture import evaluating, keeping_buffers
from dnal_mini.graph.copies import copied
from dnal_mini.graph.inputs import like
from dnal_mini.measure.cost import output_of, random_images
from dnal_mini.refused import need_number, need_numbers

MOST_SECONDS = 1e6  # that a measurement may take: eleven days


@dataclass(frozen=True)
class Latency:
    """Seconds per batch: median, 10th and 90th percentile over the repetitions.

    ``device`` is where it ran, ``threads`` the number of CPU threads that torch could use.

    Example:
        >>> time = dnal.Latency(median_s=0.0021, p10_s=0.002, p90_s=0.0024, device="cpu", threads=1)
        >>> print(time)
        2.1 ms (2 to 2.4) on cpu, 1 thread
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
    Example:
        >>> net = dnal.models.vgg16(width=0.125)
        >>> one, many = (dnal.latency(net, batch=batch, budget_s=0.05) for batch in (1, 64))
        >>> one.median_s < many.median_s
        True
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
    need_number("budget_s", budget_s, 0, MOST_SECONDS, ends=False)
    need_number("min_repeats", min_repeats, 1, whole=True)
    passes = []
    with ExitStack() as stack:
        for net in nets:
            need_numbers(net)
            images = random_images(net, image_shape, batch)
            if channels_last:  # a copy: the caller's parameters keep their memory format
                net = copied(net).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
                images = images.contiguous(memory_format=torch.channels_last)
            stack.enter_context(evaluating(net))
            stack.enter_context(keeping_buffers(net))
            passes.append((net, images))
        stack.enter_context(torch.inference_mode())
        for net, images in passes:
            output_of(net, images)
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
    device = like(net).device
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    return Latency(median_s, p10_s, p90_s, where, torch.get_num_threads())
