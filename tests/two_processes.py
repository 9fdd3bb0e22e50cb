"""Trains a small net in float64, alone or as one of several processes, and writes what came out.

Run by training/test_devices.py, with the name of the file to write, in a process or by torchrun.
"""

import sys
from pathlib import Path

import torch
from torch import nn

from dnal_mini.data.sources import toy_images
from dnal_mini.gating import add_gates, arch_parameters, open_gates, set_gates, weight_parameters
from dnal_mini.training.devices import start_processes
from dnal_mini.training.loop import evaluate, fit, only_training
from dnal_mini.training.stage import Feed, Session, Stage, Work


def net() -> nn.Module:
    """Gated, with a shared batch in two norms, dropout left out on purpose."""
    torch.manual_seed(3)
    plain = nn.Sequential(
        nn.Conv2d(3, 7, 3), nn.BatchNorm2d(7), nn.ReLU(), nn.Conv2d(7, 5, 3, stride=2),
        nn.BatchNorm2d(5, momentum=None), nn.ReLU(), nn.Flatten(), nn.Linear(5 * 4 * 3, 3),
    )  # fmt: skip
    return add_gates(plain).double()


def main(out: Path) -> None:
    fabric = start_processes(torch.device("cpu"))
    data = toy_images(train=90, val=33, num_classes=3, image_shape=(3, 12, 10))
    model, losses = net(), []
    feed, session = Feed(batch=6, precision="float64"), Session(devices=fabric)
    for stage in ("weights", "gates"):
        soft = stage == "gates"
        set_gates(model, mode="soft" if soft else "off", delta=4.0)
        chosen = list(arch_parameters(model) if soft else weight_parameters(model))
        sgd = torch.optim.SGD(chosen, lr=0.0, momentum=0.9, weight_decay=0 if soft else 1e-3)
        work = Work(penalty=(lambda: open_gates(model)) if soft else None)
        planned = Stage(stage, 2, 0.05, price=1e-2, seed="x", feed=feed)
        with only_training(model, chosen):
            for row in fit(model, data, sgd, planned, work, session):
                losses.append([row["loss"], row["price"], row["train_accuracy"]])
    accuracy = evaluate(model, data.val, data, feed, batch=10, devices=fabric)
    if fabric is None or fabric.global_rank == 0:
        found = {"losses": losses, "accuracy": accuracy, "net": model.state_dict()}
        torch.save(found | {"norm": type(model[1]).__name__}, out)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
