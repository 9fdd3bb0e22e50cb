"""What a device can do, in seconds: is it right, how fast is it, how many runs fit side by side.

Run: ``python benchmarks/self_check.py --device cuda``; ``full_runs.py`` does it first. One JSON
row, a part for each question; a part that fails says why, for the rest there was no time.

exact: hard-gated nets and their pruned ones, in float64 and in the precision of training. epochs:
seconds of an epoch of 45,000 images for each net, and the memory it takes. resumed: a run that is
stopped inside an epoch and goes on, against one that was not. together: images per second of
several processes at once, VGG16. compiled: the same of one, with ``torch.compile``.
"""

import argparse
import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from packed import CONTEXT, reason_of
from torch import Tensor, nn

from dnal_mini import recipes
from dnal_mini.data.sources import toy_images
from dnal_mini.gating import add_gates, arch_parameters, gates, open_gates, set_gates
from dnal_mini.gating import weight_parameters as weights_of
from dnal_mini.graph.copies import copied
from dnal_mini.models import MODELS
from dnal_mini.pruning.pruner import prune
from dnal_mini.runs.origin import describe_run
from dnal_mini.runs.runlog import Row
from dnal_mini.runs.signals import POLITE
from dnal_mini.search.driver import run
from dnal_mini.search.inputs import on_device
from dnal_mini.training.devices import pick_device, pick_dtype
from dnal_mini.training.loop import autocast, fit, only_training
from dnal_mini.training.stage import Feed, Stage, Work

SHAPE = (3, 32, 32)
EPOCH = 45_000  # training images of CIFAR-10 without those for validation
BATCH = 128
STEPS = {"cuda": 40, "cpu": 2}  # of a measurement
PHASE_S = {"cuda": 2.0, "cpu": 6.0}
TOGETHER = {"cuda": (1, 2, 4, 8, 12), "cpu": (1, 2)}


def check(device: str, seconds: float, width: float = 1.0) -> Row:
    """All parts for which there is time within ``seconds``, each in processes of its own."""
    end, kind = time.monotonic() + seconds, device.partition(":")[0]
    parts: dict[str, Callable[[], Row]] = {
        "exact": partial(asked, end, exact, device),
        "epochs": partial(asked, end, epochs, device, width),
        "together": partial(together, end, device, width, TOGETHER.get(kind, (1, 2))),
        "resumed": partial(asked, end, resumed, device),
        "compiled": partial(asked, end, compiled, device, width),
    }
    found: Row = {}
    for name, part in parts.items():
        began = time.monotonic()
        if answer := part() if began < end else {}:
            found[name] = answer | {"seconds": round(time.monotonic() - began, 1)}
    left = [name for name in parts if name not in found]
    about = asked(time.monotonic() + 60, describe_run, device)
    return {"kind": "self_check", **about, "width": width, **found, "left_out": left}


def asked(end: float, part: Callable[..., Row], *arguments: Any) -> Row:
    """The answer of a function, from a process of its own; {} if it was not there in time."""
    ours, theirs = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=_answer, args=(theirs, part, arguments))
    process.start()
    theirs.close()
    try:
        return ours.recv() if ours.poll(max(0.0, end - time.monotonic())) else {}
    except EOFError:
        return {"failed": "its process ended without a word"}
    finally:
        process.kill()
        process.join()


def _answer(pipe: Connection, part: Callable[..., Row], arguments: tuple) -> None:
    try:
        pipe.send(part(*arguments))
    except Exception as error:  # whatever it is: the other parts still tell something
        pipe.send({"failed": reason_of(error)})


@torch.no_grad()
def exact(device: str) -> Row:
    """The largest difference of a pruned net from the hard-gated one, relative to the output.

    A quarter of each net's width, half of its gates closed by a seed.
    """
    found, images = {}, torch.rand(16, *SHAPE, device=device)
    dtype = pick_dtype("auto", torch.device(device))
    for name, build in MODELS.items():
        torch.manual_seed(0)
        net = add_gates(build(width=0.25)).to(device).eval()
        for gate in gates(net).values():
            gate.s.copy_(torch.where(torch.rand(len(gate.s)) < 0.5, 1.0, -1.0))
            gate.s[0] = 1.0
        set_gates(net, mode="hard")
        small = prune(net, SHAPE).module

        def apart(both: Sequence[nn.Module], x: Tensor, kind: torch.dtype) -> float:
            with autocast(x.device, kind):
                first, second = (one(x).double() for one in both)
            return float((first - second).abs().max() / first.abs().max())

        doubled = [copied(one).double() for one in (net, small)]
        found[name] = {
            "float64": apart(doubled, images.double(), torch.float64),
            str(dtype).removeprefix("torch."): apart((net, small), images, dtype),
        }
    return found


def speed(net: nn.Module, device: str, gated: bool = False, compiled: bool = False) -> float:
    """Images per second of training, after an epoch to warm up."""
    kind = torch.device(device)
    feed = Feed(BATCH, precision="auto", channels_last=True, compiled=compiled)
    count = BATCH * STEPS.get(kind.type, 2)
    data = on_device(toy_images(train=count, val=8, num_classes=10, image_shape=SHAPE), kind)
    set_gates(net, mode="soft" if gated else "off")
    parameters = list(arch_parameters(net) if gated else weights_of(net))
    optimizer = torch.optim.SGD(parameters, lr=0.0, momentum=0.9)
    work = Work(penalty=(lambda: open_gates(net)) if gated else None)
    stage = Stage("arch_stage" if gated else "weight_stage", 2, 0.0, price=1e-4, feed=feed)
    with only_training(net, parameters):
        *_, row = fit(net, data, optimizer, stage, work)
    return float(row["images_per_s"])


def placed_net(name: str, device: str, width: float) -> nn.Module:
    """A gated net of ours on the device, its filters as training has them."""
    net = add_gates(MODELS[name](width=width)).to(device)
    return net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def epochs(device: str, width: float) -> Row:
    """Seconds of an epoch of each stage, with cuDNN's autotuner too, and the memory in use."""
    found: Row = {}
    for name in MODELS:
        net = placed_net(name, device, width)
        row = {"weight_s": EPOCH / speed(net, device), "arch_s": EPOCH / speed(net, device, True)}
        if torch.device(device).type == "cuda":
            row["memory_bytes"] = torch.cuda.max_memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            with torch.backends.cudnn.flags(enabled=True, benchmark=True):
                row["weight_autotuned_s"] = EPOCH / speed(net, device)
        found[name] = row
    return found


def compiled(device: str, width: float) -> Row:
    """Seconds of a compiled epoch of VGG16's weights, and of compiling and warming up."""
    began = time.monotonic()
    net = placed_net("vgg16", device, width)
    epoch_s = EPOCH / speed(net, device, compiled=True)
    return {"weight_s": epoch_s, "ready_s": time.monotonic() - began}


def resumed(device: str) -> Row:
    """Whether a run stopped inside its second stage ends with the bytes of one that was not."""
    base = recipes.digits().replace(
        data="toy", val=32, baseline="none", width=0.1, weight_epochs=1, arch_epochs=2,
        fine_tune_epochs=1, device=device,
    )  # fmt: skip
    at: list[str] = []

    def stopping(steps: Iterable, text: str) -> Iterable:
        for step in steps:
            if text.startswith("arch_stage epoch 2") and not at:
                at.append(text)
                os.kill(os.getpid(), POLITE)
            yield step

    with tempfile.TemporaryDirectory() as folder:
        whole, broken = Path(folder) / "whole", Path(folder) / "broken"
        run(base, whole, progress=lambda steps, _: steps)
        with contextlib.suppress(KeyboardInterrupt):
            run(base, broken, progress=stopping)
        run(base, broken, progress=lambda steps, _: steps)
        files = [(path / "small.safetensors").read_bytes() for path in (whole, broken)]
    return {"stopped": len(at), "same_bytes": files[0] == files[1]}


def together(end: float, device: str, width: float, counts: Sequence[int]) -> Row:
    """Images per second of 1, 2, 4 … processes that train VGG16 at once; how many give most."""
    begin, phase_s = CONTEXT.Barrier(max(counts)), PHASE_S.get(device.partition(":")[0], 2.0)
    pipes, processes = [], []
    for index in range(max(counts)):
        ours, theirs = CONTEXT.Pipe(duplex=False)
        arguments = (theirs, begin, index, counts, phase_s, device, width)
        processes.append(CONTEXT.Process(target=_steps_in_phases, args=arguments))
        processes[-1].start()
        theirs.close()
        pipes.append(ours)
    try:
        answers = []
        for pipe in pipes:
            if not pipe.poll(max(0.0, end - time.monotonic())):
                return {}
            answers.append(pipe.recv())
    except EOFError:
        return {"failed": "a process ended without a word"}
    finally:
        for process in processes:
            process.join(1.0)
            process.kill()
            process.join()
    if failed := next((answer for answer in answers if isinstance(answer, str)), ""):
        return {"failed": failed}
    speeds = {n: sum(each[k] for each in answers) for k, n in enumerate(counts)}
    most = max(speeds.values())
    best = min(n for n, found in speeds.items() if found >= 0.97 * most)
    return {"images_per_s": {str(n): round(x) for n, x in speeds.items()}, "best": best}


def _steps_in_phases(
    pipe: Connection, begin: Any, index: int, counts: Sequence[int], phase_s: float, device: str,
    width: float,
) -> None:  # fmt: skip
    """Train through one phase per count, if this process is among so many; tells its speeds."""
    try:
        torch.set_num_threads(max(1, torch.get_num_threads() // max(counts)))
        torch.manual_seed(0)
        kind = pick_device(device)
        net, dtype = placed_net("vgg16", device, width), pick_dtype("auto", kind)
        images = torch.rand(BATCH, *SHAPE, device=kind).to(memory_format=torch.channels_last)
        labels = torch.randint(10, (BATCH,), device=kind)
        optimizer = torch.optim.SGD(weights_of(net), lr=0.0, momentum=0.9)

        def step() -> None:
            with autocast(kind, dtype):
                logits = net(images)
            optimizer.zero_grad(set_to_none=True)
            nn.functional.cross_entropy(logits.float(), labels).backward()
            optimizer.step()

        step()
        speeds = []
        for count in counts:
            if kind.type == "cuda":
                torch.cuda.synchronize()
            begin.wait(60)
            began, steps = time.perf_counter(), 0
            while index < count and (spent := time.perf_counter() - began) < phase_s:
                step()
                steps += 1
                if kind.type == "cuda" and steps % 8 == 0:
                    torch.cuda.synchronize()
            speeds.append(steps * BATCH / spent if index < count else 0.0)
        pipe.send(speeds)
    except Exception as error:
        begin.abort()
        pipe.send(reason_of(error))


def main() -> None:
    """Print the row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seconds", type=float, default=45.0)
    parser.add_argument("--width", type=float, default=1.0)
    options = parser.parse_args()
    print(json.dumps(check(options.device, options.seconds, options.width)))


if __name__ == "__main__":
    sys.exit(main())
