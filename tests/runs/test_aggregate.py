"""Means, spreads and savings by hand, and a figure that shows the rows of its table."""

import json
import math
from pathlib import Path

import matplotlib as mpl
import matplotlib.figure
import pytest

mpl.use("Agg")

from dnal_mini.config import SearchConfig
from dnal_mini.figures import plots, style
from dnal_mini.runs import aggregate, runlog, tables

Row = runlog.Row


def epochs(stage: str, *seconds: float, **fields: object) -> list[Row]:
    """The epoch rows of a stage."""
    return [
        {"kind": "epoch", "stage": stage, "epoch": k, "epochs": len(seconds), "seconds": s} | fields
        for k, s in enumerate(seconds, start=1)
    ]


def record(
    tuned: float, macs: int = 250, *rows: Row, price: float = 1e-3, seed: int = 0, **fields: object
) -> list[Row]:
    """A finished run of a network of 1,000 MACs and 700 params, a seventh of which it keeps."""
    config = SearchConfig().replace(gate_price=price, seed=seed).settings() | fields
    result = {
        "kind": "result",
        "dense_accuracy": 0.9 + seed / 100,
        "pruned_accuracy": 0.5,
        "fine_tuned_accuracy": tuned,
        "macs": [1000, macs],
        "params": [700, 100],
    }
    return [{"kind": "run", "format": 1, "config": config}, *rows, result]


def cells(text: str) -> list[list[str]]:
    """The cells of a Markdown table, without its head."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()][2:]


def joint(tuned: float, **fields: object) -> list[Row]:
    """A run without a dense network."""
    rows = record(tuned, 100, optimisation="joint", baseline="none", **fields)
    return [*rows[:-1], rows[-1] | {"dense_accuracy": None}]


# --- means over seeds --------------------------------------------------------------------------


def test_runs_on_other_images_or_nets_of_the_users_are_not_taken_together():
    def mine(name: str, structure: str, seed: int) -> list[Row]:
        first, *others = record(0.8, seed=seed, data="own", model="nets.Net")
        made_of = {"data": {"name": name, "train": 90, "val": 33}, "net": {"structure": structure}}
        return [first | made_of, *others]

    runs = [
        mine("ants", "a1", 0),
        mine("ants", "a1", 1),
        mine("bees", "a1", 0),
        mine("ants", "b2", 0),
    ]
    assert sorted(len(group) for group in aggregate.by_settings(runs)) == [1, 1, 2]


def test_the_table_over_seeds_has_mean_and_sample_deviation():
    runs = [
        record(0.80, 300, seed=0),
        record(0.83, 100, price=5e-3, seed=1),
        record(0.84, 200, seed=1),
        record(0.85, 250, seed=2),
    ]
    # tuned 80, 84, 85: mean 83, squares 9 + 1 + 4 over 2; MACs 30, 20, 25; dense 90, 91, 92
    assert cells(aggregate.seeds_table(runs)) == [
        ["digits", "0.001", "3", f"83.00 ± {math.sqrt(7):.2f}", "91.00 ± 1.00", "25.0 ± 5.0",
         "14.3 ± 0.0"],
        ["digits", "0.005", "1", "83.00", "91.00", "10.0", "14.3"],
    ]  # fmt: skip


def test_only_runs_that_differ_in_the_seed_alone_are_one_group():
    runs = [
        record(0.8, seed=0),
        record(0.8, seed=1, weights_from="elsewhere", data_dir="there"),  # where, not what
        record(0.8, seed=2, fine_tune_epochs=7),
        record(0.8, seed=3, budget={"macs": 0.25}),
        record(0.8, seed=4)[:-1],  # not finished
    ]
    groups = aggregate.by_settings(runs)
    assert sorted([run["seed"] for run in group] for group in groups) == [[0, 1], [2], [3]]
    labels = {run["seed"]: run["setting"] for group in groups for run in group}
    assert labels == {0: "0.001", 1: "0.001", 2: "0.001", 3: "target 0.25"}


def test_a_record_from_before_a_setting_existed_has_its_default():
    old = record(0.8, seed=1)
    del old[0]["config"]["image_size"]
    assert len(aggregate.by_settings([record(0.8), old])) == 1


def test_of_two_runs_of_one_seed_the_later_counts():
    assert cells(aggregate.seeds_table([record(0.7), record(0.8)]))[0][2:4] == ["1", "80.00"]


def test_a_found_price_stands_in_the_table_of_runs():
    run = record(0.8, budget={"macs": 0.25})
    run[-1]["gate_price"] = 0.00123456
    assert cells(tables.results_table([run]))[0][1] == "0.001235"


def test_tables_say_what_was_not_run_and_show_means_where_they_are_wanted():
    alone = aggregate.tables([record(0.8), record(0.8, price=2e-3)], None, markdown=False)
    assert alone == tables.results_table([record(0.8), record(0.8, price=2e-3)], markdown=False)
    text = aggregate.tables([record(0.8)], [Path("s/seed0/price0.5")])
    assert "- s/seed0/price0.5: not run" in text.splitlines()
    assert aggregate.seeds_table([record(0.8)]) in text
    assert aggregate.seeds_table([record(0.8), record(0.9, seed=1)], False) in aggregate.tables(
        [record(0.8), record(0.9, seed=1)], markdown=False
    )
    assert aggregate.tables([], [Path("a")], markdown=False) == "a: not run"


# --- what sharing saved ------------------------------------------------------------------------


def shared(seed: int) -> list[Row]:
    """What two runs of a seed share: 3 epochs of 10 s and a baseline of 2 epochs of 20 s."""
    return [*epochs("weight_stage", 10, 10, 10, loss=seed), *epochs("baseline", 20, 20, loss=seed)]


def taken(rows: list[Row]) -> list[Row]:
    return [row | {"taken_over": True} for row in rows]


def test_shared_epochs_count_once_a_seed():
    runs = [
        record(0.8, 250, *taken(shared(seed)), *epochs("arch_stage", 5, loss=price), seed=seed,
               price=price)
        for seed in (0, 1)
        for price in (1e-3, 2e-3, 3e-3)
    ]  # fmt: skip
    assert aggregate.training_seconds(runs) == (2 * 70 + 6 * 5, 6 * 75)
    assert aggregate.training_seconds(runs, without=["baseline"]) == (2 * 30 + 6 * 5, 6 * 35)
    text = " ".join(aggregate.sharing(runs).split())
    assert f"{170 / 60:.1f} min of training did the work of {450 / 60:.1f} min" in text
    assert f"{170 / 450:.2f} of it, {90 / 210:.2f} without" in text


def test_the_run_that_trained_what_others_took_over_counts_once_too():
    runs = [record(0.8, 250, *shared(0)), record(0.8, 250, *taken(shared(0)), price=2e-3)]
    assert aggregate.training_seconds(runs) == (70, 140)


def test_nothing_shared_is_nothing_said_and_unfinished_runs_do_not_count():
    runs = [record(0.8, 250, *shared(0)), record(0.8, 250, *shared(1), seed=1)]
    assert aggregate.training_seconds(runs) == (140, 140)
    assert aggregate.sharing(runs) == ""
    assert aggregate.training_seconds([run[:-1] for run in runs]) == (0, 0)


def test_an_epoch_in_which_the_process_slept_counts_as_the_median_one():
    run = record(0.8, 250, *epochs("fine_tune", 3, 1, 5, 6000, 4), *epochs("arch_stage", 7))
    assert aggregate.training_seconds([run]) == (5 * 4 + 7, 5 * 4 + 7)
    assert aggregate.training_seconds([run], typical=False) == (6013 + 7, 6013 + 7)


# --- the figure --------------------------------------------------------------------------------

RUNS = [
    record(0.92, 500, seed=0),
    record(0.90, 300, seed=1),
    record(0.88, 40, seed=0, price=5e-3),
    record(0.85, 60, seed=1, price=5e-3),
]


def test_the_headline_is_the_fewest_macs_within_a_point_of_the_dense_network():
    # dense 90 and 91: at 1e-3 +2 and -1 on 40 % of the MACs, at 5e-3 -2 and -6 on 5 %
    assert aggregate.headline(RUNS) == "digits: 0.50 points more with 40% of the MACs (2 seeds)"
    smaller = record(0.895, 100, price=2e-3)
    assert aggregate.headline([*RUNS, smaller]).endswith(
        "0.50 points less with 10% of the MACs (1 seed)"
    )
    assert aggregate.headline(RUNS[2:]) == "digits: 4.00 points less with 5% of the MACs (2 seeds)"
    with pytest.raises(ValueError, match="got no finished run; need one; do"):
        aggregate.headline([RUNS[0][:-1]])


def test_the_figure_has_the_points_of_the_table():
    with mpl.rc_context():
        style.use_style()
        ax = mpl.figure.Figure().subplots()
        plots.kept_accuracy(aggregate.trade_off_rows(RUNS), ax, title="t")
        ax.figure.canvas.draw()
    runs, means = (line.get_xydata().tolist() for line in ax.lines[1:])
    assert runs == [[0.5, 0.92], [0.3, 0.90], [0.04, 0.88], [0.06, 0.85]]
    assert means == [pytest.approx([0.05, 0.865]), pytest.approx([0.4, 0.91])]


@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_a_picture_is_written_and_the_same_twice(suffix, tmp_path):
    for name in ("one", "two"):
        aggregate.draw(RUNS, tmp_path / f"{name}.{suffix}")
    one, two = ((tmp_path / f"{name}.{suffix}").read_bytes() for name in ("one", "two"))
    assert one == two
    assert one.startswith(b"<?xml" if suffix == "svg" else b"\x89PNG")


def test_another_kind_of_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"got figure .*\.gif; need .*\.svg or \.png; do"):
        aggregate.draw(RUNS, tmp_path / "x.gif")
    assert list(tmp_path.iterdir()) == []


def test_a_run_without_a_dense_network_has_a_line_of_its_own_and_no_loss():
    rows = [joint(0.7), joint(0.9, seed=1), record(0.88)]
    table = cells(aggregate.seeds_table(rows))
    assert [row[1:5] for row in table] == [
        ["0.001", "1", "88.00", "90.00"],
        ["0.001 joint", "2", "80.00 ± 14.14", "-"],
    ]
    assert aggregate.headline(rows) == "digits: 2.00 points less with 25% of the MACs (1 seed)"


# --- runs that are called after what differs ---------------------------------------------------


def test_variants_are_called_after_their_files_and_have_their_seeds(tmp_path):
    assert aggregate.variants(tmp_path / "missing") == {}
    whole = {
        name: record(0.7, seed=int(name[-1])) for name in ("a-seed-seed1", "b-seed3", "b-seed0")
    }
    for name, rows in (whole | {"c-seed0": record(0.7)[:-1]}).items():  # c is not finished
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    expected = {"a-seed": {1: whole["a-seed-seed1"]}}
    assert aggregate.variants(tmp_path) == expected | {
        "b": {0: whole["b-seed0"], 3: whole["b-seed3"]}
    }
