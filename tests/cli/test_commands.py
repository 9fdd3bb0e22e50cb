"""The command: what it passes on, what it prints, and one line for every mistake."""

import dataclasses
import io
import json
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from systems import obeys_permissions

import dnal_mini
from dnal_mini.cli.commands import main
from dnal_mini.cli.display import Display
from dnal_mini.config import SearchConfig
from dnal_mini.deployment.export import onnx_runner
from dnal_mini.methods import METHODS
from dnal_mini.recipes import RECIPES
from dnal_mini.refused import Refused
from dnal_mini.runs import aggregate, runlog, tables
from dnal_mini.search import driver as search

RESULT = {
    "dense_accuracy": 0.9777,
    "pruned_accuracy": 0.9554,
    "fine_tuned_accuracy": 0.9722,
    "params": [940_000, 117_500],
    "macs": [20_000_000, 5_000_000],
}


class Recorder:
    """Stands in for the search: keeps what it was given, writes a record, ends as it is told."""

    def __init__(self, end: BaseException | None = None, finished: bool = True) -> None:
        self.end, self.finished, self.calls = end, finished, []

    def __call__(self, config: SearchConfig, out: Path, progress: Callable, on_row: Callable):
        self.calls.append((config, Path(out)))
        Path(out).mkdir(parents=True, exist_ok=True)
        (Path(out) / "config.json").write_text(json.dumps(config.settings()))
        log = runlog.RunLog(Path(out) / runlog.FILE_NAME)
        on_row(log.append("run", format=1, config=config.settings()))
        for epoch in (1, 2):
            for _ in progress(range(3), f"weight_stage {epoch}/2"):
                pass
            row = {"epoch": epoch, "epochs": 2, "loss": 1.5, "val_accuracy": 0.25 * epoch}
            on_row(log.append("epoch", stage="weight_stage", seconds=0.5, **row))
        text = "layer 7: 2 of 64 channels open"
        on_row(log.append("warning", stage="weight_stage", epoch=2, text=text))
        if self.end:
            raise self.end
        if self.finished:
            on_row(log.append("result", **RESULT))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to stand in, so that nothing half-written can hide."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def ran(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Recorder:
    """The search replaced by a recorder, in an empty folder."""
    recorder = Recorder()
    monkeypatch.setattr(search, "run", recorder)
    return recorder


def refusal(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one line that the command refuses the words with."""
    assert main(list(words)) == 2
    output = capsys.readouterr()
    assert output.out == ""
    lines = output.err.splitlines()
    assert len(lines) == 1, output.err
    assert lines[0].startswith("dnal: ")
    assert "got " in lines[0]
    assert "; need " in lines[0]
    return lines[0]


# Bad input --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ("rnu", ["'rnu'", "need run"]),
        ("run digts", ["'digts'", "need digits"]),
        ("run xxxxxxxx", ["need one of", "cifar10_cpu"]),
        ("run --weigth-epochs 3", ["'weigth_epochs'", "need weight_epochs"]),
        ("run --weight-epochs many", ["--weight-epochs 'many'", "need int"]),
        ("run --weight-epochs 1.5", ["--weight-epochs '1.5'", "need int"]),
        ("run --gate-price cheap", ["--gate-price 'cheap'", "need float"]),
        ("run --model vgg61", ["model 'vgg61'", "need vgg16"]),
        (
            "run --baseline maybe",
            ["--baseline 'maybe'", "need weight-epochs or all-epochs or"],
        ),
        ("run --seed", ["--seed alone"]),
        ("run --seed --width 1", ["--seed alone"]),
        ("run --seed 3 digits", ["'digits' alone", "recipe first"]),
        ("run -seed 3", ["'-seed'"]),
        ("run --weight-epochs -1", ["weight_epochs", "-1"]),
        ("run --arch-epochs -3", ["arch_epochs", "-3"]),
        ("run --fine-tune-epochs -1", ["fine_tune_epochs", "-1"]),
        ("run --method l1norm --budget.macs 0.3", ["method 'l1norm'", "need l1-norm"]),
        ("run --method l1-norm", ["'l1-norm' without a budget", "--budget.macs 0.3"]),
        ("run --method random --budget.macs 0.3 --gate-price 1e-3", ["gate_price", "random"]),
        ("run --budget.macs 0.3 --budget.params 0.3", ["budget macs and params"]),
        ("run --budget.macs 0", ["budget.macs 0", "between 0 and 1"]),
        ("run --budget.macs 1", ["budget.macs 1", "between 0 and 1"]),
        ("run --budget.macs 1.5", ["budget.macs 1.5", "between 0 and 1"]),
        ("run --budget.macs nan", ["budget.macs nan", "between 0 and 1"]),
        ("run --budget.mac 0.3", ["'budget.mac'", "need budget.macs"]),
        ("run --target-macs 1.5", ["budget.macs 1.5"]),
        ("sweep --method random --gate-price 1e-3", ["'random' without a budget"]),
        ("run --gate-price -0.1", ["gate_price", "-0.1"]),
        ("run --gate-price nan", ["gate_price", "nan"]),
        ("run --delta-max 0.5", ["delta_max", "0.5"]),
        ("run --data cifar10 --data-dir nowhere", ["nowhere"]),
        ("run --device cuda:977", ["cuda:977"]),
        ("run --data own", ["data own", "data=..."]),
        ("run --weights nowhere.safetensors", ["weights", "nowhere.safetensors", "not there"]),
        ("run --device nonsense", ["nonsense"]),
        ("resume", ["no folder"]),
        ("resume nowhere", ["nowhere"]),
        ("resume a b", ["a b"]),
        ("resume . --out b", ["--out"]),
        ("resume .", ["no run record"]),
        ("report", ["no run"]),
        ("report nowhere", ["no run record at nowhere"]),
        ("report . --epoch", ["'--epoch'", "need --epochs"]),
        ("report . --figure", ["--figure alone"]),
        ("recipes --all", ["'--all'"]),
        ("sweep digts --gate-price 1e-3", ["'digts'", "need digits"]),
        ("sweep", ["nothing that the runs differ in", "--gate-price V1 V2"]),
        ("sweep --gate-price", ["no gate_price", "need one or more"]),
        ("sweep --gate-price 1e-3 cheap", ["'cheap'", "need float"]),
        ("sweep --gate-price 1e-3 0.001", ["0.001 twice"]),
        ("sweep --gate-price 1e-3 --target-macs 0.5", ["--gate-price and --budget.macs"]),
        ("sweep --target-macs 0.3 1.5", ["budget.macs 1.5", "between 0 and 1"]),
        ("sweep --gate-price 1e-3 --seed", ["no seed"]),
        ("sweep --gate-price 1e-3 --seed 1 5 1", ["seed 1 twice"]),
        ("sweep --gate-price 1e-3 --seed 0.5", ["seed '0.5'", "need int"]),
        ("sweep --gate-price 1e-3 --jobs 0", ["jobs 0", "at least 1"]),
        ("sweep --gate-price 1e-3 --jobs", ["--jobs alone"]),
        ("sweep --gate-price 1e-3 --gate 5", ["'gate'", "need gate_price"]),
        ("export", ["nothing to export"]),
        ("export nowhere", ["nowhere", "run folder or a .safetensors file"]),
        ("export a b", ["a b"]),
        ("export .", ["without small.safetensors", "finished run"]),
        ("export . --format onxx", ["'onxx'", "need onnx"]),
        ("export . --format", ["--format alone"]),
        ("export . --out", ["--out alone"]),
        ("export . --deploy --no-deploy", ["--deploy --no-deploy"]),
        ("export . --fold", ["'--fold'", "--no-deploy"]),
    ],
)
def test_a_mistake_gets_one_line_and_leaves_nothing_behind(
    words: str, parts: list[str], folder: Path, capsys: pytest.CaptureFixture[str]
):
    line = refusal(capsys, *words.split())
    assert all(part in line for part in parts), line
    assert list(folder.iterdir()) == []


def test_an_empty_data_folder_is_told_before_anything_is_written(
    folder: Path, capsys: pytest.CaptureFixture[str]
):
    (folder / "images").mkdir()
    line = refusal(capsys, "run", "--data", "cifar10", "--data-dir", "images")
    assert "images" in line
    assert [path.name for path in folder.rglob("*")] == ["images"]


def test_a_file_in_the_place_of_the_folder_is_told(
    folder: Path, capsys: pytest.CaptureFixture[str]
):
    (folder / "taken").write_text("a letter")
    for words in (["run", "--data", "toy", "--out", "taken"], ["resume", "taken"]):
        assert "taken" in refusal(capsys, *words)
    assert (folder / "taken").read_text() == "a letter"
    assert [path.name for path in folder.iterdir()] == ["taken"]


@pytest.mark.skipif(not obeys_permissions(), reason="this user may write everywhere")
def test_a_folder_without_write_permission_is_told(
    folder: Path, capsys: pytest.CaptureFixture[str]
):
    (folder / "locked").mkdir(mode=0o500)
    assert "locked" in refusal(capsys, "run", "--data", "toy", "--out", "locked/run")


def test_an_error_of_the_system_becomes_one_line(
    ran: Recorder, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    def refused(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", "runs/x")

    monkeypatch.setattr(search, "run", refused)
    assert "got no permission for runs/x" in refusal(capsys, "run")


def test_a_fault_of_the_program_is_not_dressed_as_a_mistake_of_the_user(
    ran: Recorder, capsys: pytest.CaptureFixture[str]
):
    ran.end = ValueError("operands could not be broadcast together")
    with pytest.raises(ValueError, match="broadcast"):
        main(["run"])


def test_the_module_runs_as_a_command_and_exits_with_2(folder: Path):
    words = [sys.executable, "-m", "dnal_mini", "run", "vgg61_cifar10"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "need vgg16_cifar10" in done.stderr


# Help -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"]])
def test_help_names_the_commands(words: list[str], capsys: pytest.CaptureFixture[str]):
    assert main(words) == 0
    output = capsys.readouterr()
    assert all(f"dnal {name}" in output.out for name in ("run", "sweep", "report", "export"))
    assert output.err == ""


def test_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]):
    assert main(["--version"]) == 0
    assert f"dnal_mini {dnal_mini.__version__}," in capsys.readouterr().out


def test_help_for_run_lists_every_field_with_the_values_of_the_recipe(
    capsys: pytest.CaptureFixture[str],
):
    assert main(["run", "mobilenetv2_cifar10", "--help"]) == 0
    text = capsys.readouterr().out
    fields = [*dataclasses.fields(SearchConfig), *dataclasses.fields(METHODS["dnal"])]
    names = [field.name.replace("_", "-") for field in fields]
    assert all(f"--{name}" in text for name in [*names, "out"])
    assert "(default: mobilenetv2)" in text


def test_help_shows_the_settings_of_the_method_that_is_asked_for(
    capsys: pytest.CaptureFixture[str],
):
    for name, method in METHODS.items():
        assert main(["run", "--method", name, "--help"]) == 0
        text = capsys.readouterr().out
        own = {f"--{field.name.replace('_', '-')} " for field in dataclasses.fields(method)}
        assert all(flag in text for flag in {*own, "--method ", "--budget.macs "}), name
        assert "--macs " not in text  # a budget has no default to be shown
        assert ("--gate-price" in text) == (name == "dnal")


def test_recipes_lists_each_with_its_epochs(capsys: pytest.CaptureFixture[str]):
    assert main(["recipes"]) == 0
    text = capsys.readouterr().out
    for name, recipe in RECIPES.items():
        config = recipe()
        epochs = (
            f"{config.weight_epochs}+{config.method.arch_epochs}+{config.fine_tune_epochs} epochs"
        )
        line = next(line for line in text.splitlines() if line.startswith(f"{name} "))
        assert line.split()[1:] == [config.model, *epochs.split()]
        assert recipe.__doc__.strip().splitlines()[0] in text


# Running ----------------------------------------------------------------------------------------


def test_words_become_typed_settings_of_the_recipe(ran: Recorder):
    words = "run cifar10_cpu --seed=5 --gate_price 3e-4 --baseline none --data-dir a/b --out r"
    assert main(words.split()) == 0
    changed = {"seed": 5, "gate_price": 3e-4, "baseline": "none", "data_dir": "a/b"}
    assert ran.calls == [(RECIPES["cifar10_cpu"]().replace(**changed), Path("r"))]


def test_run_alone_is_the_digits_recipe(ran: Recorder):
    assert main(["run"]) == 0
    assert ran.calls[0][0] == RECIPES["digits"]()


def test_the_folder_is_named_by_the_settings_and_printed(
    ran: Recorder, capsys: pytest.CaptureFixture[str]
):
    for words in ([], ["--seed", "5"], ["--seed", "7"], ["--seed", "5"]):
        assert main(["run", *words]) == 0
    first, five, seven, five_again = (str(out) for _, out in ran.calls)
    assert len({first, five, seven}) == 3
    assert five == five_again
    assert all(out.startswith("runs/digits-") for out in (first, five, seven))
    assert f"kept in {seven}\n" in capsys.readouterr().err


def test_without_a_terminal_each_epoch_is_a_line_and_results_go_to_stdout(
    ran: Recorder, capsys: pytest.CaptureFixture[str]
):
    assert main(["run", "--out", "r"]) == 0
    output = capsys.readouterr()
    assert output.err.splitlines() == [
        "digits: the run is kept in r",
        "weight_stage 1/2  loss 1.5000  val 25.0%  seconds 0.5",
        "weight_stage 2/2  loss 1.5000  val 50.0%  seconds 0.5",
        "WARNING, weight_stage epoch 2: layer 7: 2 of 64 channels open",
    ]
    assert output.out == tables.final_table("r") + "\n"
    assert "97.77%" in output.out


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_in_a_terminal_the_bar_shows_the_figures_of_the_epoch_before():
    stream = Terminal()
    display = Display(stream, "title")
    row = {"kind": "epoch", "stage": "arch_stage", "epoch": 3, "epochs": 7, "seconds": 1.0}
    figures = {"delta": 21.5, "loss": 0.75, "val_accuracy": 0.5, "kept": 0.25}
    assert list(display.progress(range(3), "arch_stage 3/7")) == [0, 1, 2]
    display.show(row | figures)
    display.show({"kind": "warning", "stage": "arch_stage", "epoch": 3, "text": "collapsing"})
    assert list(display.progress(range(5), "arch_stage 4/7")) == [0, 1, 2, 3, 4]
    parts = [part.strip() for part in stream.getvalue().replace("\n", "\r").split("\r")]
    assert "arch_stage 3/7  delta 21.5  loss 0.7500  val 50.0%  kept 25.0%  seconds 1.0" in parts
    assert "WARNING, arch_stage epoch 3: collapsing" in parts
    bars = [part for part in parts if part.startswith("arch_stage 4/7 ")]
    assert bars
    assert all("delta 21.5  loss 0.7500  val 50.0%  kept 25.0%" in bar for bar in bars)


def test_a_run_without_a_result_is_resumed_with_its_own_settings(
    ran: Recorder, capsys: pytest.CaptureFixture[str]
):
    ran.end = KeyboardInterrupt()
    words = ["run", "--gate-price", "0.00037", "--baseline", "none", "--data-dir", "dir", "--out"]
    assert main([*words, "my run"]) == 130
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("dnal: interrupted after weight_stage epoch 2; continue with: dnal ")
    ran.end = None
    assert main(shlex.split(line.partition("dnal resume")[2].join(["resume", ""]))) == 0
    assert ran.calls[1] == ran.calls[0]
    assert "97.22%" in capsys.readouterr().out


def test_a_real_run_stopped_in_its_second_stage_goes_on_to_the_same_end(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    words = "run --data toy --val 17 --width 0.05 --batch 64 --baseline none --arch-epochs 2"
    words += " --weight-epochs 1 --fine-tune-epochs 1 --out"
    assert main([*words.split(), "whole"]) == 0
    shown = Display.show

    def stop(self: Display, row: runlog.Row) -> None:
        shown(self, row)
        if row.get("stage") == "arch_stage":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Display, "show", stop)
        assert main([*words.split(), "stopped"]) == 130
    assert capsys.readouterr().err.endswith(
        "dnal: interrupted after arch_stage epoch 1; continue with: dnal resume stopped\n"
    )
    assert main(["resume", "stopped"]) == 0
    assert capsys.readouterr().out == tables.final_table("stopped") + "\n"
    whole, stopped = (runlog.read(out) for out in ("whole", "stopped"))
    assert stopped[-1]["kind"] == "result"
    same = ("stage", "epoch", "loss", "val_accuracy", "kept")
    epochs = [
        [[row.get(key) for key in same] for row in runlog.epochs(r)] for r in (whole, stopped)
    ]
    assert epochs[0] == epochs[1]
    assert "another" in refusal(capsys, *words.split(), "whole", "--seed", "5")


def test_an_interrupt_before_the_first_row_says_that_nothing_was_written(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def stopped(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(search, "run", stopped)
    assert main(["run"]) == 130
    assert "before anything was written" in capsys.readouterr().err


def test_a_finished_run_is_not_run_again_by_resume(
    ran: Recorder, capsys: pytest.CaptureFixture[str]
):
    assert main(["run", "--out", "r"]) == 0
    table = capsys.readouterr().out
    assert main(["resume", "r"]) == 0
    assert capsys.readouterr().out == table
    assert len(ran.calls) == 1


def test_settings_of_another_version_are_told(ran: Recorder, capsys: pytest.CaptureFixture[str]):
    Path("r").mkdir()
    runlog.RunLog("r/record.jsonl").append("run", format=1, config={})
    settings = SearchConfig().settings()
    for text, part in (
        (json.dumps(settings | {"gate_prize": 1.0}), "need gate_price"),
        (json.dumps(settings | {"gate_price": "cheap"}), "of type float"),
        (json.dumps(settings)[:-9], "r/config.json"),
        ("[1, 2]", "r/config.json"),
    ):
        Path("r/config.json").write_text(text)
        assert part in refusal(capsys, "resume", "r")
    Path("r/config.json").unlink()
    assert "r/config.json" in refusal(capsys, "resume", "r")
    assert ran.calls == []


# Reports ----------------------------------------------------------------------------------------


def test_report_of_one_is_its_table_and_of_several_a_comparison(
    ran: Recorder, capsys: pytest.CaptureFixture[str]
):
    other = ["run", "--gate-price", "5e-3", "--out", "b"]
    assert main(["run", "--out", "a"]) == main(other) == 0
    capsys.readouterr()
    assert main(["report", "a"]) == 0
    assert capsys.readouterr().out == tables.final_table("a") + "\n"
    assert main(["report", "a/record.jsonl", "b"]) == 0
    assert capsys.readouterr().out == tables.results_table(["a", "b"], markdown=False) + "\n"
    assert main(["report", "--markdown", "a", "b"]) == 0
    assert capsys.readouterr().out == tables.results_table(["a", "b"]) + "\n"


def test_report_with_epochs_has_a_line_for_each(ran: Recorder, capsys: pytest.CaptureFixture[str]):
    assert main(["run", "--out", "a"]) == 0
    capsys.readouterr()
    assert main(["report", "a", "--epochs"]) == 0
    text = capsys.readouterr().out
    assert tables.epochs_table("a") in text
    assert tables.final_table("a") in text


@pytest.mark.filterwarnings("default")
def test_report_of_a_cut_record_warns_in_one_line(
    ran: Recorder, capsys: pytest.CaptureFixture[str]
):
    assert main(["run", "--out", "a"]) == 0
    path = Path("a/record.jsonl")
    path.write_bytes(path.read_bytes()[:-9])
    capsys.readouterr()
    assert main(["report", "a"]) == 0
    output = capsys.readouterr()
    assert "not finished (weight_stage, epoch 2)" in output.out
    assert output.err.startswith("dnal: warning: a/record.jsonl: line 5 is cut short")
    assert output.err.count("\n") == 1


def test_report_takes_means_over_seeds_and_draws_them(
    ran: Recorder, capsys: pytest.CaptureFixture[str]
):
    pytest.importorskip("matplotlib")
    assert main(["run", "--out", "a"]) == main(["run", "--seed", "5", "--out", "b"]) == 0
    capsys.readouterr()
    assert main(["report", "a", "b", "--figure", "f.svg"]) == 0
    output = capsys.readouterr()
    assert output.out == aggregate.tables(["a", "b"], markdown=False) + "\n"
    assert output.out.splitlines()[-1].split()[2:6] == ["2", "97.22", "±", "0.00"]
    assert "points" in Path("f.svg").read_text()
    assert ".svg or .png" in refusal(capsys, "report", "a", "b", "--figure", "f.jpg")


# Sweeps -----------------------------------------------------------------------------------------


class Swept(Recorder):
    """Stands in for the search in a sweep; runs whose folder is in ``bad`` fail."""

    bad: tuple[str, ...] = ()

    def __call__(self, config: SearchConfig, out: Path, on_row: Callable, until: str | None):
        name = "/".join(Path(out).parts[-2:])
        if name in self.bad:
            raise Refused("got no luck; need some; do try again")
        self.finished = until is None
        super().__call__(config, out, lambda steps, text: steps, on_row)


@pytest.fixture
def swept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Swept:
    """The search of a sweep replaced by a recorder, in an empty folder."""
    recorder = Swept()
    monkeypatch.setattr(search, "run", recorder)
    return recorder


def test_a_sweep_runs_each_price_with_each_seed_and_reports_them(
    swept: Swept, capsys: pytest.CaptureFixture[str]
):
    words = "sweep cifar10_cpu --gate-price 1e-3 5e-3 --seed 5 7 --batch 32 --out s"
    assert main(words.split()) == 0
    runs = [config for config, out in swept.calls if out.name != "shared"]
    assert [(run.seed, run.method.gate_price, run.batch) for run in runs] == [
        (5, 1e-3, 32), (5, 5e-3, 32), (7, 1e-3, 32), (7, 5e-3, 32)
    ]  # fmt: skip
    output = capsys.readouterr()
    assert "seed7/price0.005: weight_stage 2/2  loss 1.5000  val 50.0%  seconds 0.5" in output.err
    assert "seed5/price0.001: done, tuned 97.22%, MACs kept 25.0%" in output.err
    paths = [f"s/seed{seed}/price{price}" for seed in (5, 7) for price in (0.001, 0.005)]
    assert output.out == aggregate.tables(paths, [], markdown=False) + "\n"
    assert main(["report", "s"]) == 0
    assert capsys.readouterr().out == output.out


def test_a_sweep_of_targets_has_a_folder_that_its_settings_name(swept: Swept):
    for targets in ("0.3", "0.5"):
        assert main(["sweep", "--target-macs", targets]) == 0
    outs = [out for _, out in swept.calls]
    assert len({out.parents[1] for out in outs}) == 1
    assert outs[0].parents[1].name.startswith("digits-sweep-")
    targets = [config.budget.macs for config, out in swept.calls if out.name != "shared"]
    assert targets == [0.3, 0.5]


def test_a_failed_run_of_a_sweep_ends_it_with_exit_code_2(
    swept: Swept, capsys: pytest.CaptureFixture[str]
):
    swept.bad = ("seed0/price0.001",)
    assert main(["sweep", "--gate-price", "1e-3", "5e-3", "--out", "s"]) == 2
    output = capsys.readouterr()
    assert "seed0/price0.001: failed: got no luck; need some; do try again" in output.err
    assert output.err.splitlines()[-1].startswith("dnal: got failures: seed0/price0.001; need")
    assert "s/seed0/price0.001: not run" in output.out
    assert "0.005" in output.out
    swept.bad = ()
    assert main(["sweep", "--gate-price", "1e-3", "5e-3", "--out", "s"]) == 0


def test_an_interrupted_sweep_names_the_command_that_goes_on(
    swept: Swept, capsys: pytest.CaptureFixture[str]
):
    swept.end = KeyboardInterrupt()
    assert main(["sweep", "--gate-price", "1e-3", "--out", "my sweep"]) == 130
    line = capsys.readouterr().err.splitlines()[-1]
    again = "dnal sweep --gate-price 1e-3 --out 'my sweep'"
    assert line == f"dnal: interrupted; continue with the same command: {again}"
    swept.end = None
    assert main(shlex.split(again)[1:]) == 0


# Exports ----------------------------------------------------------------------------------------


def tiny_run(*words: str) -> None:
    """Run the smallest search."""
    settings = "--data toy --val 17 --width 0.05 --batch 64 --weight-epochs 1 --arch-epochs 1"
    settings += " --fine-tune-epochs 1 --gate-price 3e-3 --threshold 0.9"
    assert main(["run", *settings.split(), *words]) == 0


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a real run."""
    out = tmp_path_factory.mktemp("runs") / "r"
    tiny_run("--out", str(out))
    return out


def plain_weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The weights in a checkpoint under the names of the net without gates."""
    state = torch.load(checkpoint, weights_only=True)["net"]
    plain = {name.replace(".norm.", "."): tensor for name, tensor in state.items()}
    return {name: t for name, t in plain.items() if ".gate." not in name and "_gate." not in name}


def check_exported(run: Path, files: Path, stage: str) -> None:
    """The two files compute what the nets of the run compute, in eval mode."""
    small = dnal_mini.load(run / "small.safetensors", dnal_mini.models.vgg16)
    dense = dnal_mini.models.vgg16(small.spec["config"]["num_classes"], width=0.05)
    dense.load_state_dict(plain_weights(run / f"{stage}.pt"))
    images = torch.randn(5, *small.spec["image_shape"])
    for name, net in (("dense", dense), ("pruned", small.module)):
        found = torch.export.load(files / f"{name}.pt2").module()(images)
        torch.testing.assert_close(found, net.eval()(images))


def test_export_of_a_run_writes_its_dense_and_its_pruned_net(
    finished: Path, folder: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(["export", str(finished), "--format", "pt2", "--out", "new/files"]) == 0
    head, dense_line, pruned_line, _, last = capsys.readouterr().out.splitlines()
    assert head.split() == ["file", "bytes", "ratio", "difference"]
    files = [Path("new/files") / f"{name}.pt2" for name in ("dense", "pruned")]
    assert sorted(Path("new/files").iterdir()) == files
    sizes = [file.stat().st_size for file in files]
    ratio = f"{sizes[0] / sizes[1]:.2f}x"
    assert dense_line.split()[:3] == ["dense.pt2", f"{sizes[0]:,}", "1.00x"]
    assert pruned_line.split()[:3] == ["pruned.pt2", f"{sizes[1]:,}", ratio]
    assert all(float(line.split()[3]) < 1e-4 for line in (dense_line, pruned_line))
    assert last.startswith("in new/files;")
    check_exported(finished, Path("new/files"), "baseline")


def test_without_a_baseline_the_dense_net_is_that_of_stage_1(folder: Path):
    tiny_run("--baseline", "none", "--out", "r")
    before = {path.name for path in Path("r").iterdir()}
    assert main(["export", "r", "--format=pt2", "--no-deploy"]) == 0
    new = {path.name for path in Path("r").iterdir()} - before
    assert new == {"dense.pt2", "pruned.pt2"}
    check_exported(Path("r"), Path("r"), "weight_stage")


@pytest.mark.slow
@pytest.mark.parametrize("order", ["conv-bn-relu-ss", "conv-ss-bn-relu"])
def test_runs_with_their_gates_elsewhere_are_exported_too(order: str, folder: Path):
    tiny_run("--order", order, "--out", "r")
    assert main(["export", "r", "--format", "pt2"]) == 0
    check_exported(Path("r"), Path("r"), "baseline")


@pytest.fixture
def saved(folder: Path) -> dnal_mini.Pruned:
    """A pruned net in the file small.safetensors."""
    gated = dnal_mini.add_gates(dnal_mini.models.vgg16(7, width=0.05, image_size=16))
    for gate in dnal_mini.gates(gated).values():
        torch.nn.init.uniform_(gate.s.data[1:], -1, 1)
        gate.s.data[0] = 1
    dnal_mini.set_gates(gated, mode="hard", delta=1e4)
    small = dnal_mini.prune(gated.eval(), (3, 16, 16))
    dnal_mini.save(small, "small.safetensors")
    return small


def test_export_of_a_file_writes_the_pruned_net_beside_it(
    saved: dnal_mini.Pruned, capsys: pytest.CaptureFixture[str]
):
    pytest.importorskip("onnxruntime")
    assert main(["export", "small.safetensors", "--format", "onnx"]) == 0
    output = capsys.readouterr()
    assert output.err == ""
    file, size, difference = output.out.splitlines()[1].split()
    assert (file, size) == ("pruned.onnx", f"{Path('pruned.onnx').stat().st_size:,}")
    assert float(difference) < 1e-4
    assert {path.name for path in Path().iterdir()} == {"small.safetensors", "pruned.onnx"}
    images = torch.randn(3, 3, 16, 16)
    found = torch.from_numpy(onnx_runner("pruned.onnx")(images.numpy()))
    torch.testing.assert_close(found, saved.module.eval()(images).detach())


def test_files_that_cannot_be_exported_are_told(
    saved: dnal_mini.Pruned, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    whole = Path("small.safetensors").read_bytes()
    Path("cut.safetensors").write_bytes(whole[:-9])
    for name, part in (("cut", "cut.safetensors, cut short"), ("gone", "gone.safetensors")):
        assert main(["export", f"{name}.safetensors"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert part in line
    saved.spec["config"] = None  # as of a network that is not one of the package's
    dnal_mini.save(saved, "own.safetensors")
    assert "own.safetensors of another model" in refusal(capsys, "export", "own.safetensors")
    monkeypatch.setitem(sys.modules, "onnxscript", None)  # as if it were not installed
    assert "dnal-mini[export]" in refusal(capsys, "export", "small.safetensors")
    assert not [path for path in Path().iterdir() if path.suffix != ".safetensors"]


def test_a_run_whose_checkpoint_is_gone_or_of_another_net_is_told(
    saved: dnal_mini.Pruned, capsys: pytest.CaptureFixture[str]
):
    settings = SearchConfig().replace(model="vgg16", width=0.05).settings()
    Path("config.json").write_text(json.dumps(settings))
    assert "baseline.pt" in refusal(capsys, "export", ".")
    torch.save({"net": dnal_mini.models.vgg16(7, width=0.1).state_dict()}, "baseline.pt")
    assert "baseline.pt" in refusal(capsys, "export", ".")
    Path("config.json").unlink()
    assert "config.json" in refusal(capsys, "export", ".")


# A fault of the program is no refusal ----------------------------------------------------------


def test_a_fault_whose_text_looks_like_a_refusal_is_a_traceback(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Told by class, never by text: torch's own errors contain "got", too."""

    def broken(*words: object, **more: object) -> None:
        raise ValueError("expected 4D input (got 3D input); a fault")

    monkeypatch.setattr(search, "run", broken)
    with pytest.raises(ValueError, match="a fault"):
        main(["run", "--data", "toy", "--out", "r"])
    assert main(["sweep", "--gate-price", "1e-3", "--out", "s"]) == 2
    told = capsys.readouterr().err
    assert "failed: ValueError: expected 4D input" in told
    assert "Traceback" in told  # its place is wanted
