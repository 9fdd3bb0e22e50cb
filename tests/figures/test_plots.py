"""Static figures show the numbers of their tables, in the book's colours."""

from collections.abc import Iterator

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest

mpl.use("Agg")

import matplotlib.pyplot as plt

from dnal_mini.figures import colours, plots, style
from dnal_mini.pruning.plan import FATES as WORDS_OF_THE_PRUNER

STAGES = ["weight_stage"] * 5 + ["arch_stage"] * 3 + ["fine_tune"] * 2


@pytest.fixture
def ax() -> Iterator[plt.Axes]:
    with mpl.rc_context():
        style.use_style()
        figure, ax = plt.subplots()
        yield ax
        figure.canvas.draw()  # what cannot be drawn fails here
        plt.close(figure)


def epochs(seeds: int) -> pd.DataFrame:
    rows = [
        {"seed": seed, "stage": stage, "accuracy": 0.3 + 0.05 * k + 0.01 * seed, "kept": 1 - k / 20}
        for seed in range(seeds)
        for k, stage in enumerate(STAGES)
    ]
    return pd.DataFrame(rows)


def test_curves_draw_each_group_and_order_numbers_by_shade(ax):
    x = np.linspace(0, 1, 7)
    table = [{"x": a, "y": a * k, "k": k} for k in (10, 1, 3) for a in x]
    assert plots.curves(table, ax, "x", "y", "k", title="t", x_label="x", y_label="y") is ax
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["k = 1", "k = 3", "k = 10"]
    np.testing.assert_allclose(ax.lines[2].get_ydata(), 10 * x)
    brightness = [np.dot(line.get_color()[:3], [0.2126, 0.7152, 0.0722]) for line in ax.lines]
    assert brightness == sorted(brightness, reverse=True)


def test_curves_of_names_have_the_colours_of_the_book(ax):
    table = {"x": [0, 1, 0, 1], "y": [1, 2, 3, 5], "form": ["paper", "paper", "code", "code"]}
    plots.curves(table, ax, "x", "y", "form", title="t", x_label="x", y_label="y")
    found = {line.get_label(): line.get_color() for line in ax.lines}
    assert found == {name: colours.COLOURS[name] for name in ("paper", "code")}


def test_the_gate_histogram_shows_shares_and_leaves_empty_bins_blank(ax):
    table = [{"delta": 1, "histogram": [0, 7, 0]}, {"delta": 31.6, "histogram": [6, 1, 3]}]
    plots.gate_histogram(table, ax, title="t")
    shares = ax.collections[0].get_array().reshape(3, 2)
    np.testing.assert_allclose(shares[:, 1].filled(np.nan), [0.6, 0.1, 0.3])
    assert shares[:, 0].filled(-1).tolist() == [-1, 1, -1]
    assert [text.get_text() for text in ax.get_xticklabels()] == ["1", "31.6"]


def test_training_curves_show_the_median_of_the_seeds_in_percent(ax):
    plots.training_curves(epochs(3), ax, title="t")
    lines = {line.get_label(): line for line in ax.lines}
    np.testing.assert_allclose(lines["accuracy"].get_ydata(), 0.31 + 0.05 * np.arange(10))
    np.testing.assert_allclose(lines["share of gates open"].get_ydata(), 1 - np.arange(10) / 20)
    assert len(ax.lines) == 2 * (3 + 1)
    assert ax.yaxis.get_major_formatter()(0.5).startswith("50")


def test_training_curves_mark_the_three_stages(ax):
    plots.training_curves(epochs(1).drop(columns=["seed", "kept"]), ax, title="t")
    assert len(ax.lines) == 1
    assert [text.get_text() for text in ax.texts] == list(plots.STAGE_TITLES.values())
    assert [text.get_position()[0] for text in ax.texts] == [3, 7, 9.5]


def test_training_curves_refuse_seeds_of_different_lengths(ax):
    with pytest.raises(ValueError, match="different epochs"):
        plots.training_curves(epochs(2).iloc[:-1], ax, title="t")


def test_widths_draw_a_pair_of_bars_for_each_layer(ax):
    table = {"layer": ["a", "b", "c"], "before": [11, 17, 5], "after": [7, 3, 5]}
    plots.widths(table, ax, title="t")
    assert [bar.get_height() for bar in ax.patches] == [11, 17, 5, 7, 3, 5]
    assert [text.get_text() for text in ax.texts] == ["7", "3", "5"]


def test_the_trade_off_joins_medians_of_settings_on_a_log_axis(ax):
    table = pd.DataFrame(
        {
            "method": ["dnal"] * 6 + ["uniform"] * 2,
            "setting": [1, 1, 1, 2, 2, 2, 1, 2],
            "macs": [10, 12, 11, 100, 120, 110, 13, 130],
            "accuracy": [0.7, 0.72, 0.75, 0.9, 0.91, 0.95, 0.6, 0.8],
        }
    )
    plots.trade_off(table, ax, title="t")
    joined = {line.get_label(): line for line in ax.lines if not line.get_label().startswith("_")}
    assert ax.get_xscale() == "log"
    assert joined["dnal"].get_xydata().tolist() == [[11, 0.72], [110, 0.91]]
    assert joined["dnal"].get_color() == colours.colour("dnal")
    assert joined["dnal"].get_marker() != joined["uniform"].get_marker()


def kept(**columns: list) -> pd.DataFrame:
    """A table for ``kept_accuracy``: two settings of one method, seeds 0 and 1."""
    rows = {
        "method": ["a"] * 4,
        "setting": ["x", "x", "y", "y"],
        "seed": [0, 1, 0, 1],
        "macs_kept": [0.5, 0.3, 0.1, 0.2],
        "accuracy": [0.9, 0.8, 0.7, 0.6],
        "dense_accuracy": [0.92, 0.94, 0.92, 0.94],
    }
    return pd.DataFrame(rows | columns)


def test_kept_accuracy_joins_means_and_shows_the_dense_network_as_a_band(ax):
    plots.kept_accuracy(kept(), ax, title="t")
    dense, runs, means = ax.lines
    assert dense.get_ydata() == pytest.approx([0.93, 0.93])
    (band,) = ax.patches
    low, high = band.get_y(), band.get_y() + band.get_height()
    assert (low, high) == pytest.approx((0.93 - 0.0002**0.5, 0.93 + 0.0002**0.5))
    np.testing.assert_allclose(runs.get_xdata(), [0.5, 0.3, 0.1, 0.2])
    np.testing.assert_allclose(means.get_xydata(), [[0.15, 0.65], [0.4, 0.85]])
    assert ax.get_xscale() == "linear"
    assert means.get_label() == "a, mean of 2 seeds"


def test_kept_accuracy_of_one_seed_has_no_spread_and_methods_differ(ax):
    frame = kept(method=["a", "a", "b", "b"], seed=[0] * 4, macs_kept=[0.9, 0.5, 0.05, 0.3])
    plots.kept_accuracy(frame.assign(setting=["1", "2", "1", "2"]), ax, title="t")
    assert [band.get_height() for band in ax.patches] == [0, 0]
    assert ax.get_xscale() == "log"
    lines = {line.get_label(): line for line in ax.lines}
    assert lines["a"].get_color() != lines["b"].get_color()
    assert lines["a"].get_marker() != lines["b"].get_marker()


def test_points_show_every_value_and_count_those_that_a_log_axis_cannot(ax):
    table = {"way": ["one"] * 4 + ["two"] * 3, "y": [1, 3, 5, 0, 10, 1000, 100]}
    plots.points(table, ax, "way", "y", title="t", y_label="y", log=True)
    drawn = [sorted(line.get_ydata().tolist()) for line in ax.lines]
    assert drawn == [[1, 3, 5], [10, 100, 1000]]
    bars = [bar.get_segments()[0][0][1] for bar in ax.collections]
    assert bars == [3, 100]
    assert [text.get_text() for text in ax.get_xticklabels()] == ["one\n(1 at 0)", "two"]


def fates_of(**layers: str) -> pd.DataFrame:
    """A table for ``channel_sets`` from one letter per channel."""
    words = {fate[0]: fate for fate in plots.FATES}
    rows = [
        {"layer": layer, "channel": j, "fate": words[letter]}
        for layer, letters in layers.items()
        for j, letter in enumerate(letters)
    ]
    return pd.DataFrame(rows)


def corners(cell) -> tuple[float, float, float, float]:
    (left, top), (right, bottom) = cell.vertices.min(0), cell.vertices.max(0)
    return left, right, top, bottom


def test_channel_sets_draw_each_channel_in_its_layer_with_its_fate(ax):
    assert plots.channel_sets(fates_of(b="nnz", a="zutwhc"), ax, title="t") is ax
    assert [text.get_text() for text in ax.get_yticklabels()] == ["b", "a"]
    assert ax.yaxis_inverted()
    found = {}
    for cells in ax.collections:
        middles = [
            (round(sum(c[:2]) / 2), round(sum(c[2:]) / 2)) for c in map(corners, cells.get_paths())
        ]
        found[cells.get_label()] = sorted(middles)
    assert found == {
        "stays: live and needed (2)": [(0, 0), (1, 0)],
        "stays: tied to others (1)": [(2, 1)],
        "stays: at a wall (1)": [(3, 1)],
        "stays: for the width (1)": [(4, 1)],
        "gone: always zero (2)": [(0, 1), (2, 0)],
        "gone: constant, part of a bias (1)": [(5, 1)],
        "gone: not needed (1)": [(1, 1)],
    }
    assert [text.get_text() for text in ax.get_legend().get_texts()] == list(found)


def test_cells_of_channel_sets_touch_sideways_and_never_overlap(ax):
    plots.channel_sets(fates_of(a="nnn", b="nn"), ax, title="t")
    cells = sorted(corners(cell) for cell in ax.collections[0].get_paths())
    areas = [(right - left) * (bottom - top) for left, right, top, bottom in cells]
    apart = [
        right <= other_left or bottom <= other_top or other_bottom <= top
        for k, (_, right, top, bottom) in enumerate(cells)
        for other_left, _, other_top, other_bottom in cells[k + 1 :]
    ]
    assert len(cells) == 5
    assert min(areas) > 0.5
    assert all(apart)


def test_fates_differ_for_eyes_that_see_no_colour():
    def grey(ink: str) -> float:
        return float(np.dot(mpl.colors.to_rgb(ink), [0.2126, 0.7152, 0.0722]))

    stay = [grey(ink) for ink, _, words in plots.FATES.values() if words.startswith("stays")]
    gone = [grey(ink) for ink, _, words in plots.FATES.values() if words.startswith("gone")]
    assert max(stay) < min(gone)
    assert len({hatch for _, hatch, words in plots.FATES.values() if words.startswith("gone")}) == 3


def test_many_layers_are_all_drawn_but_not_all_named(ax):
    plots.channel_sets(fates_of(**{f"layer{k}": "nz" for k in range(91)}), ax, title="t")
    assert sum(len(cells.get_paths()) for cells in ax.collections) == 182
    assert [text.get_text() for text in ax.get_yticklabels()][:3] == ["layer0", "layer3", "layer6"]


def test_the_report_of_the_pruner_uses_the_same_words(ax):
    words = list(WORDS_OF_THE_PRUNER.values())
    rows = [{"layer": f"layer{k}", "channel": k, "fate": word} for k, word in enumerate(words)]
    plots.channel_sets(rows, ax, title="t")
    assert len(ax.collections) == len(words) == len(plots.FATES)


def test_an_unknown_fate_is_named(ax):
    with pytest.raises(ValueError, match=r"got fate 'lost'; need one of needed, "):
        plots.channel_sets([{"layer": "a", "channel": 0, "fate": "lost"}], ax, title="t")


@pytest.mark.parametrize(
    "draw",
    [plots.trade_off, plots.kept_accuracy, plots.widths, plots.gate_histogram, plots.channel_sets],
)
def test_a_missing_column_is_named(ax, draw):
    with pytest.raises(ValueError, match=r"got columns .*; need "):
        draw({"other": [1]}, ax, title="t")


def test_a_table_without_rows_is_refused(ax):
    with pytest.raises(ValueError, match="without rows"):
        plots.widths({"layer": [], "before": [], "after": []}, ax, title="t")


def test_an_unknown_method_keeps_its_colour_and_the_three_stages_differ():
    assert colours.colour("some new method") == colours.colour("some new method")
    assert len({colours.colour(stage) for stage in plots.STAGE_TITLES}) == 3


def test_the_style_draws_dark_ink_on_an_opaque_ground(ax):
    assert mpl.rcParams["savefig.facecolor"] == "white"
    assert ax.get_facecolor() == (1, 1, 1, 1)
    assert mpl.colors.to_hex(ax.xaxis.label.get_color()) == colours.INK


def test_figures_are_the_same_bytes_when_drawn_again(ax, tmp_path):
    plots.widths({"layer": ["a"], "before": [3], "after": [2]}, ax, title="t")
    for name in ("one.svg", "two.svg"):
        ax.figure.savefig(tmp_path / name, metadata={"Date": None})
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()


def test_alt_text_gives_titles_axes_and_legends_of_a_figure(ax):
    table = {"x": [0, 1, 0, 1], "y": [1, 2, 3, 5], "form": ["paper", "paper", "code", "code"]}
    plots.curves(table, ax, "x", "y", "form", title="Both rise", x_label="epoch", y_label="gates")
    assert style.alt_text(ax.figure) == "Both rise. gates over epoch. Legend: paper, code."
    points = [{"order": "first", "pull": 3.0}, {"order": "last", "pull": 5.0}]
    ax.clear()
    plots.points(points, ax, "order", "pull", title="Last wins", y_label="pull")
    assert style.alt_text(ax.figure) == "Last wins. pull over first, last."


def test_a_description_stands_behind_the_headline_and_a_second_one_replaces_it(ax):
    ax.set(title="Title\nof two lines", xlabel="x", ylabel="y")
    style.describe(ax, "Seven dots.")
    style.describe(ax.figure, "Eight dots, one of them red")
    assert style.alt_text(ax.figure) == "Title of two lines. Eight dots, one of them red."
    panels, (left, right) = plt.subplots(1, 2)
    left.set(title="left", xlabel="x")
    right.set_title("right")
    assert style.alt_text(panels) == "left. right. x."
    style.describe(right, "Two empty panels.")
    assert style.alt_text(panels) == "Two empty panels.", "titles of panels are no headline"
    panels.suptitle("Nothing")
    assert style.alt_text(panels) == "Nothing. Two empty panels."
    plt.close(panels)


def test_a_notebook_stores_the_alt_text_beside_its_picture(ax):
    ax.set(title="A title")
    svg, metadata = style._picture(ax.figure)
    assert metadata == {"alt": "A title."}
    assert svg.count("<svg") == 1
    assert "<dc:date>" not in svg
    assert style.alt_text(plt.Figure()) == "", "no words from nowhere: the test of the book sees it"
