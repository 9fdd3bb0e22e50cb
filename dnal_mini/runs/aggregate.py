"""Tables over seeds: mean and spread of runs that differ in nothing else, and what sharing saved.

For records of finished runs, of a sweep or not; trains nothing. Read ``by_settings`` first;
``variants`` groups runs whose files are called after what differs.
"""

import json
import statistics
import textwrap
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from dnal_mini.config import MEANS, SearchConfig
from dnal_mini.methods import METHODS
from dnal_mini.refused import Refused
from dnal_mini.runs import runlog
from dnal_mini.runs.rows import need_fields
from dnal_mini.runs.tables import COLUMNS_OF_A_SCREEN, format_table, results_table, summary

Row = runlog.Row


Record = list[Row] | str | Path


QUANTITIES = {  # title, shown with so many digits
    "fine_tuned_accuracy": ("tuned", ".2f"),
    "dense_accuracy": ("dense", ".2f"),
    "macs_kept": ("MACs", ".1f"),
    "params_kept": ("params", ".1f"),
}


HEAD = (
    ("", "gate", "", *(title for title, _ in QUANTITIES.values())),
    ("recipe", "price", "seeds", *("%" for _ in QUANTITIES)),
)


JUDGED = ("fine_tuned_accuracy", "macs", "params")  # of a result, in every table


USUAL = {"optimisation": "sequential", "method": "dnal", "tuned_from": "pruned"}


CLOSE = 0.01  # accuracy that a reader may give away for a smaller network: one point


def _finished(records: Iterable[Record]) -> Iterator[list[Row]]:
    """The rows of the finished runs."""
    for record in records:
        rows = record if isinstance(record, list) else runlog.read(record)
        if summary(rows)["finished"]:
            need_fields(rows[0], "config")
            need_fields(next(row for row in rows[::-1] if row["kind"] == "result"), *JUDGED)
            for row in runlog.epochs(rows):
                need_fields(row, "seconds")
            yield rows


def by_settings(records: Iterable[Record]) -> list[list[Row]]:
    """Summaries of the finished runs, grouped by all settings but the seed; most MACs first.

    Of two runs with the same settings and seed the later one counts. ``setting`` is added to each
    summary: its gate price, or its target in words, and what is not as usual about the run.
    """
    groups: dict[str, dict[int, Row]] = defaultdict(dict)
    for rows in _finished(records):
        found = summary(rows)
        config = SearchConfig.of(rows[0]["config"]).settings()
        strength = config.get(METHODS[config["method"]].strength)
        budget = (config["budget"] or {}).items()
        asked = [f"target {v:g}{'' if metric == 'macs' else ' params'}" for metric, v in budget]
        odd = [config[name] for name, usual in USUAL.items() if config.get(name, usual) != usual]
        label = " ".join([*(asked or [f"{strength:g}"]), *odd])
        key = {name: config[name] for name in config if name not in {"seed", *MEANS}}
        if config["data"] == "own":  # then no setting says which images
            key["data"] = [rows[0]["data"][part] for part in ("name", "train", "val")]
        key["net"] = (rows[0].get("net") or {}).get("structure")
        groups[json.dumps(key, sort_keys=True)][found["seed"]] = found | {"setting": label}
    return sorted(
        (list(runs.values()) for runs in groups.values()),
        key=lambda runs: -statistics.mean(run["macs_pruned"] for run in runs),
    )


def spread(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation (divided by n - 1); None for the deviation of one."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None


def seeds_table(records: Iterable[Record], markdown: bool = True) -> str:
    """Mean ± sample standard deviation over seeds, one line per recipe and gate price.

    tuned, dense: test accuracy; MACs, params: of the pruned network, as share of the dense one.
    """
    body = []
    for group in by_settings(records):
        cells = []
        for name, (_, form) in QUANTITIES.items():
            if any(run[name] is None for run in group):  # a joint run has no dense network
                cells.append("-")
                continue
            mean, deviation = spread([run[name] for run in group])
            around = "" if deviation is None else f" ± {100 * deviation:{form}}"
            cells.append(f"{100 * mean:{form}}{around}")
        body.append([group[0]["name"], group[0]["setting"], str(len(group)), *cells])
    return format_table(HEAD, body, markdown) if body else ""


def variants(folder: str | Path) -> dict[str, dict[int, list[Row]]]:
    """The rows of the finished runs of a folder, by variant and seed; {} without a folder.

    A file is called ``<variant>-seed<k>.jsonl``, whatever its config says its name is.
    """
    found: dict[str, dict[int, list[Row]]] = defaultdict(dict)
    for path in sorted(Path(folder).glob("*-seed*.jsonl")):
        for rows in _finished([path]):
            found[path.stem.rpartition("-seed")[0]][rows[0]["config"]["seed"]] = rows
    return dict(found)


def training_seconds(
    records: Iterable[Record], without: Iterable[str] = (), typical: bool = True
) -> tuple[float, float]:
    """Seconds of all epochs as they were trained, and as the same runs would need one by one.

    An epoch that several records of a seed took over was trained once, whether or not the record
    of the run that trained it is among them. ``without``: stages that are left out. ``typical``:
    an epoch counts as the median one of its stage and run, so that a process which slept, or a
    machine that was busy for a while, does not tell; else as recorded. Unfinished runs are left
    out.
    """
    own: dict[str, float] = defaultdict(float)
    taken: dict[str, float] = {}
    singly = 0.0
    for rows in _finished(records):
        stages: dict[str, list[Row]] = defaultdict(list)
        for row in runlog.epochs(rows):
            stages[row["stage"]].append(row)
        for stage in stages.keys() - set(without):
            median = statistics.median(row["seconds"] for row in stages[stage])
            for row in stages[stage]:
                content = {name: row[name] for name in row if name != "taken_over"}
                key = json.dumps([rows[0]["config"].get("seed"), content], sort_keys=True)
                seconds = median if typical else row["seconds"]
                singly += seconds
                if row.get("taken_over"):
                    taken[key] = seconds
                else:
                    own[key] += seconds
    return sum((taken | own).values()), singly


def sharing(records: Iterable[Record]) -> str:
    """What sharing epochs saved, in a sentence or two; "" if nothing was shared."""
    records = list(records)
    ours, singly = training_seconds(records)
    if ours >= singly:
        return ""

    def share(**options: object) -> str:
        trained, alone = training_seconds(records, **options)  # type: ignore[arg-type]
        return f"{trained / alone:.2f}"

    text = (
        f"Shared epochs: {_time(ours)} of training did the work of {_time(singly)} for the same "
        f"runs one by one: {share()} of it, {share(without=['baseline'])} without the baselines "
        f"(at each stage's median epoch; as recorded {share(typical=False)} and "
        f"{share(typical=False, without=['baseline'])})."
    )
    return textwrap.fill(text, COLUMNS_OF_A_SCREEN)


def _time(seconds: float) -> str:
    """Seconds in the unit that a reader would choose."""
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"


def tables(
    records: Iterable[Record], not_run: Iterable[Path] | None = None, markdown: bool = True
) -> str:
    """All that several records tell: each run, what was not run, means over seeds, sharing.

    ``not_run``: runs of a sweep that are not there yet; None if the records are no sweep's, and
    means are then shown only if there are seeds to take them over.
    """
    records, bullet = list(records), "- " if markdown else ""
    wanted = not_run is not None or any(len(group) > 1 for group in by_settings(records))
    parts = (
        results_table(records, markdown),
        "\n".join(f"{bullet}{path}: not run" for path in not_run or ()),
        seeds_table(records, markdown) if wanted else "",
        sharing(records),
    )
    return "\n\n".join(part for part in parts if part)


def trade_off_rows(records: Iterable[Record]) -> list[Row]:
    """A row per finished run for ``plots.kept_accuracy``."""
    return [
        {
            "method": run["name"],
            "setting": run["setting"],
            "seed": run["seed"],
            "macs_kept": run["macs_kept"],
            "accuracy": run["fine_tuned_accuracy"],
            "dense_accuracy": run["dense_accuracy"],
        }
        for group in by_settings(records)
        for run in group
    ]


def headline(records: Iterable[Record]) -> str:
    """The trade-off in one sentence: the fewest MACs at most a point below the dense network.

    If no setting comes so near, the one that comes nearest. Means over seeds.
    Raises: ValueError if no run with a dense network is finished.
    """
    found = []
    for group in by_settings(records):
        kept = statistics.mean(run["macs_kept"] for run in group)
        if any(run["dense_accuracy"] is None for run in group):
            continue
        gain = statistics.mean(r["fine_tuned_accuracy"] - r["dense_accuracy"] for r in group)
        found.append((kept, gain, group))
    if not found:
        raise Refused("got no finished run; need one; do dnal resume those that stopped")
    close = [entry for entry in found if entry[1] >= -CLOSE]
    kept, gain, group = min(close, key=lambda e: e[0]) if close else max(found, key=lambda e: e[1])
    seeds = "1 seed" if len(group) == 1 else f"{len(group)} seeds"
    points = f"{abs(100 * gain):.2f} points {'more' if gain > 0 else 'less'}"
    return f"{group[0]['name']}: {points} with {kept:.0%} of the MACs ({seeds})"


def draw(records: Iterable[Record], path: str | Path) -> None:
    """Write the trade-off of the finished runs as a picture.

    Raises: ValueError for a file that is no picture's, no finished run, or without matplotlib.
    """
    records, path = list(records), Path(path)
    if path.suffix not in (".svg", ".png"):
        raise Refused(f"got figure {path}; need a name that ends in .svg or .png; do rename it")
    title = headline(records)
    try:
        import matplotlib as mpl
        import pandas  # noqa: F401 - plots needs it: better told here
        from matplotlib.figure import Figure
    except ImportError as error:
        raise Refused(
            f"got no package {error.name}; need it for figures; do pip install dnal-mini[book]"
        ) from None
    from dnal_mini.figures import plots, style

    with mpl.rc_context():
        style.use_style()
        figure = Figure()
        plots.kept_accuracy(trade_off_rows(records), figure.subplots(), title=title)
        figure.savefig(path, dpi=200, metadata={"Date": None} if path.suffix == ".svg" else None)


def differences(variants: Iterable[Path], base: Iterable[Path]) -> list[runlog.Row]:
    """What each variant of a run changes against the ``base`` run of the same seed.

    Both are records named ``<variant>-seed<k>.jsonl``; runs that are not finished are left out,
    and variants that have no seed in common with ``base``. A row: ``variant``, ``changed`` (the
    settings that differ, with the variant's values), ``seeds``, and a list with one difference per
    seed for ``accuracy`` (fine-tuned), ``hard_accuracy`` and ``macs_kept`` (share of the dense).
    """
    plain = {rows[0]["config"]["seed"]: rows for rows in map(runlog.read, base) if _ended(rows)}
    found: dict[str, dict[int, list[runlog.Row]]] = defaultdict(dict)
    for path in sorted(variants):
        if _ended(rows := runlog.read(path)):
            found[path.stem.rpartition("-seed")[0]][rows[0]["config"]["seed"]] = rows
    table = []
    for variant, runs in found.items():
        if seeds := sorted(runs.keys() & plain.keys()):
            pairs = [(_outcome(runs[seed]), _outcome(plain[seed])) for seed in seeds]
            changed = _changed(runs[seeds[0]], plain[seeds[0]])
            lists = {key: [a[key] - b[key] for a, b in pairs] for key in pairs[0][0]}
            table.append({"variant": variant, "changed": changed, "seeds": seeds, **lists})
    return table


def _ended(rows: list[runlog.Row]) -> bool:
    return bool(rows) and rows[-1]["kind"] == "result"


def _outcome(rows: list[runlog.Row]) -> dict[str, float]:
    """What a finished run is judged by, from its last row."""
    last = rows[-1]
    need_fields(last, "fine_tuned_accuracy", "hard_accuracy", "macs")
    return {
        "accuracy": last["fine_tuned_accuracy"],
        "hard_accuracy": last["hard_accuracy"],
        "macs_kept": last["macs"][1] / last["macs"][0],
    }


def _changed(rows: list[runlog.Row], base: list[runlog.Row]) -> runlog.Row:
    """Settings that differ from ``base``; name, seed, place and the dense rival do not count."""
    own, other = (SearchConfig.of(each[0]["config"]).settings() for each in (rows, base))
    apart = {"name", "seed", "baseline", *MEANS}
    return {key: own[key] for key in own if key not in apart and own[key] != other.get(key)}
