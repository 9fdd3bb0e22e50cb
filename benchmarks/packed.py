"""Many jobs side by side in processes, the best first, until all are done or the time is up.

``pack`` is the idea. A process is forked from one that has imported everything but has not touched
the GPU, so that it starts at once. Whatever ends a job that has not failed (the time, a signal, the
death of this process) lets it end its step and save, and the next call goes on from there.
"""

import contextlib
import math
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from jobs import Job, Place, carried_out

from dnal_mini.refused import Refused
from dnal_mini.runs.runlog import Row
from dnal_mini.runs.signals import POLITE, terminable

FORKS = sys.platform == "linux"
CONTEXT: Any = multiprocessing.get_context("forkserver" if FORKS else "spawn")
if FORKS:  # its server starts anew: it finds modules where the environment says
    here = Path(__file__).parent
    paths = [str(here), str(here.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)
    CONTEXT.set_forkserver_preload(["jobs", "torch.export._trace", "torch._dynamo"])
MEMORY = "out of memory"  # why a job ended that may fit beside fewer
Told = Callable[[Row], None]
Worth = Callable[[Job], float]


@dataclass(frozen=True)
class Means:
    """What a call may use: processes at a time, threads of each, and when its time is up.

    ``until``: of ``time.monotonic()``. A process that was asked to stop has ``saved_s`` to end its
    step and save.
    """

    at_a_time: int
    threads: int = 1
    until: float = math.inf
    saved_s: float = 20.0


@dataclass
class Outcome:
    """What became of the jobs of one call: keys, with the reason for those that failed."""

    done: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)


@dataclass
class _Pack:
    """The state of ``pack``: what waits, what runs."""

    every: dict[str, Job]
    place: Place
    todo: list[Job]
    running: dict[Connection, tuple[Job, BaseProcess, float]] = field(default_factory=dict)
    ready: set[str] = field(default_factory=set)  # parents whose stages are there to be taken over
    outcome: Outcome = field(default_factory=Outcome)


def pack(
    jobs: Sequence[Job],
    every: dict[str, Job],
    place: Place,
    means: Means,
    *,
    worth: Worth = lambda job: 0.0,
    tell: Told = lambda row: None,
    act: Callable[..., Any] = carried_out,
) -> Outcome:
    """Do all jobs that have no record, and what they need, as far as the ``means`` allow.

    Of those whose parents are there the one of the highest ``worth`` comes first, else the order
    stays. A parent whose record is there and whose folder is not trains its stages again. A job
    that fails stops no other; those that need it fail with it. One that finds no memory waits for
    fewer at a time. ``tell`` gets a row for each job that ends.

    Raises: KeyboardInterrupt on SIGINT or SIGTERM, when all have saved.
    """
    state = _Pack(every, place, _wanted(jobs, every, place))
    limit = means.at_a_time
    with terminable():  # SIGTERM, too, comes as KeyboardInterrupt
        try:
            while (state.todo or state.running) and time.monotonic() < means.until:
                _start(state, limit, means.threads, worth, act)
                if not state.running:  # what they need has left no record
                    break
                patience = min(means.until - time.monotonic(), 3600.0)
                for pipe in wait(list(state.running), max(0.0, patience)):
                    job, reason, seconds = _ended(state, pipe)
                    if reason == MEMORY and state.running:
                        limit = len(state.running)
                        state.todo.insert(0, job)
                        tell({"kind": "fewer", "job": job.key, "jobs": limit, "why": reason})
                    elif reason:
                        _fail(state, job, reason, tell)
                    else:
                        state.ready.add(job.key)
                        state.outcome.done.append(job.key)
                        tell({"kind": "done", "job": job.key, "seconds": round(seconds, 1)})
        finally:
            state.outcome.left = [job.key for job in state.todo]
            state.outcome.left += [job.key for job, *_ in state.running.values()]
            _stop(state, means.saved_s)
    return state.outcome


def _wanted(jobs: Iterable[Job], every: dict[str, Job], place: Place) -> list[Job]:
    """The jobs without a record, and what they need: whole, or the stages alone that are gone."""
    todo = {job.key: job for job in jobs if place.record(job) is None}
    asked = list(todo.values())
    for job in asked:
        for key in {job.parent, job.like} - {"", *todo}:
            need = every[key]
            if place.record(need) is not None:
                if key != job.parent or _has_stages(place, need):
                    continue
                if not need.config.method.trains_from_start:
                    need = replace(need, kind="weights")
            todo[key] = need
            asked.append(need)
    return list(todo.values())


def _has_stages(place: Place, job: Job) -> bool:
    """True if a job that has a record has left its first stage here, too."""
    first = job.config.stages()[0].name
    return place.record(job) is not None and (place.runs / job.key / f"{first}.pt").exists()


def _start(state: _Pack, limit: int, threads: int, worth: Worth, act: Callable[..., Any]) -> None:
    """Start jobs whose parents are there, the best first, while there is room."""

    def can(job: Job) -> bool:
        parent, like = state.every.get(job.parent), state.every.get(job.like)
        there = parent is None or parent.key in state.ready or _has_stages(state.place, parent)
        return there and (like is None or state.place.record(like) is not None)

    while len(state.running) < limit:
        ready = [job for job in state.todo if can(job)]
        if not ready:
            return
        job = max(ready, key=worth)  # the first of equals
        state.todo.remove(job)
        ours, theirs = CONTEXT.Pipe(duplex=False)
        arguments = (theirs, act, job, state.place, state.every, threads)
        process = CONTEXT.Process(target=_child, args=arguments)
        process.start()
        theirs.close()
        state.running[ours] = (job, process, time.monotonic())


def _ended(state: _Pack, pipe: Connection) -> tuple[Job, str, float]:
    """The job whose process has said something or died, why it failed ("" if not), its seconds."""
    job, process, began = state.running.pop(pipe)
    try:
        reason = pipe.recv()
    except EOFError:
        process.join()
        reason = f"its process ended with code {process.exitcode}"
        if FORKS and process.exitcode == -signal.SIGKILL and state.running:
            reason = MEMORY  # as a rule the system does so for want of it
    pipe.close()
    process.join()
    return job, reason, time.monotonic() - began


def _fail(state: _Pack, job: Job, reason: str, tell: Told) -> None:
    """Note a failed job and, with it, all that need it."""
    state.outcome.failed[job.key] = reason
    tell({"kind": "failed", "job": job.key, "reason": reason})
    while needs := [other for other in state.todo if job.key in (other.parent, other.like)]:
        state.todo.remove(needs[0])
        _fail(state, needs[0], f"not started: {job.key} failed", tell)


def _stop(state: _Pack, saved_s: float) -> None:
    """Let every process end its step and save; those that do not are killed."""
    processes = [process for _, process, _ in state.running.values()]
    for process in processes:
        with contextlib.suppress(OSError, TypeError):  # it has ended by itself
            os.kill(process.pid or 0, POLITE) if process.is_alive() else None
    end = time.monotonic() + saved_s
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
        process.kill()
        process.join()


def _child(
    pipe: Connection, act: Callable[..., Any], job: Job, place: Place, every: dict[str, Job],
    threads: int,
) -> None:  # fmt: skip
    """What a process does: its job, and then one word to the process that started it."""
    if FORKS:
        os.setsid()  # a terminal's Ctrl-C reaches the first process alone, which passes it on
    torch.set_num_threads(threads)
    parent = multiprocessing.parent_process()

    def watched(steps: Iterable, _: str) -> Iterable:
        for step in steps:
            if parent and not parent.is_alive():
                os.kill(os.getpid(), POLITE)  # nobody is there any more: end the step and save
            yield step

    reason = ""
    try:
        act(job, place, every, progress=watched)
    except KeyboardInterrupt:
        os._exit(130)
    except Exception as error:  # whatever it is, the other jobs go on
        reason = reason_of(error)
    with contextlib.suppress(OSError):  # nobody is there who wants to know
        pipe.send(reason)


def reason_of(error: Exception) -> str:
    """Why a job failed, in one line; ``MEMORY`` for want of it."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "out of memory" in str(error):
        return MEMORY
    text = " ".join(str(error).split())[:400]
    told = isinstance(error, Refused | FloatingPointError)
    return text if told else f"{type(error).__name__}: {text}"
