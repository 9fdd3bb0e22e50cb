"""What a notebook shows of a run: the figure as it grows, one bar, and nothing elsewhere."""

import queue
import sys
import time
from pathlib import Path
from xml.etree import ElementTree

import pytest

from dnal_mini.figures import growing, plots
from dnal_mini.figures.growing import Growing, in_notebook, watched


def epoch(stage: str, number: int, **fields) -> dict:
    row = {"kind": "epoch", "stage": stage, "epoch": number, "epochs": 3, "loss": 1.0}
    return row | {"val_accuracy": 0.2 + 0.1 * number} | fields


class Shown:
    """Stands in for a cell's output: what was displayed, and what came in its place."""

    def __init__(self) -> None:
        self.pictures: list[dict] = []

    def display(self, content: dict, **how) -> "Shown":
        assert how["raw"]
        assert how["metadata"]["image/svg+xml"]["alt"] == content["text/plain"]
        self.pictures.append(content)
        self.displayed = how.get("display_id", False)
        return self

    def update(self, content: dict, **how) -> None:
        self.display(content, **how, display_id=self.displayed)


@pytest.fixture
def cell(monkeypatch: pytest.MonkeyPatch) -> Shown:
    import IPython.display

    shown = Shown()
    monkeypatch.setattr(IPython.display, "display", shown.display)
    monkeypatch.setattr(growing, "in_notebook", lambda: True)
    return shown


def test_the_figure_grows_by_the_epochs_of_each_stage(cell, monkeypatch, capsys):
    monkeypatch.setattr(growing, "PAUSE_S", -1.0)  # a picture for each epoch
    curves, drawn = plots.training_curves, []

    def noted(table: list[dict], *axes, **words):
        drawn.append([row["stage"] for row in table])
        return curves(table, *axes, **words)

    monkeypatch.setattr(plots, "training_curves", noted)
    with watched("mine in runs/x", None, None) as (_, on_row):
        on_row({"kind": "run"})
        assert cell.pictures == []
        on_row(epoch("weight_stage", 1))
        on_row(epoch("weight_stage", 2))
        on_row({"kind": "warning", "stage": "weight_stage", "epoch": 2, "text": "a vital layer"})
        on_row(epoch("arch_stage", 1, kept=0.5))
    assert len(cell.pictures) == 3
    assert capsys.readouterr().out == "weight_stage, epoch 2: a vital layer\n"
    for picture in cell.pictures:
        assert ElementTree.fromstring(picture["image/svg+xml"]).tag.endswith("svg")
    assert drawn == [["weight_stage"], ["weight_stage"] * 2, ["weight_stage"] * 2 + ["arch_stage"]]
    words = [picture["text/plain"] for picture in cell.pictures]
    assert words[0] == (
        "mine in runs/x. Over the epochs so far; after weight_stage epoch 1 of 3: accuracy 30.0%."
    )
    assert ["share of gates open" in text for text in words] == [False, False, True]


def test_short_epochs_are_not_drawn_one_by_one_but_the_last_one_is(cell):
    shown = Growing("mine")
    for number in range(1, 30):
        shown.show(epoch("weight_stage", number))
    assert len(cell.pictures) == 1
    shown.close()
    assert len(cell.pictures) == 2
    assert len(shown.epochs) == 29
    shown.close()
    assert len(cell.pictures) == 2


def test_one_bar_serves_all_epochs_and_goes_at_the_end(cell, capsys):
    shown = Growing("mine")
    assert list(shown.progress(range(3, 7), "weight_stage epoch 1/2")) == [3, 4, 5, 6]
    bar = shown._bar
    assert (bar.n, bar.total) == (4, 4)
    assert list(shown.progress(range(2), "weight_stage epoch 2/2")) == [0, 1]
    assert shown._bar is bar
    assert (bar.n, bar.total) == (2, 2)
    shown.close()
    assert bar.disable  # closed


def test_what_is_given_takes_the_place_of_what_a_notebook_shows(cell):
    rows: list[dict] = []
    with watched("mine", lambda steps, text: steps, rows.append) as (progress, on_row):
        assert list(progress(range(2), "")) == [0, 1]
        on_row(epoch("weight_stage", 1))
    assert len(rows) == 1
    assert cell.pictures == []


def test_without_matplotlib_the_bar_has_to_do(cell, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    shown = Growing("mine")
    shown.show(epoch("weight_stage", 1))
    shown.close()
    assert cell.pictures == []
    assert len(shown.epochs) == 1


def test_nothing_is_shown_outside_of_a_kernel():
    assert not in_notebook()
    with watched("mine", None, None) as shown:
        assert shown == (None, None)


CODE = """
import dnal_mini as dnal
epochs = {{"weight_epochs": {weights}, "arch_epochs": 2, "fine_tune_epochs": 1}}
config = dnal.recipes.digits().replace(
    data="toy", val=32, width=0.07, batch=16, baseline="none", **epochs)
result = dnal.run(config, out={out!r})
print("kept", result["macs"][1] / result["macs"][0])
"""


@pytest.mark.slow
def test_a_real_kernel_shows_the_run_and_an_interrupt_says_how_to_go_on(tmp_path: Path):
    from nbclient import NotebookClient
    from nbformat.v4 import new_code_cell, new_notebook

    def ran(weights: int, name: str) -> list[dict]:
        cell = new_code_cell(CODE.format(weights=weights, out=str(tmp_path / name)))
        book = new_notebook(cells=[cell])
        NotebookClient(book, timeout=300, kernel_name="python3", allow_errors=True).execute()
        return book.cells[0].outputs

    outputs = ran(2, "whole")
    assert [output for output in outputs if output["output_type"] == "error"] == []
    pictures = [out["data"] for out in outputs if "image/svg+xml" in out.get("data", {})]
    assert len(pictures) == 1  # drawn anew in its place
    assert "accuracy" in pictures[0]["text/plain"]
    assert any("kept 0." in out.get("text", "") for out in outputs)
    assert not any("WARNING" in out.get("text", "") for out in outputs)

    code = CODE.format(weights=2000, out=str(tmp_path / "cut"))
    error = interrupted(code)
    assert error["ename"] == "KeyboardInterrupt"
    assert error["evalue"].startswith("stopped ")
    assert "the same call of dnal.run goes on from what is saved in" in error["evalue"]
    assert (tmp_path / "cut" / "weight_stage.pt").exists()


def interrupted(code: str) -> dict:
    """The error of a cell that is interrupted once it has shown a picture."""
    from jupyter_client.manager import start_new_kernel

    manager, client = start_new_kernel(kernel_name="python3")
    try:
        client.execute(code)
        end = time.monotonic() + 240
        while time.monotonic() < end:
            try:
                message = client.get_iopub_msg(timeout=5)
            except queue.Empty:
                continue
            if "image/svg+xml" in message["content"].get("data", {}):
                manager.interrupt_kernel()
            if message["msg_type"] == "error":
                return message["content"]
        raise AssertionError("the cell was not interrupted")
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
