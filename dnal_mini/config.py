"""Settings as data: what is trained, on which images, by which method, within which budget.

Read ``SearchConfig``; ``stages`` is the table that everything else is derived from. On the command
line and in files all settings are flat: those of the method stand beside the others.
"""

import dataclasses
import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

from dnal_mini.gating import MOST_EPOCHS, Order
from dnal_mini.methods import METHODS
from dnal_mini.methods.contract import Method, Scorer
from dnal_mini.methods.dnal import DNAL
from dnal_mini.models import MODELS
from dnal_mini.pruning.pruner import Residual
from dnal_mini.refused import Refused, need_name, shown
from dnal_mini.training.schedules import ScheduleName
from dnal_mini.training.stage import Feed, Stage

Metric = Literal["macs", "params"]


@dataclass(frozen=True)
class Budget:
    """What the pruned net may cost: one metric of ``measure.cost``, as a share of the dense net's.

    Raises: ValueError for none or several of them, or a share that is not between 0 and 1.
    Example:
        >>> budget = dnal.Budget(params=0.25)
        >>> budget.metric, budget.share
        ('params', 0.25)
    """

    macs: float | None = None
    """Share of the dense net's multiply-adds."""
    params: float | None = None
    """Share of the dense net's parameters."""

    def __post_init__(self) -> None:
        given = {name: share for name, share in vars(self).items() if share is not None}
        if len(given) != 1:
            got = " and ".join(given) or "none"
            raise Refused(f"got budget {got}; need one of {', '.join(vars(self))}; do name one")
        value = given[self.metric]
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1:
            raise Refused(
                f"got budget.{self.metric} {shown(value)}; need a share of the dense net's "
                "between 0 and 1, such as 0.3"
            )

    @property
    def metric(self) -> Metric:
        """The one that is given."""
        return "macs" if self.macs is not None else "params"

    @property
    def share(self) -> float:
        """Its share, in (0, 1)."""
        return float(getattr(self, self.metric))


@dataclass(frozen=True)
class SearchConfig:
    """All settings of one run from a dense net to a smaller one; frozen and checked when made.

    Raises: ValueError naming the field, what it got and what it needs.
    Example:
        >>> config = dnal.SearchConfig(width=0.125).replace(gate_price=3e-3, weight_epochs=2)
        >>> config.method.gate_price, config.weight_epochs
        (0.003, 2)
        >>> config.replace(method="l1-norm", budget=dnal.Budget(macs=0.3)).budget.share
        0.3
    """

    name: str = "digits"
    """Name of the recipe, for tables."""
    data: Literal["digits", "toy", "cifar10", "folder", "own"] = "digits"
    """Images: embedded digits, drawn toy ones, CIFAR-10, a folder of classes; own: from Python."""
    data_dir: str = ""
    """Folder with train/<class>/ and test/<class>/; empty: $DNAL_DATA, else a download."""
    image_size: int = 0
    """Side to which the images of a folder are resized, in pixels; 0: as the first one is."""
    val: int = 180
    """Images carved from train for validation, by seed."""
    train_images: int = 0
    """Training images that are used, drawn by seed, the same share of each class; 0: all."""
    crop: int = 4
    """Pixels of zero padding for random crops; 0 switches cropping off."""
    flip: bool = True
    """Mirror half of the training images."""
    model: str = "vgg16"
    """vgg16, resnet56, mobilenetv2, or a function of yours: package.module:function."""
    width: float = 1.0
    """Multiplies every channel count of the network."""
    method: Method = field(default_factory=DNAL)
    """Who decides which channels stay; its own settings stand beside these."""
    budget: Budget | None = None
    """What the pruned net may cost; none: as the method leaves it."""
    weight_epochs: int = 100
    """Epochs of stage 1 (weights, gates off)."""
    fine_tune_epochs: int = 100
    """Epochs of stage 3 (weights of the pruned net)."""
    baseline: Literal["weight-epochs", "all-epochs", "none"] = "weight-epochs"
    """Train the dense net on, to compare with: as long as the weights, or the gates too, are."""
    batch: int = 128
    """Images per step."""
    weight_lr: float = 0.1
    """Learning rate of stage 1."""
    weight_schedule: ScheduleName = "constant"
    """How it goes: constant (paper), cosine down to 0, or one-cycle (up, then down to 0)."""
    fine_tune_lr: float = 0.1
    """Learning rate of stage 3, and of the baseline: the highest one."""
    fine_tune_schedule: ScheduleName = "cosine"
    """How it goes, as for stage 1."""
    momentum: float = 0.9
    """SGD momentum, all stages."""
    nesterov: bool = False
    """Nesterov's form of it, for the weights."""
    label_smoothing: float = 0.0
    """Share of the target spread over all classes when weights are trained; 0 for gates."""
    weight_decay: float = 1e-4
    """Of the weights."""
    reset_momentum: bool = False
    """Empty the momentum buffers before every epoch, as the authors do by a new optimiser."""
    order: Order = "conv-bn-ss-relu"
    """Where the SS layer sits."""
    floor: float = 0.0
    """Share of a vital layer's channels that is held open, at least one channel."""
    residual: Residual = "scatter"
    """How a pruned residual branch joins its trunk."""
    tuned_from: Literal["pruned", "scratch"] = "pruned"
    """Stage 3 starts from the weights that are left, or from new random ones."""
    pad_to: int = 1
    """Stage 3 runs with zero channels up to a multiple of this: faster where hardware likes it."""
    weights: str = ""
    """File .safetensors with weights to start from; stage 1 then has 0 epochs unless it is told."""
    weights_from: str = ""
    """Folder of a run with the same stage 1, which is taken over instead of trained again."""
    seed: int = 0
    """Seeds initial weights, validation split, order, crops and flips."""
    device: str = "cpu"
    """Torch device: cpu, cuda, cuda:1 …"""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
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

    def __post_init__(self) -> None:
        _check(self, RANGES)
        if ":" not in self.model and "." not in self.model:  # a function, the class of a given net
            known(self.model, MODELS, "model")
        need_name("name", self.name)
        _check(self.method, self.method.ranges)
        if self.method.needs_budget and self.budget is None:
            raise Refused(
                f"got method {self.method.name!r} without a budget; need one: it ranks channels, "
                "and does not know how many to keep; do add --budget.macs 0.3"
            )
        if self.method.trains_from_start and self.baseline != "none":
            raise Refused(
                "got an optimisation that trains the weights itself, with a baseline to go on "
                "from; need --baseline none"
            )
        if self.nesterov and self.momentum == 0:
            raise Refused("got nesterov with momentum 0; need momentum; do set --momentum 0.9")

    def settings(self) -> dict[str, Any]:
        """All settings, flat and JSON-able: those of the method beside the others."""
        own = {f.name: getattr(self, f.name) for f in fields(self)}
        budget = self.budget and {self.budget.metric: self.budget.share}
        return own | {"method": self.method.name, "budget": budget} | vars(self.method)

    @classmethod
    def of(cls, settings: dict[str, Any]) -> "SearchConfig":
        """The config of flat settings, today's or those of an older version; see ``upgraded``.

        What is not there has its default.
        Raises: ValueError for a setting that no method, or another one, has.
        """
        return cls(method=METHODS["dnal"]()).replace(**upgraded(settings))

    def replace(self, **changes: Any) -> "SearchConfig":
        """A config with other settings, those of the method among them; ``method``: by name.

        Another ``model`` of one's own begins at its own width, and ``weights`` with no stage 1.
        """
        if ":" in str(changes.get("model", "")):
            changes = {"width": 1.0} | changes
        if changes.get("weights"):
            changes = {"weight_epochs": 0} | changes
        given = changes.pop("method", self.method)
        if not isinstance(given, str | Method):
            raise Refused(f"got method {shown(given)}; need one of {', '.join(METHODS)}")
        kind = METHODS[known(given, METHODS, "method")] if isinstance(given, str) else type(given)
        method = given if isinstance(given, Method) else self.method
        method = method if type(method) is kind else kind()
        own = {f.name for f in fields(self)}
        theirs = {f.name for f in fields(kind)}
        for name in changes:
            if known(name, {*own, *method_fields()}, "field") not in own | theirs:
                owner = next(m for m in METHODS.values() if name in {f.name for f in fields(m)})
                raise Refused(
                    f"got {name} for method {kind.name}, which has no such field; need one of "
                    f"{', '.join(sorted(theirs)) or 'those of the run'}; do add --method "
                    f"{owner.name}, or leave it out"
                )
        if isinstance(budget := changes.get("budget"), dict):
            for metric in budget:
                known(metric, [field.name for field in fields(Budget)], "budget")
            changes["budget"] = Budget(**budget)
        for_method = {name: changes.pop(name) for name in theirs & changes.keys()}
        method = dataclasses.replace(method, **for_method)
        return dataclasses.replace(self, method=method, **changes)

    def stages(self) -> tuple[Stage, ...]:
        """All stages of the run, in order: weights, the dense rival, the method's, fine-tuning."""
        own = self.method_stages()
        first = () if self.method.trains_from_start else (self._weights(),)
        tuned = dataclasses.replace(
            self._weights("fine_tune"),
            epochs=self.fine_tune_epochs,
            lr=self.fine_tune_lr,
            schedule=self.fine_tune_schedule,
            after=(*first, *own)[-1].name,
            settings=frozenset(TUNING),
        )
        longer = self.baseline == "all-epochs"
        more = sum(stage.epochs for stage in own if longer or stage.trains != "gates")
        twin = dataclasses.replace(
            tuned,
            name="baseline",
            epochs=more + self.fine_tune_epochs,
            after="weight_stage",
            settings=frozenset({"baseline", *TUNING[:3]}),
            seed=f"{self.seed}/baseline",
        )
        if not isinstance(self.method, Scorer):  # the weights start anew: they get all epochs
            tuned = dataclasses.replace(tuned, epochs=self.weight_epochs + self.fine_tune_epochs)
        return (*first, *([twin] if self.baseline != "none" else []), *own, tuned)

    def method_stages(self) -> tuple[Stage, ...]:
        """The stages of the method; the first may take the place of stage 1."""
        method, weights = self.method, self._weights()
        decide = {"method", "floor", *(f.name for f in fields(method))} - {*method.meeting}
        if method.searches_strength:
            decide |= {"budget", *method.meeting}
        after, found = "" if method.trains_from_start else weights.name, []
        for stage in method.stages(weights):
            settings = frozenset(decide) if after else weights.settings | decide
            seed = f"{self.seed}/{stage.name}"
            found.append(dataclasses.replace(stage, after=after, settings=settings, seed=seed))
            after = stage.name
        return tuple(found)

    def _weights(self, name: str = "weight_stage") -> Stage:
        """Stage 1, from which all other stages are made."""
        feed = Feed(
            self.batch, self.crop, self.flip, self.precision, self.channels_last, self.compile
        )
        return Stage(
            name,
            self.weight_epochs,
            self.weight_lr,
            self.weight_schedule,
            settings=frozenset(f.name for f in fields(self)) - {"name", *MEANS, *TUNING, *LATER},
            seed=f"{self.seed}/{name}",
            feed=feed,
            momentum=self.momentum,
            nesterov=self.nesterov,
            weight_decay=self.weight_decay,
            label_smoothing=self.label_smoothing,
            reset_momentum=self.reset_momentum,
        )


# They say where and with what, not what: not in comparisons of runs. Paths are kept out of records.
PATHS = ("data_dir", "weights", "weights_from")
MEANS = (*PATHS, "checkpoint_s", "devices", "num_nodes", "strategy")
TUNING = (
    "fine_tune_epochs",
    "fine_tune_lr",
    "fine_tune_schedule",
    "residual",
    "tuned_from",
    "pad_to",
)
LATER = ("method", "budget", "floor", "baseline")  # not in stage 1 either
TINY = 1e-12
MOST = {int: 10**9, float: 1e30}  # of what has no bound of its own: float32 holds it
RANGES = {
    "val": (1, math.inf), "train_images": (0, math.inf), "image_size": (0, 65536),
    "crop": (0, 64), "pad_to": (1, 1024), "width": (TINY, 64), "weight_epochs": (0, math.inf),
    "fine_tune_epochs": (1, math.inf), "batch": (2, math.inf), "weight_lr": (TINY, math.inf),
    "fine_tune_lr": (TINY, math.inf), "momentum": (0, 1), "weight_decay": (0, math.inf),
    "label_smoothing": (0, 1), "checkpoint_s": (0, math.inf), "devices": (1, 1024),
    "num_nodes": (1, 65536), "floor": (0, 1), "seed": (0, 2**62),
}  # fmt: skip


def _check(part: SearchConfig | Method, ranges: Mapping[str, tuple[float, float]]) -> None:
    """Raises: ValueError for a field of another type, word or range."""
    hints = get_type_hints(type(part))
    for name in (f.name for f in fields(part)):
        value, hint = getattr(part, name), hints[name]
        if get_origin(hint) is Literal:
            words = get_args(hint)
            if value not in words:
                raise Refused(f"got {name} {value!r}; need one of {', '.join(words)}")
        elif not isinstance(value, (int, float) if hint is float else hint) or (
            isinstance(value, bool) and hint is not bool
        ):
            kind = getattr(hint, "__name__", str(hint))
            raise Refused(f"got {name} {value!r}; need a value of type {kind}")
    for name, (low, high) in ranges.items():
        value = getattr(part, name)
        most = MOST_EPOCHS if name.endswith("epochs") else MOST[type(value)]
        most = most if high == math.inf else high
        if not low <= value <= most:
            above = (
                f"{low:g} or more" if value < low and high == math.inf else f"{low:g} to {most:g}"
            )
            raise Refused(f"got {name} {value}; need {above}")


def need_config(config: Any) -> None:
    """Raises: ValueError for what is no SearchConfig."""
    if not isinstance(config, SearchConfig):
        do = "call it" if callable(config) else "see dnal.recipes"
        raise Refused(f"got config {shown(config)}; need a SearchConfig; do {do}")


def method_fields() -> set[str]:
    """Names of all settings of all methods."""
    return {field.name for method in METHODS.values() for field in fields(method)}


def upgraded(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Flat settings of a record or folder of any version in today's words."""
    new = dict(settings)
    if "method" in new:
        return new
    rule, share, twin = (new.pop(k, None) for k in ("gates_from", "target_macs", "baseline"))
    new["method"] = "dnal" if rule in (None, "search") else rule
    new["budget"] = {"macs": share} if share else None
    new["baseline"] = "none" if twin is False else "all-epochs"
    for name in () if new["method"] == "dnal" else method_fields():
        new.pop(name, None)
    return new


def known(word: str, names: Iterable[str], what: str) -> str:
    """The word, if it is one of the names.

    Raises: ValueError with the names that begin so, or else the nearest one.
    """
    names = list(names)
    if not isinstance(word, str):
        raise Refused(f"got {what} {shown(word)}; need one of {', '.join(sorted(names))}")
    if word in names:
        return word
    begin = [name for name in names if word and name.startswith(word)]
    near = begin or difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    need = " or ".join(near) if near else f"one of {', '.join(sorted(names))}"
    help_ = {"field": "dnal run --help", "recipe": "dnal recipes"}.get(what, "dnal --help")
    raise Refused(f"got {what} {word!r}; need {need}; do see {help_}")
