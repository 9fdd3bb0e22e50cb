"""Named settings. A recipe is a function that returns a ``SearchConfig``; a variant changes fields.

Where the paper is silent (facts marked unknown in the docstrings) the choice is ours.

Example:
    >>> config = dnal.recipes.digits().replace(gate_price=3e-3)
    >>> config.model, config.width, config.method.gate_price
    ('vgg16', 0.125, 0.003)
"""

from collections.abc import Callable

from dnal_mini.config import SearchConfig
from dnal_mini.methods.dnal import DNAL


def digits() -> SearchConfig:
    """Handwritten digits, an eighth of VGG16's width: the whole road in about a minute.

    Run: ``dnal run``. Embedded data, needs no network. All epochs and rates are ours.
    """
    return SearchConfig(
        name="digits",
        data="digits",
        val=180,
        crop=2,
        flip=False,
        model="vgg16",
        width=0.125,
        weight_epochs=6,
        fine_tune_epochs=8,
        batch=32,
        weight_lr=0.05,
        fine_tune_lr=0.05,
        method=DNAL(arch_epochs=6, arch_lr=0.5, gate_price=1e-3),
        floor=0.1,
        precision="float32",
        channels_last=False,
    )


def cifar10_cpu() -> SearchConfig:
    """CIFAR-10 on two CPU cores: a quarter of VGG16's width, all 50,000 images.

    Run: ``dnal run cifar10_cpu --data-dir FOLDER``. Epochs, cosine and floor are ours.
    """
    return SearchConfig(
        name="cifar10_cpu",
        data="cifar10",
        val=5000,
        model="vgg16",
        width=0.25,
        weight_epochs=6,
        fine_tune_epochs=8,
        weight_lr=0.1,
        fine_tune_lr=0.1,
        weight_decay=5e-4,
        method=DNAL(arch_epochs=6, arch_lr=0.1, gate_price=1e-4),
        floor=0.05,
    )


def resnet56_cpu() -> SearchConfig:
    """CIFAR-10 on CPU cores with a slim ResNet56: a quarter of its width, all 50,000 images.

    Run: ``dnal run resnet56_cpu --data-dir FOLDER``. All epochs are ours, and few.
    """
    return cifar10_cpu().replace(
        name="resnet56_cpu",
        model="resnet56",
        weight_epochs=3,
        arch_epochs=3,
        fine_tune_epochs=3,
        fine_tune_schedule="one-cycle",
        floor=0.0,
    )


def vgg16_mini() -> SearchConfig:
    """A quarter of VGG16's width on 10,000 images of CIFAR-10: minutes on a core, for comparisons.

    Run: ``dnal run vgg16_mini --data-dir FOLDER``. What the chapters on settings and controls
    compare; ``benchmarks/experiments.py`` makes their records. All epochs and rates are ours.
    """
    return cifar10_cpu().replace(
        name="vgg16_mini",
        val=2500,
        train_images=10_000,
        batch=64,
        weight_epochs=6,
        arch_epochs=8,
        fine_tune_epochs=6,
        weight_lr=0.05,
        arch_lr=0.25,
        fine_tune_lr=0.05,
        gate_price=1e-3,
        baseline="none",
    )


def mobilenetv2_mini() -> SearchConfig:
    """A quarter of MobileNetV2's width on 4,000 images of CIFAR-10, as ``vgg16_mini``.

    Run: ``dnal run mobilenetv2_mini --data-dir FOLDER``.
    """
    return vgg16_mini().replace(
        name="mobilenetv2_mini",
        model="mobilenetv2",
        train_images=4000,
        precision="float32",
        floor=0.0,
    )


def vgg16_cifar10() -> SearchConfig:
    """VGG16 on CIFAR-10 as in the paper: 100 + 20 + 100 epochs; wants a GPU.

    Stated: 100 and 20 epochs, lr 0.1 constant in stages 1 and 2, delta 1 to 1e4, SGD.
    Unknown, chosen by us: stage 3 (100 epochs, cosine from 0.1), batch 128, weight decay 1e-4,
    momentum 0.9 kept over epochs, crop 4 and flip, the loss form (paper), the validation split.
    Run: ``dnal run vgg16_cifar10 --data-dir FOLDER --device cuda``.
    """
    return SearchConfig(name="vgg16_cifar10", data="cifar10", val=5000, model="vgg16")


def resnet56_cifar10() -> SearchConfig:
    """ResNet56 on CIFAR-10 as in the paper; stated and unknown as for ``vgg16_cifar10``.

    The placement of gates (stem and both norms of a block) is by analogy with the ImageNet code.
    """
    return vgg16_cifar10().replace(name="resnet56_cifar10", model="resnet56")


def mobilenetv2_cifar10() -> SearchConfig:
    """MobileNetV2 on CIFAR-10 as in the paper; stated and unknown as for ``vgg16_cifar10``.

    Weight decay 4e-5 and the placement of gates are those of the authors' ImageNet scripts.
    """
    new = {"name": "mobilenetv2_cifar10", "model": "mobilenetv2"}
    return vgg16_cifar10().replace(**new, weight_decay=4e-5)


def vgg16_cifar10_fast() -> SearchConfig:
    """VGG16 on CIFAR-10 in a fifth of the paper's epochs: 20 + 4 + 20; wants a GPU.

    All of it is ours: one-cycle learning rates and Nesterov's momentum where weights are trained,
    label smoothing, weight decay 5e-4. With a fifth of the architecture steps s moves five times as
    far in each, so that a gate price means about what it means in ``vgg16_cifar10``.
    Run: ``dnal run vgg16_cifar10_fast --data-dir FOLDER --device cuda --compile true``.
    """
    return _fast(vgg16_cifar10())


def resnet56_cifar10_fast() -> SearchConfig:
    """ResNet56 on CIFAR-10 in a fifth of the epochs, as ``vgg16_cifar10_fast``."""
    return _fast(resnet56_cifar10())


def mobilenetv2_cifar10_fast() -> SearchConfig:
    """MobileNetV2 on CIFAR-10 in a fifth of the epochs, as ``vgg16_cifar10_fast``."""
    return _fast(mobilenetv2_cifar10())


def _fast(paper: SearchConfig) -> SearchConfig:
    """A fifth of the epochs of a recipe, with what makes short training good."""
    gates = paper.settings()
    return paper.replace(
        name=paper.name + "_fast",
        weight_epochs=paper.weight_epochs // 5,
        arch_epochs=gates["arch_epochs"] // 5,
        fine_tune_epochs=paper.fine_tune_epochs // 5,
        weight_schedule="one-cycle",
        fine_tune_schedule="one-cycle",
        weight_lr=0.2,
        fine_tune_lr=0.1,
        arch_lr=5 * gates["arch_lr"],
        nesterov=True,
        label_smoothing=0.1,
        weight_decay=5e-4,
    )


SMALL = (cifar10_cpu, resnet56_cpu, vgg16_mini, mobilenetv2_mini)


PAPER = (vgg16_cifar10, resnet56_cifar10, mobilenetv2_cifar10)


FAST = (vgg16_cifar10_fast, resnet56_cifar10_fast, mobilenetv2_cifar10_fast)


RECIPES: dict[str, Callable[[], SearchConfig]] = {
    recipe.__name__: recipe for recipe in (digits, *SMALL, *PAPER, *FAST)
}
