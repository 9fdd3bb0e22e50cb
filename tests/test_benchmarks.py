"""The benchmarks of training speed run, and what they print is what they promise to measure."""

import importlib.util
import json
import random
import shutil
import sys
import warnings
from pathlib import Path
from types import ModuleType

import pytest
import torch
from small_runs import copy_of
from torch import nn

from dnal_mini.gating import add_gates, arch_parameters, gates, set_gates
from dnal_mini.models import MODELS
from dnal_mini.refused import Refused
from dnal_mini.runs.runlog import read

FOLDER = Path(__file__).parents[1] / "benchmarks"


def load(name: str) -> ModuleType:
    """A benchmark as a module, not run."""
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_main(
    name: str, words: str, out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> dict:
    """The one row that a benchmark prints; the record holds the same."""
    monkeypatch.setattr(sys, "argv", [name, *words.split(), "--out", str(out)])
    load(name).main()
    (line,) = capsys.readouterr().out.splitlines()
    (kept,) = read(out)
    row = json.loads(line)
    assert kept == {"kind": "benchmark"} | row
    assert row["benchmark"] == name
    assert row["device"]["threads"] == torch.get_num_threads()
    return row


def small_net() -> nn.Module:
    layers = [nn.Conv2d(3, 5, 3, bias=False), nn.BatchNorm2d(5), nn.ReLU()]
    layers += [nn.Conv2d(5, 7, 3, bias=False), nn.BatchNorm2d(7), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(7, 4))


def test_the_three_gate_layouts_give_one_output_and_one_gradient():
    net = small_net().double()
    nets = load("arch_step").layouts(net)
    x = torch.randn(6, 3, 9, 11, dtype=torch.float64)
    outputs, gradients = [], []
    for gated in (nets["folded"], nets["explicit"], nets["authors"]):
        logits = gated(x)
        loss = nn.functional.cross_entropy(logits, torch.arange(6) % 4)
        gradients.append(torch.cat(torch.autograd.grad(loss, list(arch_parameters(gated)))))
        outputs.append(logits)
    for output, gradient in zip(outputs[1:], gradients[1:], strict=True):
        torch.testing.assert_close(output, outputs[0])
        torch.testing.assert_close(gradient, gradients[0])
    assert gradients[0].abs().max() > 0
    by_hand = add_gates(net)
    set_gates(by_hand, mode="soft")  # s = 0: every channel is halved, whatever delta is
    torch.testing.assert_close(outputs[0], by_hand(x))


def test_only_the_gates_get_gradients_in_an_architecture_step():
    module = load("arch_step")
    nets = module.layouts(small_net())
    x, labels = torch.randn(6, 3, 9, 11), torch.arange(6) % 4
    before = {name: p.clone() for name, p in nets["folded"].named_parameters()}
    step, resting = module.step_of(nets["folded"], x, labels, torch.float32)
    step()
    changed = {n for n, p in nets["folded"].named_parameters() if not torch.equal(p, before[n])}
    assert changed == {"1.gate.s", "4.gate.s"}
    floats = (3 * 5 * 9 + 5 * 7 * 9) + 4 * (5 + 7) + (7 * 4 + 4)  # convs, norms, linear
    gates = 2 * (5 + 7) + 2  # s and its momentum; delta
    assert resting == 4 * (floats + gates) + 2 * 8  # two counters of batches


def test_peak_bytes_counts_what_is_alive_at_once():
    module, start = load("arch_step"), torch.zeros(1000)

    def step() -> None:
        kept = start + 1  # 4,000 bytes
        for _ in range(5):
            torch.cat([kept, kept])  # 8,000 bytes, gone at once
        kept.view(10, 100).t()  # no bytes of its own

    assert module.peak_bytes(step, torch.device("cpu")) == 12_000


def test_arch_step_prints_ratios_of_time_and_memory(tmp_path, monkeypatch, capsys):
    words = "--models vgg16 --width 0.05 --batch 4 --steps 2 --precision float32"
    row = run_main("arch_step", words, tmp_path / "new" / "a.jsonl", monkeypatch, capsys)
    assert set(row["time"]) == set(row["memory"]) == {"plain", "folded", "explicit", "authors"}
    assert row["time"]["plain"]["over_plain"] == 1
    assert row["ratio"] == row["time"]["folded"]["over_plain"] > 0
    assert row["memory_ratio"] < 1 < row["memory"]["explicit"]["step_over_plain"]
    assert row["reached"] == (row["ratio"] <= row["goal"])


def test_pad_step_compares_a_cut_net_at_its_widths_and_padded(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(FOLDER))
    words = "--width 0.07 --batch 4 --steps 2 --precision float32 --shares 0.3"
    row = run_main("pad_step", words, tmp_path / "new" / "a.jsonl", monkeypatch, capsys)
    assert set(row["time"]) == {"plain", "cut", "padded"}
    assert 0.2 < row["macs_share"] < 0.4
    assert row["ratio"] == min(row["time"][name]["over_plain"] for name in ("cut", "padded"))
    assert row["reached"] == (row["ratio"] <= row["goal"] == 0.75)


def test_loader_prints_the_share_of_speed_that_data_leave(tmp_path, monkeypatch, capsys):
    words = "--width 0.05 --batches 8 --steps 2 --rounds 2 --precision float32"
    row = run_main("loader", words, tmp_path / "l.jsonl", monkeypatch, capsys)
    speeds = row["real_images_per_s"] / row["synthetic_images_per_s"]
    assert row["p10"] <= row["ratio"] <= row["p90"]
    assert min(row["p10"], 0.5) * 0.9 < speeds
    assert set(row["input_s"]) == {"take", "augment", "normalise", "as_input"}


def test_scaling_prints_three_fits_and_all_points(tmp_path, monkeypatch, capsys):
    words = (
        "--images 16 24 32 --widths 0.05 0.1 0.2 --batches 4 8 16 --at 16 0.05 8 --epochs 2"
        " --precision float32"
    )
    row = run_main("scaling", words, tmp_path / "s.jsonl", monkeypatch, capsys)
    assert {name: len(points) for name, points in row["points"].items()} == dict.fromkeys(
        ("images", "width", "batch"), 3
    )
    assert row["points"]["batch"][2] | {"seconds": 0, "all": 0} == {
        "images": 16, "width": 0.05, "batch": 16, "seconds": 0, "all": 0,
    }  # fmt: skip
    assert all(fit["r2"] <= 1 for fit in row["fits"].values())


def test_budget_step_prints_what_floors_and_each_cut_take(tmp_path, monkeypatch, capsys):
    words = "--model vgg16 --width 0.07 --share 0.4"
    row = run_main("budget_step", words, tmp_path / "b.jsonl", monkeypatch, capsys)
    count = sum(len(gate.s) for gate in gates(add_gates(MODELS["vgg16"](10, 0.07))).values())
    assert row["gates"] == 13
    assert 0 < row["kept"] < count
    assert 2 ** (row["steps"] - 1) <= 2 * count, "it halves what is left"
    assert row["step_s"] <= row["slowest_step_s"] <= row["bisection_s"]
    assert row["reached"] == (row["step_s"] <= row["goal_s"])


def raises(error: Exception):
    def go_on(folder: Path) -> None:
        raise error

    return go_on


def test_the_fate_of_a_damaged_run_is_told_from_what_is_read(finished, tmp_path):
    module, folder = load("damage"), copy_of(finished, tmp_path / "run")[0]

    def fate(go_on=lambda folder: None) -> str:
        return module.fate(folder, finished, go_on)

    assert fate() == "unchanged"
    assert fate(lambda folder: warnings.warn("got a cut line", stacklevel=1)) == "warned"
    assert fate(raises(Refused("got another sum"))) == "refused"
    assert fate(raises(Refused("got\nlines"))) == fate(raises(KeyError("net"))) == "crashed"
    module.flip(folder / "small.safetensors", random.Random(5))
    assert fate() == "told"
    shutil.copy(folder / "pruned.safetensors", folder / "small.safetensors")
    assert fate() == "silent"  # a sound file of other weights


def test_the_fits_find_the_laws_that_made_the_points():
    def points(name: str, values: list[float], law: object) -> list[dict]:
        return [{"images": 640, name: value, "seconds": law(value)} for value in values]

    found = load("scaling").fits(
        {
            "images": [{"images": n, "seconds": 0.25 + 0.002 * n} for n in (100, 300, 700, 900)],
            "width": points("width", [0.1, 0.3, 0.5], lambda width: 4 * width**1.75),
            "batch": points("batch", [5, 20, 80], lambda batch: 1.5 + 32 / batch),
        }
    )
    assert found["images"] == {"slope_s_per_image": 0.002, "intercept_s": 0.25, "r2": 1}
    assert found["width"] == {"exponent": 1.75, "seconds_at_width_1": 4, "r2": 1}
    assert found["batch"] == {"a_s": 1.5, "b_s": 32, "r2": 1, "s_per_step": 0.05}


def test_random_nets_go_on_where_they_stopped_and_a_wrong_one_is_named(
    tmp_path, monkeypatch, capsys
):
    bench, out, summary = load("random_nets"), tmp_path / "nets.jsonl", tmp_path / "s.jsonl"
    for count in (2, 3):
        words = f"--count {count} --seed0 5 --out {out} --summary {summary}"
        monkeypatch.setattr(sys, "argv", ["random_nets", *words.split()])
        bench.main()
    lines = [json.loads(line) for line in summary.read_text().splitlines()]
    assert [(line["nets"], line["mismatches"], line["reloaded"]) for line in lines] == [
        (2, 0, 0),
        (3, 0, 1),
    ]
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["seed"] for row in rows] == [5, 6, 7]
    assert not capsys.readouterr().err
    assert bench.complaint(rows[0] | {"eval": 1e-3}) == "outputs differ by 1.0e-03 (eval)"
    assert bench.complaint(rows[0] | {"train_larger": float("nan")})
    assert bench.complaint(rows[2] | {"reloaded": False}) == "the file gives another net"
    assert bench.complaint(rows[0] | {"error": "Refused: got"}) == "Refused: got"
