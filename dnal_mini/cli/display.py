"""What a run shows while it goes on."""

import shlex
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TextIO

from dnal_mini.runs import runlog, tables


def show_of_several(name: str, row: runlog.Row) -> None:
    """One line on stderr for an epoch, a warning or the end of one of several runs."""
    match row["kind"]:
        case "epoch" if not row.get("taken_over"):
            line = tables.epoch_line(row)
        case "warning":
            line = f"WARNING, {row['stage']} epoch {row['epoch']}: {row['text']}"
        case "failed":
            line = f"failed: {row['reason']}"
        case "result":
            kept = row["macs"][1] / row["macs"][0]
            line = f"done, tuned {row['fine_tuned_accuracy']:.2%}, MACs kept {kept:.1%}"
        case _:
            return
    print(f"{name}: {line}", file=sys.stderr, flush=True)


def how_to_continue(out: Path) -> str:
    """How far the record in the folder has come, and the command that goes on."""
    try:
        rows = runlog.read(out)
    except OSError:
        return "interrupted before anything was written; start again with: dnal run"
    last = runlog.epochs(rows)[-1:]
    place = f"after {last[0]['stage']} epoch {last[0]['epoch']}" if last else "in the first epoch"
    return f"interrupted {place}; continue with: dnal resume {shlex.quote(str(out))}"


class Display:
    """What a run shows while it goes on: a line per epoch and, in a terminal, a bar of batches."""

    def __init__(self, stream: TextIO, title: str) -> None:
        from tqdm import tqdm

        self.stream, self.title, self.tqdm, self.latest = stream, title, tqdm, ""

    def progress(self, batches: Iterable, description: str) -> Iterable:
        """The batches under a bar, with the figures of the epoch before."""
        if not self.stream.isatty():
            return batches
        return self.tqdm(
            batches,
            description,
            file=self.stream,
            leave=False,
            postfix=self.latest,
            dynamic_ncols=True,
            bar_format="{desc} {bar} {remaining}{postfix}",
        )

    def show(self, row: runlog.Row) -> None:
        """Print the title, an epoch or a warning above the bar."""
        match row["kind"]:
            case "run" | "resume":
                line = self.title
            case "epoch":
                line = tables.epoch_line(row)
                self.latest = "  ".join(line.split("  ")[1:-1])  # without stage and seconds
            case "probe":
                (column,) = (name for name in row if name.endswith("_share"))
                share, what = row[column], column.removesuffix("_share")
                line = f"probe: price {row['price_asked']:.4g} leaves {share:.1%} of the {what}"
            case "warning":
                line = f"WARNING, {row['stage']} epoch {row['epoch']}: {row['text']}"
            case _:
                return
        self.tqdm.write(line, file=self.stream)
