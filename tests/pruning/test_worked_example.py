"""The worked example at the head of the pruner, and what it says in words."""

import doctest

import dnal_mini.pruning


def test_five_channels_through_a_residual_sum_are_cut_as_the_example_says():
    (example,) = doctest.DocTestFinder(recurse=False).find(dnal_mini.pruning)
    assert len(example.examples) > 8
    runner = doctest.DocTestRunner(verbose=False)
    result = runner.run(example)
    assert (result.failed, result.attempted) == (0, len(example.examples))
