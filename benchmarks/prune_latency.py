"""How much of a 3.9 times MACs cut arrives as time: torchvision nets at 224 x 224, two threads.

Promise at batch 1, in the form in which the small net is fastest: efficiency (speed-up / ratio of
MACs) of at least 0.75 for ResNet50, 0.9 for VGG16, 0.6 for MobileNetV2. Prints one JSON line per
net and cut. Every layer closes the same share of its channels, the last ones, so that all members
of a residual sum close the same. "round_to=8" and "round_to=16" have about 3.9 times fewer MACs,
"round_to=1" has the gates of the first of them and keeps exactly what they leave open: fewer MACs.
Weights are random: no time depends on them. Run it on a machine that does nothing else.
Run: ``python benchmarks/prune_latency.py --nets resnet50 mobilenet_v2``.
"""

import argparse
import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import dnal_mini as dnal  # before torchvision, whose missing operators it repairs
from dnal_mini.deployment.fold import deploy
from dnal_mini.measure.compare import FORMS, compare
from dnal_mini.measure.cost import layer_table
from dnal_mini.measure.latency import latency_pair

TARGETS = {"resnet50": 0.75, "vgg16_bn": 0.9, "mobilenet_v2": 0.6}
SHAPE, MACS_RATIO = (3, 224, 224), 3.9


def width(channels: int, share: float) -> int:
    """Channels that stay open, before rounding."""
    return max(1, round(share * channels))


def share_for(net: nn.Module, macs_ratio: float, round_to: int) -> float:
    """Largest share of open channels with which the rounded net has ``macs_ratio`` fewer MACs."""
    rows = [row for row in layer_table(net, SHAPE) if row["macs"]]
    classes = rows[-1]["name"]
    total = sum(row["macs"] for row in rows)

    def part_left(channels: int, share: float) -> float:
        return min(channels, -(-width(channels, share) // round_to) * round_to) / channels

    def macs(share: float) -> float:
        left = 0.0
        for row in rows:
            outputs, inputs = int(row["out_channels"]), int(row["in_channels"])
            part = 1.0 if row["name"] == classes else part_left(outputs, share)
            if row["kind"] != "depthwise" and inputs != SHAPE[0]:
                part *= part_left(inputs, share)
            left += int(row["macs"]) * part
        return left

    shares = [step / 1000 for step in range(1, 1001)]
    return max(share for share in shares if macs(share) <= total / macs_ratio)


def close(net: nn.Module, share: float) -> nn.Module:
    """A gated copy with the last channels of every layer closed; linear layers get zero rows."""
    gated = dnal.add_gates(net, where=lambda name, norm: True)
    dnal.set_gates(gated, mode="hard", delta=1e4)
    hidden = [m for m in gated.modules() if isinstance(m, nn.Linear)][:-1]  # not the classes
    with torch.no_grad():
        for gate in dnal.gates(gated).values():
            gate.s.fill_(1.0)
            gate.s[width(len(gate.s), share) :] = -1.0
        for layer in hidden:
            layer.weight[width(layer.out_features, share) :] = 0
            layer.bias[width(layer.out_features, share) :] = 0
    return gated


class Program(nn.Module):
    """A compiled network behind the call of a module, for the stopwatch."""

    def __init__(self, run: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.run = run

    def forward(self, images: Tensor) -> Tensor:
        return self.run(images)


def folded(net: nn.Module, images: Tensor) -> nn.Module:
    """Norms folded, channels first."""
    return deploy(net)


def jit(net: nn.Module, images: Tensor) -> nn.Module:
    """TorchScript, frozen and optimised for inference: oneDNN with weights in blocked layouts."""
    frozen = torch.jit.freeze(torch.jit.trace(deploy(net), images))
    program = torch.jit.optimize_for_inference(frozen)
    return Program(lambda x: program(x))


def inductor(net: nn.Module, images: Tensor) -> nn.Module:
    """torch.compile with frozen weights."""
    program = torch.compile(deploy(net))
    with torch._inductor.config.patch(freezing=True), torch.inference_mode():
        program(images)
    return Program(lambda x: program(x))


OTHERS = {"folded": folded, "jit": jit, "inductor": inductor}  # forms that compare() does not have


def times(
    dense: nn.Module,
    small: nn.Module,
    batches: Sequence[int],
    forms: Sequence[str],
    budget_s: float,
) -> dict[str, Any]:
    """Speed-up and efficiency of every form and batch, and where the small net is fastest."""
    own = [form for form in forms if form in FORMS]
    found = compare(dense, small, SHAPE, batches, own, budget_s=budget_s)
    ratio = found.sizes[0]["ratio"]
    rows = {f"{row['form']}/{row['batch']}": row for row in found.rows}
    for form in (form for form in forms if form in OTHERS):
        for batch in batches:
            torch._dynamo.reset()
            images = torch.rand(batch, *SHAPE)
            pair = [OTHERS[form](net, images) for net in (dense, small)]
            first, second = latency_pair(*pair, SHAPE, batch, budget_s=budget_s)
            speed_up = first.median_s / second.median_s
            rows[f"{form}/{batch}"] = {
                "dense_s": first.median_s, "small_s": second.median_s,
                "speed_up": speed_up, "efficiency": speed_up / ratio,
            }  # fmt: skip
    keys = ("dense_s", "small_s", "speed_up", "speed_up_p10", "speed_up_p90", "efficiency")
    table = {
        name: {key: float(f"{row[key]:.4g}") for key in keys if key in row} or row["not_measured"]
        for name, row in rows.items()
    }
    best = min(
        (
            name
            for name, row in rows.items()
            if name.endswith(f"/{batches[0]}") and "small_s" in row
        ),
        key=lambda name: rows[name]["small_s"],
    )
    best = best.partition("/")[0]
    efficiency = {
        f"efficiency_batch_{batch}": round(rows[f"{best}/{batch}"]["efficiency"], 2)
        for batch in batches
    }
    return {
        "macs_ratio": round(ratio, 2), "fastest_form": best, **efficiency, "times": table,
        "words": found.words,
    }  # fmt: skip


def benchmark(
    name: str, cuts: Sequence[int], batches: Sequence[int], forms: Sequence[str], budget_s: float
) -> Iterator[dict[str, Any]]:
    """The lines of one net."""
    from torchvision import models

    torch.manual_seed(0)
    dense = getattr(models, name)().eval()
    for round_to in cuts:
        share = share_for(dense, MACS_RATIO, round_to if round_to > 1 else max(cuts[0], 8))
        small = dnal.prune(close(dense, share), SHAPE, residual="tie", round_to=round_to)
        yield {
            "benchmark": "prune_latency", "net": name, "cut": f"round_to={round_to}",
            "threads": torch.get_num_threads(), "open_share": share,
            **times(dense, small.module, batches, forms, budget_s),
            "target_batch_1": TARGETS[name],
        }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--nets", nargs="+", choices=TARGETS, default=list(TARGETS))
    every = [*FORMS, *OTHERS]
    parser.add_argument("--forms", nargs="+", choices=every, default=every)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--budget-s", type=float, default=10.0, help="per form and batch")
    parser.add_argument("--round-to", nargs="+", type=int, default=[8, 16, 1])
    chosen = parser.parse_args()
    warnings.filterwarnings("ignore")  # TorchScript announces its retirement
    torch.set_num_threads(chosen.threads)
    for name in chosen.nets:
        settings = (chosen.round_to, chosen.batches, chosen.forms, chosen.budget_s)
        for line in benchmark(name, *settings):
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
