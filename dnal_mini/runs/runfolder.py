"""The folder of a run: its config, its record and the last checkpoints of each stage.

What makes a run resumable stands here, and nothing of the method. Read ``RunFolder`` first. Every
file is whole or absent, whenever the process is killed: it is written beside its place, forced to
the disk, and renamed; the checkpoint before the last one is kept.
"""

import errno
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from filelock import BaseFileLock, FileLock, Timeout

from dnal_mini.config import PATHS, SearchConfig
from dnal_mini.data.imageset import ImageSet
from dnal_mini.refused import Refused
from dnal_mini.runs import runlog
from dnal_mini.runs.checkpoint import Checkpoints, write_whole
from dnal_mini.runs.identity import check_made_of, images_of
from dnal_mini.runs.origin import describe_run
from dnal_mini.runs.runlog import Row
from dnal_mini.runs.takeover import differences, take_over, takeable

NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP}


class RunFolder(Checkpoints):
    """The files of one run: config, record, and the last checkpoints of each stage.

    A context: while it is open, the folder is locked and no other process can write to it.
    ``net_is``: ``identity.net_of`` a net of the user's. ``writes=False`` makes one that only
    reads, for the further processes of a run.
    Raises: ValueError if the folder holds another run or one of other images or another net, is
    not empty, is being written by another process, or cannot be written.
    """

    def __init__(
        self,
        out: str | Path,
        config: SearchConfig,
        data: ImageSet,
        on_row: Callable[[Row], None] | None = None,
        writes: bool = True,
        net_is: Row | None = None,
    ) -> None:
        super().__init__(Path(out), writes)
        self.config, self.on_row = config, on_row
        self.record = runlog.RunLog(self.path / runlog.FILE_NAME)
        self._lock: BaseFileLock | None = None
        if not writes:
            return
        if not (self.path / "config.json").exists():
            self._create(_described(config, data, net_is))
        if finished(self.path, config) is None:
            self._lock = _locked(self.path)
            try:
                self._begin(_described(config, data, net_is))
            except BaseException:
                self.close()
                raise

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Unlock the folder."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def _create(self, about: Row) -> None:
        """Make the folder as a whole, with stage 1 of another run if asked for."""
        config = self.config
        source = Path(config.weights_from)
        taken = takeable(source, config, about) if config.weights_from else []
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self.path.exists() and any(self.path.iterdir()):
                raise Refused(f"got {self.path}, which is not empty; need a new folder (--out)")
            part = Path(tempfile.mkdtemp(prefix=f".{self.path.name}.", dir=self.path.parent))
            try:
                record = runlog.RunLog(part / runlog.FILE_NAME)
                record.append("run", **about)
                if taken:
                    take_over(source, part, record, taken)
                write_whole(part / "config.json", json.dumps(config.settings(), indent=1).encode())
                part.chmod(0o777 & ~_umask())
                if os.name == "nt" and self.path.exists():
                    self.path.rmdir()  # Windows renames onto nothing only
                part.rename(self.path)  # onto nothing or an empty folder: else OSError
            finally:
                shutil.rmtree(part, ignore_errors=True)
        except OSError as error:
            raise Refused(
                f"got {self.path}, which cannot be written ({error.strerror}); need another --out"
            ) from error
        self._is_new = True

    _is_new = False

    def _begin(self, about: Row) -> None:
        """Note that the run goes on; a record that lost its first line gets it back."""
        rows = self._rows()
        if self._is_new:
            for row in rows:
                self._show(row)
        elif not rows:
            self.write("run", **about)
        else:
            check_made_of(self.path, about)
            self._note_moved()
            self.write("resume", **describe_run(self.config.device))

    def _note_moved(self) -> None:
        """Images that are the same in another place are looked for there from now on."""
        path = self.path / "config.json"
        told = json.loads(path.read_bytes())
        here = {name: getattr(self.config, name) for name in PATHS}
        moved = {name: where for name, where in here.items() if where and where != told.get(name)}
        if moved:
            write_whole(path, json.dumps(told | moved, indent=1).encode())

    def write(self, kind: str, **fields: Any) -> Row:
        """Append a row to the record and show it to ``on_row``."""
        if not self.writes:
            return {"kind": kind} | fields
        row = self.record.append(kind, **fields)
        self._show(row)
        return row

    def _show(self, row: Row) -> None:
        if self.on_row:
            self.on_row(row)

    def log(self, rows: Iterable[Row]) -> None:
        """Write every row of a stage as it comes, unless the record has it from an earlier time."""
        for row in rows:
            if self.writes and _key(row) not in map(_key, self._rows()):
                self.write(**row)

    def has(self, kind: str) -> bool:
        """True if the record holds a row of a kind."""
        return any(row["kind"] == kind for row in self._rows())

    @property
    def last(self) -> Row:
        """The last row of the record."""
        return self._rows()[-1]

    def rows(self, kind: str) -> list[Row]:
        """All rows of a kind."""
        return [row for row in self._rows() if row["kind"] == kind]

    def _rows(self) -> list[Row]:
        return runlog.read(self.record.path) if self.record.path.exists() else []

    def seconds(self) -> dict[str, float]:
        """Seconds per stage, added up over its epochs."""
        totals = dict.fromkeys((stage.name for stage in self.config.stages()), 0.0)
        for row in runlog.epochs(self.record.path):
            totals[row["stage"]] = totals.get(row["stage"], 0.0) + row["seconds"]
        return totals


def finished(out: str | Path, config: SearchConfig) -> Row | None:
    """The result of the run in a folder; None if it has none, or there is no run.

    Raises: ValueError if the folder holds a run with other settings. A setting that is newer than
    the run counts as its default there.
    """
    path = Path(out)
    if not (path / "config.json").exists():
        return None
    differ = differences(path, config)
    if differ:
        n, (theirs, ours) = min(differ.items())
        raise Refused(
            f"got {path}, which holds a run with {n}={theirs!r}, "
            f"not {ours!r}; need the same settings, or another folder (--out)"
        )
    record = path / runlog.FILE_NAME
    rows = runlog.read(record) if record.exists() else []
    return next((row for row in rows if row["kind"] == "result"), None)


def _key(row: Row) -> tuple:
    """What makes a row the same as one that a resumed run yields again."""
    return row["kind"], row.get("stage"), row.get("epoch"), row.get("text"), row.get("price_asked")


def _described(config: SearchConfig, data: ImageSet, net_is: Row | None) -> Row:
    """The first row of a record: settings without paths, images, own net, versions, device."""
    settings = config.settings()
    public = {n: Path(v).name if n in PATHS and v else v for n, v in settings.items()}
    about = describe_run(config.device)
    made_of = {"data": images_of(data), "net": net_is}
    return {"format": runlog.FORMAT, "config": public, **made_of, **about}


def _locked(folder: Path) -> BaseFileLock | None:
    """The lock of a folder for this process, until it ends, however it ends."""
    lock = FileLock(folder / "lock", timeout=0, thread_local=False)
    try:
        lock.acquire()
    except Timeout as error:
        raise Refused(
            f"got {folder}, which another process is writing; need one at a time; "
            "do wait for it, or choose another folder (--out)"
        ) from error
    except (OSError, NotImplementedError) as error:
        if getattr(error, "errno", errno.ENOSYS) not in NO_LOCKS:
            raise
        warnings.warn(
            f"got {folder}, whose file system has no locks; let one process at a time write there",
            stacklevel=2,
        )
        return None
    return lock


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
