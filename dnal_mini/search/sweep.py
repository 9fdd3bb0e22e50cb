"""Many runs that share their first stages: trained once a seed, then forked for every price.

``sweep`` is the whole idea, ``plan`` says which runs there are; below stand the three places where
runs go on: this process, several processes, a Ray cluster. Not a scheduler: who runs what on which
machine is the operating system's business, or Ray's.
"""

import contextlib
import json
import os
import subprocess
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import torch

from dnal_mini.config import MEANS, Budget, SearchConfig, need_config, upgraded
from dnal_mini.methods import METHODS
from dnal_mini.refused import Refused, need_folder, need_name, need_number, need_word, shown
from dnal_mini.runs import runlog
from dnal_mini.runs.signals import OWN_GROUP, POLITE, terminable
from dnal_mini.search import driver
from dnal_mini.search.answer import answer
from dnal_mini.search.inputs import settled

Row = runlog.Row
OnRow = Callable[[str, Row], None]
Start = Callable[["Job"], "Future[str]"]
Place = Callable[[int, OnRow | None], AbstractContextManager[Start]]
FILE_NAME = "sweep.json"
MOST_JOBS = 1024  # processes that one machine may be asked for


FOLDERS = {"gate_price": "price", "budget.macs": "target"}  # others: as they are called


FREE = {
    "seed",
    "budget",
    *(m.strength for m in METHODS.values()),
    *MEANS,
}  # fields in which the runs of one sweep may differ


@dataclass(frozen=True)
class Job:
    """One run, in ``folder``; the jobs in ``then`` start from what it leaves there."""

    folder: Path
    config: SearchConfig
    until: Literal["weights"] | None = None
    then: tuple["Job", ...] = ()

    @property
    def name(self) -> str:
        """The folder as seen from the sweep's, e.g. seed0/price0.001."""
        return "/".join(self.folder.parts[-2:])


def sweep(
    config: SearchConfig,
    values: Sequence[float],
    seeds: Sequence[int],
    out: str | Path,
    *,
    field: str = "gate_price",
    jobs: int = 1,
    ray: str | None = None,
    on_row: OnRow | None = None,
) -> dict[str, str]:
    """Run every value of a field with every seed; returns why runs failed, by their names.

    Stage 1 and the baseline are trained once a seed, in ``out/seed0/shared``; each run starts from
    them in a folder like ``out/seed0/price0.001``. The same call again goes on: finished runs are
    left alone, interrupted ones resumed, failed ones tried again, new values and seeds added.
    ``field``: the strength of the method, such as "gate_price", or "budget.macs".

    ``jobs``: runs at a time, from 2 on in processes of their own, each with its share of this
    process's torch threads (another number of threads may change the last bits of results).
    ``ray``: address of a Ray cluster, "" for $RAY_ADDRESS or else a cluster on this machine; its
    machines must see ``out`` and the data under the same paths, and ``jobs`` runs share a GPU.
    ``on_row(name, row)`` sees all rows, and one of kind "failed" (``reason``) for a run that fails;
    it is called where the run is: on Ray's machines, and in threads for several processes.

    Raises: ValueError for values, seeds or jobs that make no sweep, and for a folder that holds
    another sweep or something else. A failed run does not raise, and does not stop the others.
    KeyboardInterrupt (Ctrl-C, SIGTERM) goes through when the runs have ended a step and saved.
    """
    out = need_folder(out, "out")
    _check_call(config, values, seeds, field, jobs)
    if ray is not None:
        _ray()  # told before anything is written
    asked = plan(config, values, seeds, out.absolute(), field)
    _remember(out, config, [run for job in asked for run in job.then or (job,)])
    todo = deque(left for job in asked if (left := _unfinished(job)))
    failed: dict[str, str] = {}
    running: dict[Future[str], Job] = {}
    at_a_time = jobs
    place: Place = _here if jobs == 1 else _processes
    if ray is not None:  # which holds back what does not fit
        at_a_time, place = len(seeds) * len(values), partial(_on_ray, ray)
    with terminable(), place(jobs, on_row) as start:
        while todo or running:
            while todo and len(running) < at_a_time:
                job = todo.popleft()
                running[start(job)] = job
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                job = running.pop(future)
                if reason := _reason(future):
                    failed[job.name] = reason
                    failed |= {run.name: f"not started: {job.name} failed" for run in job.then}
                    if on_row:
                        on_row(job.name, {"kind": "failed", "reason": reason})
                else:
                    todo.extendleft(reversed(job.then))  # a seed's runs before the next seed
    return failed


def _check_call(
    config: SearchConfig, values: Sequence[float], seeds: Sequence[int], field: str, jobs: int
) -> None:
    """Raises: ValueError for arguments of another kind, or runs of several devices each."""
    need_config(config)
    strengths = {method.strength for method in METHODS.values() if method.strength}
    need_word("field", field, [*strengths, *(f"budget.{each.name}" for each in fields(Budget))])
    for name, given, whole in ((field, values, False), ("seed", seeds, True)):
        if not isinstance(given, Sequence) or isinstance(given, str):
            raise Refused(f"got {name} {shown(given)}; need a list")
        for value in given:
            need_number(name, value, whole=whole)
    need_number("jobs", jobs, 1, MOST_JOBS, whole=True)
    if config.devices * config.num_nodes > 1:
        raise Refused(
            f"got {config.devices} devices on {config.num_nodes} machines for each run of a sweep; "
            "need 1; do fill them with several runs: --jobs or --ray"
        )


def plan(
    config: SearchConfig, values: Sequence[float], seeds: Sequence[int], out: Path, field: str
) -> list[Job]:
    """A job for each seed that trains what its runs share, and behind it a job for each value.

    Runs whose method trains the weights itself share nothing: a job for each.
    Raises: ValueError for no values or seeds, one that comes twice, or one out of its range.
    """
    for name, given in ((field, values), ("seed", seeds)):
        twice = [value for k, value in enumerate(given) if value in given[:k]]
        if twice or not given:
            got = f"{name} {twice[0]} twice" if twice else f"no {name}"
            raise Refused(f"got {got}; need one or more, all different; do name each once")
    jobs: list[Job] = []
    part, _, metric = field.partition(".")
    changes: list[dict[str, Any]] = [
        {part: Budget(**{metric: float(v)}) if metric else float(v)} for v in values
    ]
    names = [f"{FOLDERS.get(field, field)}{float(value)!r}" for value in values]
    enough = Budget(macs=0.5) if config.method.needs_budget else None  # for what is shared: any
    for seed in seeds:
        folder, first = out / f"seed{seed}", config.replace(seed=seed, budget=enough)
        alone = config.method.trains_from_start
        forked = first if alone else first.replace(weights_from=str(folder / "shared"))
        forks = tuple(
            Job(folder / name, forked.replace(**new))
            for name, new in zip(names, changes, strict=True)
        )
        jobs += forks if alone else [Job(folder / "shared", first, "weights", forks)]
    return jobs


def runs(folder: str | Path) -> list[Path]:
    """The folders of all runs that were asked of the sweep in a folder; some may not be there yet.

    Raises: ValueError if ``sweep.json`` cannot be read.
    """
    return [Path(folder) / name for name in _asked(Path(folder))["runs"]]


def _asked(out: Path) -> dict[str, Any]:
    try:
        if not (out / FILE_NAME).is_file():
            raise Refused("no regular file")
        asked = json.loads((out / FILE_NAME).read_bytes())
        for name in asked["runs"]:
            for part in name.split("/"):
                need_name("run", part)
        return {"config": dict(asked["config"]), "runs": list(asked["runs"])}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise Refused(
            f"got {out / FILE_NAME}, which cannot be read ({error}); need what dnal sweep wrote; "
            "do remove it and type the sweep's command again"
        ) from None


def _remember(out: Path, config: SearchConfig, asked: list[Job]) -> None:
    """Add the runs to ``sweep.json``, if the folder is free or holds a sweep of this config."""
    settings = {name: value for name, value in config.settings().items() if name not in FREE}
    default = SearchConfig().settings()  # of fields that are newer than the sweep
    path, known = out / FILE_NAME, []
    if path.exists():
        before = _asked(out)
        known, begun = before["runs"], any(out.glob("seed*/*/config.json"))
        theirs = upgraded(before["config"])
        for name in sorted({*settings, *theirs} - FREE):
            old, new = theirs.get(name, default.get(name)), settings.get(name)
            if begun and old != new:
                raise Refused(
                    f"got {out}, which holds a sweep with {name}={old!r}, not {new!r}; need the "
                    "same settings; do choose another folder (--out)"
                )
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise Refused(f"got {out}, which holds no sweep; need a new folder; do choose --out")
    out.mkdir(parents=True, exist_ok=True)
    names = list(dict.fromkeys([*known, *(job.name for job in asked)]))
    part = path.with_suffix(".part")
    part.write_text(json.dumps({"config": settings, "runs": names}, indent=1))
    part.replace(path)


def _unfinished(job: Job) -> Job | None:
    """The job without those behind it that have their result already; None if nothing is left."""

    def done(run: Job) -> bool:
        with contextlib.suppress(OSError, ValueError):  # a bad record: the run itself says so
            return answer(settled(run.config), run.folder) is not None
        return False

    left = tuple(run for run in job.then if not done(run))
    if not (left if job.then else not done(job)):
        return None
    return replace(job, then=left)


def _work(job: Job, on_row: OnRow | None = None) -> str:
    """Run or resume a job; returns why it failed, in one line, or "". An interrupt goes through."""
    show = (lambda row: on_row(job.name, row)) if on_row else None
    try:
        driver.run(job.config, job.folder, on_row=show, until=job.until)
    except Exception as error:  # whatever it is, the other runs go on
        if not isinstance(error, Refused | FloatingPointError):  # a fault: its place is wanted too
            traceback.print_exc()
        return _line(error)
    return ""


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split())[:300]
    told = isinstance(error, Refused | FloatingPointError)
    return text if told else f"{type(error).__name__}: {text}"


def _reason(future: "Future[str]") -> str:
    """Why a job failed; what it raised counts too, such as a lost machine."""
    error = future.exception()
    if isinstance(error, Exception):
        return _line(error)
    return future.result()


def _threads(jobs: int) -> int:
    """The threads of this process, shared by ``jobs``."""
    return max(1, torch.get_num_threads() // jobs)


@contextmanager
def _here(jobs: int, on_row: OnRow | None) -> Iterator[Start]:
    """One job after the other in this process."""

    def start(job: Job) -> "Future[str]":
        future: Future[str] = Future()
        future.set_result(_work(job, on_row))
        return future

    yield start


@contextmanager
def _processes(jobs: int, on_row: OnRow | None) -> Iterator[Start]:
    """Every job in a process of its own; on an interrupt each ends its step, saves and stops.

    A process has its own session: Ctrl-C in a terminal reaches this process alone, which passes it
    on once. A process whose parent has died stops at its next row.
    """
    live: list[subprocess.Popen] = []
    lock, stopping = threading.Lock(), threading.Event()

    def work(job: Job) -> str:
        given: Row = {"folder": str(job.folder), "until": job.until, "threads": _threads(jobs)}
        given["config"] = job.config.settings()
        command = [sys.executable, "-c", "from dnal_mini.search import sweep; sweep._child()"]
        with lock:
            if stopping.is_set():
                return "interrupted"
            process = subprocess.Popen(
                [*command, json.dumps(given)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                text=True,
                **OWN_GROUP,  # a terminal's Ctrl-C does not reach it
            )
            live.append(process)
        with process:
            row: Row = {}
            for line in process.stdout or ():
                row = json.loads(line)
                if on_row and row["kind"] != "end":
                    on_row(job.name, row)
        with lock:
            live.remove(process)
        done = row.get("kind") == "end"
        return row["reason"] if done else f"its process ended with code {process.returncode}"

    with ThreadPoolExecutor(jobs) as pool:
        try:
            yield lambda job: pool.submit(work, job)
        except BaseException:
            with lock:
                stopping.set()
                for process in live:
                    process.send_signal(POLITE)
            raise


def _child() -> None:
    """What a process of ``_processes`` does: one job from argv, its rows as JSON to stdout."""
    rows = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what else is printed must not come between the rows
    given = json.loads(sys.argv[1])
    torch.set_num_threads(given["threads"])
    job = Job(Path(given["folder"]), SearchConfig.of(given["config"]), given["until"])

    def tell(row: Row) -> None:
        try:
            print(json.dumps(row), file=rows, flush=True)
        except OSError:  # the parent is gone: a broken pipe, or what Windows calls one
            raise KeyboardInterrupt from None

    try:
        tell({"kind": "end", "reason": _work(job, lambda _, row: tell(row))})
    except KeyboardInterrupt:
        os._exit(130)  # without a word: whoever stopped it says so


def _ray() -> Any:
    """The package. Raises: ValueError if it is not installed."""
    try:
        return import_module("ray")
    except ImportError as error:
        raise Refused(
            f"got no package ray ({error}); need it for --ray; do pip install dnal-mini[ray]"
        ) from None


@contextmanager
def _on_ray(address: str, jobs: int, on_row: OnRow | None) -> Iterator[Start]:
    """Every job a task of a Ray cluster, which decides where it runs and repeats it if need be."""
    ray = _ray()
    ours = not ray.is_initialized()
    if ours:
        ray.init(address=address or None)
    threads, tasks = _threads(jobs), []
    where = (str(Path.cwd()), os.environ.get("DNAL_DATA"))

    def start(job: Job) -> "Future[str]":
        gpus = 1 / jobs if job.config.device.startswith("cuda") else 0
        task = ray.remote(_task).options(num_gpus=gpus, num_cpus=threads, name=job.name)
        tasks.append(task.remote(job, on_row, threads, *where))
        return tasks[-1].future()

    try:
        yield start
    except BaseException:
        for task in tasks:
            ray.cancel(task)
        raise
    finally:
        if ours:
            ray.shutdown()


def _task(job: Job, on_row: OnRow | None, threads: int, cwd: str, data: str | None) -> str:
    """A job on one of Ray's machines, which sees the same files under the same paths."""
    os.chdir(cwd)
    if data:
        os.environ["DNAL_DATA"] = data
    torch.set_num_threads(threads)
    return _work(job, on_row)
