"""Times against a clock that we hold, sentences against numbers made by hand."""

import copy
import json
import sys
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from dnal_mini.gating import add_gates
from dnal_mini.measure.compare import FORMS, compare, speed_words, timing
from dnal_mini.measure.cost import cost

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


def test_a_small_net_that_needs_more_of_something_has_a_ratio_below_one():
    few, wide = nn.Conv2d(3, 5, 1), nn.Conv2d(3, 7, 5, stride=5)  # 143 places read 3, 4 read 75
    ratios = {r["what"]: r["ratio"] for r in compare(few, wide, SHAPE, **QUICK).sizes}
    assert ratios["macs"] == (143 * 5 * 3) / (2 * 2 * 7 * 75)
    assert ratios["params"] == (5 * 3 + 5) / (7 * 75 + 7)
    assert ratios["params"] < ratios["macs"] < 1.1


def test_all_of_a_comparison_survives_json():
    found = vars(compare(net(5), net(3), SHAPE, forms=TORCH_FORMS, **QUICK))
    assert json.loads(json.dumps(found)) == found


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
    monkeypatch.setattr("dnal_mini.deployment.export.ONNX_PACKAGES", (package,))
    monkeypatch.setitem(sys.modules, package, None)
    result = compare(net(5), net(3), SHAPE, forms=("onnxruntime",), **QUICK)
    reasons = {r["not_measured"] for r in result.rows}
    assert [(r["form"], r["batch"]) for r in result.rows] == [("onnxruntime", b) for b in (1, 3)]
    assert len(reasons) == 1
    assert f"got no package {package}" in str(result)
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
    assert len(reasons) == 2
    assert all("float64" in reason for reason in reasons)


def test_a_form_that_cannot_be_made_leaves_the_others():
    class Fickle(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if float(x.sum()) > 0 else -x

    result = compare(
        net(5, Fickle()), net(3, Fickle()), SHAPE, forms=("eager", "onnxruntime"), **QUICK
    )
    by_form = {r["form"]: r for r in result.rows}
    assert "cannot follow" in by_form["onnxruntime"]["not_measured"]
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


# --- the sentences ---------------------------------------------------------------------------


def test_with_gains_everywhere_the_largest_is_named_and_nothing_else():
    rows = [row(batch=1, speed_up=3.0), row("deployed", 8, speed_up=3.5)]
    (sentence,) = speed_words(rows, 4.0)
    assert sentence == (
        "Largest gain: 3.50 times faster in deployed at batch 8, "
        "0.88 of what 4.00 times fewer MACs could give."
    )


def test_every_form_without_a_gain_is_named_with_its_speed_up():
    rows = [
        row(speed_up=3.0),
        row(batch=8, speed_up=0.5),
        row("deployed", 8, speed_up=1.04),
        row("deployed", 64, speed_up=1.5, gain=False),  # as if the times overlapped
    ]
    gain, lost = speed_words(rows, 4.0)
    assert gain.startswith("Largest gain: 3.00 times faster in eager at batch 1")
    assert lost == (
        "No gain, with the speed-up: eager at batch 8, 0.5 (0.5 to 0.5); "
        "deployed at batch 8, 1.04 (1.04 to 1.04); "
        "not told apart: deployed at batch 64, 1.5 (1.5 to 1.5)."
    )
    assert speed_words(rows[3:], 4.0) == ["Not told apart: deployed at batch 64, 1.5 (1.5 to 1.5)."]


def test_no_gain_anywhere_is_said_first():
    first, second = speed_words([row(speed_up=1.0), row(batch=8, speed_up=1.01)], 3.9)
    assert first == (
        "No gain in any form that was measured: 3.90 times fewer MACs saved no time here."
    )
    assert "eager at batch 1, 1 (1 to 1); eager at batch 8, 1.01 (" in second


def test_rows_that_were_not_measured_get_no_words():
    missing = {"form": "onnxruntime", "batch": 1, "not_measured": "onnxruntime is not installed"}
    assert speed_words([missing], 4.0) == []
    assert not any("onnx" in sentence for sentence in speed_words([missing, row()], 4.0))


def test_the_printed_page_holds_every_row_and_every_sentence():
    found = compare(add_gates(net(11)), net(5), SHAPE, forms=TORCH_FORMS, **QUICK)
    page = str(found)
    assert 2 <= len(found.words) <= 3
    assert all(f"- {sentence}" in page.splitlines() for sentence in found.words)
    for r in found.rows:
        (line,) = [
            line for line in page.splitlines() if line.split()[:2] == [r["form"], str(r["batch"])]
        ]
        assert f"{1e3 * r['dense_s']:.3g} (" in line
        assert line.endswith(f"{r['efficiency']:.2f}")
    assert all(f"{r['dense']:,}" in page for r in found.sizes)
    assert set(FORMS) >= set(TORCH_FORMS)
