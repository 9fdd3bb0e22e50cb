"""The sequential optimisation: train weights, train gates, prune, fine-tune, test once.

Each stage is a function with a visible freeze that yields one row per epoch; ``run`` strings them
together in a folder that can be resumed. Read ``arch_stage`` first: it is the method.
"""

import copy
import dataclasses
import math
import os
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dnal_mini.channels import facts_of, prepare
from dnal_mini.config import SearchConfig
from dnal_mini.cost import latency_pair
from dnal_mini.data import ImageSet, augment, cifar10, digits, toy_images
from dnal_mini.gate import (
    add_gates,
    arch_parameters,
    delta_schedule,
    gate_report,
    gates,
    hold_floors,
    open_gates,
    set_gates,
    weight_parameters,
)
from dnal_mini.models import MODELS
from dnal_mini.netfile import load, save
from dnal_mini.prune import Pruned, drop_gates, prune
from dnal_mini.runfolder import RunFolder
from dnal_mini.train import (
    Progress,
    constant,
    cosine,
    evaluate,
    fit,
    only_training,
    pick_device,
    pick_dtype,
)

Row = dict[str, Any]


# --- the three stages ------------------------------------------------------------------------


def weight_stage(
    net: nn.Module, data: ImageSet, config: SearchConfig, **loop: Any
) -> Iterator[Row]:
    """Stage 1: train the weights with gates off, at a constant learning rate. Changes ``net``.

    ``loop``: ``folder`` (checkpoints), ``progress``; see ``run``.
    Source: Guo et al. 2022, Algorithm 1, lines 1-5 [guo2022dnal].
    """
    set_gates(net, mode="off")
    with only_training(net, weight_parameters(net)):
        optimizer = _sgd(weight_parameters(net), config, config.weight_decay)
        lr = constant(config.weight_lr)
        yield from _epochs("weight_stage", net, data, config, optimizer, lr, **loop)


def arch_stage(net: nn.Module, data: ImageSet, config: SearchConfig, **loop: Any) -> Iterator[Row]:
    """Stage 2: freeze the weights, train the gates under a price while delta grows.

    The loss of a batch is cross-entropy + gate_price * (number of open gates, softly counted).
    Starts from s = 0. Changes ``net``: its gates, and running statistics of BatchNorm if
    ``bn_mode="batch"``. Rows also hold what the gates do; a row of kind "warning" names a vital
    layer that is about to close as a whole.

    Source: Guo et al. 2022, Algorithm 1, lines 6-11, eq. 7 [guo2022dnal].
    Differs: a vital layer is held at its floor of open gates (``hold_floors``).
    """
    deltas = delta_schedule(config.arch_epochs, config.delta_form, config.delta_max)
    floors = collapse_floors(net, data.image_shape, config.floor)
    trained = list(arch_parameters(net))
    if not config.freeze_classifier:
        heads = [m for m in net.modules() if isinstance(m, nn.Linear | nn.BatchNorm1d)]
        trained += [parameter for head in heads for parameter in head.parameters()]
    set_gates(net, mode="soft", threshold=config.threshold)
    with torch.no_grad():
        for s in arch_parameters(net):
            s.zero_()
    optimizer = _sgd(trained, config, weight_decay=0)
    optimizer.register_step_post_hook(lambda *_: hold_floors(net, floors, 10 / config.delta_max))
    with only_training(net, trained):
        rows = _epochs(
            "arch_stage",
            net,
            data,
            config,
            optimizer,
            constant(config.arch_lr),
            before_epoch=lambda epoch: set_gates(net, delta=deltas[epoch - 1]),
            price=lambda: config.gate_price * open_gates(net, config.objective),
            bn_mode=config.bn_mode,
            measure=lambda: _gates_now(net, data, config),
            **loop,
        )
        for row in rows:
            yield row
            yield from _collapse_warnings(row, floors)


def fine_tune(net: nn.Module, data: ImageSet, config: SearchConfig, **loop: Any) -> Iterator[Row]:
    """Stage 3: train all weights of the pruned net, learning rate along a cosine. Changes ``net``.

    Source: Guo et al. 2022, Algorithm 1, lines 12-13 [guo2022dnal].
    """
    optimizer = _sgd(net.parameters(), config, config.weight_decay)
    lr = cosine(config.fine_tune_lr)
    yield from _epochs("fine_tune", net, data, config, optimizer, lr, **loop)


def dense_baseline(
    net: nn.Module, data: ImageSet, config: SearchConfig, **loop: Any
) -> Iterator[Row]:
    """The dense net trained on as long as stages 2 and 3 take, as stage 3 does. Changes ``net``."""
    set_gates(net, mode="off")
    with only_training(net, weight_parameters(net)):
        optimizer = _sgd(weight_parameters(net), config, config.weight_decay)
        lr = cosine(config.fine_tune_lr)
        yield from _epochs("baseline", net, data, config, optimizer, lr, **loop)


def _sgd(
    parameters: Iterable[nn.Parameter], config: SearchConfig, weight_decay: float
) -> torch.optim.Optimizer:
    return torch.optim.SGD(
        parameters, lr=0.0, momentum=config.momentum, weight_decay=weight_decay, foreach=True
    )


def _epochs(
    stage: str,
    net: nn.Module,
    data: ImageSet,
    config: SearchConfig,
    optimizer: torch.optim.Optimizer,
    lr: Callable[[float], float],
    folder: RunFolder | None = None,
    progress: Progress | None = None,
    measure: Callable[[], Row] | None = None,
    **fit_arguments: Any,
) -> Iterator[Row]:
    """The epochs of one stage, from the last checkpoint on, as rows of a record."""
    first = folder.restore(stage, net, optimizer) + 1 if folder else 1
    rows = fit(
        net,
        data,
        optimizer,
        config.epochs(stage),
        lr,
        first_epoch=first,
        batch=config.batch,
        seed=f"{config.seed}/{stage}",
        augmented=_augmentation(config),
        reset_momentum=config.reset_momentum,
        progress=(lambda it, text: progress(it, f"{stage} {text}")) if progress else None,
        **_numerics(data, config),
        **fit_arguments,
    )
    for row in rows:
        row = {"kind": "epoch", "stage": stage} | row | (measure() if measure else {})
        yield row
        if folder:
            folder.checkpoint(stage, row["epoch"], net, optimizer)


def _augmentation(config: SearchConfig) -> Callable | None:
    if config.crop == 0 and not config.flip:
        return None
    return partial(augment, pad=config.crop, flip=config.flip)


def _numerics(data: ImageSet, config: SearchConfig) -> dict[str, Any]:
    """Precision and memory layout, as ``fit`` and ``evaluate`` take them."""
    device = data.train.images.device
    dtype = pick_dtype(config.precision, device)
    return {"dtype": dtype, "channels_last": config.channels_last}


# --- watching the gates, and keeping the network alive ---------------------------------------


def _gates_now(net: nn.Module, data: ImageSet, config: SearchConfig) -> Row:
    """What an architecture epoch adds to its row."""
    layers = gate_report(net)
    total = sum(row["channels"] for row in layers.values())
    shares = [row["histogram"] for row in layers.values()]
    histogram = [sum(counts) for counts in zip(*shares, strict=True)]
    set_gates(net, mode="hard")
    hard = evaluate(net, data.val, data, **_numerics(data, config))
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


# --- the whole run ---------------------------------------------------------------------------


def load_data(config: SearchConfig) -> ImageSet:
    """The data set of a config, train and val on its device. Raises ValueError as ``data`` does."""
    device = pick_device(config.device)
    match config.data:
        case "digits":
            data = digits(seed=config.seed, val=config.val)
        case "toy":
            data = toy_images(seed=config.seed, val=config.val, image_shape=(3, 32, 32))
        case "cifar10":
            root = config.data_dir or os.environ.get("DNAL_DATA") or "data/cifar10"
            given = bool(config.data_dir or os.environ.get("DNAL_DATA"))
            data = cifar10(root, download=not given, seed=config.seed, val=config.val)
    if config.batch > len(data.train):
        raise ValueError(f"got batch {config.batch}; need at most {len(data.train)} (train images)")
    return dataclasses.replace(data, train=data.train.to(device), val=data.val.to(device))


def build(config: SearchConfig, data: ImageSet) -> nn.Module:
    """The dense network of a config, without gates, from the config's seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return MODELS[config.model](num_classes=data.num_classes, width=config.width)


def _placed(net: nn.Module, config: SearchConfig) -> nn.Module:
    """The net on the config's device, its filters in the config's memory layout."""
    layout = torch.channels_last if config.channels_last else torch.contiguous_format
    return net.to(config.device).to(memory_format=layout)  # type: ignore[call-overload]


def run(
    config: SearchConfig,
    out: str | Path,
    progress: Progress | None = None,
    on_row: Callable[[Row], None] | None = None,
) -> Row:
    """The whole sequential optimisation in the folder ``out``; returns the result row.

    Writes ``record.jsonl`` (see ``runlog``), one checkpoint a stage, ``pruned.safetensors`` (before
    fine-tuning) and ``small.safetensors``. A folder that holds the same run is resumed after its
    last finished epoch; a finished run is only read. ``progress(steps, text)`` wraps the steps of
    each epoch; ``on_row`` sees every row as it is written. The test set is opened once, at the end.

    Raises: ValueError for data or a device that is not there, or a folder that holds another run.
    """
    data = load_data(config)
    dense = _placed(build(config, data), config)
    folder = RunFolder(out, config, data, on_row)
    if folder.result:
        return folder.result
    loop: dict[str, Any] = {"folder": folder, "progress": progress}
    net = add_gates(dense, config.order)

    folder.log(weight_stage(net, data, config, **loop))
    nets = {"weight_stage": copy.deepcopy(net)}
    if config.baseline:
        nets["baseline"] = copy.deepcopy(net)
        folder.log(dense_baseline(nets["baseline"], data, config, **loop))
    folder.log(arch_stage(net, data, config, **loop))
    reopened = keep_alive(net, collapse_floors(net, data.image_shape, config.floor))
    set_gates(net, mode="hard")
    small = _pruned_once(net, data, config, folder, reopened)
    nets |= {"hard": net, "pruned": copy.deepcopy(small.module)}
    folder.log(fine_tune(small.module, data, config, **loop))
    save(small, folder.path / "small.safetensors")
    nets["fine_tuned"] = small.module
    return folder.write("result", **_test_once(nets, dense, small, data, config, folder))


def _pruned_once(
    net: nn.Module,
    data: ImageSet,
    config: SearchConfig,
    folder: RunFolder,
    reopened: dict[str, int],
) -> Pruned:
    """The pruned net, read back if an earlier session of this run has cut it already."""
    path = folder.path / "pruned.safetensors"
    if not (path.exists() and folder.has("prune")):
        gap = max(row["gap"] for row in gate_report(net).values())
        small = prune(net, data.image_shape, config.residual)
        save(small, path)
        layers = small.report.layers
        folder.write(
            "prune",
            **small.spec["cost"],
            channels={row["layer"]: {k: row[k] for k in row if k != "fates"} for row in layers},
            residual=config.residual,
            certificate=small.certificate,
            gap=gap,
            reopened=reopened,
            notes=small.report.notes,
            walls=small.report.walls,
        )
    small = load(path, MODELS[config.model])
    small.module = _placed(small.module, config)
    return small


def _test_once(
    nets: dict[str, nn.Module],
    dense: nn.Module,
    small: Pruned,
    data: ImageSet,
    config: SearchConfig,
    folder: RunFolder,
) -> Row:
    """Open the test set, measure every net on it, and time dense against pruned."""
    test = data.test.to(data.train.images.device)
    accuracy = {
        name: evaluate(net, test, data, **_numerics(data, config)) for name, net in nets.items()
    }
    before, after = small.spec["cost"]["dense"], small.spec["cost"]["pruned"]
    times = latency_pair(dense, small.module, data.image_shape, batch=1)
    seconds = folder.seconds()
    return {
        "test_images": len(test),
        "dense_is": "baseline" if config.baseline else "weight_stage",
        "dense_accuracy": accuracy["baseline" if config.baseline else "weight_stage"],
        **{f"{name}_accuracy": value for name, value in accuracy.items() if name != "baseline"},
        "params": [before["params"], after["params"]],
        "macs": [before["macs"], after["macs"]],
        "params_ratio": before["params"] / after["params"],
        "macs_ratio": before["macs"] / after["macs"],
        "latency_s": dict(zip(("dense", "pruned"), map(vars, times), strict=True)) | {"batch": 1},
        "seconds": seconds | {"total": sum(seconds.values())},
    }
