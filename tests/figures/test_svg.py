"""Panels: data land at the right place, ticks are round numbers."""

import re

import numpy as np
import pytest

from dnal_mini.figures import svg
from dnal_mini.figures.svg import BOTTOM, LEFT, RIGHT, TOP, Axes, Bars, Line

BOX = Axes("Panel", "x", "y", (-2, 3), (0, 5))


def test_data_land_where_the_axes_say():
    assert BOX.to_x([-2, 0.5, 3]).tolist() == [LEFT, (LEFT + RIGHT) / 2, RIGHT]
    assert BOX.to_y([0, 2.5, 5]).tolist() == [BOTTOM, (TOP + BOTTOM) / 2, TOP]
    log = Axes("", "", "", (0.01, 100), (1, 1000), x_log=True, y_log=True)
    assert log.to_x(1).item() == pytest.approx((LEFT + RIGHT) / 2)
    assert log.to_y(10).item() == pytest.approx(BOTTOM - (BOTTOM - TOP) / 3)


def test_values_far_outside_are_cut_off_and_zero_has_a_place_on_a_log_axis():
    log = Axes("", "", "", (0.01, 100), (1, 1000), x_log=True)
    assert np.isfinite(log.to_x([0, -1, 1e300])).all()
    assert log.to_x(0) < LEFT < RIGHT < log.to_x(1e300)


def test_a_gap_in_the_data_is_a_gap_in_the_line():
    path = svg.draw_mark(Line([-2, -1, 0, 1, 2], [1, 2, np.nan, 3, 4]), BOX)
    assert path.count("M") == 2
    assert path.count("L") == 2


def test_bars_stand_on_the_axis_and_reach_their_heights():
    path = svg.draw_mark(Bars([-2, 0.5, 3], [5, 2.5]), BOX)
    d = re.search(r' d="([^"]*)"', path).group(1)
    tops = [float(y) for y in re.findall(r"V([\d.]+)H", d)]
    assert tops == pytest.approx([TOP, (TOP + BOTTOM) / 2])
    assert d.count(f"V{BOTTOM}Z") == 2


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-0.3, 0.7), (3, 17000), (-1e-5, 2e-5)])
def test_ticks_are_few_round_and_inside(low: float, high: float):
    found = svg.ticks(low, high)
    steps = np.diff(found)
    assert 2 <= len(found) <= 7
    assert low - 1e-12 <= found[0] <= found[-1] <= high + 1e-12
    np.testing.assert_allclose(steps, steps[0])
    lead = steps[0] / 10 ** np.floor(np.log10(steps[0]) + 1e-9)
    assert min(abs(lead - k) for k in (1, 2, 5)) < 1e-6


def test_log_ticks_are_powers_of_ten():
    assert svg.ticks(0.05, 2000, log=True) == pytest.approx([0.1, 1, 10, 100, 1000])
    assert svg.tick_text(1e-4, log=True) == "10⁻⁴"
    assert svg.tick_text(100, log=True) == "100"
    assert svg.tick_text(-0.2) == "−0.2"
