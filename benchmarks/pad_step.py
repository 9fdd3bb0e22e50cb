"""A fine-tuning step of a cut net over one of the dense net, as it is and with zero channels.

The gates of a share of all channels, drawn by a seed, are closed so that the net is cut to about
the given share of its MACs. "cut" trains it at the widths that are left, "padded" the same numbers
with zeros up to a multiple (``pad_to``). Steps are taken in turns, there and back, so that what
else the machine does falls on all alike. Promise, of the better of the two over dense: at most 0.9
at 65 % of the MACs, 0.75 at 30 %.

Prints one JSON line per net, precision and share. Run: ``python benchmarks/pad_step.py``.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from arch_step import Step, ratios, times
from torch import nn
from torch.nn import functional as F

from dnal_mini.data.sources import toy_images
from dnal_mini.gating import add_gates, gates
from dnal_mini.measure.cost import cost
from dnal_mini.models import MODELS
from dnal_mini.pruning.pad import padded
from dnal_mini.pruning.pruner import prune
from dnal_mini.runs.origin import describe_run
from dnal_mini.runs.runlog import RunLog
from dnal_mini.search.budget import impose, nearest, share_of
from dnal_mini.training.devices import pick_device, pick_dtype
from dnal_mini.training.loop import as_input, autocast

SHAPE = (3, 32, 32)
GOALS = {0.65: 0.9, 0.3: 0.75}


def cut_to(net: nn.Module, share: float) -> nn.Module:
    """The net with channels closed at random, cut to about a share of its MACs."""
    gated = add_gates(net)
    draw = torch.Generator().manual_seed(0)
    values = {name: torch.rand(len(g.s), generator=draw) for name, g in gates(gated).items()}
    for value in values.values():
        value[0] = 2.0  # no layer dies
    masks, _ = nearest(values, share_of(gated, SHAPE, "macs", "scatter"), share)
    impose(gated, masks)
    return prune(gated.eval(), SHAPE).module


def step_of(net: nn.Module, x: torch.Tensor, labels: torch.Tensor, dtype: torch.dtype) -> Step:
    """One step of gradient descent on all weights."""
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-4, momentum=0.9, foreach=True)
    net.train()

    def step() -> None:
        with autocast(x.device, dtype):
            logits = net(x)
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(logits.float(), labels).backward()
        optimizer.step()

    return step


def measure(model: str, precision: Any, share: float, chosen: argparse.Namespace) -> dict[str, Any]:
    """The row of one net in one precision at one share of its MACs."""
    device = pick_device(chosen.device)
    dtype = pick_dtype(precision, device)
    torch.manual_seed(0)
    plain = MODELS[model](num_classes=10, width=chosen.width)
    small = cut_to(plain, share)
    layout = {"device": device, "memory_format": torch.channels_last}
    plain, small = plain.to(**layout), small.to(**layout)
    nets = {"plain": plain, "cut": small, "padded": padded(small, SHAPE, chosen.pad_to)}
    data = toy_images(train=chosen.batch, val=8, num_classes=10, image_shape=SHAPE)
    batch = data.train.to(device)
    x = as_input(batch.images, data, dtype, channels_last=True)
    steps = {name: step_of(net, x, batch.labels, dtype) for name, net in nets.items()}
    found = ratios(times(steps, chosen.steps, device))
    best = min(("cut", "padded"), key=lambda name: found[name]["over_plain"])
    goal = next((goal for at, goal in GOALS.items() if abs(at - share) < 0.01), None)
    return {
        "benchmark": "pad_step", **describe_run(chosen.device), "model": model,
        "width": chosen.width, "batch": chosen.batch, "rounds": chosen.steps,
        "dtype": str(dtype).removeprefix("torch."), "pad_to": chosen.pad_to,
        "macs_share": cost(small, SHAPE).macs / cost(plain, SHAPE).macs,
        "better": best, "ratio": found[best]["over_plain"], "goal": goal,
        "reached": None if goal is None else found[best]["over_plain"] <= goal, "time": found,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=["vgg16"])
    parser.add_argument("--precision", nargs="+", default=["auto"], help="auto float32 bfloat16")
    parser.add_argument("--shares", type=float, nargs="+", default=list(GOALS), help="of the MACs")
    parser.add_argument("--pad-to", type=int, default=8)
    parser.add_argument("--width", type=float, default=0.25)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--steps", type=int, default=10, help="rounds; each takes two of each")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path, help="record that the lines are appended to")
    chosen = parser.parse_args()
    if chosen.threads:
        torch.set_num_threads(chosen.threads)
    for model in chosen.models:
        for precision in chosen.precision:
            for share in chosen.shares:
                row = measure(model, precision, share, chosen)
                if chosen.out:
                    chosen.out.parent.mkdir(parents=True, exist_ok=True)
                    RunLog(chosen.out).append("benchmark", **row)
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
