"""Time per epoch against the number of images, the width of the net and the batch.

Three small grids around one setting, each point the median of some epochs of ``fit`` (training
part, no evaluation), the points of a grid measured in turns. Least-squares fits: seconds = slope *
images + intercept with R^2; seconds ~ width ** exponent (a straight line in logarithms; 2 would be
MACs alone, 1 memory traffic alone); seconds = a + b / batch (b: what a step costs however small).

Prints one JSON line with fits and raw points. Run: ``python benchmarks/scaling.py --threads 1``.
"""

import argparse
import dataclasses
import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dnal_mini.data.sources import toy_images
from dnal_mini.models import MODELS
from dnal_mini.runs.origin import describe_run
from dnal_mini.runs.runlog import RunLog
from dnal_mini.training.devices import pick_device, pick_dtype
from dnal_mini.training.loop import fit
from dnal_mini.training.stage import Feed, Stage

Setting = tuple[int, float, int]  # images, width, batch


def epoch_of(setting: Setting, model: str, device: torch.device, feed: Feed) -> Callable[[], float]:
    """A function that trains one epoch and returns its seconds per whole number of batches.

    Images of an incomplete last batch are not trained; the seconds are scaled up for them.
    """
    images, width, batch = setting
    torch.manual_seed(0)
    layout = torch.channels_last if feed.channels_last else torch.contiguous_format
    net = MODELS[model](num_classes=10, width=width).to(device).to(memory_format=layout)
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-4, momentum=0.9, foreach=True)
    data = toy_images(train=images, val=8, num_classes=10, image_shape=(3, 32, 32))
    data = dataclasses.replace(data, train=data.train.to(device), val=data.val.to(device))

    def epoch() -> float:
        (row,) = fit(net, data, optimizer, Stage("epoch", 1, 1e-4, feed=replace(feed, batch=batch)))
        return images / row["images_per_s"]

    return epoch


def grid(
    settings: Sequence[Setting], epochs: int, model: str, device: torch.device, feed: Feed
) -> list[dict[str, Any]]:
    """Median seconds of an epoch at each setting, with all that was measured."""
    points = [epoch_of(setting, model, device, feed) for setting in settings]
    for point in points:  # warm-up
        point()
    spent: list[list[float]] = [[] for _ in points]
    for turn in range(epochs):
        numbers = range(len(points))
        for number in reversed(numbers) if turn % 2 else numbers:
            spent[number].append(points[number]())
    return [
        dict(zip(("images", "width", "batch"), setting, strict=True))
        | {"seconds": four(statistics.median(times)), "all": [four(t) for t in times]}
        for setting, times in zip(settings, spent, strict=True)
    ]


def four(value: float) -> float:
    """Four digits are enough."""
    return float(f"{value:.4g}")


def line(xs: Sequence[float], ys: Sequence[float]) -> tuple[float, float, float]:
    """Least squares y = slope * x + intercept: slope, intercept, R^2."""
    x, y = torch.tensor(xs, dtype=torch.float64), torch.tensor(ys, dtype=torch.float64)
    away = x - x.mean()
    slope = (away * (y - y.mean())).sum() / (away**2).sum()
    intercept = y.mean() - slope * x.mean()
    left = ((y - slope * x - intercept) ** 2).sum()
    r2 = 1 - left / ((y - y.mean()) ** 2).sum()
    return float(slope), float(intercept), float(r2)


def fits(by: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, float]]:
    """The three fits."""
    seconds = {name: [point["seconds"] for point in points] for name, points in by.items()}

    def sizes(name: str) -> list[float]:
        return [point[name] for point in by[name]]

    slope, start, r2 = line(sizes("images"), seconds["images"])
    logs = ([math.log(v) for v in values] for values in (sizes("width"), seconds["width"]))
    exponent, level, r2_width = line(*logs)
    per_step, floor, r2_batch = line([1 / size for size in sizes("batch")], seconds["batch"])
    images = by["batch"][0]["images"]
    return {
        "images": {"slope_s_per_image": four(slope), "intercept_s": four(start), "r2": four(r2)},
        "width": {
            "exponent": four(exponent), "seconds_at_width_1": four(math.exp(level)),
            "r2": four(r2_width),
        },
        "batch": {
            "a_s": four(floor), "b_s": four(per_step), "r2": four(r2_batch),
            "s_per_step": four(per_step / images),
        },
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", choices=MODELS, default="vgg16")
    parser.add_argument("--images", nargs="+", type=int, default=[512, 1024, 1536, 2048])
    parser.add_argument("--widths", nargs="+", type=float, default=[0.125, 0.25, 0.375, 0.5])
    parser.add_argument("--batches", nargs="+", type=int, default=[16, 32, 64, 128, 256])
    parser.add_argument(
        "--at", nargs=3, type=float, default=[512, 0.25, 128], metavar=("IMAGES", "WIDTH", "BATCH")
    )
    parser.add_argument("--epochs", type=int, default=3, help="measured at every point")
    parser.add_argument("--precision", default="auto", help="auto, float32 or bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--contiguous", action="store_true", help="no channels_last")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path, help="record that the line is appended to")
    chosen = parser.parse_args()
    if chosen.threads:
        torch.set_num_threads(chosen.threads)
    device = pick_device(chosen.device)
    dtype = pick_dtype(chosen.precision, device)
    images, width, batch = int(chosen.at[0]), chosen.at[1], int(chosen.at[2])
    settings = {
        "images": [(count, width, batch) for count in chosen.images],
        "width": [(images, share, batch) for share in chosen.widths],
        "batch": [(images, width, size) for size in chosen.batches],
    }
    feed = Feed(precision=chosen.precision, channels_last=not chosen.contiguous)
    by = {
        name: grid(points, chosen.epochs, chosen.model, device, feed)
        for name, points in settings.items()
    }
    row = {
        "benchmark": "scaling", **describe_run(chosen.device), "model": chosen.model,
        "dtype": str(dtype).removeprefix("torch."), "channels_last": not chosen.contiguous,
        "fits": fits(by), "points": by,
    }  # fmt: skip
    if chosen.out:
        chosen.out.parent.mkdir(parents=True, exist_ok=True)
        RunLog(chosen.out).append("benchmark", **row)
    print(json.dumps(row))


if __name__ == "__main__":
    main()
