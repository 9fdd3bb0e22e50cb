"""The stages of a run, each a function with a visible freeze that yields one row per epoch.

Read ``arch_stage`` and the method's ``work`` (``methods/dnal.py``): they are the search.
``driver.run`` strings the stages together; how long and how fast they are says ``config.stages``.
"""

from collections.abc import Generator, Iterator

from torch import nn

from dnal_mini.config import SearchConfig
from dnal_mini.data.imageset import ImageSet
from dnal_mini.gating import set_gates, weight_parameters
from dnal_mini.methods.contract import Subject
from dnal_mini.pruning.pad import padded
from dnal_mini.search.floors import collapse_floors
from dnal_mini.training.devices import from_first
from dnal_mini.training.loop import fit, only_training
from dnal_mini.training.position import Position
from dnal_mini.training.stage import Row, Session, Stage, Work

ALONE = Session()  # nobody watches, nothing is kept


def weight_stage(
    net: nn.Module, data: ImageSet, config: SearchConfig, session: Session = ALONE
) -> Iterator[Row]:
    """Stage 1: train the weights with gates off. Changes ``net``.

    Source: Guo et al. 2022, Algorithm 1, lines 1-5 [guo2022dnal].
    """
    return _weights(net, data, stage_of(config, "weight_stage"), session)


def dense_baseline(
    net: nn.Module, data: ImageSet, config: SearchConfig, session: Session = ALONE
) -> Iterator[Row]:
    """The dense net trained on after stage 1, as stage 3 trains the small one. Changes ``net``."""
    return _weights(net, data, stage_of(config, "baseline"), session)


def fine_tune(
    net: nn.Module, data: ImageSet, config: SearchConfig, session: Session = ALONE
) -> Iterator[Row]:
    """Stage 3: train all weights of the pruned net. Changes ``net``.

    Source: Guo et al. 2022, Algorithm 1, lines 12-13 [guo2022dnal].
    Differs: with ``config.pad_to`` above 1 it is run wider, with channels of zeros.
    """
    runs = padded(net, data.image_shape, config.pad_to) if config.pad_to > 1 else None
    return _weights(net, data, stage_of(config, "fine_tune"), session, runs)


def _weights(
    net: nn.Module, data: ImageSet, stage: Stage, session: Session, runs: nn.Module | None = None
) -> Iterator[Row]:
    set_gates(net, mode="off")
    work = Work(({"params": list(weight_parameters(net))},), runs=runs)
    return run_stage(net, data, stage, work, session)


def arch_stage(
    net: nn.Module, data: ImageSet, config: SearchConfig, session: Session = ALONE
) -> Generator[Row, None, None]:
    """Stage 2: freeze the weights, train the gates under a price while delta grows.

    The loss of a batch is cross-entropy + gate_price * (number of open gates, softly counted).
    Starts from s = 0. Changes ``net``: its gates, and running statistics of BatchNorm if
    ``bn_mode="batch"``. Rows also hold what the gates do; a row of kind "warning" names a vital
    layer that is about to close as a whole. With another method: that method's own stages.

    Source: Guo et al. 2022, Algorithm 1, lines 6-11, eq. 7 [guo2022dnal].
    """
    floors = collapse_floors(net, data.image_shape, config.floor)
    subject = Subject(net, data, config.seed, floors, session)
    for stage in config.method_stages():
        yield from run_stage(net, data, stage, config.method.work(stage, subject), session)


def stage_of(config: SearchConfig, name: str) -> Stage:
    """A stage of the config's table by name."""
    return next(stage for stage in config.stages() if stage.name == name)


def run_stage(
    net: nn.Module, data: ImageSet, stage: Stage, work: Work, session: Session
) -> Generator[Row, None, None]:
    """The epochs of one stage, from its last checkpoint on, as rows of a record.

    A checkpoint is written before the rows of its epoch, and holds them. Epochs that a crash has
    taken are trained again, to the same end. One that cannot be written ends every process.
    """
    folder, devices = session.folder, session.devices
    with only_training(net, work.trained()):
        optimizer = work.optimizer(stage)
        done, place, rows = folder.restore(stage.name, net, optimizer) if folder else (0, None, [])
        yield from rows

        def save(epoch: int, place: Position | None = None) -> None:
            state = (stage, epoch, net, optimizer, rows, place)
            from_first(devices, lambda: folder.checkpoint(*state))

        def keep(place: Position) -> None:
            save(place.epoch - 1, place)

        start = place or done + 1
        kept = keep if folder else None
        if folder and not stage.epochs:  # nothing to train: what others go on from is there too
            save(0)
        for row in fit(net, data, optimizer, stage, work, session, start, kept):
            measured = work.measure() if work.measure else {}
            row = {"kind": "epoch", "stage": stage.name} | row | measured
            rows = [row, *(work.remark(row) if work.remark else [])]
            last = row["epoch"] == stage.epochs
            stop = devices is None and session.stopping is not None and session.stopping()
            old = folder is not None and from_first(
                devices, lambda: folder.checkpoint_age_s() >= session.checkpoint_s
            )
            if folder and (last or stop or old or not data.train.seekable):
                save(int(row["epoch"]))
            yield from rows
            if stop and not last:
                raise KeyboardInterrupt(f"stopped after epoch {row['epoch']}")
