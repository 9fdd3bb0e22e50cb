"""Times against a clock that we hold, words against numbers made by hand."""

import copy
import importlib.util
import json
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from dnal_mini.gating import add_gates
from dnal_mini.layers.channelmap import ChannelMap
from dnal_mini.measure.compare import (
    FORMS,
    compare,
    fixed_cost_words,
    map_words,
    memory_words,
    speed_words,
    timing,
    width_words,
)
from dnal_mini.measure.cost import cost, layer_table

SHAPE = (3, 11, 13)
QUICK = {"batches": (1, 3), "budget_s": 1e-3, "min_repeats": 2}
TORCH_FORMS = ("eager", "channels_last", "deployed")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads that wait for each other on a busy machine would make these tests slow."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Clock:
    """Stands in for the real clock, also in copies of a net: only ``Slow`` layers move it."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def __deepcopy__(self, memo: dict) -> "Clock":
        return self


class Slow(nn.Module):
    """Takes ``fixed_s`` per call and ``image_s`` per image on the clock."""

    fx_leaf = True

    def __init__(self, clock: Clock, fixed_s: float, image_s: float) -> None:
        super().__init__()
        self.clock, self.fixed_s, self.image_s = clock, fixed_s, image_s

    def forward(self, x: Tensor) -> Tensor:
        self.clock.now += self.fixed_s + self.image_s * len(x)
        return x


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("dnal_mini.measure.latency.time", clock)
    return clock


def net(width: int, *layers: nn.Module, classes: int = 5) -> nn.Sequential:
    """Two convolutions with a norm each, 3 -> width -> 2 * width, and a linear layer."""
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, bias=False),
        nn.BatchNorm2d(2 * width),
        *layers,
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(2 * width, classes),
    )


def row(form: str = "eager", batch: int = 1, speed_up: float = 2.0, **changes: object) -> dict:
    """A row of times without any spread: the dense net takes 8 ms a batch, MACs fell 4 times."""
    return {
        "form": form,
        "batch": batch,
        **timing([8e-3] * 2, [8e-3 / speed_up] * 2, 4.0),
        **changes,
    }


# --- the numbers -----------------------------------------------------------------------------


def test_percentiles_of_eleven_turns_are_the_second_and_the_tenth():
    dense = [float(20 + turn) for turn in range(11)]
    small = [5.0] * 11
    found = timing(dense[::-1], small, macs_ratio=4.0)
    assert (found["dense_p10_s"], found["dense_s"], found["dense_p90_s"]) == (21, 25, 29)
    assert (found["small_p10_s"], found["small_s"], found["small_p90_s"]) == (5, 5, 5)
    ratios = found["speed_up_p10"], found["speed_up"], found["speed_up_p90"]
    assert ratios == pytest.approx((21 / 5, 25 / 5, 29 / 5))
    assert found["efficiency"] == pytest.approx(25 / 5 / 4)


def test_a_machine_that_slows_down_does_not_widen_the_speed_up():
    small = [1.0, 1.1, 1.3, 1.7, 1.9]
    found = timing([3 * s for s in small], small, 5.0)
    assert found["speed_up_p10"] == pytest.approx(3)
    assert found["speed_up_p90"] == pytest.approx(3)
    assert found["dense_p90_s"] > 1.5 * found["dense_p10_s"]


@pytest.mark.parametrize(
    ("dense_s", "small_s", "gain"),
    [
        ([10, 11], [5, 6], True),
        ([10.6, 10.6], [10, 10], True),
        ([10.4, 10.4], [10, 10], False),  # under 1.05
        ([10, 20, 30], [5, 9, 14], False),  # 2 times faster, but from 12 and up to 13
        ([5, 5], [10, 10], False),
    ],
)
def test_a_gain_is_five_percent_with_intervals_apart(dense_s, small_s, gain):
    assert timing(dense_s, small_s, 4.0)["gain"] is gain


def test_compare_reads_the_clock_per_form_and_batch(clock):
    dense = net(11, Slow(clock, fixed_s=1.0, image_s=4.0))
    small = net(5, Slow(clock, fixed_s=1.0, image_s=1.0))
    found = compare(dense, small, SHAPE, (1, 7), TORCH_FORMS, budget_s=50.0)
    ratio = cost(dense, SHAPE).macs / cost(small, SHAPE).macs
    assert [(r["form"], r["batch"]) for r in found.rows] == [
        (form, batch) for form in TORCH_FORMS for batch in (1, 7)
    ]
    for r in found.rows:
        dense_s, small_s = 1.0 + 4.0 * r["batch"], 1.0 + 1.0 * r["batch"]
        assert r["dense_s"] == pytest.approx(dense_s)
        assert r["small_s"] == pytest.approx(small_s)
        assert r["speed_up_p10"] == r["speed_up_p90"] == pytest.approx(dense_s / small_s)
        assert r["efficiency"] == pytest.approx(dense_s / small_s / ratio)


def test_sizes_are_the_costs_and_the_bytes_of_a_real_file(tmp_path):
    dense, small = net(13), net(7)
    found = compare(dense, small, SHAPE, forms=("eager",), **QUICK)
    sizes = {r["what"]: r for r in found.sizes}
    for name, module in (("dense", dense), ("small", small)):
        save_file(module.state_dict(), tmp_path / name)
        assert sizes["file_bytes"][name] == (tmp_path / name).stat().st_size
        for what, value in vars(cost(module, SHAPE)).items():
            assert sizes[what][name] == value
    assert sizes["macs"]["ratio"] == cost(dense, SHAPE).macs / cost(small, SHAPE).macs


def test_rows_and_sizes_survive_json():
    found = compare(net(5), net(3), SHAPE, forms=TORCH_FORMS, **QUICK)
    assert json.loads(json.dumps([found.rows, found.sizes])) == [found.rows, found.sizes]


def test_both_nets_are_left_alone():
    dense, small = add_gates(net(5)).train(), net(3).train()
    before = [copy.deepcopy(m.state_dict()) for m in (dense, small)]
    compare(dense, small, SHAPE, forms=TORCH_FORMS, **QUICK)
    for module, old in zip((dense, small), before, strict=True):
        torch.testing.assert_close(module.state_dict(), old, rtol=0, atol=0)
        assert all(part.training for part in module.modules())


@pytest.mark.parametrize("order", ["conv-bn-ss-relu", "conv-bn-relu-ss", "conv-ss-bn-relu"])
def test_gates_of_the_dense_net_are_no_part_of_it(order, clock):
    dense = net(5, Slow(clock, 1.0, 0.0))
    plain, gated = [
        compare(module, net(3, Slow(clock, 1.0, 0.0)), SHAPE, (2,), ("eager",), budget_s=5.0)
        for module in (dense, add_gates(dense, order))
    ]
    assert plain.sizes == gated.sizes
    assert "The dense net is compared without its 2 gates." in gated.words
    assert not any("gate" in sentence for sentence in plain.words)


def test_an_object_that_holds_a_module_stands_for_it():
    held = compare(
        SimpleNamespace(module=net(5)),
        SimpleNamespace(module=net(3)),
        SHAPE,
        forms=("eager",),
        **QUICK,
    )
    assert held.sizes == compare(net(5), net(3), SHAPE, forms=("eager",), **QUICK).sizes


# --- what cannot be measured -----------------------------------------------------------------


@pytest.mark.parametrize("package", ["onnxruntime", "onnx", "onnxscript"])
def test_a_missing_package_is_told_in_the_row(package, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == package else found(name) or True
    )
    result = compare(net(5), net(3), SHAPE, forms=("onnxruntime",), **QUICK)
    reason = f"{package} is not installed"
    assert result.rows == [
        {"form": "onnxruntime", "batch": batch, "not_measured": reason} for batch in (1, 3)
    ]
    assert f"not measured: {reason}" in str(result)
    assert result.words == []  # nothing was measured, so nothing is said


def test_onnxruntime_is_timed_where_it_is_installed():
    for package in ("onnxruntime", "onnx", "onnxscript"):
        pytest.importorskip(package)
    result = compare(net(5), net(3), SHAPE, forms=("onnxruntime",), **QUICK)
    assert [r["batch"] for r in result.rows] == [1, 3]
    assert all(r["dense_s"] > 0 and r["small_s"] > 0 for r in result.rows)


def test_onnxruntime_is_not_timed_in_another_precision_than_the_nets():
    result = compare(net(5).double(), net(3).double(), SHAPE, **QUICK)
    reasons = [r["not_measured"] for r in result.rows if r["form"] == "onnxruntime"]
    missing = importlib.util.find_spec("onnxruntime") is None
    assert all(("not installed" if missing else "float64") in reason for reason in reasons)
    assert len(reasons) == 2


def test_a_form_that_cannot_be_made_leaves_the_others():
    class Fickle(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if float(x.sum()) > 0 else -x

    result = compare(
        net(5, Fickle()), net(3, Fickle()), SHAPE, forms=("eager", "deployed"), **QUICK
    )
    by_form = {r["form"]: r for r in result.rows}
    assert "cannot trace" in by_form["deployed"]["not_measured"]
    assert by_form["eager"]["dense_s"] > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"forms": ("eager", "fast")}, "form 'fast'"),
        ({"forms": ()}, "at least one"),
        ({"batches": ()}, "at least one"),
        ({"batches": (0,)}, "batch 0"),
        ({"budget_s": 0.0}, "budget_s"),
        ({"image_shape": (3, 11)}, "image_shape"),
        ({"image_shape": (5, 11, 13)}, "image_shape"),
        ({"small": add_gates(net(3))}, "masked, not pruned"),
        ({"small": net(3).to("meta")}, "one device"),
    ],
)
def test_what_cannot_be_compared_is_refused_in_one_line(changes, message):
    arguments = {"dense": net(5), "small": net(3), "image_shape": SHAPE, "forms": ("eager",)}
    with pytest.raises(ValueError, match=message) as error:
        compare(**{**arguments, **QUICK, **changes})
    assert "\n" not in str(error.value)


# --- the words: speed ------------------------------------------------------------------------


def test_with_gains_everywhere_no_sentence_denies_them():
    rows = [row(batch=1, speed_up=3.0), row("deployed", 8, speed_up=3.5)]
    words = " ".join(speed_words(rows, 4.0))
    assert "3.50 times faster in deployed at batch 8, 0.88 of what 4.00 times fewer MACs" in words
    assert "Least gain: 3.00 times faster in eager at batch 1" in words
    assert "No gain" not in words


def test_every_kind_of_failure_is_called_no_gain_with_its_place():
    rows = [
        row(speed_up=3.0),
        row(batch=8, speed_up=0.5),
        row("deployed", 8, speed_up=1.04),
        row("deployed", 64, speed_up=1.5, gain=False),  # as if the times overlapped
    ]
    slower, equal, unclear = speed_words(rows, 4.0)[1:]
    assert "No gain, the small net is slower: eager at batch 8 (0.50;" in slower
    assert "No gain, the speed-up is under 1.05: deployed at batch 8 (1.04;" in equal
    assert "overlap: deployed at batch 64 (1.50;" in unclear
    assert not any("eager at batch 1" in sentence for sentence in (slower, equal, unclear))


def test_no_gain_anywhere_is_said_first():
    rows = [row(speed_up=1.0), row(batch=8, speed_up=1.01)]
    first, second = speed_words(rows, 3.9)
    assert first == (
        "No gain in any form that was measured: 3.90 times fewer MACs saved no time here."
    )
    assert "eager at batch 1 (1.00; 1.00 to 1.00), eager at batch 8 (1.01;" in second


def test_rows_that_were_not_measured_get_no_words():
    missing = {"form": "onnxruntime", "batch": 1, "not_measured": "onnxruntime is not installed"}
    assert speed_words([missing], 4.0) == fixed_cost_words([missing]) == []
    assert not any("onnx" in sentence for sentence in speed_words([missing, row()], 4.0))


def test_a_fixed_cost_is_suspected_only_where_small_batches_are_dear_and_inefficient():
    dear = [row(batch=1, small_s=6e-3), row(batch=64, small_s=64e-3)]  # 6 ms and 1 ms an image
    (sentence,) = fixed_cost_words(dear)
    assert "eager (6.0 times batch 64)" in sentence
    assert "may" in sentence
    fair = [row(batch=1, small_s=6e-3), row(batch=64, small_s=64 * 4e-3)]
    efficient = [row(batch=1, small_s=6e-3, efficiency=0.9), dear[1]]
    assert fixed_cost_words(fair) == fixed_cost_words(efficient) == []
    assert fixed_cost_words(dear[:1]) == []


# --- the words: widths, index operations, memory ---------------------------------------------


def tables(dense: nn.Module, small: nn.Module) -> tuple[list[dict], list[dict]]:
    return layer_table(dense, SHAPE), layer_table(small, SHAPE)


def test_odd_widths_are_named_with_the_next_multiple_and_its_price():
    dense, small = tables(net(32), net(11))  # 11 -> 16 and 22 -> 24 channels, 5 classes stay
    (sentence,) = width_words(dense, small)
    outer, inner = 11 * 13 * 27, 9 * 11 * 9  # pixels times kernel, the image has 3 channels
    macs = outer * 11 + inner * 11 * 22 + 22 * 5
    rounded = outer * 16 + inner * 16 * 24 + 24 * 5
    share = inner * 11 * 22 / macs
    assert f"3 (22, next 24, {share:.1%} of the MACs), 0 (11, next 16, " in sentence
    assert f"{rounded / macs - 1:.1%} more MACs" in sentence
    assert sentence.startswith("2 layers")  # not the classes, which nobody cut
    assert "may" in sentence
    assert "round_to=8" in sentence


def test_multiples_of_eight_are_not_complained_of():
    assert width_words(*tables(net(32), net(16))) == []
    (sentence,) = width_words(*tables(net(32), net(24)), multiple=16)
    assert "0 (24, next 32, " in sentence
    assert "round_to=16" in sentence
    assert sentence.startswith("1 layer ")  # 48 is a multiple of both


@pytest.mark.parametrize(("capability", "named"), [("AVX2", False), ("AVX512", True)])
def test_blocks_of_sixteen_are_a_matter_of_the_processor(capability, named, monkeypatch, clock):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    dense, small = net(32, Slow(clock, 9.0, 0.0)), net(24, Slow(clock, 9.0, 0.0))
    words = compare(dense, small, SHAPE, (2,), ("eager",), budget_s=50.0).words
    assert any("round_to=16" in sentence for sentence in words) is named


def test_an_odd_width_that_the_cut_did_not_make_is_left_alone():
    assert width_words(*tables(net(13), net(13))) == []


def test_the_next_width_never_passes_the_dense_one():
    (sentence,) = width_words(*tables(net(13), net(11)))
    assert "(11, next 13, " in sentence
    assert "(22, next 24, " in sentence


def test_layers_without_a_share_in_the_macs_are_not_named():
    dense, small = tables(net(32), net(16))
    for table, width in ((dense, 32), (small, 7)):
        extra = {"name": "tail", "kind": "conv", "out_channels": width, "in_channels": 16}
        table.append(table[0] | extra | {"macs": 10})
    assert width_words(dense, small) == []
    small[-1]["macs"] = 10**6
    (sentence,) = width_words(dense, small)
    assert "tail (7, next 8, " in sentence


def test_columns_of_a_flatten_grow_with_their_channels():
    def flat(width: int) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(3, width, 3), nn.Flatten(), nn.Linear(width * 9 * 11, 7))

    (sentence,) = width_words(*tables(flat(16), flat(5)))
    macs, rounded = ((9 * 11 * 27) * width + (9 * 11) * width * 7 for width in (5, 8))
    assert f"{rounded / macs - 1:.1%} more MACs" in sentence


def test_a_depthwise_layer_grows_in_proportion_to_its_width():
    def thin(width: int) -> nn.Sequential:
        deep = nn.Conv2d(width, width, 3, padding=1, groups=width)
        return nn.Sequential(nn.Conv2d(3, width, 1), deep)

    (sentence,) = width_words(*tables(thin(24), thin(13)))
    assert f"{16 / 13 - 1:.1%} more MACs" in sentence


def test_a_layer_that_the_surgery_wrapped_is_found_under_its_old_name():
    dense, small = net(32), net(16)
    small[3] = nn.Sequential(ChannelMap(list(range(16))), nn.Conv2d(16, 19, 3))
    small[4], small[7] = nn.BatchNorm2d(19), nn.Linear(19, 5)
    (sentence,) = width_words(*tables(dense, small))
    assert "3.1 (19, next 24, " in sentence


def test_index_operations_that_were_not_there_before_are_named_with_the_way_out():
    own = ChannelMap([0, -1, 1], stride=2)  # a shortcut of the architecture
    maps = [ChannelMap([2, 0, 1]) for _ in range(2)]
    dense, small = nn.Sequential(own, nn.Conv2d(3, 7, 3)), nn.Sequential(own, *maps, net(2))
    words = compare(dense, small, SHAPE, forms=("eager",), **QUICK).words
    (sentence,) = [sentence for sentence in words if "index operation" in sentence]
    assert sentence.startswith("2 index operations (1, 2) ")
    assert 'residual="tie"' in sentence
    assert map_words([]) == []
    assert "a, b, c, d, 3 more" in map_words(list("abcdefg"))[0]


def test_thin_layers_are_told_with_their_share_of_bytes_and_macs():
    def thin(width: int) -> nn.Sequential:
        deep = nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False)
        return nn.Sequential(nn.Conv2d(3, width, 1, bias=False), deep)

    small, dense = 5, 11
    pixels = 11 * 13
    (sentence,) = memory_words(*tables(thin(dense), thin(small)), batch=7)
    moved = [7 * pixels * (3 + 3 * w) + 3 * w + 9 * w for w in (dense, small)]
    macs = [pixels * (3 * w + 9 * w) for w in (dense, small)]
    assert sentence.startswith("At batch 7, 2 of 2 layers do under 4 MACs per byte (1 of them")
    assert "100% of the bytes, 100% of the MACs" in sentence
    assert f"bytes fell {moved[0] / moved[1]:.2f} times" in sentence
    assert f"MACs fell {macs[0] / macs[1]:.2f} times" in sentence
    assert "may" in sentence


def test_a_linear_layer_is_thin_at_batch_one_and_not_in_a_large_batch():
    dense, small = (nn.Sequential(nn.Flatten(), nn.Linear(429, w)) for w in (257, 131))
    assert "1 of 1 layer do" in memory_words(*tables(dense, small), batch=1)[0]
    assert memory_words(*tables(dense, small), batch=64) == []


def test_thick_layers_raise_no_suspicion():
    wide = nn.Conv2d(64, 64, 3, padding=1)
    table = layer_table(nn.Sequential(wide), (64, 32, 32))
    assert memory_words(table, table) == []


# --- together --------------------------------------------------------------------------------


def test_reasons_are_given_only_where_something_is_missing(clock):
    def words(image_s: float) -> str:
        dense, small = net(32, Slow(clock, 0.0, 90.0)), net(11, Slow(clock, 0.0, image_s))
        return " ".join(compare(dense, small, SHAPE, (2,), ("eager",), budget_s=900.0).words)

    assert "round_to=8" in words(90.0)
    assert "No gain" in words(90.0)
    assert "round_to=8" not in words(10.0)  # 9 times faster for about 8 times fewer MACs
    assert "No gain" not in words(10.0)


def test_a_net_whose_layers_are_unknown_gets_no_words_on_widths():
    words = compare(net(7, nn.PReLU()), net(7, nn.PReLU()), SHAPE, forms=("eager",), **QUICK).words
    assert any("The widths were not looked at: got PReLU" in sentence for sentence in words)


def test_a_small_net_that_needs_more_of_anything_is_told():
    words = compare(net(3), net(5), SHAPE, forms=("eager",), **QUICK).words
    assert f"The small net needs more params: {cost(net(5), SHAPE).params:,} against" in words[1]


def test_the_printed_page_holds_every_row_and_every_sentence():
    found = compare(net(11), net(5), SHAPE, forms=TORCH_FORMS, **QUICK)
    page = str(found)
    assert all(sentence in page for sentence in found.words)
    for r in found.rows:
        (line,) = [
            line for line in page.splitlines() if line.split()[:2] == [r["form"], str(r["batch"])]
        ]
        assert f"{1e3 * r['dense_s']:.3g} (" in line
        assert line.endswith(f"{r['efficiency']:.2f}")
    assert all(f"{r['dense']:,}" in page for r in found.sizes)
    assert set(FORMS) >= set(TORCH_FORMS)
