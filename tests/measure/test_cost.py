"""Counts against products worked out by hand, times against a clock that we hold."""

import copy
import time

import pytest
import torch
from torch import Tensor, nn

from dnal_mini.gating import add_gates, set_gates
from dnal_mini.measure.authors import authors_counting
from dnal_mini.measure.cost import Cost, cost, layer_table
from dnal_mini.measure.latency import latency, latency_pair
from dnal_mini.models import MODELS, mobilenetv2, vgg16

FLOAT = 4  # bytes


class Residual(nn.Module):
    """``relu(x) + conv2(conv1(relu(x)))`` with 5 channels outside and 3 inside."""

    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(5, 3, 3, padding=1)
        self.conv2 = nn.Conv2d(3, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(x)
        return x + self.conv2(self.conv1(x))


class Clock:
    """Stands in for the real clock: only ``Slow`` layers make it go on."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


class Slow(nn.Module):
    """Takes ``delays`` seconds on the clock, the last one again and again; notes its name."""

    def __init__(self, clock: Clock, *delays: float, name: str = "", log: list | None = None):
        super().__init__()
        self.clock, self.delays, self.name = clock, list(delays), name
        self.log: list[str] = [] if log is None else log

    def forward(self, x: Tensor) -> Tensor:
        self.clock.now += self.delays.pop(0) if len(self.delays) > 1 else self.delays[0]
        self.log.append(self.name)
        return x


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("dnal_mini.measure.latency.time", clock)
    return clock


def chain() -> nn.Sequential:
    """Convolutions 3 -> 13 -> 7 on 17 x 19 pixels, then 7 -> 11 units."""
    return nn.Sequential(
        nn.Conv2d(3, 13, (5, 7), stride=(2, 1), bias=False),  # 7 x 13 pixels
        nn.BatchNorm2d(13),
        nn.ReLU(inplace=True),
        nn.Conv2d(13, 7, 3),  # 5 x 11 pixels
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(7, 11),
    )


def test_macs_and_parameters_equal_the_products_by_hand():
    macs = (7 * 13) * 13 * (3 * 5 * 7) + (5 * 11) * 7 * (13 * 3 * 3) + 7 * 11
    params = 13 * 3 * 5 * 7 + 2 * 13 + (7 * 13 * 3 * 3 + 7) + (7 * 11 + 11)
    result = cost(chain(), (3, 17, 19))
    assert (result.macs, result.params) == (macs, params)


@pytest.mark.parametrize("groups", [1, 3, 15])
def test_grouped_convolutions_count_only_their_own_inputs(groups):
    conv = nn.Conv2d(15, 15, 3, padding=1, groups=groups)
    assert cost(conv, (15, 7, 11)).macs == (7 * 11) * 15 * (15 // groups) * 9


def test_peak_of_a_chain_is_its_largest_input_plus_output():
    # image 3*17*19, conv1 and norm 13*7*13 each (ReLU in place), conv2 7*5*11
    peak = max(3 * 17 * 19 + 13 * 7 * 13, 2 * 13 * 7 * 13, 13 * 7 * 13 + 7 * 5 * 11)
    assert cost(chain(), (3, 17, 19)).peak_activation_bytes == FLOAT * peak


def test_the_image_counts():
    conv = nn.Conv2d(11, 2, 3)
    assert cost(conv, (11, 7, 5)).peak_activation_bytes == FLOAT * (11 * 7 * 5 + 2 * 5 * 3)


def test_a_skip_stays_alive_through_its_branch():
    # at conv1 x and the inner map; at conv2 x, inner and branch; at the sum x, branch and sum
    pixels = 7 * 13
    assert cost(Residual(), (5, 7, 13)).peak_activation_bytes == FLOAT * pixels * (5 + 5 + 5)
    wide = Residual()
    wide.conv1, wide.conv2 = nn.Conv2d(5, 17, 3, padding=1), nn.Conv2d(17, 5, 1)
    assert cost(wide, (5, 7, 13)).peak_activation_bytes == FLOAT * pixels * (5 + 17 + 5)


def test_views_and_in_place_operations_take_no_memory():
    aliases = nn.Sequential(nn.Identity(), nn.Dropout(0.5), nn.ReLU(inplace=True), nn.Flatten())
    assert cost(aliases, (3, 5, 7)).peak_activation_bytes == FLOAT * 3 * 5 * 7
    assert cost(nn.ReLU(), (3, 5, 7)).peak_activation_bytes == 2 * FLOAT * 3 * 5 * 7


def test_peak_ignores_who_still_holds_a_tensor_that_nobody_reads():
    class Hoarder(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            held = [x.mean((2, 3))]  # never read
            held += [x[:, :1] * 2]
            return held[1].sum((2, 3))

    # the doubled channel while the image is still there
    assert cost(Hoarder(), (3, 5, 7)).peak_activation_bytes == FLOAT * (3 + 1) * 5 * 7


@pytest.mark.parametrize(
    ("model", "floats"),
    [
        ("vgg16", 2 * 64 * 32 * 32),  # conv 2: input and output
        ("resnet56", 3 * 16 * 32 * 32),  # first stage: skip, input, output
        ("mobilenetv2", (24 + 2 * 144) * 32 * 32),  # second 24-channel block: skip, hidden twice
    ],
)
def test_peak_of_the_published_nets_sits_where_the_layer_sizes_say(model, floats):
    net = MODELS[model]()
    assert cost(net).peak_activation_bytes == FLOAT * floats


@pytest.mark.parametrize(("dtype", "factor"), [(torch.float64, 2), (torch.bfloat16, 0.5)])
def test_only_the_bytes_depend_on_the_dtype(dtype, factor):
    single, other = cost(chain(), (3, 17, 19)), cost(chain().to(dtype), (3, 17, 19))
    assert (other.params, other.macs) == (single.params, single.macs)
    assert other.peak_activation_bytes == factor * single.peak_activation_bytes


def test_cost_needs_no_real_weights():
    net = vgg16(width=0.3)
    assert cost(copy.deepcopy(net).to("meta")) == cost(net)


@pytest.mark.parametrize("order", ["conv-bn-ss-relu", "conv-bn-relu-ss", "conv-ss-bn-relu"])
@pytest.mark.parametrize("mode", ["off", "soft", "hard"])
def test_gates_cost_nothing(order, mode):
    net = vgg16(width=0.1)
    gated = add_gates(net, order)
    set_gates(gated, mode=mode, delta=3.0)
    assert cost(gated) == cost(net)
    assert authors_counting(gated) == authors_counting(net)


def test_counting_leaves_the_net_as_it_was():
    net = add_gates(vgg16(width=0.2))
    set_gates(net, mode="soft")
    net.train()
    net.features[1].eval()
    before = copy.deepcopy(net.state_dict())
    flags = [module.training for module in net.modules()]
    cost(net)
    layer_table(net)
    latency(net, budget_s=0.01, min_repeats=1, channels_last=True)
    assert [module.training for module in net.modules()] == flags
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    assert all(p.is_contiguous() for p in net.parameters())


def test_a_failed_count_leaves_no_trace():
    net = add_gates(vgg16(width=0.2))
    for measure in (cost, layer_table, latency):
        with pytest.raises(ValueError, match="the net cannot take"):
            measure(net, (4, 32, 32))
    assert net.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


def test_cost_reads_well():
    text = str(Cost(params=14_991_946, macs=313_463_808, peak_activation_bytes=524_288))
    assert text == "14.99 M parameters, 313.46 M MACs, 0.524 MB of activations at the peak"


@pytest.mark.parametrize("model", MODELS)
def test_layer_tables_sum_to_the_cost(model):
    net = MODELS[model](width=0.3)
    rows, total = layer_table(net), cost(net)
    # the table uses a closed form, cost counts what runs
    assert sum(row["macs"] for row in rows) == total.macs
    assert sum(row["params"] for row in rows) == total.params


def test_the_layer_table_of_vgg16_is_the_published_one():
    rows = layer_table(vgg16())
    millions = [1.769, 37.749, 18.874, 37.749, 18.874, 37.749, 37.749, 18.874, 37.749, 37.749]
    millions += [9.437, 9.437, 9.437, 0.262, 0.005]
    params = [1_920, 37_056, 74_112, 147_840, 295_680, 590_592, 590_592, 1_181_184]
    params += [2_360_832] * 5
    layers = [row for row in rows if row["kind"] != "norm"]
    assert [round(row["macs"] / 1e6, 3) for row in layers] == millions
    convs = [i for i, row in enumerate(rows) if row["kind"] == "conv"]
    assert [rows[i]["params"] + rows[i + 1]["params"] for i in convs] == params  # with its norm
    assert [row["params"] for row in layers[-2:]] == [512 * 512 + 512, 5_130]


def test_a_row_says_what_the_layer_is():
    first, second, *_, last = layer_table(chain(), (3, 17, 19))
    assert first == {
        "name": "0",
        "kind": "conv",
        "kernel": "5x7",
        "stride": "2x1",
        "groups": 1,
        "macs": 7 * 13 * 13 * 3 * 5 * 7,
        "params": 13 * 3 * 5 * 7,
        "height": 7,
        "width": 13,
        "in_channels": 3,
        "out_channels": 13,
    }
    assert (second["kind"], second["params"], second["in_channels"]) == ("norm", 26, 13)
    assert (last["kind"], last["in_channels"], last["out_channels"]) == ("linear", 7, 11)


def test_depthwise_layers_are_named():
    kinds = [row["kind"] for row in layer_table(mobilenetv2(width=0.3))]
    assert kinds.count("depthwise") == 17
    assert kinds.count("conv") == 1 + 17 * 2 + 4 + 1  # stem, expand and project, shortcuts, head


def test_a_layer_that_runs_twice_costs_twice_but_holds_its_weights_once():
    conv = nn.Conv2d(5, 5, 3, padding=1)
    twice = nn.Sequential(conv, nn.ReLU(), conv)
    assert [row["name"] for row in layer_table(twice, (5, 7, 11))] == ["0", "0"]
    macs, params = 7 * 11 * 5 * 5 * 9, 5 * 5 * 9 + 5
    result = cost(twice, (5, 7, 11))
    assert (result.macs, result.params) == (2 * macs, params)
    assert authors_counting(twice, (5, 7, 11)) == (2 * (macs + 5 + 5), params + 2 * 5)


def test_the_authors_counting_by_hand():
    net = chain()
    macs = cost(net, (3, 17, 19)).macs
    flops = macs + (13 + 7) + 7 + 11  # one per conv channel, per conv bias, per linear bias
    params = 13 * 3 * 5 * 7 + 2 * 13 + (7 * 13 * 9 + 7 + 2 * 7) + (7 * 11 + 11)
    assert authors_counting(net, (3, 17, 19)) == (flops, params)


def test_the_layer_table_refuses_layers_that_it_cannot_count():
    net = nn.Sequential(nn.ConvTranspose2d(3, 5, 3))
    with pytest.raises(ValueError, match="got ConvTranspose2d at '0'"):
        layer_table(net, (3, 7, 7))
    assert cost(net, (3, 7, 7)).macs == 3 * 5 * 9 * 7 * 7


def test_latency_is_the_median_and_its_spread(clock):
    unseen = (50.0, 70.0, 90.0)  # first pass and warm-up: must not show
    timed = (3, 11, 1, 9, 2, 7, 10, 4, 8, 5, 6)
    net = Slow(clock, *unseen, *(t for time in timed for t in (60.0, time)))  # one unseen before
    result = latency(net, budget_s=0.1, min_repeats=11)
    # 11 values: a tenth of the way from rank 0 to rank 10 is rank 1
    assert (result.median_s, result.p10_s, result.p90_s) == pytest.approx((6, 2, 10))
    assert (result.device, result.threads) == ("cpu", torch.get_num_threads())


def test_latency_keeps_its_budget_but_does_its_repeats(clock):
    net = Slow(clock, 0.25)
    latency(net, budget_s=10, min_repeats=1)
    assert len(net.log) == 1 + 8 + 40  # first pass, 2 s of warm-up, 10 s of passes, half untimed
    net.log.clear()
    latency(net, budget_s=0.1, min_repeats=7)
    assert len(net.log) == 1 + 2 + 14


def test_a_pair_is_timed_in_turns(clock):
    log: list[str] = []
    first, second = Slow(clock, 4, name="a", log=log), Slow(clock, 12, name="b", log=log)
    fast, slow = latency_pair(first, second, budget_s=0.1, min_repeats=6)
    assert (fast.median_s, slow.median_s) == pytest.approx((4, 12))
    assert "".join(log) == "ab" + "aabb" + 3 * "aabbbbaa"  # first passes, warm-up, timed


def test_latency_runs_on_the_real_clock():
    class Sleep(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            time.sleep(0.01)
            return x

    result = latency(Sleep(), budget_s=0.05, min_repeats=3)
    assert 0.01 <= result.p10_s <= result.median_s <= result.p90_s


def test_a_batch_reaches_the_net_in_evaluation_mode():
    seen = []

    class Witness(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append((tuple(x.shape), self.training, torch.is_inference_mode_enabled()))
            return x

    latency(Witness(), (3, 5, 7), batch=11, budget_s=0.001, min_repeats=2)
    assert set(seen) == {((11, 3, 5, 7), False, True)}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_counts_on_a_gpu_equal_those_on_the_cpu():
    net = vgg16(width=0.3)
    on_gpu = copy.deepcopy(net).cuda()
    assert cost(on_gpu) == cost(net)
    assert latency(on_gpu, budget_s=0.1).device == torch.cuda.get_device_name()


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        ((32, 32), "image_shape"),
        ((3, 0, 32), "need positive ints"),
        ((3, 32.0, 32), "need positive ints"),
        ((4, 32, 32), "the net cannot take .* 3 channels"),
        ((3, 8, 8), "the net cannot take"),
        ((3, 64, 64), "the net cannot take"),
    ],
)
@pytest.mark.parametrize("measure", [cost, layer_table, authors_counting, latency])
def test_image_shapes_that_do_not_fit_are_refused_in_one_line(measure, shape, reason):
    with pytest.raises(ValueError, match=reason) as error:
        measure(vgg16(width=0.1), shape)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "arguments",
    [{"batch": 0}, {"batch": 2.5}, {"budget_s": 0}, {"budget_s": float("nan")}, {"min_repeats": 0}],
)
def test_latency_refuses_settings_that_measure_nothing(arguments):
    with pytest.raises(ValueError, match=f"got .*{next(iter(arguments))}"):
        latency(nn.Identity(), **arguments)
