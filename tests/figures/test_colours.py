"""The colours of the methods can be told apart, on white, on near black, by most eyes."""

import itertools

import matplotlib as mpl
import numpy as np
import pytest

mpl.use("Agg")

import matplotlib.pyplot as plt

from dnal_mini.figures import colours, plots
from dnal_mini.figures.colours import COLOURS, MARKERS, METHOD_COLOURS, colour, looks, marker
from dnal_mini.methods import METHODS

PLANNED = [
    "dnal", "random", "uniform", "l1-norm", "slimming", "group-lasso", "variational-dropout",
    "morphnet", "generator-inquisitor", "random-weights", "filter-bits", "filter-widths",
    "memnet", "sss", "hrank", "thinet", "gal", "abcpruner", "fbnetv2", "proxylessnas", "darts",
    "amc", "figs", "magnitude", "taylor",
]  # fmt: skip
JUST_SEEN = 0.02  # in OKLab: about the smallest difference that an eye sees side by side
# Machado, Oliveira, Fernandes 2009, severity 1: linear RGB as seen without red or green cones.
EYES = {
    "all cones": np.eye(3),
    "no red": [[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]],
    "no green": [[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]],
}


def linear(ink: str) -> np.ndarray:
    """sRGB "#rrggbb" as linear light (IEC 61966-2-1): (3,) in [0, 1]."""
    c = np.array([int(ink[k : k + 2], 16) for k in (1, 3, 5)]) / 255
    return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)


def oklab(light: np.ndarray) -> np.ndarray:
    """Ottosson 2020: a space in which equal distances look about equal."""
    cones = np.array([[0.41222, 0.53633, 0.05145], [0.21190, 0.68070, 0.10740],
                      [0.08830, 0.28172, 0.62998]])  # fmt: skip
    turn = np.array([[0.21045, 0.79362, -0.00407], [1.97800, -2.42859, 0.45059],
                     [0.02590, 0.78277, -0.80868]])  # fmt: skip
    return turn @ np.cbrt(cones @ light)


def distance(one: str, two: str, eyes: str = "all cones") -> float:
    """How different two colours look to such eyes, in OKLab."""
    a, b = (oklab(np.clip(np.array(EYES[eyes]) @ linear(ink), 0, 1)) for ink in (one, two))
    return float(np.linalg.norm(a - b))


def contrast(one: str, two: str) -> float:
    """WCAG 2.1 contrast ratio."""
    low, high = sorted(np.dot([0.2126, 0.7152, 0.0722], linear(ink)) + 0.05 for ink in (one, two))
    return high / low


def test_the_yardsticks_measure_what_they_are_known_to():
    assert contrast("#ffffff", "#000000") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)
    assert distance("#ffffff", "#000000") == pytest.approx(1, abs=1e-3)
    assert oklab(linear("#ff0000")) == pytest.approx([0.628, 0.2249, 0.1258], abs=1e-3)
    assert distance("#ff0000", "#558800", "no red") < distance("#ff0000", "#558800") / 2


def test_every_method_has_its_own_colour_and_marker():
    assert set(METHOD_COLOURS) == set(PLANNED)
    assert set(METHODS) <= set(METHOD_COLOURS), "a new method needs its line in the table"
    assert len(set(METHOD_COLOURS.values())) == len(METHOD_COLOURS)
    for name, (ink, mark) in METHOD_COLOURS.items():
        assert (colour(name), marker(name)) == (ink, mark)
        assert mark in MARKERS
        assert mpl.markers.MarkerStyle(mark).is_filled()


@pytest.mark.parametrize("ground", ["#ffffff", "#121212"])
@pytest.mark.parametrize("name", PLANNED)
def test_every_method_is_legible_on_a_light_and_on_a_dark_page(name, ground):
    assert contrast(colour(name), ground) >= 3


def test_two_methods_differ_in_colour_and_much_if_they_share_the_marker():
    for one, two in itertools.combinations(PLANNED, 2):
        near = {eyes: distance(colour(one), colour(two), eyes) for eyes in EYES}
        assert near["all cones"] >= 3 * JUST_SEEN, (one, two)
        assert marker(one) != marker(two) or min(near.values()) >= 5 * JUST_SEEN, (one, two, near)


def test_the_method_of_the_book_keeps_its_blue():
    assert colour("dnal") == colours.BLUE == COLOURS["paper"]


def test_an_unknown_name_keeps_its_look_and_meets_no_method_nor_another_name():
    names = [f"recipe {k}" for k in range(20)]
    alone = {name: (colour(name), marker(name)) for name in names}
    assert alone == {name: (colour(name), marker(name)) for name in reversed(names)}
    together = looks([*names, *PLANNED, "dense"])
    assert len(set(together.values())) == len(together) == 46
    assert {name: together[name] for name in PLANNED} == METHOD_COLOURS
    assert together["dense"][0] == COLOURS["dense"]
    few = looks(names[:5])
    assert len({ink for ink, _ in few.values()}) == 5, "not by the marker alone"
    assert looks(reversed(names)) == looks(names)


def test_figures_draw_a_method_in_its_look_wherever_it_stands_in_the_table():
    row = {"setting": 1, "seed": 0, "macs": 5, "macs_kept": 0.5, "accuracy": 0.7}
    row |= {"dense_accuracy": 0.9}
    for draw in (plots.trade_off, plots.kept_accuracy):
        for order in (["uniform", "dnal", "my own"], ["my own", "dnal", "uniform"]):
            figure, ax = plt.subplots()
            draw([row | {"method": name} for name in order], ax, title="t")
            drawn = {line.get_label(): line for line in ax.lines}
            for name in order:
                look = drawn[name].get_color(), drawn[name].get_marker()
                assert look == (colour(name), marker(name))
            plt.close(figure)
