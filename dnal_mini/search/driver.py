"""How any method is run to a smaller network: train, let it decide, cut, fine-tune, test once.

Read ``run`` and ``_Run``. Nothing here knows a method by name: it asks for values of channels, for
widths or for an architecture (``methods/contract.py``), and treats the answer in the same way.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from dnal_mini.config import SearchConfig
from dnal_mini.data.imageset import ImageSet
from dnal_mini.figures.growing import watched
from dnal_mini.gating import add_gates, gate_report, gates
from dnal_mini.graph.copies import copied
from dnal_mini.measure.cost import cost
from dnal_mini.measure.latency import latency_pair
from dnal_mini.methods.contract import Designer, Scorer, Subject, Values, Widther
from dnal_mini.models import restart
from dnal_mini.pruning.netfile import load, save
from dnal_mini.pruning.pruner import Pruned, prune
from dnal_mini.runs.reopen import saved
from dnal_mini.runs.runfolder import RunFolder
from dnal_mini.runs.signals import asked_to_stop
from dnal_mini.search.answer import answer
from dnal_mini.search.budget import impose, nearest, share_of
from dnal_mini.search.floors import collapse_floors, keep_alive
from dnal_mini.search.inputs import Data, Inputs, check_call, inputs, on_device, placed, settled
from dnal_mini.search.price import price_for
from dnal_mini.search.stages import dense_baseline, fine_tune, run_stage, weight_stage
from dnal_mini.search.widths import architecture, built
from dnal_mini.training.devices import from_first, pick_device, start_processes
from dnal_mini.training.loop import evaluate
from dnal_mini.training.stage import Progress, Row, Session

if TYPE_CHECKING:
    from lightning_fabric import Fabric


def run(
    config: SearchConfig,
    out: str | Path,
    progress: Progress | None = None,
    on_row: Callable[[Row], None] | None = None,
    until: str | None = None,
    *,
    net: nn.Module | None = None,
    data: Data = None,
) -> Row:
    """The whole road to a smaller network in the folder ``out``; returns the result row.

    Writes ``record.jsonl`` (see ``runlog``), the last two checkpoints of each stage,
    ``pruned.safetensors`` (before fine-tuning) and ``small.safetensors``. A folder that holds the
    same run is resumed where it was stopped; a finished run is only read. ``progress(steps, text)``
    wraps the steps of each epoch; ``on_row`` sees every row as it is written; in a notebook a bar
    and a growing figure stand in for them, elsewhere nothing is shown. ``until="weights"``
    stops after stage 1 and the baseline, which runs with other settings of the method can take over
    (``weights_from``), ``until="gates"`` before the cut. The test set is opened once, at the end.

    ``net``: any network to start from, with its own weights; it is left alone (``weight_epochs=0``
    if it is trained). ``data``: an ``ImageSet``, such as ``data.sources.image_folder`` gives, or
    three DataLoaders (train, val, test), whose batches arrive normalised and augmented; such a run
    resumes at the end of an epoch. They take the place of the settings that ``inputs.settled``
    names, and are known again by what they are: others in the same folder are refused.

    SIGINT (Ctrl-C) and SIGTERM let the present step end, save, and raise KeyboardInterrupt.
    With ``config.devices`` or ``num_nodes`` above 1, or under torchrun, many processes run this
    together; the folder must then be on a file system that all of them see.

    Raises: ValueError for data or a device that is not there, or a folder that holds another run
    or is being written; FloatingPointError with a diagnosis if a loss is not finite.
    Example:
        >>> epochs = {f"{stage}_epochs": 1 for stage in ("weight", "arch", "fine_tune")}
        >>> config = dnal.recipes.digits().replace(data="toy", baseline="none", **epochs)
        >>> result = dnal.run(config, out="runs/toy")
        >>> result["macs"][1] < result["macs"][0]
        True
        >>> dnal.run(config, out="runs/toy") == result  # finished: it is only read
        True
    """
    check_call(config, out, progress, on_row, until)
    config = settled(config, net, data)
    if result := answer(config, Path(out), net, data):
        return result
    start = inputs(config, net, data)
    with watched(f"{config.name} in {out}", progress, on_row) as shown:
        return _carried_out(start, Path(out), *shown, until)


def _carried_out(
    start: Inputs,
    out: Path,
    progress: Progress | None,
    on_row: Callable[[Row], None] | None,
    until: str | None,
) -> Row:
    """The run in its processes and its folder, from its last checkpoint on."""
    config = start.config
    devices = start_processes(
        pick_device(config.device), config.devices, config.num_nodes, config.strategy
    )
    if devices:
        start = dataclasses.replace(start, data=on_device(start.data, devices.device))
    if devices and devices.global_rank > 0:
        progress = on_row = None
    with _opened(out, start, on_row, devices) as folder, asked_to_stop() as stopping:
        session = Session(folder, progress, stopping, devices, config.checkpoint_s)
        try:
            return _Run(config, start.data, session, start.net).go(until)
        except KeyboardInterrupt as stop:
            again = f"the same call of dnal.run goes on from what is saved in {folder.path}"
            raise KeyboardInterrupt(f"{str(stop) or 'interrupted'}; {again}") from None
        except FloatingPointError as error:
            folder.write("stopped", text=str(error))
            raise FloatingPointError(
                f"{error}, in a new folder; the last good checkpoint is in {folder.path}"
            ) from error


def _opened(
    out: Path,
    start: Inputs,
    on_row: Callable[[Row], None] | None,
    devices: "Fabric | None",
) -> RunFolder:
    """The run's folder: made, checked and locked by the first process, read by the others."""
    folders: list[RunFolder] = []

    def opened(writes: bool) -> RunFolder:
        return RunFolder(out, start.config, start.data, on_row, writes, start.net_is)

    from_first(devices, lambda: folders.append(opened(True)))
    return folders[0] if folders else opened(False)


@dataclass
class _Run:
    """One run: its settings, images and session, and the networks on the way, by name."""

    config: SearchConfig
    data: ImageSet
    session: Session
    dense: nn.Module
    nets: dict[str, nn.Module] = field(default_factory=dict)
    price: float | None = None  # of the method's stages, once it is known

    def __post_init__(self) -> None:
        self.folder: RunFolder = self.session.folder
        self.dense = placed(self.dense, self.config, self.data)

    def go(self, until: str | None = None) -> Row:
        """The stages one after the other, each from its last checkpoint on."""
        config, folder, around = self.config, self.folder, (self.data, self.config, self.session)
        net = add_gates(self.dense, config.order, image_shape=self.data.image_shape)
        if not config.method.trains_from_start:
            folder.log(weight_stage(net, *around))
            self.nets["weight_stage"] = copied(net)
            if config.baseline != "none":
                self.nets["baseline"] = copied(net)
                folder.log(dense_baseline(self.nets["baseline"], *around))
            if until == "weights":
                return folder.last
        subject = self._search(net)
        if until == "gates":
            return folder.last
        small = self._cut_once(self._decide(subject))
        small.module = placed(small.module, config, self.data)
        self.nets["pruned"] = copied(small.module)
        if config.tuned_from == "scratch":
            restart(small.module, config.seed)
        folder.log(fine_tune(small.module, *around))
        if folder.writes:
            save(small, folder.path / "small.safetensors")
        self.nets["fine_tuned"] = small.module
        return folder.write("result", **self._test_once(small))

    def _search(self, net: nn.Module) -> Subject:
        """The method's own stages, at the price that the budget wants; the net they leave."""
        config, shape = self.config, self.data.image_shape
        method, stages, budget = config.method, config.method_stages(), config.budget
        floors = collapse_floors(net, shape, config.floor)
        share = share_of(net, shape, budget.metric if budget else "macs", config.residual)
        wanted = budget.share if budget else None
        subject = Subject(net, self.data, config.seed, floors, self.session, wanted, share)
        if budget and method.searches_strength and stages:
            price = price_for(
                budget, method, stages, subject, lambda trial: share(self._alive(trial)[0])
            )
            stages = tuple(dataclasses.replace(stage, price=price) for stage in stages)
        self.price = stages[-1].price if stages else None
        for stage in stages:
            work = method.work(stage, subject)
            self.folder.log(run_stage(net, self.data, stage, work, self.session))
        return subject

    def _decide(self, subject: Subject) -> Callable[[], tuple[Pruned, Row]]:
        """How the method's answer becomes a small network, and a row that says how."""
        method, config, shape = self.config.method, self.config, self.data.image_shape
        if isinstance(method, Designer):
            return lambda: built(method.design(subject), config, self.data)
        if isinstance(method, Widther):
            return lambda: built(architecture(method.widths(subject), config, self.data),
                                 config, self.data)  # fmt: skip
        net, (masks, how) = subject.net, self._masks(subject)
        if any(bool((gate.s != 0).any()) for gate in gates(net).values()):
            how["gap"] = max(row["gap"] for row in gate_report(net).values())
        impose(net, masks)
        self.nets["hard"] = net
        return lambda: (prune(net, shape, config.residual), how)

    def _masks(self, subject: Subject) -> tuple[Values, Row]:
        """The channels that stay: those that are alive, or as many as the budget allows."""
        if subject.budget is None:
            masks, reopened = self._alive(subject)
            return masks, {"reopened": reopened, "shift": 0.0}
        values = self._scorer().values(subject)

        def share(masks: Values) -> float:
            return subject.share(keep_alive(masks, values, subject.floors)[0])

        masks, cut_at = nearest(values, share, subject.budget)
        masks, reopened = keep_alive(masks, values, subject.floors)
        return masks, {"reopened": reopened, "shift": -cut_at}

    def _alive(self, subject: Subject) -> tuple[Values, dict[str, int]]:
        """The channels that the method leaves, and how many were reopened for the net's life."""
        scorer = self._scorer()
        return keep_alive(scorer.alive(subject), scorer.values(subject), subject.floors)

    def _scorer(self) -> Scorer:
        assert isinstance(self.config.method, Scorer)
        return self.config.method

    def _cut_once(self, make: Callable[[], tuple[Pruned, Row]]) -> Pruned:
        """The small net, read back if an earlier session of this run has made it already."""
        path = self.folder.path / "pruned.safetensors"

        def cut() -> None:
            if path.exists() and self.folder.has("prune"):
                return
            small, how = make()
            save(small, path)
            layers = small.report.layers
            self.folder.write(
                "prune",
                **small.spec["cost"],
                channels={row["layer"]: {k: row[k] for k in row if k != "fates"} for row in layers},
                residual=self.config.residual,
                certificate=small.certificate,
                **how,
                notes=small.report.notes,
                walls=small.report.walls,
            )

        from_first(self.session.devices, cut)
        if isinstance(self.config.method, Scorer):
            return load(path, lambda: copied(self.dense))
        return saved(path, "" if isinstance(self.config.method, Designer) else self.config.model)

    def _test_once(self, small: Pruned) -> Row:
        """Open the test set, measure every net on it, and time dense against pruned."""
        data, devices, shape = self.data, self.session.devices, self.data.image_shape
        test = data.test.to(data.train.device)
        feed = self.config.stages()[-1].feed
        accuracy = {
            name: evaluate(net, test, data, feed, devices=devices)
            for name, net in self.nets.items()
        }
        dense_is = next((n for n in ("baseline", "weight_stage") if n in self.nets), None)
        before, after = cost(self.dense, shape), cost(small.module, shape)
        times = from_first(devices, lambda: latency_pair(self.dense, small.module, shape, batch=1))
        seconds, strength = self.folder.seconds(), self.config.method.strength
        return {
            "test_images": len(test),
            "dense_is": dense_is,
            "dense_accuracy": accuracy[dense_is] if dense_is else None,
            **{f"{name}_accuracy": value for name, value in accuracy.items() if name != "baseline"},
            "params": [before.params, after.params],
            "macs": [before.macs, after.macs],
            **({strength: self.price} if self.config.budget and strength else {}),
            "params_ratio": before.params / after.params,
            "macs_ratio": before.macs / after.macs,
            "latency_s": dict(zip(("dense", "pruned"), map(vars, times), strict=True))
            | {"batch": 1},
            "seconds": seconds | {"total": sum(seconds.values())},
        }
