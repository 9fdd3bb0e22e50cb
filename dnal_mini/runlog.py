"""Run records: one JSON object per line, one file per run, and the tables made from them.

For writing a record while a run goes on, reading it back, and printing its results.
Not for checkpoints: a record holds numbers and words, no weights. Read ``read`` first.
"""

import json
import math
import os
import platform
import subprocess
import textwrap
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import asdict, is_dataclass
from datetime import UTC, datetime
from importlib import import_module, metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas

Row = dict[str, Any]

FORMAT = 1
FILE_NAME = "record.jsonl"
COLUMNS_OF_A_SCREEN = 80


def plain(value: Any) -> Any:
    """The value in JSON's own types; tensors and arrays become lists, NaN and infinity None.

    Raises: ValueError for an object that JSON has no word for.
    """
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int | float) and type(value) in (int, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))
    if hasattr(value, "tolist"):  # torch tensors, numpy arrays and scalars
        return plain(value.tolist())
    kind = type(value).__name__
    raise ValueError(f"got a {kind} for a record; need numbers, words, lists or dicts; do convert")


class RunLog:
    """A record that rows are appended to; every row is on the disk when ``append`` returns."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def append(self, kind: str, **fields: Any) -> Row:
        """Write one row and return it as it will be read back.

        A last line that an earlier crash has cut is removed first, so that it never ends up in
        the middle of the file.
        Raises: ValueError for a value that JSON has no word for; nothing is written then.
        """
        row = {"kind": kind} | {name: plain(value) for name, value in fields.items()}
        line = json.dumps(row, allow_nan=False) + "\n"
        self._mend()
        with self.path.open("ab") as file:
            file.write(line.encode())
            file.flush()
            os.fsync(file.fileno())
        return row

    def _mend(self) -> None:
        """Drop a cut last line; end a whole last line that only lacks its line break."""
        if not self.path.exists() or self.path.stat().st_size == 0:
            return
        with self.path.open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            if file.read(1) == b"\n":
                return
            file.seek(0)
            text = file.read()
            last = text.rpartition(b"\n")[2]
            if _parsed(last) is None:
                file.truncate(len(text) - len(last))
            else:
                file.write(b"\n")


def _parsed(line: bytes) -> Row | None:
    """The row that a line holds, or None if it holds no row."""
    try:
        row = json.loads(line)
    except ValueError:  # JSONDecodeError and UnicodeDecodeError both are
        return None
    return row if isinstance(row, dict) and isinstance(row.get("kind"), str) else None


def read(path: str | Path) -> list[Row]:
    """All rows of a record (a file, or the folder of a run), in the order of writing.

    A last line without its end is what a crash leaves: it is dropped with a warning.
    Raises: FileNotFoundError if there is none; ValueError for a line that is no row, or a record
    of another format.
    """
    path = Path(path)
    if path.is_dir():
        path = path / FILE_NAME
    if not path.is_file():
        raise FileNotFoundError(
            f"got no run record at {path}; need a folder that dnal run has written, or its "
            f"{FILE_NAME}; do check the path"
        )
    *lines, last = path.read_bytes().split(b"\n")  # last: empty, unless the file was cut
    rows = []
    for number, line in enumerate(lines, start=1):
        row = _parsed(line)
        if row is None:
            raise ValueError(
                f"got no JSON row in line {number} of {path}; need one row per line; do restore "
                "the file, or start the run again in a new folder"
            )
        rows.append(row)
    if last:
        row = _parsed(last)
        if row is None:
            warnings.warn(
                f"{path}: line {len(lines) + 1} is cut short, dropped it; do check the disk if no "
                "run was stopped while it wrote",
                stacklevel=2,
            )
        else:
            rows.append(row)
    if rows and rows[0].get("format", FORMAT) != FORMAT:
        raise ValueError(
            f"got record format {rows[0]['format']} in {path}; need format {FORMAT}; do use the "
            "version of dnal_mini that wrote it"
        )
    return rows


def _rows(rows_or_path: list[Row] | str | Path) -> list[Row]:
    return rows_or_path if isinstance(rows_or_path, list) else read(rows_or_path)


def epochs(rows_or_path: list[Row] | str | Path) -> list[Row]:
    """The epoch rows; of rows for the same stage and epoch (after a resume) only the last."""
    latest: dict[tuple[str, int], Row] = {}
    for row in _rows(rows_or_path):
        if row["kind"] == "epoch":
            latest[row["stage"], row["epoch"]] = row
    return list(latest.values())


def table(rows_or_path: list[Row] | str | Path, kind: str = "epoch") -> "pandas.DataFrame":
    """Rows of one kind as a table, one column per field; lists and dicts stay in their cells."""
    import pandas

    rows = _rows(rows_or_path)
    chosen = epochs(rows) if kind == "epoch" else [row for row in rows if row["kind"] == kind]
    return pandas.DataFrame(chosen)


# What a run was made with -----------------------------------------------------------------------


def describe_run(device: str = "cpu") -> Row:
    """Versions, commit, device and time of writing: what a reader needs to repeat a run."""
    commit, dirty = _commit()
    return {
        "versions": versions(),
        "commit": commit,
        "dirty": dirty,
        "device": _device(device),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def versions() -> dict[str, str | None]:
    """Installed versions, read from the packages' metadata: nothing is imported for it."""
    found = {
        "python": platform.python_version(),
        "dnal_mini": import_module("dnal_mini").__version__,
    }
    for name in ("torch", "torchvision", "numpy"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def _commit() -> tuple[str | None, bool | None]:
    """Commit of the package's checkout, and whether the package differs from it.

    (None, None) for an installed package: a repository that merely contains the environment does
    not track this file.
    """
    here = Path(__file__).resolve()

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here.parent), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
        return done.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", here.name)
        return git("rev-parse", "HEAD"), bool(git("status", "--porcelain", "--", "."))
    except (OSError, subprocess.SubprocessError):
        return None, None


def _device(device: str) -> Row:
    """Type and name of the device, threads that torch computes with, cores of the machine."""
    import torch

    chosen = torch.device(device)
    name = torch.cuda.get_device_name(chosen) if chosen.type == "cuda" else _processor()
    counts = {"threads": torch.get_num_threads(), "cpu_count": os.cpu_count()}
    return {"type": chosen.type, "name": name, **counts}


def _processor() -> str:
    """The processor's own name where the system tells it, else its family."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


# Results ----------------------------------------------------------------------------------------


def summary(rows_or_path: list[Row] | str | Path) -> Row:
    """What a results table needs of one record, flat.

    ``finished`` tells whether the run has its result; without one, ``stage``, ``epoch`` and
    ``epochs`` tell how far it came and the results are None. Accuracies are on the test set, in
    [0, 1]. ``macs_kept``, ``params_kept``: share of the dense network, in (0, 1]. ``speedup``:
    median latency of the dense network over that of the pruned one.
    Raises: ValueError if the record does not begin with the row of its run.
    """
    rows = _rows(rows_or_path)
    if not rows or rows[0]["kind"] != "run":
        raise ValueError(
            f"got a record of {len(rows)} rows without the row of its run; need a first row of "
            "kind 'run'; do start the run again in a new folder"
        )
    run, config = rows[0], rows[0].get("config", {})
    last = (epochs(rows) or [{}])[-1]
    result = next((row for row in reversed(rows) if row["kind"] == "result"), {})
    found = {key: config.get(key) for key in ("name", "model", "seed", "gate_price")}
    found |= {key: last.get(key) for key in ("stage", "epoch", "epochs")}
    found |= {"finished": bool(result), "device": run.get("device"), "commit": run.get("commit")}
    found |= {key: result.get(key) for key in ("dense_is", "test_images", "seconds")}
    found |= {"gate_price": result.get("gate_price", config.get("gate_price"))}  # if it was found
    for net in ("dense", "weight_stage", "hard", "pruned", "fine_tuned"):
        found[f"{net}_accuracy"] = result.get(f"{net}_accuracy")
    for unit in ("params", "macs"):
        dense, pruned = result.get(unit, (None, None))
        found |= {f"{unit}_dense": dense, f"{unit}_pruned": pruned}
        found[f"{unit}_kept"] = _ratio(pruned, dense)
    times = result.get("latency_s", {})
    dense, pruned = (times.get(net, {}).get("median_s") for net in ("dense", "pruned"))
    found |= {"latency_dense_s": dense, "latency_pruned_s": pruned}
    return found | {"latency_batch": times.get("batch"), "speedup": _ratio(dense, pruned)}


def _ratio(top: float | None, bottom: float | None) -> float | None:
    return top / bottom if top is not None and bottom else None


def format_table(
    head: Sequence[Sequence[str]], body: Iterable[Sequence[str]], markdown: bool = False
) -> str:
    """Cells as aligned text, or as a Markdown table; first column to the left, others right.

    ``head`` holds one or two lines; Markdown joins them into one.
    """
    body = list(body)
    if markdown:
        titles = [" ".join(part for part in parts if part) for parts in zip(*head, strict=True)]
        lines = [titles, [":--", *["--:"] * (len(titles) - 1)], *body]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)
    lines = [*head, *body]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    gap = " " if sum(widths) + 2 * (len(widths) - 1) > COLUMNS_OF_A_SCREEN else "  "
    return "\n".join(
        gap.join(
            cell.rjust(width) if index else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def shown(value: float | None, form: str, unit: str = "", scale: float = 1) -> str:
    """A number for a table cell; a dash where there is none."""
    return "-" if value is None else format(value * scale, form) + unit


RESULTS_HEAD = (
    ("", "gate", "", "dense", "pruned", "tuned", "MACs", "MACs", "params", "faster", "run"),
    ("recipe", "price", "seed", "%", "%", "%", "%", "M", "M", "times", "min"),
)


def results_table(paths: Iterable[str | Path | list[Row]], markdown: bool = True) -> str:
    """One line per finished record, most MACs first; then a line for each unfinished one.

    dense, pruned, tuned: test accuracy of the dense network, of the pruned one, and of the pruned
    one after fine-tuning. MACs and params: of the pruned network, as share of the dense one and
    in millions. gate price: the one found, where the run was asked for a share of the MACs.
    """
    found = [summary(path) for path in paths]
    done = sorted((s for s in found if s["finished"]), key=lambda s: -s["macs_pruned"])
    text = format_table(RESULTS_HEAD, [_result_cells(s) for s in done], markdown) if done else ""
    bullet = "- " if markdown else ""
    left = "\n".join(bullet + _unfinished(s) for s in found if not s["finished"])
    return "\n\n".join(part for part in (text, left) if part)


def _result_cells(found: Row) -> list[str]:
    """The cells under ``RESULTS_HEAD``."""
    nets = ("dense", "pruned", "fine_tuned")
    return [
        str(found["name"]),
        shown(found["gate_price"], ".4g"),
        str(found["seed"]),
        *(shown(found[f"{net}_accuracy"], ".2f", scale=100) for net in nets),
        shown(found["macs_kept"], ".1f", scale=100),
        shown(found["macs_pruned"], ".2f", scale=1e-6),
        shown(found["params_pruned"], ".2f", scale=1e-6),
        shown(found["speedup"], ".2f"),
        shown((found["seconds"] or {}).get("total"), ".1f", scale=1 / 60),
    ]


def _unfinished(found: Row) -> str:
    place = f"{found['stage']}, epoch {found['epoch']}" if found["stage"] else "no epoch yet"
    label = f"{found['name']}, gate price {shown(found['gate_price'], 'g')}, seed {found['seed']}"
    return f"{label}: not finished ({place})"


def final_table(rows_or_path: list[Row] | str | Path, markdown: bool = False) -> str:
    """The results of one run: accuracy, params, MACs and latency of the dense and pruned network.

    An unfinished run gives the one line that tells how far it came.
    """
    found = summary(rows_or_path)
    if not found["finished"]:
        return _unfinished(found)
    nets = ("dense", "pruned", "pruned")  # fine-tuning changes the weights, not the size
    accuracies = [
        shown(found[f"{net}_accuracy"], ".2%") for net in ("dense", "pruned", "fine_tuned")
    ]
    body = [["test accuracy", *accuracies, ""]]
    for title, key in (("parameters", "params"), ("MACs of one image", "macs")):
        ratio = shown(_ratio(1, found[f"{key}_kept"]), ".2f", "x fewer")
        body += [[title, *(shown(found[f"{key}_{net}"], ",") for net in nets), ratio]]
    times = (shown(found[f"latency_{net}_s"], ".3f", " ms", 1e3) for net in nets)
    speedup = shown(found["speedup"], ".2f", "x faster")
    body += [[f"latency, batch {found['latency_batch']}", *times, speedup]]
    head = [["", "dense", "pruned", "fine-tuned", "ratio"]]
    return f"{_caption(found)}\n\n{format_table(head, body, markdown)}"


def _caption(found: Row) -> str:
    """What was run, where, and how long each stage took, in lines of one screen."""
    device, commit = found["device"] or {}, found["commit"] or "unknown"
    seconds = {key: value for key, value in (found["seconds"] or {}).items() if value}
    dense = {"baseline": "; the dense network is trained on as long", None: ""}
    stage_1 = shown(found["weight_stage_accuracy"], ".2%")
    before = f"after the weight stage {stage_1}, " if found["dense_is"] else ""
    sentences = (
        f"{found['name']}: {found['model']}, gate price {shown(found['gate_price'], 'g')}, "
        f"seed {found['seed']}, commit {commit[:10]}.",
        f"On {device.get('name')}, {device.get('threads')} threads: "
        + ", ".join(f"{stage} {value:.0f} s" for stage, value in seconds.items())
        + ".",
        f"Test accuracy {before}with hard gates {shown(found['hard_accuracy'], '.2%')}"
        f"{dense.get(found['dense_is'], '; the dense network is that of the weight stage')}.",
    )
    return "\n".join(textwrap.fill(line, COLUMNS_OF_A_SCREEN) for line in sentences)


# Epochs -----------------------------------------------------------------------------------------

EPOCH_FIELDS = (  # title, field, format
    ("delta", "delta", ".4g"),
    ("loss", "loss", ".4f"),
    ("train", "train_accuracy", ".1%"),
    ("val", "val_accuracy", ".1%"),
    ("hard", "hard_val_accuracy", ".1%"),
    ("kept", "kept", ".1%"),
    ("undecided", "undecided", ".1%"),
    ("seconds", "seconds", ".1f"),
)


def epoch_line(row: Row) -> str:
    """One epoch on one line: stage, epoch, and those of the chief figures that the row has."""
    parts = [f"{row['stage']} {row['epoch']}/{row['epochs']}"]
    parts += [
        f"{title} {shown(row[field], form)}"
        for title, field, form in EPOCH_FIELDS
        if field in row and title in ("delta", "loss", "val", "kept", "seconds")
    ]
    return "  ".join(parts)


def epochs_table(rows_or_path: list[Row] | str | Path, markdown: bool = False) -> str:
    """One line per finished epoch; a dash where a stage has no such figure."""
    found = epochs(rows_or_path)
    fields = [entry for entry in EPOCH_FIELDS if any(entry[1] in row for row in found)]
    body = [
        [
            f"{row['stage']} {row['epoch']}/{row['epochs']}",
            *(shown(row.get(field), form) for _, field, form in fields),
        ]
        for row in found
    ]
    return format_table([["stage", *(title for title, _, _ in fields)]], body, markdown)
