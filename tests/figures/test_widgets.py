"""The interactive figures of the book show their numbers."""

import numpy as np
import pytest

from dnal_mini.figures import widgets


def test_the_gate_figure_shows_the_sigmoid_and_counts_every_gate():
    s = np.random.default_rng(3).normal(0, 0.05, 501)
    figure = widgets.gate_figure(s, [1, 30, 1e4])
    line, dots = figure.draw(30).panels[0][1:]
    np.testing.assert_allclose(line.y, 1 / (1 + np.exp(-30 * line.x)), rtol=1e-12)
    assert set(dots.x) <= set(s)
    (bars,) = figure.draw(30).panels[1]
    p = 1 / (1 + np.exp(-30 * s))
    middle = np.mean((p >= 0.4) & (p < 0.5))
    assert sum(bars.heights) == pytest.approx(1)
    assert bars.heights[4] == pytest.approx(middle)
    assert "δ/4 = 7.5" in figure.draw(30).readout
    assert len(figure.html()) < 100_000


def test_the_price_figure_shows_each_form_at_its_epoch():
    share, deltas = np.linspace(0, 2, 7), [10.0, 1000.0, 1e4]
    paths = {form: [np.full(7, k * sign) for k in (0.1, 0.2, 0.3)] for form, sign in
             (("paper", 1), ("code", -1))}  # fmt: skip
    figure = widgets.price_figure(share, paths, deltas)
    gates, values = figure.draw(1).panels
    assert [line.label for line in gates] == ["paper form", "code form"]
    np.testing.assert_allclose(gates[0].y, 1 / (1 + np.exp(-1.0)), rtol=1e-12)
    np.testing.assert_allclose(gates[1].y, 1 / (1 + np.exp(1.0)), rtol=1e-12)
    np.testing.assert_allclose(figure.draw(3).panels[1][1].y, -0.3)
    assert len(values) == 2
    assert "epoch 3 of 3" in figure.draw(3).readout


def seen_through_the_microscope() -> list[dict]:
    """A record of two epochs and a look before them: layers of 3 and 5 gates."""

    def look(epoch: int, delta: float, *layers: tuple) -> dict:
        names = ("histogram", "undecided", "frozen", "gradient", "data_gradient")
        found = {f"g{k}": dict(zip(names, layer, strict=True)) for k, layer in enumerate(layers)}
        return {"kind": "look", "epoch": epoch, "delta": delta, "layers": found}

    def epoch(number: int, soft: float, hard: float, stage: str = "arch_stage") -> dict:
        row = {"kind": "epoch", "stage": stage, "epoch": number}
        return row | {"val_accuracy": soft, "hard_val_accuracy": hard}

    return [
        epoch(1, 0.9, 0.9, "weight_stage"),
        look(0, 1.0, ([0, 0, 3, 0], 1.0, 0.0, 2e-3, 1e-3), ([0, 0, 5, 0], 1.0, 0.0, 4e-3, 3e-3)),
        epoch(1, 0.7, 0.2),
        look(1, 9.0, ([1, 1, 1, 0], 2 / 3, 0.0, 8e-3, 7e-3), ([2, 0, 0, 3], 0.0, 0.4, 1e-9, 0.0)),
        epoch(2, 0.6, 0.5),
        look(2, 1e4, ([2, 0, 0, 1], 0.0, 1.0, 0.0, 0.0), ([2, 0, 0, 3], 0.0, 1.0, 0.0, 0.0)),
    ]


def test_the_microscope_figure_counts_gates_not_layers():
    figure = widgets.microscope_figure(seen_through_the_microscope(), "a net")
    assert figure.values == [0, 1, 2]
    gates, shares, moving, accuracy = figure.draw(1).panels
    np.testing.assert_allclose(gates[0].heights, [3 / 8, 1 / 8, 1 / 8, 3 / 8])
    assert gates[0].edges.tolist() == [0, 0.25, 0.5, 0.75, 1]
    bars, dots = shares
    assert (bars.heights.tolist(), dots.y.tolist()) == ([2 / 3, 0.0], [0.0, 0.4])
    assert (bars.edges.tolist(), dots.x.tolist()) == ([0.5, 1.5, 2.5], [1, 2])
    line, points = moving
    assert (points.x.tolist(), points.y.tolist()) == ([1], [8e-3]), "1e-9 moves nothing: not drawn"
    np.testing.assert_array_equal(line.y, [7e-3, np.nan])
    assert accuracy[0].y == [0.7], "of the architecture stage, up to this epoch"
    assert "undecided 25.0%, frozen 25.0%" in figure.draw(1).readout
    assert figure.draw(1).readout.endswith("soft 70.0%, hard 20.0%")
    assert figure.axes[0].title == "a net: all 8 gates"


def test_the_microscope_figure_is_drawn_from_before_the_first_step_to_the_last():
    figure = widgets.microscope_figure(seen_through_the_microscope(), "a net")
    assert "nan" not in figure.html()
    assert figure.draw(0).panels[3][0].y == []
    assert "accuracy" not in figure.draw(0).readout
    assert figure.draw(2).panels[3][1].y == [0.2, 0.5]
    assert figure.draw(2).panels[2][1].y.tolist() == []
    low, high = figure.axes[2].y_range
    assert (low, high) == (widgets.FAINT, 2 * 8e-3)


def test_a_record_without_the_microscope_is_refused():
    rows = [row for row in seen_through_the_microscope() if row["kind"] == "epoch"]
    with pytest.raises(ValueError, match="got 0 looks"):
        widgets.microscope_figure(rows, "a net")
