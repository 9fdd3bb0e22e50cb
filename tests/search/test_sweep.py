"""Sweeps: the same results as single runs, trained once where shared, and gone on with."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_runs import changed

from dnal_mini.config import Budget, SearchConfig
from dnal_mini.models import MODELS
from dnal_mini.pruning.netfile import load
from dnal_mini.runs import runlog
from dnal_mini.search import driver, sweep
from dnal_mini.search import driver as search

CONFIG = changed(weight_epochs=2, arch_epochs=1, fine_tune_epochs=1)
PRICES = (1e-3, 3e-2)


def outcome(folder: Path) -> tuple[dict, dict[str, torch.Tensor], list[float]]:
    """What a run has found, without what differs from one time to the next."""
    rows = runlog.read(folder)
    assert rows[-1]["kind"] == "result"
    result = {name: rows[-1][name] for name in rows[-1] if name not in {"seconds", "latency_s"}}
    net = load(folder / "small.safetensors", MODELS["vgg16"]).module
    return result, net.state_dict(), [row["loss"] for row in runlog.epochs(rows)]


def check_same(ours: Path, theirs: Path) -> None:
    """Two runs agree to the last bit."""
    one, two = outcome(ours), outcome(theirs)
    assert one[0] == two[0]
    assert one[2] == two[2]
    assert one[1].keys() == two[1].keys()
    assert all(torch.equal(value, two[1][name]) for name, value in one[1].items())


class Rows:
    """Keeps the rows of a sweep; calls ``then(name, row)`` after each."""

    def __init__(self, then=lambda name, row: None) -> None:
        self.seen, self.then = [], then

    def __call__(self, name: str, row: dict) -> None:
        self.seen.append((name, row))
        self.then(name, row)

    def trained(self, stage: str) -> list[str]:
        """The runs that trained an epoch of a stage, once per epoch."""
        rows = [(name, row) for name, row in self.seen if row.get("stage") == stage]
        return [n for n, row in rows if row["kind"] == "epoch" and not row.get("taken_over")]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Rows]:
    """A finished sweep of two prices and one seed, in this process."""
    out, rows = tmp_path_factory.mktemp("sweeps") / "whole", Rows()
    assert sweep.sweep(CONFIG, PRICES, [3], out, on_row=rows) == {}
    return out, rows


# --- what there is to run ----------------------------------------------------------------------


def test_the_plan_forks_each_seed_for_each_value(tmp_path):
    jobs = sweep.plan(CONFIG, [1e-5, 2.5e-4, 1], [5, 0], tmp_path, "gate_price")
    assert [job.name for job in jobs] == ["seed5/shared", "seed0/shared"]
    assert [job.until for job in jobs] == ["weights"] * 2
    assert [run.name for run in jobs[0].then] == [
        "seed5/price1e-05", "seed5/price0.00025", "seed5/price1.0"
    ]  # fmt: skip
    for job, seed in zip(jobs, (5, 0), strict=True):
        assert job.config == CONFIG.replace(seed=seed)
        for run, price in zip(job.then, (1e-5, 2.5e-4, 1.0), strict=True):
            forked = {"seed": seed, "gate_price": price, "weights_from": str(job.folder)}
            assert run.config == CONFIG.replace(**forked)
            assert (run.until, run.then) == (None, ())


def test_folders_of_prices_that_hardly_differ_are_apart(tmp_path):
    (job,) = sweep.plan(CONFIG, [0.12345678, 0.12345679], [0], tmp_path, "gate_price")
    assert len({run.folder for run in job.then}) == 2


@pytest.mark.parametrize(
    ("values", "seeds", "jobs", "message"),
    [
        ([], [0], 1, "got no gate_price; need one or more"),
        ([1e-3], [], 1, "got no seed; need one or more"),
        ([1e-3, 2e-3, 0.001], [0], 1, r"got gate_price 0\.001 twice; need .*different"),
        ([1e-3], [7, 5, 7], 1, "got seed 7 twice"),
        ([1e-3], [0], 0, "got jobs 0; need an int of at least 1"),
        ([-1e-3], [0], 1, r"got gate_price -0\.001; need"),
        ([1e-3], [-1], 1, "got seed -1; need"),
    ],
)
def test_what_makes_no_sweep_is_told_and_nothing_is_written(values, seeds, jobs, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        sweep.sweep(CONFIG, values, seeds, tmp_path / "new", jobs=jobs)
    assert list(tmp_path.iterdir()) == []


def test_a_run_of_a_sweep_has_one_device(tmp_path):
    with pytest.raises(ValueError, match=r"got 2 devices on 1 machines .*; need 1; do .* --jobs"):
        sweep.sweep(CONFIG.replace(devices=2), PRICES, [0], tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_something_else_is_left_alone(tmp_path):
    (tmp_path / "letter").write_text("dear")
    for out in (tmp_path, tmp_path / "letter"):
        with pytest.raises(ValueError, match=r"got .* (holds no sweep|is no folder); need "):
            sweep.sweep(CONFIG, PRICES, [0], out)
    assert [path.name for path in tmp_path.iterdir()] == ["letter"]


# --- running, and going on ---------------------------------------------------------------------


def test_a_sweep_finds_what_single_runs_find(whole, tmp_path):
    out, _ = whole
    for price in PRICES:
        driver.run(CONFIG.replace(seed=3, gate_price=price), tmp_path / f"{price}")
        check_same(out / f"seed3/price{price}", tmp_path / f"{price}")


def test_shared_stages_are_trained_once(whole):
    _, rows = whole
    names = [f"seed3/price{price}" for price in PRICES]
    assert rows.trained("weight_stage") == ["seed3/shared"] * 2
    assert rows.trained("baseline") == ["seed3/shared"]  # as long as fine-tuning
    assert rows.trained("arch_stage") == rows.trained("fine_tune") == names


def test_the_same_call_again_does_nothing(whole):
    out, _ = whole
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.name != "sweep.json"}
    rows = Rows()
    assert sweep.sweep(CONFIG, PRICES, [3], out, on_row=rows) == {}
    assert rows.seen == []
    after = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.name != "sweep.json"}
    assert {path for path in before if path.is_file()} == {p for p in after if p.is_file()}
    assert all(after[path] == before[path] for path in before if path.is_file())


@pytest.mark.parametrize("place", ["seed3/shared", "seed3/price0.001"])
def test_an_interrupted_sweep_ends_as_an_uninterrupted_one(place, whole, tmp_path):
    def stop(name: str, row: dict) -> None:
        if name == place and row["kind"] == "epoch" and not row.get("taken_over"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sweep.sweep(CONFIG, PRICES, [3], tmp_path, on_row=Rows(stop))
    assert sweep.sweep(CONFIG, PRICES, [3], tmp_path) == {}
    for price in PRICES:
        check_same(tmp_path / f"seed3/price{price}", whole[0] / f"seed3/price{price}")


def test_values_and_seeds_may_be_added_and_nothing_else_changed(tmp_path):
    config = CONFIG.replace(baseline="none", weight_epochs=1)
    assert sweep.sweep(config, [1e-3], [0], tmp_path) == {}
    rows = Rows()
    assert sweep.sweep(config, [2e-3, 1e-3], [0], tmp_path, on_row=rows) == {}
    assert rows.trained("arch_stage") == ["seed0/price0.002"]
    assert rows.trained("weight_stage") == []
    names = ["seed0/price0.001", "seed0/price0.002"]
    assert sweep.runs(tmp_path) == [tmp_path / name for name in names]
    before = (tmp_path / "sweep.json").read_text()
    with pytest.raises(ValueError, match=r"a sweep with batch=64, not 32; need .*; do .*--out"):
        sweep.sweep(config.replace(batch=32), [1e-3], [0], tmp_path)
    assert (tmp_path / "sweep.json").read_text() == before


def test_settings_under_which_nothing_has_begun_may_change(tmp_path):
    config = CONFIG.replace(device="cuda:77")
    failed = sweep.sweep(config, [1e-3], [0], tmp_path)
    assert failed.keys() == {"seed0/shared", "seed0/price0.001"}
    with pytest.raises(KeyboardInterrupt):
        sweep.sweep(CONFIG, [1e-3], [0], tmp_path, on_row=Rows(interrupt))


def interrupt(name: str, row: dict) -> None:
    raise KeyboardInterrupt


def test_a_damaged_list_of_runs_is_told(tmp_path):
    for text in ("{", "[1]", '{"config": {}}'):
        (tmp_path / "sweep.json").write_text(text)
        with pytest.raises(ValueError, match=r"got .*sweep\.json, which cannot be read .*; do"):
            sweep.runs(tmp_path)


# --- failures ----------------------------------------------------------------------------------


def test_a_run_that_fails_stops_no_other_and_is_tried_again(tmp_path):
    bad = tmp_path / "seed0/price0.03"
    config = CONFIG.replace(baseline="none", weight_epochs=1)
    with pytest.raises(KeyboardInterrupt):
        sweep.sweep(config, [3e-2, 1e-3], [0], tmp_path, on_row=Rows(interrupt))
    bad.mkdir(parents=True)
    (bad / "letter").write_text("dear")
    rows = Rows()
    failed = sweep.sweep(config, [3e-2, 1e-3], [0], tmp_path, on_row=rows)
    assert failed.keys() == {"seed0/price0.03"}
    assert "not empty" in failed["seed0/price0.03"]
    assert ("seed0/price0.03", {"kind": "failed", "reason": failed["seed0/price0.03"]}) in rows.seen
    assert outcome(tmp_path / "seed0/price0.001")
    (bad / "letter").unlink()
    assert sweep.sweep(config, [3e-2, 1e-3], [0], tmp_path) == {}
    assert outcome(bad)


def test_without_the_shared_stages_of_a_seed_its_runs_are_not_started(monkeypatch, tmp_path, capfd):
    started = []

    def run(config: SearchConfig, out: Path, on_row=None, until=None) -> None:
        started.append("/".join(Path(out).parts[-2:]))
        if started[-1] == "seed5/shared":
            raise RuntimeError("out of\nmemory")

    monkeypatch.setattr(search, "run", run)
    failed = sweep.sweep(CONFIG, PRICES, [5, 7], tmp_path)
    assert started == ["seed5/shared", "seed7/shared", "seed7/price0.001", "seed7/price0.03"]
    assert failed == {
        "seed5/shared": "RuntimeError: out of memory",
        "seed5/price0.001": "not started: seed5/shared failed",
        "seed5/price0.03": "not started: seed5/shared failed",
    }
    assert "Traceback" in capfd.readouterr().err  # a fault of the program shows its place


# --- processes ---------------------------------------------------------------------------------


def test_two_at_a_time_find_what_one_after_the_other_finds(whole, tmp_path):
    rows = Rows()
    assert sweep.sweep(CONFIG, PRICES, [3], tmp_path, jobs=2, on_row=rows) == {}
    for price in PRICES:
        check_same(tmp_path / f"seed3/price{price}", whole[0] / f"seed3/price{price}")
        (first, *_) = runlog.read(tmp_path / f"seed3/price{price}")
        assert first["device"]["threads"] == 1  # one thread in this process: at least one each
    plain = [(n, r["kind"], r.get("stage"), r.get("epoch")) for n, r in rows.seen]
    same = [(n, r["kind"], r.get("stage"), r.get("epoch")) for n, r in whole[1].seen]
    assert sorted(map(str, plain)) == sorted(map(str, same))


def test_a_process_that_is_killed_is_a_run_that_failed(monkeypatch, tmp_path):
    started = []

    def recorded(*arguments, **options) -> subprocess.Popen:
        started.append(popen(*arguments, **options))
        return started[-1]

    popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", recorded)
    kill = Rows(lambda name, row: started[0].kill())
    failed = sweep.sweep(CONFIG, [1e-3], [0], tmp_path, jobs=2, on_row=kill)
    assert failed == {
        "seed0/shared": f"its process ended with code {started[0].returncode}",
        "seed0/price0.001": "not started: seed0/shared failed",
    }


@pytest.mark.skipif(sys.platform == "win32", reason="os.kill ends the process there at once")
@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_an_interrupt_reaches_every_process_and_the_same_call_goes_on(number, tmp_path):
    config = CONFIG.replace(baseline="none", weight_epochs=1)
    running: dict[str, int] = {}

    def stop(name: str, row: dict) -> None:
        running[name] = running.get(name, 0) + 1
        if len(running) == 2:
            os.kill(os.getpid(), number)

    with pytest.raises(KeyboardInterrupt):
        sweep.sweep(config, [1e-3], [0, 1], tmp_path, jobs=2, on_row=stop)
    assert running.keys() == {"seed0/shared", "seed1/shared"}
    assert sweep.sweep(config, [1e-3], [0, 1], tmp_path) == {}  # also: nobody holds the folders
    assert all(outcome(run) for run in sweep.runs(tmp_path))


def test_a_process_whose_parent_is_gone_stops(tmp_path):
    config = CONFIG.replace(weight_epochs=50)
    given = {"folder": str(tmp_path / "r"), "until": "weights", "threads": 1}
    given["config"] = config.settings()
    command = [sys.executable, "-c", "from dnal_mini.search import sweep; sweep._child()"]
    with subprocess.Popen([*command, json.dumps(given)], stdout=subprocess.PIPE) as process:
        assert json.loads(process.stdout.readline())["kind"] == "run"
        process.stdout.close()
        assert process.wait(60) == 130
    assert len(runlog.epochs(tmp_path / "r")) < 5


# --- Ray ---------------------------------------------------------------------------------------


def test_without_ray_its_name_is_told(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "ray", None)  # as if it were not installed
    with pytest.raises(ValueError, match=r"got no package ray .*; do pip install dnal-mini\[ray\]"):
        sweep.sweep(CONFIG, PRICES, [0], tmp_path, ray="")


@pytest.mark.ray
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs the extra ray")
def test_a_ray_cluster_finds_what_one_process_finds(whole, tmp_path):
    code = (
        "import json, sys; from dnal_mini import SearchConfig, sweep\n"
        "config, values, seeds, out = json.loads(sys.argv[1])\n"
        "failed = sweep.sweep(SearchConfig.of(config), values, seeds, out, jobs=2, ray='')\n"
        "print(json.dumps(failed))"
    )
    given = json.dumps([CONFIG.settings(), PRICES, [3], str(tmp_path / "out")])
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    environment |= {"HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}  # Ray writes a token to HOME
    command = [sys.executable, "-c", code, given]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {}
    for price in PRICES:
        check_same(tmp_path / f"out/seed3/price{price}", whole[0] / f"seed3/price{price}")


def test_runs_that_train_their_weights_themselves_share_nothing(tmp_path):
    config = CONFIG.replace(optimisation="joint", baseline="none", weight_epochs=1)
    rows = Rows()
    assert sweep.sweep(config, PRICES, [3], tmp_path / "out", on_row=rows) == {}
    assert not (tmp_path / "out" / "seed3" / "shared").exists()
    found = {path.name: runlog.read(path)[-1] for path in sweep.runs(tmp_path / "out")}
    assert [row["kind"] for row in found.values()] == ["result"] * len(PRICES)
    alone = driver.run(config.replace(seed=3, gate_price=PRICES[0]), tmp_path / "alone")
    assert found[f"price{PRICES[0]}"]["macs"] == alone["macs"]
    again = Rows()
    assert sweep.sweep(config, PRICES, [3], tmp_path / "out", on_row=again) == {}
    assert not again.seen  # all are finished


def test_a_rule_is_swept_over_budgets_from_shared_weights(tmp_path):
    config = CONFIG.replace(method="random", budget=Budget(macs=0.9), weight_epochs=1)
    values, field = [0.4, 0.7], "budget.macs"
    assert sweep.sweep(config, values, [3], tmp_path / "out", field=field) == {}
    for value in values:
        rows = runlog.read(tmp_path / "out" / "seed3" / f"target{value}")
        assert rows[-1]["macs"][1] / rows[-1]["macs"][0] == pytest.approx(value, abs=0.08)
        taken = {row["stage"] for row in runlog.epochs(rows) if row.get("taken_over")}
        assert taken == {"weight_stage", "baseline"}


def test_a_finished_run_of_a_sweep_whose_settings_were_edited_is_told(tmp_path: Path):
    assert sweep.sweep(CONFIG, PRICES[:1], [0], tmp_path / "s") == {}
    path = tmp_path / "s" / "seed0" / "price0.001" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"arch_lr": 2.0}))
    failed = sweep.sweep(CONFIG, PRICES[:1], [0], tmp_path / "s")
    assert "arch_lr=2.0, the record beside it with 5.0" in failed["seed0/price0.001"]
