"""What a finished run answers when it is asked again: its result, if it is still the same run."""

from dataclasses import replace
from pathlib import Path

from torch import nn

from dnal_mini.config import SearchConfig
from dnal_mini.models import MODELS
from dnal_mini.models.builders import can_import
from dnal_mini.runs.identity import check_made_of, images_of
from dnal_mini.runs.reopen import recorded
from dnal_mini.runs.runfolder import finished
from dnal_mini.runs.runlog import Row
from dnal_mini.search.inputs import (
    Data,
    data_still_there,
    dense_net,
    images_given,
    load_data,
)


def answer(
    config: SearchConfig, out: Path, net: nn.Module | None = None, data: Data = None
) -> Row | None:
    """The result of a finished run; None if it is not. Nothing is trained, written or downloaded.

    Raises: ValueError if the folder holds a run with other settings, or the images or the net that
    are given, or are now where the run had its own, are others.
    """
    result = finished(out, config)
    if not result:
        return None
    known = "fingerprint" in recorded(out).get("data", {})  # not by older versions
    config = replace(config, device="cpu", devices=1, num_nodes=1)  # to look, not to train
    images = images_given(config, net, data) if data is not None else None
    images = images or (data_still_there(config) if known else None)
    about: Row = {"data": images_of(images)} if images and known else {}
    if net is None and config.model in MODELS and not config.weights:
        about["net"] = None  # one of ours, drawn by the seed
    elif (images or config.data in ("digits", "toy")) and (net is not None or _there(config)):
        about["net"] = dense_net(config, net, images or load_data(config))[1]
    check_made_of(out, about)
    return result


def _there(config: SearchConfig) -> bool:
    """False if the net's builder, or the file of its weights, is gone since: nothing to compare."""
    weights = not config.weights or Path(config.weights).exists()
    return weights and can_import(config.model)
