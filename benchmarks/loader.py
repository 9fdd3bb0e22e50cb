"""What the data cost: images/s of real training over images/s on one resident synthetic batch.

Real training is ``fit`` on a resident uint8 set: indices drawn, images taken, cropped, mirrored and
normalised. The rival takes the same steps of the same net, again and again on one batch that is
normalised already. Short epochs of both in turns, there and back. Promise: at least 0.95.

Prints one JSON line per net and batch; ``input_s`` says where the rest goes, measured piece by
piece. Run: ``python benchmarks/loader.py --threads 2``.
"""

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dnal_mini.data.augment import augment, normalise
from dnal_mini.data.imageset import ImageSet
from dnal_mini.data.sources import toy_images
from dnal_mini.models import MODELS
from dnal_mini.runs.origin import describe_run
from dnal_mini.runs.runlog import RunLog
from dnal_mini.training.devices import pick_device, pick_dtype
from dnal_mini.training.loop import as_input, autocast, fit
from dnal_mini.training.stage import Feed, Stage

GOAL = 0.95


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def synthetic_epoch(
    net: nn.Module,
    optimizer: torch.optim.Optimizer,
    x: Tensor,
    labels: Tensor,
    steps: int,
    dtype: torch.dtype,
) -> float:
    """Seconds of ``steps`` steps on one batch."""
    net.train()
    synchronise(x.device)
    start = time.perf_counter()
    for _ in range(steps):
        with autocast(x.device, dtype):
            logits = net(x)
        loss = F.cross_entropy(logits.float(), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    synchronise(x.device)
    return time.perf_counter() - start


def real_epoch(
    net: nn.Module, optimizer: torch.optim.Optimizer, data: ImageSet, feed: Feed
) -> float:
    """Seconds of the training part of one epoch of ``fit``."""
    synchronise(data.train.images.device)
    (row,) = fit(net, data, optimizer, Stage("epoch", 1, 1e-4, feed=feed))
    return len(data.train) // feed.batch * feed.batch / row["images_per_s"]


def pieces(data: ImageSet, batch: int, dtype: torch.dtype, channels_last: bool) -> dict[str, float]:
    """Median seconds per batch of taking, augmenting and normalising images, each by itself."""
    device = data.train.images.device
    images = data.train.images[:batch]
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(data.train), generator=generator).to(device)[:batch]
    parts: dict[str, Callable[[], Any]] = {
        "take": lambda: (data.train.images[order], data.train.labels[order]),
        "augment": lambda: augment(images, generator),
        "normalise": lambda: normalise(images, data.mean, data.std, dtype),
        "as_input": lambda: as_input(images, data, dtype, channels_last),
    }
    found = {}
    for name, part in parts.items():
        spent = []
        for _ in range(23):
            synchronise(device)
            start = time.perf_counter()
            part()
            synchronise(device)
            spent.append(time.perf_counter() - start)
        found[name] = float(f"{statistics.median(spent[3:]):.3g}")
    return found


def measure(model: str, batch: int, chosen: argparse.Namespace) -> dict[str, Any]:
    """The row of one net and batch."""
    device = pick_device(chosen.device)
    dtype = pick_dtype(chosen.precision, device)
    feed = Feed(batch, precision=chosen.precision, channels_last=not chosen.contiguous)
    torch.manual_seed(0)
    layout = torch.contiguous_format if chosen.contiguous else torch.channels_last
    net = MODELS[model](num_classes=10, width=chosen.width).to(device).to(memory_format=layout)
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-4, momentum=0.9, foreach=True)
    images = batch * chosen.steps
    data = toy_images(train=images, val=8, num_classes=10, image_shape=(3, 32, 32))
    data = dataclasses.replace(data, train=data.train.to(device), val=data.val.to(device))
    first = data.train.take(torch.arange(batch, device=device))
    x = as_input(first.images, data, dtype, feed.channels_last)

    def real() -> float:
        return real_epoch(net, optimizer, data, feed)

    def synthetic() -> float:
        return synthetic_epoch(net, optimizer, x, first.labels, chosen.steps, dtype)

    real(), synthetic()
    spent = []  # (real, synthetic), a round each
    for _ in range(chosen.rounds):
        there = (real(), synthetic())
        back = (synthetic(), real())
        spent.append((there[0] + back[1], there[1] + back[0]))
    shares = torch.tensor([one / other for other, one in spent], dtype=torch.float64)
    p10, ratio, p90 = (round(float(shares.quantile(q)), 3) for q in (0.1, 0.5, 0.9))
    real_s, synthetic_s = (statistics.median(column) for column in zip(*spent, strict=True))
    input_s = pieces(data, batch, dtype, feed.channels_last)
    return {
        "benchmark": "loader", **describe_run(chosen.device), "model": model,
        "width": chosen.width, "batch": batch, "steps": chosen.steps, "rounds": chosen.rounds,
        "dtype": str(dtype).removeprefix("torch."), "channels_last": not chosen.contiguous,
        "ratio": ratio, "p10": p10, "p90": p90, "goal": GOAL, "reached": ratio >= GOAL,
        "real_images_per_s": round(2 * images / real_s),
        "synthetic_images_per_s": round(2 * images / synthetic_s),
        "synthetic_step_s": float(f"{synthetic_s / 2 / chosen.steps:.3g}"), "input_s": input_s,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["vgg16"])
    parser.add_argument("--batches", nargs="+", type=int, default=[128])
    parser.add_argument("--width", type=float, default=0.25)
    parser.add_argument("--steps", type=int, default=8, help="of an epoch")
    parser.add_argument("--rounds", type=int, default=10, help="each: two epochs of both")
    parser.add_argument("--precision", default="auto", help="auto, float32 or bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--contiguous", action="store_true", help="no channels_last")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path, help="record that the lines are appended to")
    chosen = parser.parse_args()
    if chosen.threads:
        torch.set_num_threads(chosen.threads)
    for model in chosen.models:
        for batch in chosen.batches:
            row = measure(model, batch, chosen)
            if chosen.out:
                chosen.out.parent.mkdir(parents=True, exist_ok=True)
                RunLog(chosen.out).append("benchmark", **row)
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
