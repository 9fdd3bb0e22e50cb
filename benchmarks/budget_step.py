"""Seconds that a budget costs beyond training: the collapse floors, and a step of the bisection.

The floors are asked for once per run. A step is what ``nearest`` does for one count of channels:
masks by rank, the floors held, the net cut to them and its MACs counted. The net is a ResNet56 of a
quarter of its width for CIFAR images, the ranks are those of random values. Promise: a step takes
at most 0.5 s. ``bisection_s`` is a whole search for the share, ``steps`` the cuts that it tries.

Prints one JSON line. Run: ``python benchmarks/budget_step.py --threads 1``.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dnal_mini.gating import add_gates, gates
from dnal_mini.methods.contract import Values
from dnal_mini.models import MODELS
from dnal_mini.runs.origin import describe_run
from dnal_mini.runs.runlog import RunLog
from dnal_mini.search.budget import nearest, share_of
from dnal_mini.search.floors import collapse_floors, keep_alive

GOAL_S = 0.5
SHAPE = (3, 32, 32)


def seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    """What ``work`` takes, and what it returns."""
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def measure(chosen: argparse.Namespace) -> dict[str, Any]:
    """The row: floors, the first cut with all that it prepares, and each step of a bisection."""
    torch.manual_seed(0)
    net = add_gates(MODELS[chosen.model](num_classes=10, width=chosen.width))
    values: Values = {name: torch.randn(len(gate.s)) for name, gate in gates(net).items()}
    floors_s, floors = seconds(lambda: collapse_floors(net, SHAPE, 0.05))
    prepared_s, cost_of = seconds(lambda: share_of(net, SHAPE, "macs", chosen.residual))
    spent: list[float] = []

    def share(masks: Values) -> float:
        step_s, found = seconds(lambda: cost_of(keep_alive(masks, values, floors)[0]))
        spent.append(step_s)
        return found

    bisection_s, (masks, _) = seconds(lambda: nearest(values, share, chosen.share))
    step_s = statistics.median(spent)
    return {
        "benchmark": "budget_step", **describe_run("cpu"), "model": chosen.model,
        "width": chosen.width, "residual": chosen.residual, "share": chosen.share,
        "gates": len(values), "kept": sum(int(mask.sum()) for mask in masks.values()),
        "floors_s": round(floors_s, 3), "prepared_s": round(prepared_s, 3),
        "steps": len(spent), "step_s": round(step_s, 3), "slowest_step_s": round(max(spent), 3),
        "bisection_s": round(bisection_s, 3), "goal_s": GOAL_S, "reached": step_s <= GOAL_S,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", choices=MODELS, default="resnet56")
    parser.add_argument("--width", type=float, default=0.25)
    parser.add_argument("--residual", choices=("scatter", "tie"), default="scatter")
    parser.add_argument("--share", type=float, default=0.3, help="of the MACs, that is wanted")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path, help="record that the line is appended to")
    chosen = parser.parse_args()
    if chosen.threads:
        torch.set_num_threads(chosen.threads)
    row = measure(chosen)
    if chosen.out:
        chosen.out.parent.mkdir(parents=True, exist_ok=True)
        RunLog(chosen.out).append("benchmark", **row)
    print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
