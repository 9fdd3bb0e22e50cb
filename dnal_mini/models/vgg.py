"""VGG16 for small images: thirteen convolutions in a plain chain.

The simplest of the three networks, so the three rules that all of them share stand here too:
which arguments are allowed, how a width multiplier rounds, how weights start.
"""

import math
from collections import OrderedDict

import torch
from torch import Tensor, nn

from dnal_mini.refused import LARGEST_SIDE, need_number

# Output channels of the 3x3 convolutions; "M" halves height and width.
LAYOUT = (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512)
HIDDEN = 512  # units of the hidden linear layer
GAMMA = 0.5  # scale of every BatchNorm2d at the start
TINY, WIDEST = 1e-12, 64  # of what a width may be
SHRINK = 2 ** LAYOUT.count("M")  # 32 x 32 pixels become 2 x 2


class VGG16(nn.Module):
    """Convolutions ``features.conv1`` to ``conv13`` with their norms, then two linear layers."""

    def __init__(self, num_classes: int, width: float, image_size: int) -> None:
        super().__init__()
        self.config = {
            "builder": "vgg16",
            "num_classes": num_classes,
            "width": width,
            "image_size": image_size,
        }
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        channels, conv, pool = 3, 0, 0
        for entry in LAYOUT:
            if isinstance(entry, str):
                pool += 1
                layers[f"pool{pool}"] = nn.MaxPool2d(2)
                continue
            conv += 1
            inputs, channels = channels, scaled(entry, width)
            layers[f"conv{conv}"] = nn.Conv2d(inputs, channels, 3, padding=1)
            layers[f"bn{conv}"] = nn.BatchNorm2d(channels)
            layers[f"relu{conv}"] = nn.ReLU()
        self.features = nn.Sequential(layers)
        self.pool = nn.AvgPool2d(image_size // SHRINK)
        hidden = scaled(HIDDEN, width)
        self.classifier = nn.Sequential(
            OrderedDict(
                fc1=nn.Linear(channels, hidden),
                bn=nn.BatchNorm1d(hidden),
                relu=nn.ReLU(),
                fc2=nn.Linear(hidden, num_classes),
            )
        )
        initialise(self, GAMMA)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.features(x))
        return self.classifier(torch.flatten(x, 1))

    def gate_here(self, name: str) -> bool:
        """True for all 13 BatchNorm2d; the hidden units of the classifier are not gated."""
        return name.startswith("features.bn")


def vgg16(num_classes: int = 10, width: float = 1.0, image_size: int = 32) -> VGG16:
    """VGG16 with batch norm for square images of ``image_size`` pixels, at least 16.

    Input: (n, 3, image_size, image_size); output: (n, num_classes) logits. ``width`` multiplies
    every channel count and the hidden units, see ``scaled``.

    Source: Simonyan & Zisserman 2015, configuration D, in the CIFAR form of Lin et al. 2019 (GAL),
    which [guo2022dnal] prunes: convolutions with bias, one hidden linear layer with batch norm,
    batch norm gamma 0.5 at the start.
    Differs: the last average pool grows with ``image_size`` (2 x 2 at 32), so that every size ends
    in one pixel.
    Raises: ValueError for num_classes < 1, a width that is not above 0, image_size < 16.
    Example:
        >>> net = dnal.models.vgg16(width=0.125)
        >>> tuple(net(torch.randn(2, 3, 32, 32)).shape)
        (2, 10)
        >>> print(dnal.cost(dnal.models.vgg16()))
        14.99 M parameters, 313.46 M MACs, 0.524 MB of activations at the peak
    """
    check_arguments(num_classes, width)
    need_number("image_size", image_size, SHRINK, LARGEST_SIDE, whole=True)  # four pools halve it
    return VGG16(num_classes, width, image_size)


def check_arguments(num_classes: int, width: float) -> None:
    """Raise a ValueError if a network of this width and class count cannot be built."""
    need_number("num_classes", num_classes, 1, 10**6, whole=True)
    need_number("width", width, TINY, WIDEST)


def scaled(channels: int, width: float) -> int:
    """``channels * width`` to the nearest int (halves to even), but never below 4.

    Width 1 gives exactly the published widths. Four is the floor because a layer of one or two
    channels leaves the gates nothing to choose from.
    """
    return channels if width == 1 else max(4, round(channels * width))


def initialise(net: nn.Module, gamma: float = 1.0) -> None:
    """Draw starting weights, in place.

    Convolutions: N(0, sqrt(2 / (k * k * out_channels))); linear layers: N(0, 0.01); biases 0;
    BatchNorm2d: scale ``gamma``, shift 0.

    Source: the authors' scripts and those of GAL [guo2022dnal].
    Differs: one rule for the classifiers of all nets; the authors' ResNet50 keeps torch's default.
    """
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
            nn.init.normal_(module.weight, 0.0, math.sqrt(2 / fan_out))
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, 0.0, 0.01)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.constant_(module.weight, gamma)
        if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
