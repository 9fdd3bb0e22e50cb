"""The networks of the paper's CIFAR-10 experiments, as plain modules without gates.

Each builder returns a network that knows two things about itself: ``config``, the call that
rebuilds it, and ``gate_here(name)``, whether the paper puts a gate behind that BatchNorm2d.

| builder     | layers with a gate | gated channels | MACs, 32 x 32 | parameters |
|-------------|--------------------|----------------|---------------|------------|
| vgg16       | 13                 | 4,224          | 313.46 M      | 14.99 M    |
| resnet56    | 55                 | 2,032          | 125.49 M      | 0.85 M     |
| mobilenetv2 | 35                 | 9,920          | 91.15 M       | 2.30 M     |
"""

from collections.abc import Callable

import torch
from torch import nn

from dnal_mini.models.mobilenetv2 import mobilenetv2
from dnal_mini.models.resnet import resnet56
from dnal_mini.models.vgg import GAMMA, initialise, vgg16
from dnal_mini.refused import Refused

MODELS: dict[str, Callable[..., nn.Module]] = {
    "vgg16": vgg16,
    "resnet56": resnet56,
    "mobilenetv2": mobilenetv2,
}

__all__ = ["MODELS", "mobilenetv2", "resnet56", "restart", "vgg16"]


def restart(net: nn.Module, seed: int) -> None:
    """Give a network new random weights and fresh norms, in place: training from scratch.

    One of ours, whole or pruned (which one says its ``config``), gets them as its builder gives
    them; any other as ``reset_parameters`` of its layers does.

    Raises: ValueError for a layer with weights that has no such method; nothing is changed then.
    """
    if name := cannot_restart(net):
        raise Refused(
            f"got a network whose layer {name} has weights and no reset_parameters(); need it for "
            "new random ones; do write it, or leave --tuned-from at pruned"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for module in net.modules():
            if reset := getattr(module, "reset_parameters", None):
                reset()
        config = getattr(net, "config", None)
        builder = config.get("builder") if isinstance(config, dict) else None
        if builder in MODELS:
            initialise(net, GAMMA if builder == "vgg16" else 1.0)


def cannot_restart(net: nn.Module) -> str:
    """Name of the first layer whose weights nobody can draw anew; "" if there is none."""
    for name, module in net.named_modules():
        own = next(module.parameters(recurse=False), None)
        if own is not None and not hasattr(module, "reset_parameters"):
            return name or type(module).__name__
    return ""
