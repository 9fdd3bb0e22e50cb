"""Codes that travel through the forward code instead of numbers."""

import pytest
import torch
from torch import Tensor

from dnal_mini.pruning.provenance import SPOTS, Broken, Shadow, fresh, held, read, rows_of_blocks


def of_channels(codes: Tensor) -> list[int]:
    """Channel of every element of the first image."""
    return (codes[0] // SPOTS).flatten().tolist()


def test_every_element_has_a_code_of_its_own_that_names_its_channel():
    codes = fresh(3, (2, 3, 5, 4)).codes()
    assert codes.shape == (2, 3, 5, 4)
    assert torch.equal(codes[0], codes[1])
    assert len(codes[0].unique()) == 3 * 5 * 4
    assert of_channels(codes) == [0] * 20 + [1] * 20 + [2] * 20


def test_the_spots_of_all_channels_are_the_same():
    spots = fresh(3, (2, 3, 5, 4)).codes()[0] % SPOTS
    assert torch.equal(spots[0], spots[1])
    assert torch.equal(spots[0], spots[2])
    assert len(spots[0].unique()) == 20


@pytest.mark.parametrize("axis", [1, 2, 3])
def test_reading_codes_gives_back_the_shadow(axis):
    shadow = held(torch.tensor([4, 0, 7]), (2, 5, 6, 4), axis)
    back = read(shadow.codes())
    assert (back.shape, back.axis) == (shadow.shape, axis)
    assert back.channels.tolist() == [4, 0, 7]
    assert back.plain


def test_a_flattened_image_has_a_key_for_every_column():
    flat = read(fresh(3, (2, 3, 2, 4)).codes().flatten(1))
    assert (flat.shape, flat.axis) == ((2, 24), 1)
    assert flat.channels.tolist() == [0] * 8 + [1] * 8 + [2] * 8
    assert not flat.plain
    assert len(flat.keys.unique()) == 24


def test_an_exchanged_order_is_read():
    codes = fresh(6, (2, 6, 3, 4)).codes()
    shuffled = codes.view(2, 2, 3, 3, 4).transpose(1, 2).reshape(2, 6, 3, 4)
    assert read(shuffled).channels.tolist() == [0, 3, 1, 4, 2, 5]
    assert read(codes.permute(0, 2, 3, 1)).axis == 3


def test_what_has_no_single_channel_axis_keeps_a_code_per_element():
    grid = read(fresh(6, (2, 6, 3)).codes().view(2, 2, 3, 3))
    assert grid.keys is None
    assert grid.raw is not None
    assert not grid.plain
    assert torch.equal(grid.channels[0, :, :, 0], torch.arange(6).view(2, 3))


def test_different_spots_under_one_channel_are_not_uniform():
    codes = fresh(2, (2, 2, 3)).codes().clone()
    codes[:, 1] = codes[:, 1].flip(1)  # the second channel runs backwards
    assert read(codes).keys is None


@pytest.mark.parametrize(
    "mixed",
    [
        lambda codes: codes.transpose(0, 1),
        lambda codes: codes.reshape(1, -1),
        lambda codes: codes.flatten(),
        lambda codes: torch.stack([codes[0], codes[1].flip(0)]),
    ],
)
def test_mixing_images_and_channels_is_broken(mixed):
    with pytest.raises(Broken, match="images and channels"):
        read(mixed(fresh(3, (2, 3, 4)).codes()))


def test_relabelling_changes_names_and_keeps_spots():
    flat = read(fresh(3, (2, 3, 2, 2)).codes().flatten(1))
    named = flat.relabelled(torch.tensor([5, 9, 2]))
    assert named.channels.tolist() == [5] * 4 + [9] * 4 + [2] * 4
    assert torch.equal(named.keys % SPOTS, flat.keys % SPOTS)
    with pytest.raises(Broken, match="does not belong"):
        flat.relabelled(torch.tensor([5, -1, 2]))


def test_resizing_changes_everything_but_the_channels():
    small = held(torch.tensor([4, 0, 7]), (2, 3, 8, 6)).resized((2, 9, 4, 3))
    assert small.shape == (2, 3, 4, 3)  # 9 is the full width: the narrow one stays
    assert small.channels.tolist() == [4, 0, 7]


def test_blocks_are_the_rows_of_a_grid():
    grid = read(fresh(6, (2, 6, 3)).codes().view(2, 2, 3, 3))
    assert [block.tolist() for block in rows_of_blocks(grid)] == [[0, 1, 2], [3, 4, 5]]
    assert rows_of_blocks(fresh(6, (2, 6, 3))) == []


def test_a_shadow_of_one_channel_or_one_pixel_can_be_read():
    assert read(fresh(1, (2, 1, 3, 3)).codes()).channels.tolist() == [0]
    assert read(fresh(4, (2, 4, 1, 1)).codes()).channels.tolist() == [0, 1, 2, 3]
    assert isinstance(read(fresh(4, (2, 4)).codes()), Shadow)
