"""DNAL: gates are trained under a price while delta grows, until each is open or closed.

Read ``DNAL.work``: it is the method. The weights are frozen meanwhile (``optimisation`` may say
otherwise, to compare with).
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from dnal_mini.gating import (
    DeltaForm,
    Objective,
    arch_parameters,
    delta_schedule,
    gate_report,
    gates,
    open_gates,
    set_gates,
    weight_parameters,
)
from dnal_mini.methods.contract import Method, Subject, Values
from dnal_mini.methods.marginal import macs_weights
from dnal_mini.training.loop import evaluate
from dnal_mini.training.stage import Row, Stage, Work

DECIDED = 0.02  # a search for a price ends once fewer gates are between 0.1 and 0.9


@dataclass(frozen=True)
class DNAL(Method):
    """Differentiable neural architecture learning.

    Source: Guo et al. 2022, Algorithm 1 [guo2022dnal].
    Differs: a layer that would take the network with it is held at its floor of open gates; the
    paper does not say how its joint optimisation was made, so epochs, rates and delta are ours.
    """

    optimisation: Literal["sequential", "joint"] = "sequential"
    """Weights, then gates (paper), or both at once for as many epochs."""
    arch_epochs: int = 20
    """Epochs of stage 2 (gates, weights frozen)."""
    arch_lr: float = 0.1
    """Learning rate of s in stage 2, constant."""
    arch_weight_decay: float = 0.0
    """Of s, which it pulls towards 0; the authors' scripts have none."""
    gate_price: float = 1e-4
    """Loss (nats) per open gate: lambda_a."""
    price_per: Literal["gate", "macs"] = "gate"
    """Every gate costs the same (paper), or in proportion to the MACs that closing it saves."""
    target_by: Literal["price", "shift"] = "price"
    """How a budget is met: look for a price and shift s by what is missing, or only shift."""
    objective: Objective = "paper"
    """Price sum sigmoid(delta s) as in the paper, or sum sigmoid(s) as in the authors' code."""
    delta_form: DeltaForm = "paper"
    """delta from 1 to delta_max (paper), multiplied before each epoch (code), linear, constant."""
    delta_max: float = 1e4
    """Steepness in the last architecture epoch."""
    threshold: float = 0.5
    """A gate is open where sigmoid(delta s) is above it; the authors' scripts take 0.9."""
    freeze_classifier: bool = True
    """Freeze linear layers too in stage 2 (paper); the authors' scripts train them."""
    bn_mode: Literal["batch", "running"] = "batch"
    """BatchNorm statistics in stage 2: of the batch, as in the authors' scripts, or running."""

    name: ClassVar[str] = "dnal"
    strength: ClassVar[str] = "gate_price"
    meeting: ClassVar[tuple[str, ...]] = ("target_by",)
    ranges: ClassVar[Mapping[str, tuple[float, float]]] = {
        "arch_epochs": (1, math.inf), "arch_lr": (1e-12, math.inf),
        "arch_weight_decay": (0, math.inf), "gate_price": (0, math.inf), "delta_max": (1, 1e9),
        "threshold": (1e-6, 1 - 1e-6),
    }  # fmt: skip

    @property
    def trains_from_start(self) -> bool:
        """Joint optimisation has no stage 1 of its own."""
        return self.optimisation == "joint"

    @property
    def searches_strength(self) -> bool:
        """A budget is met by another price, unless only s is to be shifted."""
        return self.target_by == "price" and not self.trains_from_start

    def stages(self, weights: Stage) -> tuple[Stage, ...]:
        """The architecture stage, or the joint one for as long as stages 1 and 2 together."""
        if self.trains_from_start:
            epochs = weights.epochs + self.arch_epochs
            joint = replace(weights, name="joint_stage", trains="both", price=self.gate_price)
            return (replace(joint, epochs=epochs),)
        return (
            replace(
                weights,
                name="arch_stage",
                epochs=self.arch_epochs,
                lr=self.arch_lr,
                schedule="constant",
                trains="gates",
                price=self.gate_price,
                nesterov=False,
                weight_decay=0.0,
                label_smoothing=0.0,
                bn_mode=self.bn_mode,
            ),
        )

    def work(self, stage: Stage, subject: Subject) -> Work:
        """Cross-entropy + gate_price * (open gates, softly counted), from s = 0, delta growing."""
        net, floors = subject.net, subject.floors
        deltas = delta_schedule(stage.epochs, self.delta_form, self.delta_max)
        set_gates(net, mode="soft", threshold=self.threshold)
        with torch.no_grad():
            for s in arch_parameters(net):
                s.zero_()
        by_macs = self.price_per == "macs"
        prices = macs_weights(net, subject.data.image_shape) if by_macs else None
        return Work(
            groups=self._groups(net, stage),
            penalty=lambda: open_gates(net, self.objective, prices),
            before_epoch=lambda epoch: set_gates(net, delta=deltas[epoch - 1]),
            after_step=lambda rate: hold_floors(net, floors, 10 / self.delta_max),
            measure=lambda: _gates_now(stage, subject),
            remark=lambda row: _warnings(row, floors),
        )

    def _groups(self, net: nn.Module, stage: Stage) -> tuple[dict[str, Any], ...]:
        """The freeze: what SGD gets is all that moves."""
        s = {"params": list(arch_parameters(net)), "weight_decay": self.arch_weight_decay}
        if stage.trains == "both":
            own = {"nesterov": False, "lr_scale": self.arch_lr / stage.lr}
            return {"params": list(weight_parameters(net))}, s | own
        if self.freeze_classifier:
            return (s,)
        heads = [m for m in net.modules() if isinstance(m, nn.Linear | nn.BatchNorm1d)]
        return s, {"params": [p for head in heads for p in head.parameters()]}

    def settled(self, row: Row) -> bool:
        """True once nearly all gates are decided, well before delta is at its end."""
        return row.get("undecided", 1.0) <= DECIDED

    def values(self, subject: Subject) -> Values:
        """The trained s."""
        return {name: gate.s.detach() for name, gate in gates(subject.net).items()}

    def alive(self, subject: Subject) -> Values:
        """sigmoid(delta s) above the threshold."""
        return {name: gate.is_open for name, gate in gates(subject.net).items()}


@torch.no_grad()
def hold_floors(net: nn.Module, floors: Mapping[str, int], margin: float = 1e-3) -> None:
    """Keep at least ``floors[name]`` gates of a layer at s >= 0 by shifting its s, in place.

    If the k-th largest s of a layer has fallen below 0, all of them are raised until it is at
    ``margin``. A common shift is what a lower price for this layer would have done: which of
    its channels are the better ones does not change.

    Differs: not in the paper, where a layer can close as a whole and take the network with it.
    """
    for name, gate in gates(net).items():
        if name in floors:
            kth: Tensor = gate.s.topk(floors[name]).values[-1]
            gate.s.add_(torch.where(kth < 0, margin - kth, 0.0))


def _gates_now(stage: Stage, subject: Subject) -> Row:
    """What an epoch with gates adds to its row."""
    net, data = subject.net, subject.data
    layers = gate_report(net)
    total = sum(row["channels"] for row in layers.values())
    shares = [row["histogram"] for row in layers.values()]
    set_gates(net, mode="hard")
    hard = evaluate(net, data.val, data, stage.feed, devices=subject.session.devices)
    set_gates(net, mode="soft")
    return {
        "delta": float(next(iter(gates(net).values())).delta),
        "gate_price": stage.price,
        "hard_val_accuracy": hard,
        "kept": sum(row["open"] for row in layers.values()) / total,
        "undecided": sum(row["undecided"] * row["channels"] for row in layers.values()) / total,
        "gap": max(row["gap"] for row in layers.values()),
        "histogram": [sum(counts) for counts in zip(*shares, strict=True)],
        "layers": layers,
    }


def _warnings(row: Row, floors: Mapping[str, int]) -> Iterator[Row]:
    """A row of kind "warning" for the vital layers that are at their floor or closed."""
    low = [
        f"{name} ({row['layers'][name]['open']} of {row['layers'][name]['channels']} open)"
        for name, floor in floors.items()
        if row["layers"][name]["open"] <= floor
    ]
    if low:
        why = "held at the floor, or the layer would close as a whole; a lower gate_price helps"
        text = f"{why}: {', '.join(low)}"
        yield {"kind": "warning", "stage": row["stage"], "epoch": row["epoch"], "text": text}
