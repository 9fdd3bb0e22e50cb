"""The three stages of the sequential optimisation, and what keeps the network alive meanwhile.

Each stage is a function with a visible freeze that yields one row per epoch. Read ``arch_stage``
first: it is the method. ``search.run`` strings the stages together.
"""

from collections.abc import Callable, Generator, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from dnal_mini.config import SearchConfig
from dnal_mini.data.augment import augment
from dnal_mini.data.imageset import ImageSet
from dnal_mini.gating import (
    arch_parameters,
    delta_schedule,
    gate_report,
    gates,
    open_gates,
    set_gates,
    weight_parameters,
)
from dnal_mini.runs.runfolder import RunFolder
from dnal_mini.runs.runlog import Row
from dnal_mini.search.budget import macs_weights
from dnal_mini.search.floors import collapse_floors, collapse_warnings, hold_floors
from dnal_mini.training.devices import pick_dtype
from dnal_mini.training.loop import Progress, evaluate, fit, only_training
from dnal_mini.training.position import Position
from dnal_mini.training.schedules import SCHEDULES, Schedule, constant


def weight_stage(
    net: nn.Module, data: ImageSet, config: SearchConfig, **loop: Any
) -> Iterator[Row]:
    """Stage 1: train the weights with gates off. Changes ``net``.

    ``loop``: ``folder`` (checkpoints), ``progress``, ``fabric``, ``stopping``; see ``search.run``.
    Source: Guo et al. 2022, Algorithm 1, lines 1-5 [guo2022dnal].
    """
    set_gates(net, mode="off")
    with only_training(net, weight_parameters(net)):
        optimizer = _sgd(weight_parameters(net), config, config.weight_decay)
        lr = SCHEDULES[config.weight_schedule](config.weight_lr)
        smooth = config.label_smoothing
        yield from _epochs(
            "weight_stage", net, data, config, optimizer, lr, label_smoothing=smooth, **loop
        )


def arch_stage(
    net: nn.Module, data: ImageSet, config: SearchConfig, name: str = "arch_stage", **loop: Any
) -> Generator[Row, None, None]:
    """Stage 2: freeze the weights, train the gates under a price while delta grows.

    The loss of a batch is cross-entropy + gate_price * (number of open gates, softly counted).
    ``name``: that of its rows and checkpoints.
    Starts from s = 0. Changes ``net``: its gates, and running statistics of BatchNorm if
    ``bn_mode="batch"``. Rows also hold what the gates do; a row of kind "warning" names a vital
    layer that is about to close as a whole.

    Source: Guo et al. 2022, Algorithm 1, lines 6-11, eq. 7 [guo2022dnal].
    Differs: a vital layer is held at its floor of open gates (``hold_floors``).
    """
    trained = list(arch_parameters(net))
    groups: list[dict[str, Any]] = [{"params": trained, "weight_decay": config.arch_weight_decay}]
    if not config.freeze_classifier:
        heads = [m for m in net.modules() if isinstance(m, nn.Linear | nn.BatchNorm1d)]
        groups.append({"params": [p for head in heads for p in head.parameters()]})
        trained = trained + groups[1]["params"]
    optimizer = _sgd(groups, config, weight_decay=0, nesterov=False)
    with only_training(net, trained):
        yield from _gated_epochs(
            name,
            net,
            data,
            config,
            optimizer,
            constant(config.arch_lr),
            bn_mode=config.bn_mode,
            **loop,
        )


def joint_stage(
    net: nn.Module, data: ImageSet, config: SearchConfig, **loop: Any
) -> Generator[Row, None, None]:
    """Weights and gates at once, for as long as stages 1 and 2 together. Changes ``net``.

    One loss and one optimiser; s has its own learning rate and no weight decay of the weights.
    delta grows over all of its epochs. What the sequential optimisation is compared with.

    Source: Guo et al. 2022, sec. 4.3, fig. 5 [guo2022dnal].
    Differs: the paper does not say how many epochs, which rates and which delta its joint
    optimisation had; all of these are ours.
    """
    gates_too: dict[str, Any] = {
        "params": list(arch_parameters(net)),
        "weight_decay": config.arch_weight_decay,
        "nesterov": False,
        "lr_scale": config.arch_lr / config.weight_lr,
    }
    groups: list[dict[str, Any]] = [{"params": list(weight_parameters(net))}, gates_too]
    optimizer = _sgd(groups, config, config.weight_decay)
    lr = SCHEDULES[config.weight_schedule](config.weight_lr)
    smooth = config.label_smoothing
    yield from _gated_epochs(
        "joint_stage", net, data, config, optimizer, lr, label_smoothing=smooth, **loop
    )


def _gated_epochs(
    stage: str,
    net: nn.Module,
    data: ImageSet,
    config: SearchConfig,
    optimizer: torch.optim.Optimizer,
    lr: Schedule,
    **loop: Any,
) -> Iterator[Row]:
    """Epochs in which the gates are soft, start from s = 0, and pay while delta grows."""
    epochs = config.epochs("arch_stage" if stage.startswith("probe") else stage)
    deltas = delta_schedule(epochs, config.delta_form, config.delta_max)
    floors = collapse_floors(net, data.image_shape, config.floor)
    set_gates(net, mode="soft", threshold=config.threshold)
    with torch.no_grad():
        for s in arch_parameters(net):
            s.zero_()
    weights = macs_weights(net, data.image_shape) if config.price_per == "macs" else None
    optimizer.register_step_post_hook(lambda *_: hold_floors(net, floors, 10 / config.delta_max))
    yield from _epochs(
        stage,
        net,
        data,
        config,
        optimizer,
        lr,
        before_epoch=lambda epoch: set_gates(net, delta=deltas[epoch - 1]),
        price=lambda: config.gate_price * open_gates(net, config.objective, weights),
        measure=lambda: _gates_now(net, data, config, loop.get("fabric")),
        remark=lambda row: collapse_warnings(row, floors),
        **loop,
    )


def fine_tune(net: nn.Module, data: ImageSet, config: SearchConfig, **loop: Any) -> Iterator[Row]:
    """Stage 3: train all weights of the pruned net. Changes ``net``.

    Source: Guo et al. 2022, Algorithm 1, lines 12-13 [guo2022dnal].
    """
    optimizer = _sgd(net.parameters(), config, config.weight_decay)
    lr = SCHEDULES[config.fine_tune_schedule](config.fine_tune_lr)
    smooth = config.label_smoothing
    yield from _epochs(
        "fine_tune", net, data, config, optimizer, lr, label_smoothing=smooth, **loop
    )


def dense_baseline(
    net: nn.Module, data: ImageSet, config: SearchConfig, **loop: Any
) -> Iterator[Row]:
    """The dense net trained on as long as stages 2 and 3 take, as stage 3 does. Changes ``net``."""
    set_gates(net, mode="off")
    with only_training(net, weight_parameters(net)):
        optimizer = _sgd(weight_parameters(net), config, config.weight_decay)
        lr = SCHEDULES[config.fine_tune_schedule](config.fine_tune_lr)
        smooth = config.label_smoothing
        yield from _epochs(
            "baseline", net, data, config, optimizer, lr, label_smoothing=smooth, **loop
        )


def _sgd(
    parameters: Iterable[nn.Parameter] | list[dict[str, Any]],
    config: SearchConfig,
    weight_decay: float,
    nesterov: bool | None = None,
) -> torch.optim.Optimizer:
    return torch.optim.SGD(
        parameters,
        lr=0.0,
        momentum=config.momentum,
        weight_decay=weight_decay,
        nesterov=config.nesterov if nesterov is None else nesterov,
        foreach=True,
    )


def _epochs(
    stage: str,
    net: nn.Module,
    data: ImageSet,
    config: SearchConfig,
    optimizer: torch.optim.Optimizer,
    lr: Schedule,
    folder: RunFolder | None = None,
    progress: Progress | None = None,
    measure: Callable[[], Row] | None = None,
    remark: Callable[[Row], Iterable[Row]] | None = None,
    **fit_arguments: Any,
) -> Iterator[Row]:
    """The epochs of one stage, from its last checkpoint on, as rows of a record.

    A checkpoint is written before the rows of its epoch, and holds them. Epochs that a crash has
    taken are trained again, to the same end.
    """
    done, place, rows = folder.restore(stage, net, optimizer) if folder else (0, None, [])
    yield from rows
    epochs = config.epochs("arch_stage" if stage.startswith("probe") else stage)

    def keep(place: Position) -> None:
        assert folder is not None
        folder.checkpoint(stage, place.epoch - 1, net, optimizer, rows, place)

    for row in fit(
        net,
        data,
        optimizer,
        epochs,
        lr,
        first_epoch=done + 1,
        place=place,
        batch=config.batch,
        seed=f"{config.seed}/{'arch_stage' if stage.startswith('probe') else stage}",
        augmented=_augmentation(config),
        reset_momentum=config.reset_momentum,
        compiled=config.compile,
        progress=(lambda it, text: progress(it, f"{stage} {text}")) if progress else None,
        keep=keep if folder else None,
        keep_every_s=config.checkpoint_s,
        **numerics(data, config),
        **fit_arguments,
    ):
        row = {"kind": "epoch", "stage": stage} | row | (measure() if measure else {})
        rows = [row, *(remark(row) if remark else [])]
        last = row["epoch"] == epochs
        if folder and (last or folder.checkpoint_age_s() >= config.checkpoint_s):
            folder.checkpoint(stage, row["epoch"], net, optimizer, rows, is_last=last)
        yield from rows


def _augmentation(config: SearchConfig) -> Callable | None:
    if config.crop == 0 and not config.flip:
        return None
    return partial(augment, pad=config.crop, flip=config.flip)


def numerics(data: ImageSet, config: SearchConfig) -> dict[str, Any]:
    """Precision and memory layout, as ``fit`` and ``evaluate`` take them."""
    device = data.train.images.device
    dtype = pick_dtype(config.precision, device)
    return {"dtype": dtype, "channels_last": config.channels_last}


def _gates_now(net: nn.Module, data: ImageSet, config: SearchConfig, fabric: Any) -> Row:
    """What an architecture epoch adds to its row."""
    layers = gate_report(net)
    total = sum(row["channels"] for row in layers.values())
    shares = [row["histogram"] for row in layers.values()]
    histogram = [sum(counts) for counts in zip(*shares, strict=True)]
    set_gates(net, mode="hard")
    hard = evaluate(net, data.val, data, fabric=fabric, **numerics(data, config))
    set_gates(net, mode="soft")
    return {
        "delta": float(next(iter(gates(net).values())).delta),
        "gate_price": config.gate_price,
        "hard_val_accuracy": hard,
        "kept": sum(row["open"] for row in layers.values()) / total,
        "undecided": sum(row["undecided"] * row["channels"] for row in layers.values()) / total,
        "gap": max(row["gap"] for row in layers.values()),
        "histogram": histogram,
        "layers": layers,
    }
