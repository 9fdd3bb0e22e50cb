"""Gates random nets at random, prunes them, and records whether the smaller net does the same.

Promise: none of 5,000 nets of ``tests/random_nets.py`` is refused or differs from the hard-gated
one: to 1e-9 of an output's largest number in eval mode (float32 nets 1e-5: a constant in a bias is
rounded there), to 1e-5 with batch statistics, at the size that was cut for and at a larger one
where the whole net takes it; every tenth file, loaded back, gives the same bits. One JSON line per
net is appended to ``--out``; seeds that are there are skipped. At the end one line is printed, and
appended to ``--summary``.
Run: ``python benchmarks/random_nets.py --count 5000 --seed0 100000 --out nets.jsonl``.
"""

import argparse
import copy
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves

import dnal_mini as dnal

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from random_nets import ORDERS, SHAPE, Step, build, draw_gates, program, settle

LARGER = (3, 17, 14)
EXACT = {torch.float64: 1e-9, torch.float32: 1e-5}  # relative to the output's largest number
TRAINED = 1e-5  # norms with batch statistics divide by the spread of what hardly varies
LOADED = 10  # the file of every tenth net is read back


def gated_net(steps: list[Step], seed: int) -> nn.Module:
    """A net with settled statistics and decided gates; the seed picks precision and order."""
    dtype = torch.float32 if seed % 4 == 3 else torch.float64
    net = settle(build(steps), seed).to(dtype)
    if not any(isinstance(module, nn.BatchNorm2d) for module in net.modules()):
        return net  # zero filters alone
    gated = dnal.add_gates(net, ORDERS[seed % 3], image_shape=SHAPE)
    draw_gates(dnal.gates(gated), seed)
    dnal.set_gates(gated, mode="hard", delta=1e4)
    return gated


@torch.no_grad()
def outputs(net: nn.Module, images: Tensor, train: bool) -> list[Tensor]:
    """All output tensors in float64; ``train`` puts the norms alone into training mode."""
    net = copy.deepcopy(net).double().eval()
    for module in net.modules():
        if isinstance(module, _BatchNorm):
            module.train(train)
    found = tree_leaves(net(images.clone()))  # a forward may change its images in place
    return [leaf.clone() for leaf in found if isinstance(leaf, Tensor)]


def difference(net: nn.Module, small: nn.Module, images: Tensor, train: bool) -> float | None:
    """Largest of any output, relative to its largest number; None if the net takes no such size.

    ``x.reshape(-1, 360)`` does not fail there: it makes more rows of other images' pixels.
    """
    try:
        expected = outputs(net, images, train)
    except Exception:
        return None
    usual = outputs(net, torch.zeros(3, *SHAPE, dtype=torch.float64), train)
    if [len(x) for x in expected] != [len(x) for x in usual]:
        return None
    found = outputs(small, images, train)
    if [x.shape for x in expected] != [x.shape for x in found]:
        return float("inf")
    pairs = zip(expected, found, strict=True)
    return max(float((x - y).abs().max() / x.abs().max().clamp(min=1e-3)) for x, y in pairs)


def reloaded(steps: list[Step], small: dnal.Pruned, images: Tensor) -> bool:
    """True if the file, surgery repeated on a fresh net, gives the same bits in both modes."""
    dtype = next((p.dtype for p in small.module.parameters()), torch.float32)
    with tempfile.TemporaryDirectory() as folder:
        dnal.save(small, f"{folder}/net")
        back = dnal.load(f"{folder}/net", lambda: build(steps).to(dtype)).module
    pairs = [
        (a, b)
        for train in (False, True)
        for a, b in zip(
            outputs(small.module, images, train), outputs(back, images, train), strict=True
        )
    ]
    return all(torch.equal(a, b) for a, b in pairs)


def row_of(seed: int) -> dict[str, Any]:
    """What became of one net; ``error`` is what was raised on the way, None if nothing."""
    steps, residual = program(seed), ("scatter", "tie")[seed // 4 % 2]
    row: dict[str, Any] = {"seed": seed, "steps": len(steps), "residual": residual, "error": None}
    start = time.perf_counter()
    try:
        net = gated_net(steps, seed)
        row["sharp"] = all(p.dtype == torch.float64 for p in net.parameters())
        small = dnal.prune(net, SHAPE, residual)
        row["seconds"] = round(time.perf_counter() - start, 2)
        draw = torch.Generator().manual_seed(seed)
        for name, shape in (("", SHAPE), ("_larger", LARGER)):
            images = torch.randn(3, *shape, generator=draw, dtype=torch.float64)
            row[f"eval{name}"] = difference(net, small.module, images, train=False)
            row[f"train{name}"] = difference(net, small.module, images, train=True)
        cost = small.spec["cost"]
        row["macs"] = [cost["dense"]["macs"], cost["pruned"]["macs"]]
        row["walls"] = len(small.report.walls)
        if seed % LOADED == 7:
            images = torch.randn(3, *SHAPE, generator=draw, dtype=torch.float64)
            row["reloaded"] = reloaded(steps, small, images)
    except Exception as error:  # what this script is there to find
        row["error"] = f"{type(error).__name__}: {error}".splitlines()[0]
    return row


def complaint(row: dict[str, Any]) -> str:
    """What is wrong with a row, "" if nothing."""
    if row["error"]:
        return row["error"]
    bounds = {"eval": EXACT[torch.float64 if row["sharp"] else torch.float32], "train": TRAINED}
    wrong = [
        f"outputs differ by {row[key]:.1e} ({key})"
        for mode, bound in bounds.items()
        for key in (mode, f"{mode}_larger")
        if row[key] is not None and not row[key] <= bound
    ]
    if not row.get("reloaded", True):
        wrong.append("the file gives another net")
    if row["macs"][1] > row["macs"][0]:
        wrong.append("MACs grow from {} to {}".format(*row["macs"]))
    return "; ".join(wrong)


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The one line about all nets."""
    sound = [row for row in rows if not complaint(row)]
    sharp = [row for row in sound if row["sharp"]]
    return {
        "benchmark": "random_nets",
        "nets": len(rows),
        "seeds": [min(row["seed"] for row in rows), max(row["seed"] for row in rows)],
        "mismatches": len(rows) - len(sound),
        "smaller": sum(row["macs"][1] < row["macs"][0] for row in sound),
        "with_walls": sum(row["walls"] > 0 for row in sound),
        "taken_at_larger": sum(row["eval_larger"] is not None for row in sound),
        "reloaded": sum("reloaded" in row for row in sound),
        "float64_nets": len(sharp),
        "largest_difference_float64": max(
            (row[k] or 0.0 for row in sharp for k in ("eval", "eval_larger")), default=None
        ),
        "seconds": round(sum(row["seconds"] for row in sound)),
        "torch": torch.__version__,
        "version": dnal.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="record file, JSON lines")
    parser.add_argument("--summary", type=Path, help="file to append the last line to")
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--seed0", type=int, default=100_000)
    options = parser.parse_args()
    lines = options.out.read_text().splitlines() if options.out.exists() else []
    rows = {row["seed"]: row for row in map(json.loads, lines)}
    wanted = range(options.seed0, options.seed0 + options.count)
    for seed in wanted:
        if seed not in rows:
            rows[seed] = row_of(seed)
            with options.out.open("a") as file:
                file.write(json.dumps(rows[seed]) + "\n")
            if wrong := complaint(rows[seed]):
                print(f"seed {seed}: {wrong}", file=sys.stderr, flush=True)
    line = json.dumps(summary([rows[seed] for seed in wanted]))
    print(line)
    if options.summary:
        with options.summary.open("a") as file:
            file.write(line + "\n")


if __name__ == "__main__":
    main()
