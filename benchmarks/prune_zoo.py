"""Prunes networks of torchvision, timm and ultralytics and records how exact the smaller net is.

All classifiers of torchvision; of the others those of ``OTHERS`` whose package is there (they are
no dependency of this project). Promise: 100 % of models x keep shares x residual modes agree with
the hard-gated net to 1e-9 of the largest output in float64, or to what rounding alone explains, or
stay whole behind named walls; none raises. Models without a BatchNorm get random zero filters
instead of closed gates. One JSON line per case is appended to ``--out``; cases that are there are
skipped.
Run: ``python benchmarks/prune_zoo.py --out zoo.jsonl``.
"""

import argparse
import importlib.util
import itertools
import json
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

import dnal_mini as dnal  # before torchvision, whose missing operators it repairs
from dnal_mini.graph.outputs import tensors_in
from dnal_mini.pruning.certificate import NOISE, Rounded

EXACT = 1e-9
ROUNDED = 1e-6  # of nets that stay in float32, where a constant in a bias is rounded
LARGE = 200_000_000  # parameters of nets that stay in float32 for the sake of memory
KEEPS = (0.8, 0.5, 0.2)
RESIDUALS = ("scatter", "tie")
SIDES = {  # the smallest images they take
    "inception_v3": 96, "maxvit_t": 224, "alexnet": 70, "nasnetalarge": 128, "levit_conv_128s": 224,
}  # fmt: skip
OTHERS = {  # by the package that builds them
    "yolov8n": "ultralytics", "yolo11n": "ultralytics", "timm_vgg11_bn": "timm",
    "tf_efficientnet_b0": "timm", "nasnetalarge": "timm", "levit_conv_128s": "timm",
}  # fmt: skip
DETECTS_AT = (64, 96, 192, 320)  # sides of images that a detector is compared at, too
CHANGES: dict[str, dict[str, Any]] = {
    "googlenet": {"init_weights": False},
    "inception_v3": {"init_weights": False},
    **{name: {"image_size": 64} for name in ("vit_b_16", "vit_b_32", "vit_l_16", "vit_l_32")},
    "vit_h_14": {"image_size": 56},
}


def model_names() -> list[str]:
    from torchvision import models

    return sorted(models.list_models(module=models))


def other_names() -> list[str]:
    return [name for name, package in OTHERS.items() if importlib.util.find_spec(package)]


def build(name: str, num_classes: int) -> nn.Module:
    if OTHERS.get(name) == "timm":
        import timm

        return timm.create_model(name.removeprefix("timm_"), num_classes=num_classes)
    if OTHERS.get(name) == "ultralytics":
        from ultralytics.nn.tasks import DetectionModel

        return DetectionModel(f"{name}.yaml", nc=num_classes, verbose=False)
    from torchvision import models

    return models.get_model(name, weights=None, num_classes=num_classes, **CHANGES.get(name, {}))


def image_shape(name: str) -> tuple[int, int, int]:
    """Small images, as far as the model takes them."""
    side = CHANGES.get(name, {}).get("image_size", SIDES.get(name, 64))
    return 3, side, side


class _NoRandomInit(TorchFunctionMode):
    """Leaves out the slow random fills of constructors; ``zoo_net`` draws all weights itself."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in ("uniform_", "normal_", "erfinv_"):
            tensor = args[0] if args else kwargs["tensor"]
            return tensor.zero_()
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def zoo_net(name: str, seed: int, num_classes: int = 10) -> nn.Module:
    """A model in eval mode with He-uniform weights and small biases."""
    with _NoRandomInit(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        net = build(name, num_classes)
    draw = torch.Generator().manual_seed(seed)
    for layer in net.modules():
        for parameter in layer.parameters(recurse=False):
            if not parameter.requires_grad:
                continue  # a detector's table of distances
            if parameter.dim() > 1:
                bound = (6.0 / parameter[0].numel()) ** 0.5
                parameter.uniform_(-bound, bound, generator=draw)
            elif not isinstance(layer, _BatchNorm) and not (parameter != 0).any():
                parameter.uniform_(-0.1, 0.1, generator=draw)
    return net.eval()


@torch.no_grad()
def close_at_random(net: nn.Module, shape: Sequence[int], keep: float, seed: int) -> nn.Module:
    """A gated copy with that share of the gates open and statistics as after training.

    A net without a BatchNorm gets zero filters instead, in place.
    """
    draw = torch.Generator().manual_seed(seed)
    if any(isinstance(module, _BatchNorm) for module in net.modules()):
        net = dnal.add_gates(net, image_shape=shape)
        for gate in dnal.gates(net).values():
            is_open = torch.rand(len(gate.s), generator=draw) < keep
            gate.s.copy_(torch.where(is_open, 1.0, -1.0))
        dnal.set_gates(net, mode="hard", delta=1e4)
        settle(net, shape, draw)
        return net
    convs = [module for module in net.modules() if isinstance(module, nn.Conv2d)]
    for conv in convs[: max(1, len(convs) - 1)]:  # SqueezeNet's last one makes its logits
        closed = torch.rand(conv.out_channels, generator=draw) >= keep
        conv.weight /= keep**0.5  # so that what is left is as loud as before
        conv.weight[closed] = 0
        if conv.bias is not None:
            conv.bias[closed] = 0
    return net


def settle(net: nn.Module, shape: Sequence[int], draw: torch.Generator) -> None:
    """Random affines, and the running statistics of a few images, not quite hit; in place.

    Far from the true statistics a deep net would forget its image, and the check see nothing.
    """
    norms = [module for module in net.modules() if isinstance(module, _BatchNorm)]
    for norm in norms:
        norm.weight.uniform_(0.5, 1.5, generator=draw)
        norm.bias.uniform_(-0.4, 0.6, generator=draw)
        norm.running_mean.zero_()
        norm.train()
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    net(torch.randn(6, *shape, generator=draw))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()
        noise = torch.rand(2, norm.num_features, generator=draw)
        norm.running_mean += norm.running_var.sqrt() * (noise[0] - 0.5) * 0.6
        norm.running_var.clamp_(min=0.05).mul_(0.7 + 0.7 * noise[1])


@contextmanager
def _doubled(net: nn.Module) -> Iterator[nn.Module]:
    """The net itself in float64 and hard mode; afterwards as it was, not a bit changed."""
    dtype = next(net.parameters()).dtype
    gates = dnal.gates(net).values()
    modes = [gate.mode for gate in gates]
    dnal.set_gates(net, mode="hard")
    try:
        yield net.double().eval()
    finally:
        net.to(dtype)
        for gate, mode in zip(gates, modes, strict=True):
            gate.mode = mode


def outputs(net: nn.Module, images: Tensor) -> list[Tensor]:
    with _doubled(net), torch.no_grad():
        return tensors_in(net(images))


def relative(gaps: list[Tensor], sizes: list[Tensor]) -> float:
    """The largest of differences, each against the largest number of its own tensor."""
    pairs = zip(gaps, sizes, strict=True)
    return max(float(gap.abs().max() / size.abs().max().clamp(min=1e-300)) for gap, size in pairs)


def rounding(net: nn.Module, every: list[Tensor], expected: list[list[Tensor]]) -> float:
    """How far a net is from itself if it rounds otherwise, in the measure of ``relative``.

    Fifty blocks with random weights multiply what a last digit is off.
    """
    with Rounded():
        others = [outputs(net, images) for images in every]
    pairs = [zip(a, b, strict=True) for a, b in zip(expected, others, strict=True)]
    return max(map(relative, [[a - b for a, b in pair] for pair in pairs], expected))


def zoo_rows(
    name: str, keep: float, residuals: tuple[str, ...] = RESIDUALS, seed: int = 0
) -> Iterator[dict[str, Any]]:
    """One row per residual mode: how far the pruned output is off, and what is left.

    ``difference`` is relative to the largest output, ``live`` says how much the output depends on
    the image in the same measure, ``error`` is what ``prune`` raised, None if it did not,
    ``rounding`` how far the net is from itself where the difference is above ``EXACT``. Of a
    detector ``difference`` is the largest over images of all ``DETECTS_AT``, too.
    """
    shape = image_shape(name)
    net = zoo_net(name, seed)
    dense = dnal.cost(net, shape)
    gated = close_at_random(net, shape, keep, seed)
    del net
    if sharp := dense.params < LARGE:
        gated.double()
    draw = torch.Generator().manual_seed(seed)
    sides = DETECTS_AT if OTHERS.get(name) == "ultralytics" else ()
    sizes = [shape, *((3, side, side) for side in sides)]
    every = [torch.randn(2, *size, generator=draw, dtype=torch.float64) for size in sizes]
    expected = [outputs(gated, images) for images in every]
    live = relative([x[0] - x[1] for x in expected[0][:1]], expected[0][:1])
    for residual in residuals:
        row: dict[str, Any] = {"model": name, "keep": keep, "residual": residual, "seed": seed}
        row |= {"live": live, "error": None}
        start = time.perf_counter()
        try:
            small = dnal.prune(gated, shape, residual)
        except Exception as error:  # what this script is there to find
            yield row | {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
            continue
        row["seconds"] = round(time.perf_counter() - start, 2)
        left = dnal.cost(small.module, shape)
        found = [outputs(small.module, images) for images in every]
        gaps = [
            [a - b for a, b in zip(*pair, strict=True)]
            for pair in zip(expected, found, strict=True)
        ]
        row["difference"] = max(map(relative, gaps, expected))
        if sharp and row["difference"] > EXACT:
            row["rounding"] = rounding(gated, every, expected)
        row["macs"], row["params"] = [dense.macs, left.macs], [dense.params, left.params]
        row["walls"] = list(small.report.walls)
        row["sharp"] = sharp
        row["same_class"] = type(small.module) is type(gated)
        row["gates_left"] = len(dnal.gates(small.module))
        del small
        yield row


def complaint(row: dict[str, Any]) -> str:
    """What is wrong with a row, "" if nothing."""
    if row["error"]:
        return row["error"]
    wrong = []
    allowed = NOISE * row.get("rounding", 0.0) + (EXACT if row["sharp"] else ROUNDED)
    if not row["difference"] <= allowed:
        wrong.append(f"outputs differ by {row['difference']:.1e}")
    if not row["same_class"]:
        wrong.append("another class")
    if row["gates_left"]:
        wrong.append(f"{row['gates_left']} gates left")
    for unit in ("macs", "params"):
        before, after = row[unit]
        if after > before:
            wrong.append(f"{unit} grow from {before} to {after}")
    if row["macs"][1] == row["macs"][0] and not row["walls"]:
        wrong.append("nothing cut and no wall named")
    return "; ".join(wrong)


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def peak_memory_gib() -> float | None:
    """What this process has needed at most, where the system tells."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 2**30 if sys.platform == "darwin" else 2**20  # bytes there, KiB elsewhere
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="record file, JSON lines")
    every = [*model_names(), *other_names()]
    parser.add_argument("--models", nargs="*", default=every, metavar="NAME")
    parser.add_argument("--keeps", nargs="*", type=float, default=KEEPS, metavar="SHARE")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    def key(row: dict[str, Any]) -> tuple:
        return row["model"], row["keep"], row["residual"], row["seed"]

    done = {key(row) for row in read(options.out)}
    for name, keep in itertools.product(options.models, options.keeps):
        todo = tuple(r for r in RESIDUALS if (name, keep, r, options.seed) not in done)
        if todo:
            for row in zoo_rows(name, keep, todo, options.seed):
                row["torch"], row["version"] = torch.__version__, dnal.__version__
                with options.out.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                if wrong := complaint(row):
                    print(f"{name} keep {keep} {row['residual']}: {wrong}", flush=True)
    wanted = {
        (name, keep, residual, options.seed)
        for name, keep, residual in itertools.product(options.models, options.keeps, RESIDUALS)
    }
    rows = [row for row in read(options.out) if key(row) in wanted]
    sound = [row for row in rows if not complaint(row)]
    summary = {
        "benchmark": "prune_zoo",
        "models": len({row["model"] for row in rows}),
        "cases": len(rows),
        "sound": len(sound),
        "ratio": round(len(sound) / max(len(rows), 1), 4),
        "smaller": sum(row["macs"][1] < row["macs"][0] for row in sound),
        "largest_difference": max((row["difference"] for row in sound), default=None),
        "seconds": round(sum(row.get("seconds", 0) for row in rows)),
        "peak_memory_gib": peak_memory_gib(),
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
