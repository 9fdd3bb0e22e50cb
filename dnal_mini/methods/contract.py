"""What a method has to say, and nothing else: which channels are worth keeping, or how many, or
which network.

A method is a frozen dataclass: its fields are its settings, flat on the command line, and it is one
of three kinds. A ``Scorer`` says what each channel is worth and which are alive; a ``Widther`` how
many channels each layer has; a ``Designer`` which ``Architecture`` to build. The driver
(``search/driver.py``) trains, meets the budget, cuts, fine-tunes, tests and records, in the same
way for all. A channel group is known by the name of its gate, whoever decides about it.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, runtime_checkable

from torch import Tensor, nn

from dnal_mini.data.imageset import ImageSet
from dnal_mini.models.builders import build_named
from dnal_mini.training.stage import Row, Session, Stage, Work

Values = dict[str, Tensor]  # of each gate: (channels,)


@dataclass(frozen=True)
class Subject:
    """What a method looks at.

    ``net`` has gates and the weights that stage 1 left; the method may change it. ``floors``: how
    many channels of a layer must stay by all means, by gate. ``share(masks)``: what a budget counts
    (MACs, if there is none) of the net cut to boolean masks, over that of the dense one; ``budget``
    is the share that is wanted.
    """

    net: nn.Module
    data: ImageSet
    seed: int = 0
    floors: Mapping[str, int] = field(default_factory=dict)
    session: Session = field(default_factory=Session)
    budget: float | None = None
    share: Callable[[Values], float] = lambda masks: 1.0


@dataclass(frozen=True)
class Architecture:
    """A network that was found, as data: a builder, its arguments, widths by gate.

    ``widths`` may be above those of the dense net of width 1: the builder's ``width`` then is.
    Hashable, and JSON there and back (``json``, ``Architecture.of``).
    """

    builder: str
    arguments: tuple[tuple[str, Any], ...] = ()
    widths: tuple[tuple[str, int], ...] = ()

    def json(self) -> str:
        """Canonical JSON."""
        parts = {"arguments": dict(self.arguments), "widths": dict(self.widths)}
        return json.dumps({"builder": self.builder, **parts}, sort_keys=True)

    @classmethod
    def of(cls, text: str) -> "Architecture":
        """What ``json`` wrote."""
        parts = json.loads(text)
        pairs = (tuple(sorted(parts[name].items())) for name in ("arguments", "widths"))
        return cls(parts["builder"], *pairs)

    def build(self, num_classes: int) -> nn.Module:
        """The whole network that the widths are cut from, with new weights, without gates."""
        return build_named(self.builder, num_classes, **dict(self.arguments))


@dataclass(frozen=True)
class Method:
    """What all methods share: settings, and how the driver is to treat them.

    ``strength``: the setting that trades size for accuracy; the driver searches it for a budget.
    ``meeting``: settings that say how a budget is met, and matter for nothing else.
    ``needs_budget``: it ranks, and does not know how many to keep. ``ranges``: least and largest
    value of its numbers.
    """

    name: ClassVar[str] = ""
    strength: ClassVar[str] = ""
    meeting: ClassVar[tuple[str, ...]] = ()
    needs_budget: ClassVar[bool] = False
    ranges: ClassVar[Mapping[str, tuple[float, float]]] = {}

    @property
    def trains_from_start(self) -> bool:
        """True if its first stage takes the place of stage 1."""
        return False

    @property
    def searches_strength(self) -> bool:
        """True if a budget is met by another strength, not by the ranking alone."""
        return bool(self.strength)

    def stages(self, weights: Stage) -> tuple[Stage, ...]:
        """Its own stages of training, made from stage 1's by ``replace``; () for none.

        The driver fills in ``after``, ``settings`` and ``seed``.
        """
        return ()

    def work(self, stage: Stage, subject: Subject) -> Work:
        """What it does inside one of its stages. Changes ``subject.net``."""
        raise NotImplementedError(f"{self.name} has no stage {stage.name}")

    def settled(self, row: Row) -> bool:
        """True if a search for a strength can stop after this epoch of its last stage."""
        return False


@runtime_checkable
class Scorer(Protocol):
    """Says what each channel is worth: the higher, the sooner it stays."""

    def values(self, subject: Subject) -> Values:
        """By gate: (channels,), comparable over the whole net."""

    def alive(self, subject: Subject) -> Values:
        """By gate: bool (channels,), the channels that stay if there is no budget."""


@runtime_checkable
class Widther(Protocol):
    """Says how many channels each layer has; what they compute is learned anew."""

    def widths(self, subject: Subject) -> dict[str, int]:
        """By gate: at least 1, also more than the dense net has."""


@runtime_checkable
class Designer(Protocol):
    """Says which network to build; its weights are learned from the start."""

    def design(self, subject: Subject) -> Architecture:
        """The network."""
