"""The channel analysis on nets whose facts can be told by looking at them, and its two laws."""

import copy
from collections import OrderedDict
from typing import Any

import pytest
import torch
from random_nets import SHAPE as RANDOM_SHAPE
from random_nets import build, program
from random_nets import settle as settle_random
from small_nets import Again, close, hold_the_facts, named
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from dnal_mini.pruning.analysis import analyse, facts_of, folds
from dnal_mini.pruning.facts import CONSTANT, FIXED, LIVE, ZERO
from dnal_mini.pruning.prepare import prepare, tensors_of
from dnal_mini.pruning.provenance import Shadow

SHAPE = (3, 6, 4)


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


def facts(net: nn.Module, shape=SHAPE, **options):
    analysis = analyse(net, shape, **options)
    return {name: analysis.facts[node] for name, node in named(analysis).items()}, analysis


def where(mask: Tensor) -> list[int]:
    return mask.nonzero().flatten().tolist()


# --- a chain ---------------------------------------------------------------------------------


def test_closed_channels_are_zero_up_to_the_flatten():
    """G1: no bias, beta or running statistic leaks past a closed gate."""
    net = chain(bias=True)
    close(net.bn2, 1, 6)
    found, _ = facts(net)
    for name in ("bn2", "relu2", "pool", "flat"):
        assert where(found[name].state == ZERO) == [1, 6]
    assert found["conv2"].state.eq(LIVE).all()


def test_a_filter_before_a_closed_channel_is_not_needed():
    net = chain()
    close(net.bn2, 1, 6)
    found, _ = facts(net)
    assert where(~found["conv2"].needed) == [1, 6]
    assert found["relu1"].needed.all()


def test_a_channel_that_only_meets_zero_weights_is_not_needed():
    net = chain()
    net.conv2.weight.data[:, 3] = 0
    found, _ = facts(net)
    assert where(~found["relu1"].needed) == [3]
    assert where(~found["conv1"].needed) == [3]
    assert found["relu1"].state.eq(LIVE).all()


def test_a_channel_that_only_meets_filters_nobody_needs_is_not_needed():
    net = chain()
    close(net.bn2, 0, 2)
    net.conv2.weight.data[[1, 3, 4, 5, 6], 2] = 0  # channel 2 goes into filters 0 and 2 alone
    found, _ = facts(net)
    assert where(~found["conv1"].needed) == [2]


def test_gamma_zero_alone_leaves_a_constant():
    net = chain()
    net.bn1.weight.data[2] = 0
    net.bn1.bias.data[2] = 0.25
    net.bn1.weight.data[4] = 0
    net.bn1.bias.data[4] = -0.25
    found, _ = facts(net)
    assert found["bn1"].state.tolist() == [LIVE, LIVE, CONSTANT, LIVE, CONSTANT]
    assert found["relu1"].state.tolist() == [LIVE, LIVE, CONSTANT, LIVE, CONSTANT]
    assert found["relu1"].value.tolist() == [0, 0, 0.25, 0, 0]
    assert found["relu1"].steady.all()
    assert where(found["relu1"].silent) == [4]
    assert where(~found["relu1"].needed) == [4]  # 0 in both modes: nobody misses it


def test_zero_into_a_norm_is_a_constant_not_a_zero():
    """G2, G15: beta in train mode, shifted by the running statistics in eval mode."""
    net = chain()
    close(net.bn1, 0, 1, 2, 3, 4)
    found, analysis = facts(net)
    assert found["conv2"].state.eq(ZERO).all()
    assert not found["bn2"].state.eq(ZERO).any()
    assert not found["bn2"].steady.any()
    assert analysis.output_is_constant()


def test_a_bias_behind_zero_input_is_a_constant():
    net = chain(bias=True)
    close(net.bn1, 0, 1, 2, 3, 4)
    found, _ = facts(net)
    assert found["conv2"].state.eq(CONSTANT).all()
    torch.testing.assert_close(found["conv2"].value, net.conv2.bias.detach().double())


def test_a_constant_that_meets_padding_is_fixed_but_not_constant():
    """G2: right in the interior, wrong at the border."""
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


# --- residual blocks, candidates, several outputs --------------------------------------------


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
    """G6: in-channel j of the consumer goes only if branch and skip are zero at j."""
    net = Residual()
    close(net.bn2, 0, 1)
    close(net.stem[1], 1, 2)
    found, _ = facts(net)
    assert where(found["add"].state == ZERO) == [1]


def test_constants_that_cancel_in_a_sum_are_silent():
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    net[1].weight.data.zero_()
    net[1].bias.data.copy_(torch.tensor([0.5, -0.25, 1.0, 0.0]))

    class Cancels(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = net

        def forward(self, x: Tensor) -> Tensor:
            x = self.body(x)
            return x - x.abs()

    found, _ = facts(Cancels())
    assert found["sub"].state.tolist() == [CONSTANT, CONSTANT, CONSTANT, ZERO]
    assert found["sub"].value.tolist() == [0, -0.5, 0, 0]
    assert where(found["sub"].silent) == [0, 2]


class Candidates(nn.Module):
    """A supernet's mixed layer: a skip and three candidates that are added up."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 5, 1)
        self.paths = nn.ModuleList(
            nn.Sequential(nn.Conv2d(5, 5, k, padding=k // 2), nn.BatchNorm2d(5)) for k in (1, 3, 5)
        )
        self.norm = nn.BatchNorm2d(5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x))
        return x + sum(path(x) for path in self.paths)


def test_a_sum_of_candidates_is_zero_where_all_of_them_are():
    """G13: all gates 0 and the skip 0 at j."""
    net = Candidates()
    for path, closed in zip(net.paths, [(0, 1, 2), (0, 1, 3), (0, 1)], strict=True):
        close(path[1], *closed)
    close(net.norm, 1, 2)
    found, _ = facts(net)
    assert where(found["add_3"].state == ZERO) == [1]


@pytest.mark.parametrize("outputs", ["tuple", "dict", "nested"])
def test_everything_that_is_returned_is_needed(outputs):
    class Several(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 5, 1), nn.Conv2d(5, 4, 1)
            self.second.weight.data[:, 2] = 0

        def forward(self, x: Tensor) -> Any:
            x = self.first(x)
            y = self.second(x)
            return {"tuple": (y, x), "dict": {"a": y, "b": x}, "nested": [y, {"c": (x,)}]}[outputs]

    found, _ = facts(Several())
    assert found["first"].needed.all()
    assert found["second"].needed.all()


# --- walls -----------------------------------------------------------------------------------


class Odd(nn.Module):
    """A known body, an operation that is not known, a head."""

    def __init__(self, operation: Any) -> None:
        super().__init__()
        self.body, self.fc, self.operation = chain()[:3], nn.Linear(5, 4), operation

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.operation(self.body(x)).mean((2, 3)))


@pytest.mark.parametrize(
    ("operation", "name"),
    [
        (lambda x: torch.cumsum(x, 1), "cumsum in forward"),
        (lambda x: x.softmax(1), "softmax in forward"),
        (lambda x: F.layer_norm(x, (5, 6, 4)), "layer_norm in forward"),
        (lambda x: x @ x.transpose(2, 3), "matmul in forward"),
        (lambda x: x + x.mean(), "mean in forward"),
        (lambda x: x - x.mean(1, keepdim=True), "mean in forward"),
        (lambda x: x.mean(0, keepdim=True), "mean in forward"),
        (nn.GroupNorm(1, 5), "GroupNorm operation"),
        (nn.Softmax2d(), "Softmax2d operation"),
    ],
)
def test_an_operation_that_is_not_known_is_a_wall_that_keeps_everything(operation, name):
    net = Odd(operation)
    close(net.body.bn1, 0, 2)
    found, analysis = facts(net)
    assert next(iter(analysis.walls.values())) == name
    assert found["body_relu1"].needed.all()
    wall = next(node for node in analysis.walls if node in analysis.facts)
    assert analysis.facts[wall].state.eq(LIVE).all()
    hold_the_facts(net, SHAPE)


# --- what if ---------------------------------------------------------------------------------


def test_zeroed_answers_what_if_a_layer_died():
    """G16, G17: a layer that closes as a whole cuts a chain, but not a net with a skip."""
    assert analyse(Residual(), SHAPE, zeroed={"stem.1"}).output_is_constant()
    assert analyse(chain(), SHAPE, zeroed={"bn1"}).output_is_constant()
    assert not analyse(Residual(), SHAPE, zeroed={"bn2"}).output_is_constant()


def test_one_trace_answers_many_questions():
    net = chain()
    graph, tensors = prepare(net, SHAPE), tensors_of(net)
    answers = [
        facts_of(graph, tensors, zeroed).output_is_constant() for zeroed in ((), {"bn2"}, ())
    ]
    assert answers == [False, True, False]


def test_the_analysis_leaves_the_net_alone():
    net = chain()
    net.bn1.eval()
    before, modes = copy.deepcopy(net.state_dict()), [m.training for m in net.modules()]
    analyse(net, SHAPE)
    assert [m.training for m in net.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


# --- constants that a bias can take ----------------------------------------------------------


@pytest.mark.parametrize("reader", [nn.BatchNorm2d(4), nn.ReLU()], ids=["norm", "no norm"])
def test_a_constant_that_depends_on_the_mode_folds_only_in_front_of_a_norm(reader):
    """G15: a norm takes any constant away again in train mode."""
    net = nn.Sequential(
        nn.Conv2d(3, 5, 1, bias=False), nn.BatchNorm2d(5), nn.Conv2d(5, 5, 1, groups=5, bias=False),
        nn.BatchNorm2d(5), nn.Conv2d(5, 4, 1), reader,
    )  # fmt: skip
    close(net[1], 0, 3)
    analysis = analyse(net, SHAPE)
    node = named(analysis)["4"]
    folded = where(folds(node, analysis))
    assert folded == ([0, 3] if isinstance(reader, nn.BatchNorm2d) else [])


# --- two laws on random nets -----------------------------------------------------------------


def random_net(seed: int) -> nn.Module:
    """A random net with closed channels in its norms."""
    net = settle_random(build(program(seed)), seed).double()
    draw = torch.Generator().manual_seed(seed)
    for norm in (m for m in net.modules() if isinstance(m, nn.BatchNorm2d) and m.affine):
        close(norm, *where(torch.rand(norm.num_features, generator=draw) < 0.4))
    return net


TWENTIES = [0, *(pytest.param(first, marks=pytest.mark.slow) for first in (20, 40))]


@pytest.mark.parametrize("first", TWENTIES)
def test_facts_of_random_nets_are_what_runs_by(first):
    """Zero is zero in both modes, a constant is its value, fixed does not see the image."""
    seen = [0, 0, 0, 0]
    for seed in range(first, first + 20):
        found = hold_the_facts(random_net(seed), RANDOM_SHAPE)
        seen = [a + b for a, b in zip(seen, found, strict=True)]
    assert min(seen) > 0


class Noise(Again):
    """Adds noise to all that is live or fixed and that nobody is said to need."""

    def __init__(self, analysis: Any, share: float) -> None:
        super().__init__(analysis)
        self.share, self.hit = share, 0

    def see(self, node: fx.Node, result: Any) -> Any:
        found, shadow = self.analysis.facts.get(node), self.analysis.values.get(node)
        no_numbers = not isinstance(shadow, Shadow) or result.dtype == torch.bool
        if found is None or no_numbers or node.op == "placeholder":
            return result
        channel = shadow.channels if shadow.raw is not None else shadow.codes() // 2**32
        loose = (~found.needed & (found.state >= FIXED))[channel]
        self.hit += int(loose.any())
        return result + self.share * loose * torch.randn(result.shape, dtype=result.dtype)


@pytest.mark.parametrize("first", TWENTIES)
def test_noise_in_channels_that_nobody_needs_changes_no_output(first):
    hit = 0
    for seed in range(first, first + 20):
        analysis = analyse(random_net(seed), RANDOM_SHAPE)
        images = torch.randn(2, *RANDOM_SHAPE, dtype=torch.float64)
        with torch.no_grad():
            quiet, loud = (Noise(analysis, share) for share in (0.0, 1.0))
            pairs = zip(
                tree_leaves(quiet.on(images)),
                tree_leaves(loud.on(images)),
                strict=True,
            )
            for expected, got in pairs:
                torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
        hit += loud.hit
    assert hit > 20


# --- mistakes --------------------------------------------------------------------------------


class DataDependent(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda: analyse(chain(), (3, 17, 19)), "image_shape"),
        (lambda: analyse(chain(), (4, 6, 4)), "image_shape"),
        (lambda: analyse(DataDependent(), SHAPE), "a branch on the numbers in a tensor"),
    ],
)
def test_mistakes_get_one_line(call, word):
    with pytest.raises(ValueError, match=rf"^got [^\n]*{word}[^\n]*$"):
        call()
