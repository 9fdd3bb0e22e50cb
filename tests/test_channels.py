"""The channel analysis on nets whose facts can be told by looking at them."""

from collections import OrderedDict

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dnal_mini.channels import CONSTANT, FIXED, LIVE, ZERO, ChannelMap, analyse


def close(norm: nn.Module, *channels: int) -> None:
    """What a closed gate leaves behind: gamma = beta = 0."""
    norm.weight.data[list(channels)] = 0
    norm.bias.data[list(channels)] = 0


def chain(bias: bool = False) -> nn.Sequential:
    """3 -> 5 -> 7 channels on 6x4 pixels, flatten, 4 classes."""
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(3, 5, 3, padding=1, bias=bias),
            bn1=nn.BatchNorm2d(5),
            relu1=nn.ReLU(),
            conv2=nn.Conv2d(5, 7, 3, padding=1, bias=bias),
            bn2=nn.BatchNorm2d(7),
            relu2=nn.ReLU(),
            pool=nn.MaxPool2d(2),
            flat=nn.Flatten(),
            fc=nn.Linear(7 * 3 * 2, 4),
        )
    )


def facts(net: nn.Module, shape=(3, 6, 4), **options):
    analysis = analyse(net, shape, **options)
    return {node.name: found for node, found in analysis.facts.items()}, analysis


def test_closed_channels_are_zero_up_to_the_flatten():
    net = chain()
    close(net.bn2, 1, 6)
    found, _ = facts(net)
    for name in ("bn2", "relu2", "pool", "flat"):
        assert (found[name].state == ZERO).nonzero().flatten().tolist() == [1, 6]
    assert found["flat"].columns == 6
    assert found["conv2"].state.eq(LIVE).all()


def test_a_filter_before_a_closed_channel_is_not_needed():
    net = chain()
    close(net.bn2, 1, 6)
    found, _ = facts(net)
    assert (~found["conv2"].needed).nonzero().flatten().tolist() == [1, 6]
    assert found["relu1"].needed.all()


def test_a_channel_that_only_meets_zero_weights_is_not_needed():
    net = chain()
    net.conv2.weight.data[:, 3] = 0
    found, _ = facts(net)
    assert (~found["relu1"].needed).nonzero().flatten().tolist() == [3]
    assert found["relu1"].state.eq(LIVE).all()


def test_gamma_zero_alone_leaves_a_constant():
    net = chain()
    net.bn1.weight.data[2] = 0
    net.bn1.bias.data[2] = 0.25
    net.bn1.weight.data[4] = 0
    net.bn1.bias.data[4] = -0.25
    found, _ = facts(net)
    assert found["bn1"].state.tolist() == [LIVE, LIVE, CONSTANT, LIVE, CONSTANT]
    assert found["relu1"].state.tolist() == [LIVE, LIVE, CONSTANT, LIVE, ZERO]
    assert found["relu1"].value[2] == 0.25
    assert not found["bn1"].needed[4]  # ReLU makes it zero whatever it is


@pytest.mark.parametrize(
    ("activation", "state"),
    [(nn.Sigmoid(), CONSTANT), (nn.Tanh(), ZERO), (nn.PReLU(), ZERO), (nn.Hardsigmoid(), CONSTANT)],
)
def test_an_activation_of_zero_is_its_own_value(activation, state):
    net = chain()
    net.relu1 = activation
    close(net.bn1, 0)
    found, _ = facts(net)
    assert found["relu1"].state[0] == state
    assert found["relu1"].value[0] == float(activation(torch.zeros(1)).detach())


def test_zero_into_a_norm_is_a_constant_not_a_zero():
    net = chain()
    close(net.bn1, 0, 1, 2, 3, 4)
    found, analysis = facts(net)
    assert found["conv2"].state.eq(ZERO).all()
    assert not found["bn2"].state.eq(ZERO).any()  # beta in train mode, shifted in eval mode
    assert analysis.output_is_constant()


def test_a_bias_behind_zero_input_is_a_constant():
    net = chain(bias=True)
    close(net.bn1, 0, 1, 2, 3, 4)
    found, _ = facts(net)
    assert found["conv2"].state.eq(CONSTANT).all()
    torch.testing.assert_close(found["conv2"].value, net.conv2.bias.detach().double())


def test_a_constant_that_meets_padding_is_fixed_but_not_constant():
    net = chain(bias=True)
    net.bn1.weight.data.zero_()
    net.bn1.bias.data.fill_(0.5)
    found, analysis = facts(net)
    assert found["relu1"].state.eq(CONSTANT).all()
    assert found["conv2"].state.eq(FIXED).all()
    assert analysis.output_is_constant()
    image = net.eval()[:4](torch.randn(2, 3, 6, 4))
    torch.testing.assert_close(image[0], image[1])  # the same for every image,
    assert float((image[0, :, 0, 0] - image[0, :, 2, 2]).detach().abs().max()) > 1e-3  # not here


class Residual(nn.Module):
    """Stem, one basic block, linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.BatchNorm2d(5), nn.ReLU())
        self.conv1, self.bn1 = nn.Conv2d(5, 7, 3, padding=1), nn.BatchNorm2d(7)
        self.conv2, self.bn2 = nn.Conv2d(7, 5, 3, padding=1), nn.BatchNorm2d(5)
        self.fc = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + x)
        return self.fc(x.mean((2, 3)))


def test_a_sum_is_zero_only_where_both_sides_are():
    net = Residual()
    close(net.bn2, 0, 1)
    close(net.stem[1], 1, 2)
    found, _ = facts(net)
    assert (found["add"].state == ZERO).nonzero().flatten().tolist() == [1]


def test_scatter_frees_the_branch_end_and_tie_does_not():
    net = Residual()
    close(net.bn2, 0, 1)
    found, analysis = facts(net, residual="scatter")
    assert [node.name for node in analysis.scatters] == ["bn2"]
    assert found["bn2"].layout != found["add"].layout
    assert int(analysis.keeps()[found["bn2"].layout].sum()) == 3
    found, analysis = facts(net, residual="tie")
    assert not analysis.scatters
    assert found["bn2"].layout == found["add"].layout
    assert int(analysis.keeps()[found["bn2"].layout].sum()) == 5


def test_unknown_operations_are_walls_that_keep_everything():
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = chain()[:3]
            self.fc = nn.Linear(5, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(torch.cumsum(self.body(x), 1).mean((2, 3)))

    net = Odd()
    close(net.body.bn1, 0, 2)
    found, analysis = facts(net)
    assert any("cumsum" in wall for wall in analysis.walls)
    assert analysis.keeps()[found["body_relu1"].layout].all()


def test_channel_map_equals_indexing():
    x = torch.randn(2, 5, 7, 9)
    out = ChannelMap([3, -1, 0, 0], stride=2)(x)
    expected = torch.stack([x[:, 3], torch.zeros_like(x[:, 0]), x[:, 0], x[:, 0]], 1)
    torch.testing.assert_close(out, expected[:, :, ::2, ::2], rtol=0, atol=0)
    torch.testing.assert_close(ChannelMap([4, 1])(x), x[:, [4, 1]], rtol=0, atol=0)


def test_zeroed_answers_what_if_a_layer_died():
    assert analyse(Residual(), (3, 6, 4), zeroed={"stem.1"}).output_is_constant()
    assert analyse(chain(), (3, 6, 4), zeroed={"bn1"}).output_is_constant()
    assert not analyse(Residual(), (3, 6, 4), zeroed={"bn2"}).output_is_constant()


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda: ChannelMap([0, -2]), "indices"),
        (lambda: ChannelMap([]), "indices"),
        (lambda: analyse(chain(), (3, 17, 19)), "image_shape"),
        (lambda: analyse(DataDependent(), (3, 6, 4)), "cannot trace"),
    ],
)
def test_mistakes_get_one_line(call, word):
    with pytest.raises(ValueError, match=rf"^got [^\n]*{word}[^\n]*$"):
        call()


class DataDependent(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x
