"""The smallest run that has every stage: VGG16 at a fourteenth of its width, 128 toy images."""

import shutil
from pathlib import Path

from dnal_mini.config import SearchConfig
from dnal_mini.runs import runlog

CONFIG = SearchConfig().replace(
    name="toy", data="toy", val=32, model="vgg16", width=0.07, weight_epochs=1, arch_epochs=3,
    fine_tune_epochs=2, batch=64, arch_lr=5.0, gate_price=1e-3, precision="float32",
    channels_last=False, checkpoint_s=0.0,
)  # fmt: skip
TIMES = {"seconds", "images_per_s", "latency_s", "created"}


def changed(**fields) -> SearchConfig:
    """The run with other settings."""
    return CONFIG.replace(**fields)


def told(row: dict) -> dict:
    """A row without what no two runs share."""
    return {name: value for name, value in row.items() if name not in TIMES}


class Stop(Exception):
    """Ends a run where a test wants it to."""


def stopped_at(stage: str, epoch: int):
    """What ``on_row`` needs to end a run behind an epoch."""

    def stop(row: dict) -> None:
        if (row["kind"], row.get("stage"), row.get("epoch")) == ("epoch", stage, epoch):
            raise Stop

    return stop


def copy_of(finished: Path, folder: Path) -> tuple[Path, dict]:
    """A finished run in a folder of its own, and its result."""
    shutil.copytree(finished, folder)
    return folder, runlog.read(folder)[-1]
