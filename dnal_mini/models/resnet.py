"""ResNet56 for small images: a trunk that 27 blocks add to."""

from collections import OrderedDict

import torch
from torch import Tensor, nn

from dnal_mini.layers.channelmap import ChannelMap
from dnal_mini.models.vgg import check_arguments, initialise, scaled

STEM = 16
# channels, blocks, stride of the first block
STAGES = ((16, 9, 1), (32, 9, 2), (64, 9, 2))


class BasicBlock(nn.Module):
    """``relu(branch(x) + shortcut(x))``; the branch is two 3x3 convolutions with norms."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = zero_padded_shortcut(inputs, outputs, stride)
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        branch = self.relu1(self.bn1(self.conv1(x)))
        branch = self.bn2(self.conv2(branch))
        return self.relu2(branch + self.shortcut(x))


def zero_padded_shortcut(inputs: int, outputs: int, stride: int) -> nn.Module:
    """A shortcut without parameters: every ``stride``-th pixel, new channels filled with zeros.

    Half of the new channels come before the old ones and half after, an odd one at the end.
    Source: He et al. 2016, shortcut option A.
    """
    if inputs == outputs and stride == 1:
        return nn.Identity()
    before = (outputs - inputs) // 2
    after = outputs - inputs - before
    return ChannelMap([-1] * before + list(range(inputs)) + [-1] * after, stride=stride)


class ResNet56(nn.Module):
    """Stem, blocks ``blocks.0`` to ``blocks.26`` in three stages, mean over the image, linear."""

    def __init__(self, num_classes: int, width: float) -> None:
        super().__init__()
        self.config = {"builder": "resnet56", "num_classes": num_classes, "width": width}
        channels = scaled(STEM, width)
        self.stem = nn.Sequential(
            OrderedDict(
                conv=nn.Conv2d(3, channels, 3, padding=1, bias=False),
                bn=nn.BatchNorm2d(channels),
                relu=nn.ReLU(),
            )
        )
        blocks: list[nn.Module] = []
        for stage_channels, count, first_stride in STAGES:
            for index in range(count):
                outputs = scaled(stage_channels, width)
                blocks.append(BasicBlock(channels, outputs, first_stride if index == 0 else 1))
                channels = outputs
        self.blocks = nn.Sequential(*blocks)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(channels, num_classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.stem(x))
        return self.classifier(torch.flatten(self.pool(x), 1))

    def gate_here(self, name: str) -> bool:
        """True for the stem's BatchNorm2d and for both of every block: 55 in all."""
        return name.rpartition(".")[2] in {"bn", "bn1", "bn2"}


def resnet56(num_classes: int = 10, width: float = 1.0) -> ResNet56:
    """ResNet56 with parameter-free shortcuts, for images of any size.

    Input: (n, 3, h, w); output: (n, num_classes) logits. ``width`` multiplies every channel count,
    see ``dnal_mini.models.vgg.scaled``.

    Source: He et al. 2016, section 4.2; the shortcut pads half before, half after, as in GAL
    (Lin et al. 2019). The printed 125.49 M of [guo2022dnal] fit this shortcut, not projections.
    Differs: the placement of gates (stem, both norms of a block) is by analogy with the authors'
    ResNet50; no CIFAR code is published.
    Raises: ValueError for num_classes < 1 or a width that is not above 0.
    Example:
        >>> net = dnal.models.resnet56(num_classes=7, width=0.25)
        >>> net.config
        {'builder': 'resnet56', 'num_classes': 7, 'width': 0.25}
        >>> tuple(net(torch.randn(2, 3, 20, 24)).shape)
        (2, 7)
    """
    check_arguments(num_classes, width)
    return ResNet56(num_classes, width)
