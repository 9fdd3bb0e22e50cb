"""The sequential optimisation: train weights, train gates, prune, fine-tune, test once.

``run`` strings the stages of ``stages`` together in a folder that can be resumed: read it first.
"""

import contextlib
import copy
import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dnal_mini.config import SearchConfig
from dnal_mini.data.imageset import ImageSet, carve
from dnal_mini.data.sources import cifar10, digits, toy_images
from dnal_mini.gating import add_gates, gate_report, set_gates
from dnal_mini.measure.latency import latency_pair
from dnal_mini.methods.controls import rank_by
from dnal_mini.models import MODELS, restart
from dnal_mini.pruning.netfile import load, save
from dnal_mini.pruning.pruner import Pruned, prune
from dnal_mini.runs.runfolder import RunFolder, finished
from dnal_mini.runs.signals import asked_to_stop
from dnal_mini.search.budget import meet_target, share_of_macs
from dnal_mini.search.floors import collapse_floors, keep_alive
from dnal_mini.search.price import MAX_PROBES, best_probe, is_hit, next_price
from dnal_mini.search.stages import (
    Row,
    arch_stage,
    dense_baseline,
    fine_tune,
    joint_stage,
    numerics,
    weight_stage,
)
from dnal_mini.training.devices import from_first, pick_device, processes, start_processes
from dnal_mini.training.loop import Progress, evaluate, steps_of

if TYPE_CHECKING:
    from lightning_fabric import Fabric

DECIDED = 0.02  # a probe ends once fewer gates than this share are between 0.1 and 0.9


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
    if config.train_images:
        _, used = carve(data.train.labels, config.train_images, config.seed)
        data = dataclasses.replace(data, train=data.train.take(used))
    steps_of(len(data.train), config.batch, processes(config.devices, config.num_nodes))
    return _on(device, data)


def _on(device: torch.device, data: ImageSet) -> ImageSet:
    return dataclasses.replace(data, train=data.train.to(device), val=data.val.to(device))


def build(config: SearchConfig, data: ImageSet) -> nn.Module:
    """The dense network of a config, without gates, from the config's seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return MODELS[config.model](num_classes=data.num_classes, width=config.width)


def _placed(net: nn.Module, config: SearchConfig, data: ImageSet) -> nn.Module:
    """The net on the data's device, its filters in the config's memory layout."""
    layout = torch.channels_last if config.channels_last else torch.contiguous_format
    return net.to(data.train.images.device).to(memory_format=layout)  # type: ignore[call-overload]


def run(
    config: SearchConfig,
    out: str | Path,
    progress: Progress | None = None,
    on_row: Callable[[Row], None] | None = None,
    until: str | None = None,
) -> Row:
    """The whole sequential optimisation in the folder ``out``; returns the result row.

    Writes ``record.jsonl`` (see ``runlog``), the last two checkpoints of each stage,
    ``pruned.safetensors`` (before fine-tuning) and ``small.safetensors``. A folder that holds the
    same run is resumed where it was stopped; a finished run is only read. ``progress(steps, text)``
    wraps the steps of each epoch; ``on_row`` sees every row as it is written. ``until="weights"``
    stops after stage 1 and the baseline, which runs at other prices can take over
    (``weights_from``), ``until="gates"`` before the cut. The test set is opened once, at the end.

    SIGINT (Ctrl-C) and SIGTERM let the present step end, save, and raise KeyboardInterrupt.
    With ``config.devices`` or ``num_nodes`` above 1, or under torchrun, many processes run this
    together; the folder must then be on a file system that all of them see.

    Raises: ValueError for data or a device that is not there, or a folder that holds another run
    or is being written; FloatingPointError with a diagnosis if a loss is not finite.
    """
    if result := finished(out, config):
        return result
    data = load_data(config)
    fabric = start_processes(
        pick_device(config.device), config.devices, config.num_nodes, config.strategy
    )
    if fabric:
        data = _on(fabric.device, data)
    if fabric and fabric.global_rank > 0:
        progress = on_row = None
    dense = _placed(build(config, data), config, data)
    with _opened(out, config, data, on_row, fabric) as folder, asked_to_stop() as stopping:
        loop = {"folder": folder, "progress": progress, "stopping": stopping, "fabric": fabric}
        try:
            return _stages(config, dense, data, loop, until)
        except FloatingPointError as error:
            folder.write("stopped", text=str(error))
            raise FloatingPointError(
                f"{error}, in a new folder; the last good checkpoint is in {folder.path}"
            ) from error


def _stages(
    config: SearchConfig, dense: nn.Module, data: ImageSet, loop: dict[str, Any], until: str | None
) -> Row:
    """The stages one after the other, each from its last checkpoint on."""
    folder: RunFolder = loop["folder"]
    net = add_gates(dense, config.order)
    nets: dict[str, nn.Module] = {}
    if config.optimisation == "joint":
        folder.log(joint_stage(net, data, config, **loop))
    else:
        folder.log(weight_stage(net, data, config, **loop))
        nets["weight_stage"] = copy.deepcopy(net)
        if config.baseline:
            nets["baseline"] = copy.deepcopy(net)
            folder.log(dense_baseline(nets["baseline"], data, config, **loop))
        if until == "weights":
            return folder.last
        config = _decide_gates(net, data, config, loop)
    if until == "gates":
        return folder.last
    shift = meet_target(net, data.image_shape, config) if config.target_macs else 0.0
    reopened = keep_alive(net, collapse_floors(net, data.image_shape, config.floor))
    set_gates(net, mode="hard")
    small = _pruned_once(net, data, config, loop, {"reopened": reopened, "shift": shift})
    nets |= {"hard": net, "pruned": copy.deepcopy(small.module)}
    if config.tuned_from == "scratch":
        restart(small.module, config.seed)
    folder.log(fine_tune(small.module, data, config, **loop))
    if folder.writes:
        save(small, folder.path / "small.safetensors")
    nets["fine_tuned"] = small.module
    return folder.write("result", **_test_once(nets, dense, small, data, config, loop))


def _decide_gates(
    net: nn.Module, data: ImageSet, config: SearchConfig, loop: dict[str, Any]
) -> SearchConfig:
    """Stage 2, or the rule that stands in its place; returns the config with the price it took."""
    if config.gates_from != "search":
        rank_by(net, config.gates_from, config.seed)
        set_gates(net, mode="soft", delta=config.delta_max, threshold=config.threshold)
        return config
    if config.target_macs and config.target_by == "price":
        price = _price_for_target(net, data, config, loop)
        config = dataclasses.replace(config, gate_price=price)
    loop["folder"].log(arch_stage(net, data, config, **loop))
    return config


def _price_for_target(
    net: nn.Module, data: ImageSet, config: SearchConfig, loop: dict[str, Any]
) -> float:
    """The gate price whose architecture stage ends near ``config.target_macs``.

    A probe is an architecture stage that starts from the same weights with a price of its own and
    ends as soon as its gates are decided, well before delta is at its end. ``net`` is untouched.
    """
    folder: RunFolder = loop["folder"]
    probes = [(row["price_asked"], row["macs_share"]) for row in folder.rows("probe")]
    hits = [share for _, share in probes if is_hit(share, config.target_macs)]
    while not hits and len(probes) < MAX_PROBES:
        price = next_price(probes, config.target_macs, config.gate_price or 1e-4)
        name, trial = f"probe_{len(probes) + 1}", copy.deepcopy(net)
        epochs = 0
        asked = dataclasses.replace(config, gate_price=price)
        with contextlib.closing(arch_stage(trial, data, asked, name, **loop)) as rows:
            for row in rows:
                folder.log([row])
                epochs = row["epoch"]
                if row.get("undecided", 1.0) <= DECIDED:
                    break
        share = share_of_macs(trial, data.image_shape, config)
        folder.write("probe", price_asked=price, macs_share=share, epochs_of_search=epochs)
        folder.forget(name)
        probes.append((price, share))
        hits = [share for _, share in probes if is_hit(share, config.target_macs)]
    price, share = best_probe(probes, config.target_macs)
    if not hits:
        text = f"no price found for {config.target_macs:g} of the MACs; nearest: {share:.3g}"
        folder.log([{"kind": "warning", "stage": "arch_stage", "epoch": 0, "text": text}])
    return price


def _opened(
    out: str | Path,
    config: SearchConfig,
    data: ImageSet,
    on_row: Callable[[Row], None] | None,
    fabric: "Fabric | None",
) -> RunFolder:
    """The run's folder: made, checked and locked by the first process, read by the others."""
    folders: list[RunFolder] = []
    from_first(fabric, lambda: folders.append(RunFolder(out, config, data, on_row)))
    return folders[0] if folders else RunFolder(out, config, data, writes=False)


def _pruned_once(
    net: nn.Module,
    data: ImageSet,
    config: SearchConfig,
    loop: dict[str, Any],
    changed: Row,
) -> Pruned:
    """The pruned net, read back if an earlier session of this run has cut it already."""
    folder: RunFolder = loop["folder"]
    path = folder.path / "pruned.safetensors"

    def cut() -> None:
        if path.exists() and folder.has("prune"):
            return
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
            **changed,
            notes=small.report.notes,
            walls=small.report.walls,
        )

    from_first(loop["fabric"], cut)
    small = load(path, MODELS[config.model])
    small.module = _placed(small.module, config, data)
    return small


def _test_once(
    nets: dict[str, nn.Module],
    dense: nn.Module,
    small: Pruned,
    data: ImageSet,
    config: SearchConfig,
    loop: dict[str, Any],
) -> Row:
    """Open the test set, measure every net on it, and time dense against pruned."""
    test = data.test.to(data.train.images.device)
    accuracy = {
        name: evaluate(net, test, data, fabric=loop["fabric"], **numerics(data, config))
        for name, net in nets.items()
    }
    dense_is = next((name for name in ("baseline", "weight_stage") if name in nets), None)
    before, after = small.spec["cost"]["dense"], small.spec["cost"]["pruned"]
    times = from_first(
        loop["fabric"], lambda: latency_pair(dense, small.module, data.image_shape, batch=1)
    )
    seconds = loop["folder"].seconds()
    return {
        "test_images": len(test),
        "dense_is": dense_is,
        "dense_accuracy": accuracy[dense_is] if dense_is else None,
        **{f"{name}_accuracy": value for name, value in accuracy.items() if name != "baseline"},
        "params": [before["params"], after["params"]],
        "macs": [before["macs"], after["macs"]],
        **({"gate_price": config.gate_price} if config.target_macs else {}),
        "params_ratio": before["params"] / after["params"],
        "macs_ratio": before["macs"] / after["macs"],
        "latency_s": dict(zip(("dense", "pruned"), map(vars, times), strict=True)) | {"batch": 1},
        "seconds": seconds | {"total": sum(seconds.values())},
    }
