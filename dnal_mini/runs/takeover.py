"""Finished stages of another run that a new run takes over, instead of training them again."""

from pathlib import Path
from typing import Any

from dnal_mini.config import SearchConfig
from dnal_mini.refused import Refused
from dnal_mini.runs import runlog
from dnal_mini.runs.checkpoint import load_state, write_whole
from dnal_mini.runs.identity import check_made_of
from dnal_mini.runs.reopen import differing, settings_in
from dnal_mini.runs.runlog import Row


def differences(folder: Path, config: SearchConfig) -> dict[str, tuple[Any, Any]]:
    """Settings of the run in ``folder`` that differ, by name: (theirs, ours); no means.

    A setting that is newer than the run counts as its default there.
    Raises: ValueError for settings that no version can read.
    """
    return differing(settings_in(folder), config)


def takeable(source: Path, config: SearchConfig, about: Row) -> list[str]:
    """Names of the finished stages of another run that this run would repeat exactly.

    Raises: ValueError if not even the first is one, with the settings that differ, or if it was
    trained on other images or began with another net, as ``about`` tells ours.
    """
    try:
        differ, theirs = set(differences(source, config)), settings_in(source).stages()
    except ValueError as error:
        raise Refused(f"got weights_from {source} ({error}); need a run's folder") from error
    table = {stage.name: stage for stage in theirs}
    same: dict[str, set[str]] = {"": set()}  # by stage: what differs there or in one before it
    taken: list[str] = []
    for stage in config.stages()[:-1]:
        own = table[stage.name].settings if stage.name in table else {*differ, "method"}
        same[stage.name] = same[stage.after] | (differ & (stage.settings | own))
        path = source / f"{stage.name}.pt"
        done = load_state(path)["epoch"] if path.exists() else -1  # 0 epochs may be all there are
        if not same[stage.name] and stage.name in table and done == stage.epochs:
            taken.append(stage.name)
        elif not stage.after:
            why = ", ".join(sorted(same[stage.name])) or "it is not finished"
            raise Refused(f"got weights_from {source} with another stage 1: {why}; train anew")
    check_made_of(source, about)
    return taken


def take_over(source: Path, part: Path, record: runlog.RunLog, taken: list[str]) -> None:
    """Copy finished stages of another run, and what its record says of them."""
    (origin, *_) = runlog.read(source / runlog.FILE_NAME)
    made = {key: origin[key] for key in ("commit", "versions", "device", "created")}
    record.append("taken_over", stages=taken, source=source.name, **made)
    for stage in taken:
        write_whole(part / f"{stage}.pt", (source / f"{stage}.pt").read_bytes())
        for row in runlog.epochs(source / runlog.FILE_NAME):
            if row["stage"] == stage:
                record.append(**row | {"taken_over": True})
