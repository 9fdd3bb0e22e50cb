"""ChannelMap equals indexing, whatever it is used for."""

import pytest
import torch

from dnal_mini.layers.channelmap import ChannelMap


def test_a_map_with_holes_equals_indexing():
    x = torch.randn(2, 5, 7, 9)
    out = ChannelMap([3, -1, 0, 0], stride=2)(x)
    expected = torch.stack([x[:, 3], torch.zeros_like(x[:, 0]), x[:, 0], x[:, 0]], 1)
    torch.testing.assert_close(out, expected[:, :, ::2, ::2], rtol=0, atol=0)
    torch.testing.assert_close(ChannelMap([4, 1])(x), x[:, [4, 1]], rtol=0, atol=0)


@pytest.mark.parametrize("sizes", [(), (7,), (7, 3), (2, 7, 3)])
def test_vectors_signals_images_and_volumes_are_mapped(sizes):
    x = torch.randn(2, 5, *sizes)
    out = ChannelMap([-1, 4, 2, -1, -1, 0])(x)
    assert out.shape == (2, 6, *sizes)
    torch.testing.assert_close(out[:, [1, 2, 5]], x[:, [4, 2, 0]], rtol=0, atol=0)
    assert not out[:, [0, 3, 4]].any()


def test_an_empty_branch_emits_zeros_even_where_its_input_is_not_finite():
    x = torch.full((2, 5, 7, 9), torch.nan)
    out = ChannelMap([-1] * 3, stride=2)(x)
    assert out.shape == (2, 3, 4, 5)
    assert not out.any()


def test_a_gradient_goes_to_the_channels_that_are_taken():
    """A channel that is taken twice gets the sum of both."""
    x = torch.zeros(1, 4, 2, 2, requires_grad=True)
    ChannelMap([3, -1, 0, 3])(x).sum().backward()
    assert x.grad[0, :, 0, 0].tolist() == [1, 0, 0, 2]


def test_scattering_undoes_gathering():
    x, kept = torch.randn(2, 6, 3, 5), [1, 4, 5]
    there = ChannelMap(kept)(x)
    back = ChannelMap([kept.index(c) if c in kept else -1 for c in range(6)])(there)
    torch.testing.assert_close(back[:, kept], x[:, kept], rtol=0, atol=0)
    assert not back[:, [0, 2, 3]].any()


def test_it_holds_no_tensor_that_a_file_would_keep():
    assert not ChannelMap([1, 0, -1]).state_dict()
    assert "-> 3, stride=2" in repr(ChannelMap([1, 0, -1], 2))


@pytest.mark.parametrize(
    ("source", "stride"), [([0, -2], 1), ([], 1), ([[0, 1]], 1), ([0, 1], 0), ([0], -1)]
)
def test_mistakes_get_one_line(source, stride):
    with pytest.raises(ValueError, match=r"^got [^\n]*indices >= -1[^\n]*$"):
        ChannelMap(source, stride)
