"""The vectors of the analysis and the two ways to pick from them."""

import torch

from dnal_mini.pruning.facts import CONSTANT, FIXED, LIVE, ZERO, Facts, known, pick


def facts(state: list[int], value: list[float], steady: list[bool], needed: list[bool]) -> Facts:
    tensors = torch.tensor(state, dtype=torch.uint8), torch.tensor(value, dtype=torch.float64)
    return Facts("same", *tensors, torch.tensor(steady), torch.tensor(needed), [])


def test_zero_stays_zero_only_if_it_is_made_of_zeros():
    """A constant that becomes 0 is a constant still; what is not known has no value."""
    state, value = known(
        torch.tensor([LIVE, FIXED, CONSTANT, CONSTANT, ZERO, ZERO]),
        torch.tensor([7.0, 7, 0, -2, 3, 0]),
    )
    assert state.tolist() == [LIVE, FIXED, CONSTANT, CONSTANT, CONSTANT, ZERO]
    assert value.tolist() == [0, 0, 0, -2, 3, 0]


def test_silent_is_a_constant_zero_in_both_modes():
    states = [CONSTANT, CONSTANT, CONSTANT, LIVE, ZERO]
    x = facts(states, [0, 0, 2, 0, 0], [True, False, True, True, True], [True] * 5)
    assert x.silent.tolist() == [True, False, False, False, False]


def test_what_comes_from_nowhere_is_zero_in_both_modes():
    x = facts([LIVE, CONSTANT], [0, 5], [False, False], [True, True])
    state, value, steady = pick(x, torch.tensor([1, -1, 0, -1]))
    assert state.tolist() == [CONSTANT, ZERO, LIVE, ZERO]
    assert value.tolist() == [5, 0, 0, 0]
    assert steady.tolist() == [False, True, False, True]


def test_a_channel_is_kept_if_it_is_not_zero_and_somebody_needs_it():
    states = [ZERO, CONSTANT, FIXED, LIVE] * 2
    x = facts(states, [0] * 8, [True] * 8, [True] * 4 + [False] * 4)
    assert x.kept.tolist() == [False, True, True, True] + [False] * 4
