"""Images per second of training VGG16 at a quarter and at full width: bfloat16 and channels_last
against float32, and an architecture epoch against a weight epoch, interleaved in one run.

Prints one JSON line. ``arch_over_weight`` is the time of one architecture step over that of one
weight step of the same net in the same precision (frozen weights need no weight gradient; the gate
is folded into the norm's affine). Each number is the median of three rounds.
"""

import json
import statistics
from collections import defaultdict

import torch

from dnal_mini.data.sources import toy_images
from dnal_mini.gating import add_gates, arch_parameters, open_gates, set_gates, weight_parameters
from dnal_mini.models import vgg16
from dnal_mini.training.devices import pick_dtype
from dnal_mini.training.loop import fit, only_training
from dnal_mini.training.stage import Feed, Stage, Work

FULL_STEPS, ROUNDS, BATCH = 4, 3, 128
dtype = pick_dtype("auto", torch.device("cpu"))
speeds: dict[str, list[float]] = defaultdict(list)


def images_per_s(net: torch.nn.Module, name: str, steps: int, feed: Feed) -> float:
    """Speed of one epoch of ``steps`` steps, after a warm-up epoch of one step."""
    soft = name == "arch_stage"
    set_gates(net, mode="soft" if soft else "off")
    parameters = list(arch_parameters(net) if soft else weight_parameters(net))
    optimizer = torch.optim.SGD(parameters, lr=0.0, momentum=0.9)
    work = Work(penalty=(lambda: open_gates(net)) if soft else None)
    stage = Stage(name, 1, 0.0, price=1e-4, feed=feed)
    for count in (1, steps):
        data = toy_images(train=BATCH * count, val=8, num_classes=10, image_shape=(3, 32, 32))
        with only_training(net, parameters):
            (row,) = fit(net, data, optimizer, stage, work)
    return row["images_per_s"]


for _ in range(ROUNDS):
    for width, steps in ((0.25, 4 * FULL_STEPS), (1.0, FULL_STEPS)):
        net = add_gates(vgg16(width=width)).to(memory_format=torch.channels_last)
        fast = Feed(BATCH, precision="auto", channels_last=True)
        speeds[f"{width}/fast"].append(images_per_s(net, "weight_stage", steps, fast))
        speeds[f"{width}/arch"].append(images_per_s(net, "arch_stage", steps, fast))
        plain = add_gates(vgg16(width=width))
        speeds[f"{width}/float32"].append(images_per_s(plain, "weight_stage", steps, Feed(BATCH)))

median = {name: statistics.median(values) for name, values in speeds.items()}
found: dict[str, object] = {
    "benchmark": "train_speed",
    "dtype": str(dtype).removeprefix("torch."),
    "threads": torch.get_num_threads(),
    "images_per_s": {name: round(value) for name, value in median.items()},
}
for width in ("0.25", "1.0"):
    fast, arch = median[f"{width}/fast"], median[f"{width}/arch"]
    found[f"fast_over_float32_{width}"] = round(fast / median[f"{width}/float32"], 2)
    found[f"arch_over_weight_{width}"] = round(fast / arch, 2)
print(json.dumps(found))
