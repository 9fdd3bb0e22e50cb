"""All settings of a search in one frozen dataclass, checked when it is made."""

import dataclasses
import difflib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args, get_type_hints

from dnal_mini.gating import DeltaForm, Objective, Order
from dnal_mini.methods.controls import Rule
from dnal_mini.pruning.pruner import Residual
from dnal_mini.training.devices import Precision

ScheduleName = Literal["constant", "cosine", "one-cycle"]


@dataclass(frozen=True)
class SearchConfig:
    """All settings of one sequential optimisation; frozen and checked when made.

    Raises: ValueError naming the field, what it got and what it needs.
    """

    name: str = "digits"
    """Name of the recipe, for tables."""
    data: Literal["digits", "toy", "cifar10"] = "digits"
    """Data set: embedded digits, drawn toy images, or CIFAR-10."""
    data_dir: str = ""
    """Folder with train/<class>/ and test/<class>/; empty: $DNAL_DATA, else a download."""
    val: int = 180
    """Images carved from train for validation, by seed."""
    train_images: int = 0
    """Training images that are used, drawn by seed, the same share of each class; 0: all."""
    crop: int = 4
    """Pixels of zero padding for random crops; 0 switches cropping off."""
    flip: bool = True
    """Mirror half of the training images."""
    model: Literal["vgg16", "resnet56", "mobilenetv2"] = "vgg16"
    """Network."""
    width: float = 1.0
    """Multiplies every channel count of the network."""
    optimisation: Literal["sequential", "joint"] = "sequential"
    """Weights, then gates (paper), or both at once for as many epochs."""
    weight_epochs: int = 100
    """Epochs of stage 1 (weights, gates off)."""
    arch_epochs: int = 20
    """Epochs of stage 2 (gates, weights frozen)."""
    fine_tune_epochs: int = 100
    """Epochs of stage 3 (weights of the pruned net)."""
    baseline: bool = True
    """Also train the dense net on for as many epochs as stages 2 and 3, to compare with."""
    batch: int = 128
    """Images per step."""
    weight_lr: float = 0.1
    """Learning rate of stage 1."""
    weight_schedule: ScheduleName = "constant"
    """How it goes: constant (paper), cosine down to 0, or one-cycle (up, then down to 0)."""
    arch_lr: float = 0.1
    """Learning rate of s in stage 2, constant."""
    fine_tune_lr: float = 0.1
    """Learning rate of stage 3, and of the baseline: the highest one."""
    fine_tune_schedule: ScheduleName = "cosine"
    """How it goes, as for stage 1."""
    momentum: float = 0.9
    """SGD momentum, all stages."""
    nesterov: bool = False
    """Nesterov's form of it, for the weights."""
    label_smoothing: float = 0.0
    """Share of the target spread over all classes when weights are trained; 0 in stage 2."""
    weight_decay: float = 1e-4
    """Of the weights."""
    arch_weight_decay: float = 0.0
    """Of s, which it pulls towards 0; the authors' scripts have none."""
    reset_momentum: bool = False
    """Empty the momentum buffers before every epoch, as the authors' scripts do."""
    gate_price: float = 1e-4
    """Loss (nats) per open gate: lambda_a."""
    price_per: Literal["gate", "macs"] = "gate"
    """Every gate costs the same (paper), or in proportion to the MACs that closing it saves."""
    target_macs: float = 0.0
    """Share of the dense MACs to end at: the price is found, from gate_price on; 0: as given."""
    target_by: Literal["price", "shift"] = "price"
    """How: look for a price and shift s by what is missing, or keep the price and only shift."""
    gates_from: Rule = "search"
    """Who decides which channels stay: the search, or a rule to compare it with."""
    objective: Objective = "paper"
    """Price sum sigmoid(delta s) as in the paper, or sum sigmoid(s) as in the authors' code."""
    delta_form: DeltaForm = "paper"
    """delta from 1 to delta_max (paper), multiplied before each epoch (code), linear, constant."""
    delta_max: float = 1e4
    """Steepness in the last architecture epoch."""
    order: Order = "conv-bn-ss-relu"
    """Where the SS layer sits."""
    threshold: float = 0.5
    """A gate is open where sigmoid(delta s) is above it; the authors' scripts take 0.9."""
    freeze_classifier: bool = True
    """Freeze linear layers too in stage 2 (paper); the authors' scripts train them."""
    bn_mode: Literal["batch", "running"] = "batch"
    """BatchNorm statistics in stage 2: of the batch, as in the authors' scripts, or running."""
    floor: float = 0.0
    """Share of a vital layer's channels that is held open, at least one channel."""
    residual: Residual = "scatter"
    """How a pruned residual branch joins its trunk."""
    tuned_from: Literal["pruned", "scratch"] = "pruned"
    """Stage 3 starts from the weights that are left, or from new random ones."""
    weights_from: str = ""
    """Folder of a run with the same stage 1, which is taken over instead of trained again."""
    seed: int = 0
    """Seeds initial weights, validation split, order, crops and flips."""
    device: str = "cpu"
    """Torch device: cpu, cuda, cuda:1 …"""
    precision: Precision = "auto"
    """Of convolutions; auto: bfloat16 where the hardware multiplies in it."""
    channels_last: bool = True
    """Memory layout of images and filters."""
    compile: bool = False
    """Let torch.compile fuse the training step; pays on long runs."""
    checkpoint_s: float = 60.0
    """Seconds between checkpoints, inside epochs and after them; one follows each stage anyway."""
    devices: int = 1
    """Processes on each machine, one device each; they share every batch."""
    num_nodes: int = 1
    """Machines."""
    strategy: Literal["ddp"] = "ddp"
    """How Lightning Fabric shares the work."""

    def epochs(self, stage: str) -> int:
        """Number of epochs of a stage; the baseline takes as many as stages 2 and 3 together."""
        if stage == "baseline":
            return self.arch_epochs + self.fine_tune_epochs
        if stage == "joint_stage":
            return self.weight_epochs + self.arch_epochs
        return int(getattr(self, stage.removesuffix("_stage") + "_epochs"))

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for field in dataclasses.fields(self):
            value, hint = getattr(self, field.name), hints[field.name]
            words = get_args(hint)
            if words and value not in words:
                raise ValueError(f"got {field.name} {value!r}; need one of {', '.join(words)}")
            kind = (int, float) if hint is float else hint
            wrong = isinstance(value, bool) and hint is not bool
            if not words and (wrong or not isinstance(value, kind)):
                raise ValueError(
                    f"got {field.name} {value!r}; need a value of type {hint.__name__}"
                )
        for name, (low, high) in RANGES.items():
            value = getattr(self, name)
            if not (low <= value <= high and math.isfinite(value)):
                above = f"{low:g} or more" if high == math.inf else f"{low:g} to {high:g}"
                raise ValueError(f"got {name} {value}; need {above}")
        if self.gates_from != "search" and self.target_macs == 0:
            raise ValueError(
                f"got gates_from {self.gates_from!r} with target_macs 0; need a target: a rule "
                "ranks channels, and does not know how many to keep"
            )
        if self.optimisation == "joint" and self.baseline:
            raise ValueError("got joint optimisation with a baseline; need --baseline false")
        if self.nesterov and self.momentum == 0:
            raise ValueError("got nesterov with momentum 0; need momentum; do set --momentum 0.9")


# They say where and with what, not what: not in comparisons of runs. Paths are kept out of records.
PATHS = ("data_dir", "weights_from")


MEANS = (*PATHS, "checkpoint_s", "devices", "num_nodes", "strategy")


TINY = 1e-12


RANGES = {
    "val": (1, math.inf), "train_images": (0, math.inf), "crop": (0, 64), "width": (TINY, 64),
    "weight_epochs": (1, math.inf),
    "arch_epochs": (1, math.inf), "fine_tune_epochs": (1, math.inf), "batch": (2, math.inf),
    "weight_lr": (TINY, math.inf), "arch_lr": (TINY, math.inf), "fine_tune_lr": (TINY, math.inf),
    "momentum": (0, 1), "weight_decay": (0, math.inf), "arch_weight_decay": (0, math.inf),
    "gate_price": (0, math.inf),
    "label_smoothing": (0, 1), "target_macs": (0, 1), "checkpoint_s": (0, math.inf),
    "devices": (1, 1024), "num_nodes": (1, 65536), "delta_max": (1, 1e9),
    "threshold": (1e-6, 1 - 1e-6), "floor": (0, 1), "seed": (0, 2**62),
}  # fmt: skip


def known(word: str, names: Iterable[str], what: str) -> str:
    """The word, if it is one of the names.

    Raises: ValueError with the names that begin so, or else the nearest one.
    """
    names = list(names)
    if word in names:
        return word
    begin = [name for name in names if word and name.startswith(word)]
    near = begin or difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    need = " or ".join(near) if near else f"one of {', '.join(names)}"
    help_ = {"field": "dnal run --help", "recipe": "dnal recipes"}.get(what, "dnal --help")
    raise ValueError(f"got {what} {word!r}; need {need}; do see {help_}")
