"""The committed run records, and the README that quotes them."""

from pathlib import Path

import experiments
import pytest
from jobs import Place, settled

from dnal_mini.config import SearchConfig
from dnal_mini.recipes import RECIPES
from dnal_mini.runs import aggregate, runlog, tables

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "results"
RECORDS = sorted([*RESULTS.glob("*.jsonl"), *RESULTS.glob("*_cpu/*.jsonl")])
TARGETS = sorted(RESULTS.glob("targets/*.jsonl"))
PLACE = Place(Path("nowhere"), RESULTS)
PLAN = experiments.plan()
EXPERIMENTS = {key: job for key, job in PLAN.items() if (RESULTS / f"{key}.jsonl").exists()}
ENDS = {"run": "result", "gates": "epoch", "look": "look"}
BEGIN, END = "<!-- results: begin", "<!-- results: end -->"


def quoted(markdown: str) -> str:
    """What stands between the two marks of the README."""
    inside = markdown.partition(BEGIN)[2].partition(END)[0]
    return inside.partition("-->")[2].strip()


def test_the_table_in_the_readme_is_that_of_the_records():
    expected = aggregate.seeds_table(RECORDS)
    assert expected
    assert quoted((ROOT / "README.md").read_text()) == expected, "means over seeds: dnal report"


def test_a_table_that_has_drifted_is_caught():
    table = aggregate.seeds_table(RECORDS)
    assert quoted(f"{BEGIN} -->\n{table}\n{END}") == table
    assert quoted(f"{BEGIN} -->\n{table.replace('1', '2', 1)}\n{END}") != table


@pytest.mark.parametrize("path", RECORDS + TARGETS, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_a_record_is_whole_and_names_its_making(path: Path):
    rows = runlog.read(path)
    first, last = rows[0], rows[-1]
    assert (first["kind"], last["kind"]) == ("run", "result")
    assert first["config"]["name"] in RECIPES
    assert {"versions", "commit", "device", "created"} <= first.keys()
    (cut,) = [row for row in rows if row["kind"] == "prune"]
    assert cut["certificate"] <= 1e-8
    assert [cut["dense"]["macs"], cut["pruned"]["macs"]] == last["macs"]
    stages = {row["stage"]: row["epochs"] for row in rows if row["kind"] == "epoch"}
    for stage, epochs in stages.items():
        found = [row["epoch"] for row in runlog.epochs(rows) if row["stage"] == stage]
        if stage.startswith("probe"):  # ends as soon as its gates are decided
            epochs = len(found)
        assert found == list(range(1, epochs + 1)), stage


def strings(value: object) -> list[str]:
    """All strings in a JSON value."""
    if isinstance(value, dict | list):
        parts = value.values() if isinstance(value, dict) else value
        return [text for part in parts for text in strings(part)]
    return [value] if isinstance(value, str) else []


@pytest.mark.parametrize("path", RECORDS + TARGETS, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_a_record_holds_no_path_of_the_machine(path: Path):
    assert not [text for text in strings(runlog.read(path)) if text.startswith(("/", "~"))]


@pytest.mark.parametrize("key", EXPERIMENTS)
def test_the_record_of_an_experiment_is_that_of_the_plan(key: str):
    job = EXPERIMENTS[key]
    assert PLACE.record(job), "it counts as done"
    rows = runlog.read(RESULTS / f"{key}.jsonl")
    first, last = rows[0], rows[-1]
    assert (first["kind"], last["kind"]) == ("run", ENDS[job.kind])
    assert first["commit"]
    assert first["dirty"] is False
    settings = settled(job, PLACE, PLAN).settings()
    recorded = SearchConfig.of(first["config"]).settings()
    elsewhere = {"data_dir", "weights_from"}
    assert recorded.keys() == settings.keys()
    differ = {n for n, value in settings.items() if recorded[n] != value} - elsewhere
    assert not differ
    assert not [text for text in strings(rows) if text.startswith(("/", "~"))]
    if job.kind == "run":
        (cut,) = [row for row in rows if row["kind"] == "prune"]
        assert cut["certificate"] <= 1e-8
    trained = [row for row in runlog.epochs(rows) if not row.get("taken_over")]
    assert all(row["epochs"] == max(r["epoch"] for r in trained if r["stage"] == row["stage"])
               for row in trained if not row["stage"].startswith("probe"))  # fmt: skip


def test_no_record_of_an_experiment_is_beside_the_plan():
    planned = {RESULTS / f"{key}.jsonl" for key in PLAN}
    there = {path for name in experiments.FIRST for path in (RESULTS / name).glob("*")}
    assert there <= planned


EVERY = sorted(RESULTS.rglob("*.jsonl"))


@pytest.mark.parametrize("path", EVERY, ids=lambda p: str(p.relative_to(RESULTS)))
def test_every_file_of_results_is_read_or_refused_in_one_line(path: Path):
    if not path.read_bytes().startswith(b'{"kind": '):  # measurements, no runs
        with pytest.raises(ValueError, match=r"^got no JSON row in line 1[^\n]*$"):
            runlog.read(path)
        return
    rows = runlog.read(path)
    assert rows
    if rows[0]["kind"] == "run" and "name" in rows[0].get("config", {}):
        config = SearchConfig.of(rows[0]["config"])
        assert config.settings().items() >= rows[0]["config"].items(), "nothing of it is lost"
        found = tables.summary(rows)
        assert found["method"] == config.method.name
        stages = {stage.name: stage.epochs for stage in config.stages()}
        for row in runlog.epochs(rows):
            if not row["stage"].startswith("probe"):
                assert row["epochs"] == stages[row["stage"]], "the table has the stage as it was"
