"""One architecture step over one plain training step: same net, batch and precision, in one run.

The plain step trains the weights of the net without gates; the others train the gates of the same
net with its weights frozen, price included: "folded" (what training uses: the gate inside the
norm's affine), "explicit" (the layer as it stands on screen, after the norm), "authors" (the
layout of the authors' scripts, from its description; it copies unless the net is channels_last).
Steps are taken in turns, there and back, so that what else the machine does falls on all alike.
Promise, folded over plain: time at most 0.72 for VGG16, 0.75 for ResNet56, 0.85 for MobileNetV2;
never more memory.

Prints one JSON line per net and precision. Run: ``python benchmarks/arch_step.py --threads 2``.
"""

import argparse
import copy
import json
import statistics
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dnal_mini.data.sources import toy_images
from dnal_mini.gating import add_gates, arch_parameters, open_gates, set_gates
from dnal_mini.layers.gated_norm import Gated
from dnal_mini.layers.scaled_sigmoid import ScaledSigmoid
from dnal_mini.models import MODELS
from dnal_mini.runs.origin import describe_run
from dnal_mini.runs.runlog import RunLog
from dnal_mini.training.devices import pick_device, pick_dtype
from dnal_mini.training.loop import as_input, autocast

GOALS = {"vgg16": 0.72, "resnet56": 0.75, "mobilenetv2": 0.85}
MEMORY_GOAL = 1.0
Step = Callable[[], None]


class TransposedGate(ScaledSigmoid):
    """The gate with channels moved last and pixels in rows, multiplied, and all of it undone."""

    def forward(self, x: Tensor) -> Tensor:
        last = x.permute(0, 2, 3, 1)
        rows = last.reshape(-1, x.shape[1]) * self.p.to(x.dtype)
        return rows.view(last.shape).permute(0, 3, 1, 2)


def layouts(plain: nn.Module) -> dict[str, nn.Module]:
    """The plain net and its three gated copies, gates soft and at s = 0."""
    folded = add_gates(plain)
    explicit, authors = copy.deepcopy(folded), copy.deepcopy(folded)
    for net, gate_of in ((explicit, None), (authors, TransposedGate)):
        for layer in (m for m in net.modules() if isinstance(m, Gated)):
            layer.folded = False
            if gate_of is not None:
                layer.gate = gate_of(len(layer.gate.s)).to(layer.gate.s)
    for net in (folded, explicit, authors):
        set_gates(net, mode="soft", delta=10.0)
        net.requires_grad_(False)
        for s in arch_parameters(net):
            s.requires_grad_(True)
    return {"plain": plain, "folded": folded, "explicit": explicit, "authors": authors}


def step_of(net: nn.Module, x: Tensor, labels: Tensor, dtype: torch.dtype) -> tuple[Step, int]:
    """One step of gradient descent, and the bytes that rest between steps (without gradients)."""
    trained = [p for p in net.parameters() if p.requires_grad]
    gated = any(isinstance(m, ScaledSigmoid) for m in net.modules())
    optimizer = torch.optim.SGD(trained, lr=1e-4, momentum=0.9, foreach=True)

    def step() -> None:
        with autocast(x.device, dtype):
            logits = net(x)
        loss = F.cross_entropy(logits.float(), labels)
        if gated:
            loss = loss + 1e-4 * open_gates(net)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    lasting = [*net.parameters(), *net.buffers(), *trained]  # the last: momentum
    return step, sum(tensor.nbytes for tensor in lasting)


# --- time ------------------------------------------------------------------------------------


def seconds(step: Step, device: torch.device) -> tuple[float, float]:
    """Seconds on the wall and seconds of processor time of one step."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    wall, cpu = time.perf_counter(), time.process_time()
    step()
    wait()
    return time.perf_counter() - wall, time.process_time() - cpu


def times(steps: dict[str, Step], rounds: int, device: torch.device) -> dict[str, list[Tensor]]:
    """Seconds (wall, processor) of each, one entry per round of there and back."""
    there = list(steps)
    found: dict[str, list[Tensor]] = {name: [] for name in there}
    for name in there * 2:  # warm-up
        steps[name]()
    for _ in range(rounds):
        spent = {name: torch.zeros(2, dtype=torch.float64) for name in there}
        for name in there + there[::-1]:
            spent[name] += torch.tensor(seconds(steps[name], device), dtype=torch.float64) / 2
        for name in there:
            found[name].append(spent[name])
    return found


def ratios(found: dict[str, list[Tensor]]) -> dict[str, Any]:
    """Of the rounds' ratios to the plain step: median, p10 and p90; and median seconds."""
    plain = torch.stack(found["plain"])
    rows = {}
    for name, spent in found.items():
        wall, cpu = (torch.stack(spent) / plain).T
        p10, p50, p90 = (round(float(wall.quantile(q)), 3) for q in (0.1, 0.5, 0.9))
        rows[name] = {
            "step_s": float(f"{statistics.median(float(s[0]) for s in spent):.4g}"),
            "over_plain": p50, "p10": p10, "p90": p90,
            "processor_time_over_plain": round(float(cpu.median()), 3),
        }  # fmt: skip
    return rows


# --- memory ----------------------------------------------------------------------------------


class Alive(TorchDispatchMode):
    """Counts the bytes of storages that operations have made and that are still alive."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if is_tensor(t)}
        made = func(*args, **(kwargs or {}))
        for storage in (t.untyped_storage() for t in tree_leaves(made) if is_tensor(t)):
            if storage._cdata not in self.known | given:
                self.known.add(storage._cdata)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.gone, storage._cdata, storage.nbytes())
        return made

    def gone(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


def is_tensor(value: object) -> bool:
    return isinstance(value, Tensor)


def peak_bytes(step: Step, device: torch.device) -> int:
    """Most bytes alive at once in one step, over what rests between steps.

    On a CPU: storages that operations leave behind; what a kernel needs inside is not seen.
    """
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before
    with Alive() as counter:
        step()
    return counter.peak


def memory(nets: dict[str, nn.Module], steps: dict[str, Step], rest: dict[str, int]) -> Any:
    """Peak bytes of a step of each: what rests and what comes on top; the sum over plain's."""
    rows: dict[str, dict[str, Any]] = {}
    for name, net in nets.items():
        net.zero_grad(set_to_none=True)
        peak = peak_bytes(steps[name], next(net.parameters()).device)
        rows[name] = {"resting_bytes": rest[name], "step_bytes": peak}
    whole = {name: row["resting_bytes"] + row["step_bytes"] for name, row in rows.items()}
    for name, row in rows.items():
        row["over_plain"] = round(whole[name] / whole["plain"], 4)
        row["step_over_plain"] = round(row["step_bytes"] / rows["plain"]["step_bytes"], 4)
    return rows


# --- all of it -------------------------------------------------------------------------------


def measure(model: str, precision: Any, chosen: argparse.Namespace) -> dict[str, Any]:
    """The row of one net in one precision."""
    device = pick_device(chosen.device)
    dtype = pick_dtype(precision, device)
    torch.manual_seed(0)
    layout = torch.contiguous_format if chosen.contiguous else torch.channels_last
    plain = MODELS[model](num_classes=10, width=chosen.width).to(device)
    nets = layouts(plain.to(memory_format=layout))
    data = toy_images(train=chosen.batch, val=8, num_classes=10, image_shape=(3, 32, 32))
    batch = data.train.to(device)
    x = as_input(batch.images, data, dtype, not chosen.contiguous)
    pairs = {name: step_of(net, x, batch.labels, dtype) for name, net in nets.items()}
    steps = {name: step for name, (step, _) in pairs.items()}
    found = ratios(times(steps, chosen.steps, device))
    bytes_of = memory(nets, steps, {name: rest for name, (_, rest) in pairs.items()})
    ratio, more = found["folded"]["over_plain"], bytes_of["folded"]["over_plain"]
    return {
        "benchmark": "arch_step", **describe_run(chosen.device), "model": model,
        "width": chosen.width, "batch": chosen.batch, "rounds": chosen.steps,
        "dtype": str(dtype).removeprefix("torch."), "channels_last": not chosen.contiguous,
        "ratio": ratio, "goal": GOALS[model], "memory_ratio": more, "memory_goal": MEMORY_GOAL,
        "reached": ratio <= GOALS[model] and more <= MEMORY_GOAL,
        "time": found, "memory": bytes_of,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--models", nargs="+", choices=GOALS, default=list(GOALS))
    parser.add_argument("--precision", nargs="+", default=["auto"], help="auto float32 bfloat16")
    parser.add_argument("--width", type=float, default=0.5)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=10, help="rounds; each takes two of each")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--contiguous", action="store_true", help="no channels_last")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path, help="record that the lines are appended to")
    chosen = parser.parse_args()
    if chosen.threads:
        torch.set_num_threads(chosen.threads)
    for model in chosen.models:
        for precision in chosen.precision:
            row = measure(model, precision, chosen)
            if chosen.out:
                chosen.out.parent.mkdir(parents=True, exist_ok=True)
                RunLog(chosen.out).append("benchmark", **row)
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
