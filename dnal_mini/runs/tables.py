"""Results of run records as text: one run, several, epoch by epoch."""

import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path

from dnal_mini.refused import Refused
from dnal_mini.runs.rows import need_fields
from dnal_mini.runs.runlog import Row, epochs, rows_of

COLUMNS_OF_A_SCREEN = 80


ASKED = ("name", "model", "seed", "method", "budget", "baseline")


def summary(rows_or_path: list[Row] | str | Path) -> Row:
    """What a results table needs of one record, flat.

    ``finished`` tells whether the run has its result; without one, ``stage``, ``epoch`` and
    ``epochs`` tell how far it came and the results are None. Accuracies are on the test set, in
    [0, 1]. ``macs_kept``, ``params_kept``: share of the dense network, in (0, 1]. ``speedup``:
    median latency of the dense network over that of the pruned one.
    Raises: ValueError if the record does not begin with the row of its run.
    """
    rows = rows_of(rows_or_path)
    if not rows or rows[0]["kind"] != "run":
        raise Refused(
            f"got a record of {len(rows)} rows without the row of its run; need a first row of "
            "kind 'run'; do start the run again in a new folder"
        )
    run, config = rows[0], rows[0].get("config", {})
    last = (epochs(rows) or [{}])[-1]
    result = next((row for row in reversed(rows) if row["kind"] == "result"), {})
    if result:
        need_fields(result, "macs", "params")
    found = {key: config.get(key) for key in ASKED}
    found |= {key: last.get(key) for key in ("stage", "epoch", "epochs")}
    found |= {"finished": bool(result), "device": run.get("device"), "commit": run.get("commit")}
    found |= {key: result.get(key) for key in ("dense_is", "test_images", "seconds")}
    price = result.get("gate_price", config.get("gate_price"))  # found, if a budget was asked for
    found["gate_price"] = price if found["method"] in (None, "dnal") else None
    for net in ("dense", "weight_stage", "hard", "pruned", "fine_tuned"):
        found[f"{net}_accuracy"] = result.get(f"{net}_accuracy")
    for unit in ("params", "macs"):
        dense, pruned = result.get(unit, (None, None))
        found |= {f"{unit}_dense": dense, f"{unit}_pruned": pruned}
        found[f"{unit}_kept"] = _ratio(pruned, dense)
    times = result.get("latency_s") or {}
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
        f"{found['name']}{_of_method(found)}",
        shown(found["gate_price"], ".4g"),
        str(found["seed"]),
        *(shown(found[f"{net}_accuracy"], ".2f", scale=100) for net in nets),
        shown(found["macs_kept"], ".1f", scale=100),
        shown(found["macs_pruned"], ".2f", scale=1e-6),
        shown(found["params_pruned"], ".2f", scale=1e-6),
        shown(found["speedup"], ".2f"),
        shown((found["seconds"] or {}).get("total"), ".1f", scale=1 / 60),
    ]


def setting(found: Row) -> str:
    """What a run was asked for, in words: its gate price, or its budget, and by which method."""
    asked = [f"{share:.0%} of the {metric}" for metric, share in (found["budget"] or {}).items()]
    price = found["gate_price"]
    return ", ".join(
        [*([] if price is None else [f"gate price {price:g}"]), *asked, *_of_method(found).split()]
    )


def _of_method(found: Row) -> str:
    return "" if found["method"] in (None, "dnal") else f" {found['method']}"


def _unfinished(found: Row) -> str:
    place = f"{found['stage']}, epoch {found['epoch']}" if found["stage"] else "no epoch yet"
    label = f"{found['name']}, {setting(found)}, seed {found['seed']}"
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
    longer = "epochs of weights" if found["baseline"] == "weight-epochs" else "epochs in all"
    dense = {"baseline": f"; the dense network is trained for as many {longer}", None: ""}
    stage_1 = shown(found["weight_stage_accuracy"], ".2%")
    before = f"after the weight stage {stage_1}, " if found["dense_is"] else ""
    sentences = (
        f"{found['name']}: {found['model']}, {setting(found)}, seed {found['seed']}, "
        f"commit {commit[:10]}.",
        f"On {device.get('name')}, {device.get('threads')} threads: "
        + ", ".join(f"{stage} {value:.0f} s" for stage, value in seconds.items())
        + ".",
        f"Test accuracy {before}with hard gates {shown(found['hard_accuracy'], '.2%')}"
        f"{dense.get(found['dense_is'], '; the dense network is that of the weight stage')}.",
    )
    return "\n".join(textwrap.fill(line, COLUMNS_OF_A_SCREEN) for line in sentences)


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
    for row in found:
        need_fields(row, "epochs")
    fields = [entry for entry in EPOCH_FIELDS if any(entry[1] in row for row in found)]
    body = [
        [
            f"{row['stage']} {row['epoch']}/{row['epochs']}",
            *(shown(row.get(field), form) for _, field, form in fields),
        ]
        for row in found
    ]
    return format_table([["stage", *(title for title, _, _ in fields)]], body, markdown)
