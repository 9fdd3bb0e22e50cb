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

from torch import nn

from dnal_mini.models.mobilenetv2 import mobilenetv2
from dnal_mini.models.resnet import resnet56
from dnal_mini.models.vgg import vgg16

MODELS: dict[str, Callable[..., nn.Module]] = {
    "vgg16": vgg16,
    "resnet56": resnet56,
    "mobilenetv2": mobilenetv2,
}

__all__ = ["MODELS", "mobilenetv2", "resnet56", "vgg16"]
