"""The three stages of the sequential optimisation, and what keeps the network alive meanwhile.

Each stage is a function with a visible freeze that yields one row per epoch. Read ``arch_stage``
first: it is the method. ``search.run`` strings the stages together.
"""

import copy
import math
from collections.abc import Callable, Generator, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from dnal_mini.channels import facts_of, prepare
from dnal_mini.config import SearchConfig
from dnal_mini.cost import cost
from dnal_mini.data import ImageSet, augment
from dnal_mini.gate import (
    arch_parameters,
    delta_schedule,
    gate_report,
    gates,
    hold_floors,
    open_gates,
    set_gates,
    weight_parameters,
)
from dnal_mini.prune import cut_net, drop_gates
from dnal_mini.runfolder import Place, RunFolder
from dnal_mini.schedules import SCHEDULES, Schedule, constant
from dnal_mini.train import Progress, evaluate, fit, only_training, pick_dtype

Row = dict[str, Any]


# --- the three stages ------------------------------------------------------------------------


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
        remark=lambda row: _collapse_warnings(row, floors),
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

    def keep(place: Place) -> None:
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


# --- watching the gates, and keeping the network alive ---------------------------------------


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


def collapse_floors(
    net: nn.Module, image_shape: tuple[int, int, int], floor: float
) -> dict[str, int]:
    """Channels that each vital gate must leave open, by gate name: at least 1.

    A gate is vital if the network's output no longer depends on its input once all of its
    channels are closed: every gate of a plain chain, none of a residual branch.
    """
    opened = copy.deepcopy(net)
    for gate in gates(opened).values():
        torch.nn.init.constant_(gate.s, math.inf)
    floors = {}
    if isinstance(net, torch.fx.GraphModule):
        sites = {name: name.removesuffix("_gate") for name in gates(net)}
    else:
        sites = {name: name.removesuffix(".gate") for name in gates(net)}
    graph = prepare(drop_gates(opened), image_shape)
    for name, gate in gates(net).items():
        dead = facts_of(graph, zeroed={sites[name]}, forward_only=True)
        if dead.output_is_constant():
            floors[name] = max(1, math.ceil(floor * len(gate.s)))
    return floors


def _collapse_warnings(row: Row, floors: dict[str, int]) -> Iterator[Row]:
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


@torch.no_grad()
def keep_alive(net: nn.Module, floors: dict[str, int]) -> dict[str, int]:
    """Open the gates with the largest s where a vital layer has fewer open than its floor.

    Changes ``net``; returns the number of gates opened by name. So a layer never closes as a
    whole without a word: the names go into the record.
    """
    opened = {}
    for name, gate in gates(net).items():
        missing = floors.get(name, 0) - int(gate.is_open.sum())
        if missing > 0:
            closed = gate.s.masked_fill(gate.is_open, -math.inf)
            certain = (30 + abs(math.log(gate.threshold / (1 - gate.threshold)))) / gate.delta
            gate.s[closed.topk(missing).indices] = certain
            opened[name] = missing
    return opened


# --- how many MACs a gate stands for ---------------------------------------------------------


def macs_weights(net: nn.Module, image_shape: tuple[int, int, int]) -> dict[str, float]:
    """What one channel of each gate costs in MACs, by gate name; 1 on average over all channels.

    Measured, not derived: one channel of the gate is closed in a copy, the copy is pruned, and
    the MACs that are gone are counted.

    Differs: not in the paper, where every gate has the same price.
    """
    opened = copy.deepcopy(net)
    set_gates(opened, mode="hard")
    for gate in gates(opened).values():
        nn.init.constant_(gate.s, math.inf)
    whole = cost(drop_gates(opened), image_shape).macs
    saved = {}
    for name, gate in gates(opened).items():
        with torch.no_grad():
            gate.s[0] = -math.inf
        saved[name] = whole - cost(cut_net(opened, image_shape)[0], image_shape).macs
        nn.init.constant_(gate.s, math.inf)
    channels = {name: len(gate.s) for name, gate in gates(net).items()}
    total = sum(saved[name] * channels[name] for name in saved)
    return {name: saved[name] * sum(channels.values()) / total for name in saved}


def share_of_macs(net: nn.Module, image_shape: tuple[int, int, int], config: SearchConfig) -> float:
    """MACs of the net pruned as its gates stand now, over those of the dense one, in (0, 1]."""
    decided = copy.deepcopy(net)
    keep_alive(decided, collapse_floors(decided, image_shape, config.floor))
    set_gates(decided, mode="hard")
    small = cut_net(decided, image_shape, config.residual)[0]
    for gate in gates(decided).values():
        nn.init.constant_(gate.s, math.inf)
    return cost(small, image_shape).macs / cost(drop_gates(decided), image_shape).macs


@torch.no_grad()
def meet_target(net: nn.Module, image_shape: tuple[int, int, int], config: SearchConfig) -> float:
    """Shift all s by one amount, so that the pruned net comes nearest to ``config.target_macs``.

    Changes ``net``; returns the shift. All gates are ranked by s and as many are opened as the
    target allows. A common shift is what a slightly other price would have done, without the luck
    that a new search brings. It costs accuracy, either way, that fine-tuning has to win back: the
    gates have been trained for each other.

    Differs: not in the paper.
    """
    every = torch.cat([gate.s for gate in gates(net).values()]).double().sort(descending=True)[0]
    gate = next(iter(gates(net).values()))
    edge = math.log(gate.threshold / (1 - gate.threshold)) / float(gate.delta)
    shares: dict[int, float] = {}

    def shifted(count: int) -> tuple[float, nn.Module]:
        """The shift that opens ``count`` gates, and a copy of the net with it."""
        shift = edge - float(every[count - 1 : count + 1].mean())
        copied = copy.deepcopy(net)
        for s in arch_parameters(copied):
            s.add_(shift)
        return shift, copied

    low, high = 1, len(every) - 1
    while low < high:
        middle = (low + high) // 2
        shares[middle] = share_of_macs(shifted(middle)[1], image_shape, config)
        low, high = (middle + 1, high) if shares[middle] < config.target_macs else (low, middle)
    shares[low] = share_of_macs(shifted(low)[1], image_shape, config)
    best = min(shares, key=lambda count: abs(shares[count] - config.target_macs))
    shift = shifted(best)[0]
    for s in arch_parameters(net):
        s.add_(shift)
    return shift
