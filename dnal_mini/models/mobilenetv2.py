"""MobileNetV2 for small images: thin trunk, wide depthwise branches."""

from collections import OrderedDict

import torch
from torch import Tensor, nn

from dnal_mini.models.vgg import check_arguments, initialise, scaled

STEM = 32
# expansion, channels, blocks, stride of the first block
STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 1),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
HEAD = 1280


def conv_bn(
    inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1, relu: bool = True
) -> nn.Sequential:
    """Convolution without bias, padded to keep the size, its norm and (if asked) a ReLU."""
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        conv=nn.Conv2d(
            inputs, outputs, kernel, stride, padding=kernel // 2, groups=groups, bias=False
        ),
        bn=nn.BatchNorm2d(outputs),
    )
    if relu:
        layers["relu"] = nn.ReLU()
    return nn.Sequential(layers)


class InvertedBlock(nn.Module):
    """Expand with 1x1, filter each channel with 3x3, project with 1x1; add ``x`` at stride 1.

    The projection has no activation. At stride 1 with a change of width the shortcut is a 1x1
    convolution with norm; at stride 2 there is none.
    """

    def __init__(self, inputs: int, outputs: int, expansion: int, stride: int) -> None:
        super().__init__()
        hidden = expansion * inputs
        self.expand = conv_bn(inputs, hidden)
        self.depthwise = conv_bn(hidden, hidden, kernel=3, stride=stride, groups=hidden)
        self.project = conv_bn(hidden, outputs, relu=False)
        self.shortcut: nn.Module | None = None
        if stride == 1:
            same = inputs == outputs
            self.shortcut = nn.Identity() if same else conv_bn(inputs, outputs, relu=False)

    def forward(self, x: Tensor) -> Tensor:
        branch = self.project(self.depthwise(self.expand(x)))
        return branch if self.shortcut is None else branch + self.shortcut(x)


class MobileNetV2(nn.Module):
    """Stem, 17 blocks ``blocks.0`` to ``blocks.16``, 1x1 head, mean over the image, linear."""

    def __init__(self, num_classes: int, width: float) -> None:
        super().__init__()
        self.config = {"builder": "mobilenetv2", "num_classes": num_classes, "width": width}
        channels = scaled(STEM, width)
        self.stem = conv_bn(3, channels, kernel=3)
        blocks: list[nn.Module] = []
        for expansion, stage_channels, count, first_stride in STAGES:
            for index in range(count):
                outputs = scaled(stage_channels, width)
                stride = first_stride if index == 0 else 1
                blocks.append(InvertedBlock(channels, outputs, expansion, stride))
                channels = outputs
        self.blocks = nn.Sequential(*blocks)
        self.head = conv_bn(channels, scaled(HEAD, width))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(scaled(HEAD, width), num_classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.head(self.blocks(self.stem(x)))
        return self.classifier(torch.flatten(self.pool(x), 1))

    def gate_here(self, name: str) -> bool:
        """True behind depthwise, projection and head convolutions: 35 in all.

        Not behind stem, expansion and shortcut: a channel that the expansion's gate closed would
        come back as a constant from the depthwise norm, so the depthwise gate decides for both.
        """
        return name.endswith(".bn") and name.split(".")[-2] in {"depthwise", "project", "head"}


def mobilenetv2(num_classes: int = 10, width: float = 1.0) -> MobileNetV2:
    """MobileNetV2 in its common CIFAR form, for images of any size.

    Input: (n, 3, h, w); output: (n, num_classes) logits. ``width`` multiplies every channel count,
    see ``dnal_mini.models.vgg.scaled``; hidden channels are 6 times the scaled trunk.

    Source: Sandler et al. 2018, in the form whose counts fit [guo2022dnal] to the last printed
    digit (kuangliu/pytorch-cifar): stride 1 in the stem and the second stage, ReLU and not ReLU6,
    a 32 -> 32 expansion in the first block, convolutions as shortcuts at stride 1.
    Differs: the placement of gates is that of the authors' ImageNet network.
    Raises: ValueError for num_classes < 1 or a width that is not above 0.
    Example:
        >>> net = dnal.models.mobilenetv2(width=0.25)
        >>> gated = dnal.add_gates(net)
        >>> sum(len(gate.s) for gate in dnal.gates(gated).values())
        2480
    """
    check_arguments(num_classes, width)
    return MobileNetV2(num_classes, width)
