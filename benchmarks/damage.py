"""What is left of a run after flipped bits, kills and full disks: all of it, or a word about it.

The run is the smallest that has every stage. Promises:

- flips: one bit of one file, over all files of a finished run and of one that was interrupted. Then
  every file is read, and the same call of ``run`` goes on: it ends with the weights and the record
  of the undisturbed run, or the cause is named. ``silent`` counts what differs without a word.
- kills (SIGKILL) at moments that are spread over the whole run; the same call ends with weight
  files of the same bytes.
- disks: a small file system runs full at four moments. The run says so in one line, nothing is
  half-written, and with room again the same call ends with the same bytes.

Prints one JSON line. Linux only; the disks need a mounted tmpfs: root, or ``--disk`` with an empty
small file system. Run: ``python benchmarks/damage.py``.
"""

import argparse
import contextlib
import errno
import json
import multiprocessing
import random
import shutil
import subprocess
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from dnal_mini.config import SearchConfig
from dnal_mini.refused import Refused
from dnal_mini.runs import runlog
from dnal_mini.runs.checkpoint import load_state
from dnal_mini.runs.origin import describe_run
from dnal_mini.runs.reopen import saved, settings_in
from dnal_mini.runs.runlog import Row, RunLog
from dnal_mini.search.driver import run

CONFIG = SearchConfig().replace(
    name="toy", data="toy", val=32, width=0.07, weight_epochs=2, arch_epochs=3, fine_tune_epochs=2,
    batch=16, arch_lr=5.0, gate_price=1e-3, precision="float32", channels_last=False,
    checkpoint_s=0.0,
)  # fmt: skip
FORK: Any = multiprocessing.get_context("fork")  # from this process, which has imported everything
TIMES = {"seconds", "images_per_s", "latency_s", "created", "commit", "dirty"}
NETS = ("pruned.safetensors", "small.safetensors")
STOPPED = ("arch_stage", 2)  # behind this epoch the interrupted run ends
FULL = {  # moment: the row after which the disk is full
    "at the start": None,
    "weights": ("weight_stage", 1),
    "gates": ("arch_stage", 2),
    "fine-tuning": ("fine_tune", 1),
}


class Stop(Exception):
    """Ends a run behind a row."""


def place(row: Row) -> tuple[str, int] | None:
    return (row["stage"], row["epoch"]) if row["kind"] == "epoch" else None


def interrupt(row: Row) -> None:
    if place(row) == STOPPED:
        raise Stop


def rows(folder: Path) -> list[Row]:
    """The record without times and without the rows that tell of going on."""
    found = [row for row in runlog.read(folder) if row["kind"] != "resume"]
    return [{name: row[name] for name in row if name not in TIMES} for row in found]


def contents(folder: Path) -> dict[str, Callable[[], Any]]:
    """What a run leaves, by name, as the package reads it: record, nets, last checkpoints."""
    nets = {n: lambda n=n: saved(folder / n).module.state_dict() for n in NETS}
    stages = {s.name: folder / f"{s.name}.pt" for s in CONFIG.stages()}
    states = {n: lambda p=p: load_state(p)["net"] for n, p in stages.items()}
    return {"record": lambda: rows(folder), **nets, **states}


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, dict) and one.keys() == other.keys():
        return all(torch.equal(value, other[name]) for name, value in one.items())
    return bool(one == other)


def same(one: Path, other: Path) -> bool:
    """Whether two finished runs have the same record, weights, and bytes of the nets' files."""
    a, b = contents(one), contents(other)
    files = all((one / name).read_bytes() == (other / name).read_bytes() for name in NETS)
    return files and all(equal(a[name](), b[name]()) for name in a)


def read_all(folder: Path) -> None:
    """Open everything in a folder as the package does. Raises: Refused for what is damaged."""
    settings_in(folder)
    runlog.read(folder)
    for path in sorted(folder.iterdir()):
        if path.suffix == ".pt":
            load_state(path)
        elif path.suffix == ".safetensors":
            saved(path)


# Flips --------------------------------------------------------------------------------------------


def flip(path: Path, draw: random.Random) -> None:
    """Another value of one bit of a file."""
    content = bytearray(path.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def fate(folder: Path, whole: Path, go_on: Callable[[Path], object]) -> str:
    """What became of a damaged run after the same call: "unchanged", or who has told the damage.

    "refused": the call ends with the cause. "warned": it told the damage and found the same end.
    "told": it had no use for the damaged file, which is refused where it is read. "silent", which
    must not be: something is read that is not the undisturbed run's. Another error: "crashed".
    """
    told = "unchanged"
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        try:
            go_on(folder)
        except Refused as error:
            return "crashed" if "\n" in str(error) else "refused"
        except Exception:
            return "crashed"
        theirs = contents(whole)
        for name, read in contents(folder).items():
            try:
                if not equal(read(), theirs[name]()):
                    return "silent"
            except Refused:
                told = "told"
    return "warned" if heard else told


def flips(whole: Path, stopped: Path, count: int, work: Path) -> dict[str, dict[str, int]]:
    """Fates by folder: every file has its turn, the folders alternate."""
    draw, found = random.Random(0), {"finished": Counter(), "interrupted": Counter()}  # of fates
    for number in range(count):
        kind, source = (("finished", whole), ("interrupted", stopped))[number % 2]
        files = sorted(path.name for path in source.iterdir() if path.stat().st_size)
        folder = Path(shutil.copytree(source, work / "flipped"))
        flip(folder / files[number // 2 % len(files)], draw)
        found[kind][fate(folder, whole, lambda out: run(CONFIG, out))] += 1
        shutil.rmtree(folder)
    return {kind: dict(counts) for kind, counts in found.items()}


# Kills --------------------------------------------------------------------------------------------


def started(folder: Path) -> Any:
    """The run in a process of its own, which says nothing."""
    child = FORK.Process(target=run, args=(CONFIG, folder))
    child.start()
    return child


def killed_at(folder: Path, moment: float, lines: int, draw: random.Random) -> bool:
    """Start a run and kill it when its record has come to a share of its lines; False if it ended.

    The wait behind the line is drawn, so that the kill falls into steps, files and cuts as well.
    """
    child, record = started(folder), folder / runlog.FILE_NAME
    while child.exitcode is None:
        there = record.read_bytes().count(b"\n") if record.exists() else 0
        if there >= moment * lines:
            break
        time.sleep(0.005)
    time.sleep(draw.uniform(0, 0.3))
    child.kill()
    child.join()
    return child.exitcode != 0


def kills(whole: Path, count: int, work: Path) -> Row:
    """Kill, go on to the end, compare; where the record stood, by stage."""
    draw, reached, identical = random.Random(1), Counter(), 0
    lines, folder = len(runlog.read(whole)), work / "killed"
    for number in range(count):
        while not killed_at(folder, (number + draw.random()) / count, lines, draw):
            shutil.rmtree(folder)  # it was faster
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a line that was cut short
            last = runlog.read(folder)[-1] if folder.exists() else {}
        reached[last.get("stage", last.get("kind", "nothing"))] += 1
        child = started(folder)
        child.join()
        identical += child.exitcode == 0 and same(folder, whole)
        shutil.rmtree(folder)
    return {"count": count, "identical": identical, "last_row": dict(reached)}


# Disks --------------------------------------------------------------------------------------------


@contextlib.contextmanager
def small_disk(given: Path | None, work: Path) -> Iterator[Path | None]:
    """A small file system: the one that was given, or a tmpfs that is mounted for it, or None."""
    if given:
        yield given
        return
    mounted = work / "disk"
    mounted.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(mounted)]
    if subprocess.run(command, check=False, capture_output=True).returncode:
        yield None
        return
    try:
        yield mounted
    finally:
        subprocess.run(["umount", str(mounted)], check=True)


def fill(path: Path) -> None:
    """Write a file until no byte fits any more."""
    with path.open("ab", buffering=0) as file:
        for size in (1 << 20, 4096, 1):
            try:
                while True:
                    file.write(b"\0" * size)
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise


def disk_fate(disk: Path, moment: str, whole: Path) -> dict[str, Any]:
    """What a run says and leaves when the disk is full at a moment, and whether it goes on."""
    folder, filler = disk / "run", disk / "filler"
    if FULL[moment] is None:
        fill(filler)

    def on_row(row: Row) -> None:
        if FULL[moment] is not None and place(row) == FULL[moment]:
            fill(filler)

    said = "nothing"
    try:
        run(CONFIG, folder, on_row=on_row)
    except Refused as error:
        said = str(error)
    except OSError as error:
        said = f"OSError: {error}"
    one_line = said.startswith("got ") and "\n" not in said and "No space left" in said
    left = [path.name for path in disk.rglob("*.part")]
    if folder.exists():
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            read_all(folder)
    filler.unlink()
    run(CONFIG, folder)
    ends = same(folder, whole)
    shutil.rmtree(folder)
    found = {"one_line": one_line, "half_written": left, "goes_on": ends}
    return found if one_line else found | {"said": said}


# The row ------------------------------------------------------------------------------------------


def measure(chosen: argparse.Namespace, work: Path) -> Row:
    """The row: an undisturbed and an interrupted run, and what befell copies of them."""
    whole, stopped = work / "whole", work / "stopped"
    run(CONFIG, whole)
    with contextlib.suppress(Stop):
        run(CONFIG, stopped, on_row=interrupt)
    fates = flips(whole, stopped, chosen.flips, work)
    killed = kills(whole, chosen.kills, work)
    with small_disk(chosen.disk, work) as disk:
        disks = {m: disk_fate(disk, m, whole) for m in FULL} if disk and chosen.disks else None
    bad = sum(counts.get(name, 0) for counts in fates.values() for name in ("silent", "crashed"))
    kept = all(
        d["one_line"] and d["goes_on"] and not d["half_written"] for d in (disks or {}).values()
    )
    return {
        "benchmark": "damage", **describe_run("cpu"), "config": CONFIG.settings(),
        "flips": chosen.flips, "fates": fates, "silent_or_crashed": bad, "kills": killed,
        "full_disks": disks, "reached": not bad and killed["identical"] == chosen.kills and kept,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--flips", type=int, default=60, help="single bits, one a time")
    parser.add_argument("--kills", type=int, default=12)
    parser.add_argument("--no-disks", dest="disks", action="store_false")
    parser.add_argument("--disk", type=Path, help="an empty small file system (about 12 MB)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="record that the line is appended to")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    with tempfile.TemporaryDirectory() as work:
        row = measure(chosen, Path(work))
    if chosen.out:
        chosen.out.parent.mkdir(parents=True, exist_ok=True)
        RunLog(chosen.out).append("benchmark", **row)
    print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
