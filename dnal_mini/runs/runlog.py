"""Run records: one JSON object per line, one file per run.

For writing a record while a run goes on and reading it back. Not for checkpoints: a record holds
numbers and words, no weights. Read ``read`` first; ``tables`` prints what records hold. Each line
ends with ``sum``, a checksum of its row; lines of older versions have none.
"""

import hashlib
import json
import math
import os
import warnings
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas

from dnal_mini.config import upgraded
from dnal_mini.refused import Refused, need_path, shown
from dnal_mini.runs.rows import need_fields, wrong_field
from dnal_mini.training.stage import Row

FORMAT = 2


FILE_NAME = "record.jsonl"


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
    raise Refused(f"got a {kind} for a record; need numbers, words, lists or dicts; do convert")


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
        line = json.dumps(row | {"sum": _sum(row)}, allow_nan=False) + "\n"
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
        row = json.loads(line, parse_constant=_no_number)
    except (ValueError, RecursionError):  # JSONDecodeError and UnicodeDecodeError both are
        return None
    return row if isinstance(row, dict) and isinstance(row.get("kind"), str) else None


def _no_number(word: str) -> None:
    """NaN and Infinity: ``plain`` writes neither. Raises: ValueError."""
    raise Refused(f"got {word}; need a number")


def _sum(row: Row) -> str:
    """Eight hex digits that change with anything in a row."""
    return hashlib.sha256(json.dumps(row).encode()).hexdigest()[:8]


def _check_sums(rows: list[Row], path: Path) -> None:
    """Take the checksums out of the rows. Raises: ValueError for one that is wrong or missing."""
    begun = False
    for number, row in enumerate(rows, start=1):
        told = row.pop("sum", None)
        if (told is not None or begun) and told != _sum(row):
            raise Refused(
                f"got another checksum than was written in line {number} of {path}; need every row "
                "as it was written; do restore the file, or start the run again in a new folder"
            )
        begun = begun or told is not None


def read(path: str | Path) -> list[Row]:
    """All rows of a record (a file, or the folder of a run), in the order of writing.

    A last line without its end is what a crash leaves: it is dropped with a warning. The config of
    an older record is given in today's words (``config.upgraded``).
    Raises: FileNotFoundError if there is none; ValueError for a line that is no row or no longer
    the one that was written, or a record of another format.
    """
    path = need_path(path, "record")
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
            raise Refused(
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
    _check_sums(rows, path)
    first = rows[0] if rows else {}
    if first.get("format", FORMAT) not in range(1, FORMAT + 1):
        raise Refused(
            f"got record format {first['format']} in {path}; need format 1 to {FORMAT}; do use the "
            "version of dnal_mini that wrote it"
        )
    if isinstance(first.get("config"), dict):
        first["config"] = upgraded(first["config"])
    for number, row in enumerate(rows, start=1):
        if name := wrong_field(row):
            raise Refused(
                f"got {name} {shown(row.get(name))} in line {number} of {path}; need what dnal run "
                "writes there; do restore the file, or start the run again in a new folder"
            )
    return rows


def rows_of(rows_or_path: list[Row] | str | Path) -> list[Row]:
    if not isinstance(rows_or_path, list):
        return read(rows_or_path)
    for row in rows_or_path:
        if not isinstance(row, dict) or not isinstance(row.get("kind"), str):
            raise Refused(f"got row {shown(row)}; need a dict with its kind; do read() a record")
    return rows_or_path


def epochs(rows_or_path: list[Row] | str | Path) -> list[Row]:
    """The epoch rows; of rows for the same stage and epoch (after a resume) only the last."""
    latest: dict[tuple[str, int], Row] = {}
    for row in rows_of(rows_or_path):
        if row["kind"] == "epoch":
            need_fields(row, "stage", "epoch")
            latest[row["stage"], row["epoch"]] = row
    return list(latest.values())


def table(rows_or_path: list[Row] | str | Path, kind: str = "epoch") -> "pandas.DataFrame":
    """Rows of one kind as a table, one column per field; lists and dicts stay in their cells."""
    import pandas

    rows = rows_of(rows_or_path)
    chosen = epochs(rows) if kind == "epoch" else [row for row in rows if row["kind"] == kind]
    return pandas.DataFrame(chosen)
