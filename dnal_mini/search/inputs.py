"""What a run starts from: its images and its dense network."""

import dataclasses
import inspect
import os
from typing import Any

import torch
from torch import nn

from dnal_mini.config import SearchConfig
from dnal_mini.data.imageset import ImageSet, carve
from dnal_mini.data.sources import cifar10, digits, image_folder, toy_images
from dnal_mini.models import MODELS
from dnal_mini.training.devices import pick_device, processes
from dnal_mini.training.loop import steps_of


def load_data(config: SearchConfig) -> ImageSet:
    """The data set of a config, train and val on its device. Raises ValueError as ``data`` does."""
    device = pick_device(config.device)
    root = config.data_dir or os.environ.get("DNAL_DATA")
    carved: dict[str, Any] = {"seed": config.seed, "val": config.val}
    match config.data:
        case "digits":
            data = digits(**carved)
        case "toy":
            data = toy_images(**carved, image_shape=(3, 32, 32))
        case "cifar10":
            data = cifar10(root or "data/cifar10", download=not root, **carved)
        case "folder":
            data = image_folder(root, config.image_size or None, **carved)
    if config.train_images:
        _, used = carve(data.train.labels, config.train_images, config.seed)
        data = dataclasses.replace(data, train=data.train.take(used))
    steps_of(len(data.train), config.batch, processes(config.devices, config.num_nodes))
    return on_device(data, device)


def data_still_there(config: SearchConfig) -> ImageSet | None:
    """The images of a run that is over, on the CPU; None if they are gone or come with the package.

    Nothing is downloaded.
    """
    if config.data not in ("cifar10", "folder"):
        return None
    usual = "data/cifar10" if config.data == "cifar10" else ""
    root = config.data_dir or os.environ.get("DNAL_DATA") or usual
    try:
        return load_data(config.replace(device="cpu", data_dir=root))
    except (OSError, ValueError):
        return None


def on_device(data: ImageSet, device: torch.device) -> ImageSet:
    """The set with train and val on a device."""
    return dataclasses.replace(data, train=data.train.to(device), val=data.val.to(device))


def build(config: SearchConfig, data: ImageSet) -> nn.Module:
    """The dense network of a config, without gates, from the config's seed."""
    builder, side = MODELS[config.model], data.image_shape[1]
    sized = side != 32 and "image_size" in inspect.signature(builder).parameters
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        more = {"image_size": side} if sized else {}
        return builder(num_classes=data.num_classes, width=config.width, **more)


def placed(net: nn.Module, config: SearchConfig, data: ImageSet) -> nn.Module:
    """The net on the data's device, its filters in the config's memory layout."""
    layout = torch.channels_last if config.channels_last else torch.contiguous_format
    return net.to(data.train.device).to(memory_format=layout)  # type: ignore[call-overload]
