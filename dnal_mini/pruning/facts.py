"""What the analysis knows of a network: facts per tensor and channel."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from dnal_mini.graph.capture import Capture
from dnal_mini.graph.layer import Layer
from dnal_mini.graph.places import describe
from dnal_mini.pruning.provenance import Shadow

ZERO, CONSTANT, FIXED, LIVE = 0, 1, 2, 3


class Unknown:
    """The value of a node that returns something the analysis does not follow."""


@dataclass
class Facts:
    """What is known of one tensor, per channel (all vectors: (channels,))."""

    kind: str  # the word of graph/ops.py
    state: Tensor  # ZERO, CONSTANT, FIXED or LIVE; uint8
    value: Tensor  # the constant, float64, in eval mode; 0 where there is none
    steady: Tensor  # bool: state and value hold in train mode, too
    needed: Tensor  # bool
    sources: list[tuple[fx.Node, Tensor]]  # channel j is made of channel source[j] of that node
    # (-1: of none); an empty list where all channels are mixed
    inputs: Tensor | None = None  # layers with weights: channel at each position of the input
    blocks: list[Tensor] = field(default_factory=list)  # must keep equally many channels each

    @property
    def silent(self) -> Tensor:
        """Constants of value 0 in both modes: nothing to whoever sums them up."""
        return (self.state == CONSTANT) & (self.value == 0) & self.steady

    @property
    def kept(self) -> Tensor:
        """Channels that must physically be there: not zero, and needed."""
        return (self.state != ZERO) & self.needed


@dataclass
class Analysis:
    """A captured network with its numbers and what is known of them; see ``analysis.facts_of``."""

    graph: Capture
    tensors: dict[str, Tensor]  # parameters and buffers as they are now
    facts: dict[fx.Node, Facts] = field(default_factory=dict)  # of nodes that return tensors
    values: dict[fx.Node, Any] = field(default_factory=dict)  # their shadows; learned numbers
    walls: dict[fx.Node, str] = field(default_factory=dict)
    shared: dict[str, list[fx.Node]] = field(default_factory=dict)  # layers that are called again
    lent: set[str] = field(default_factory=set)  # layers whose tensors others read, too

    def layer(self, node: fx.Node) -> Layer:
        """The layer that a node calls; there is one where facts have ``inputs``."""
        return self.graph.layers[node]

    def tensor(self, node: fx.Node, role: str) -> Tensor | None:
        """A parameter or buffer of a node's layer; None if it has none in this role."""
        name = self.graph.layers[node].roles.get(role)
        return None if name is None else self.tensors[name].detach()

    def name(self, node: fx.Node) -> str:
        """What a report calls a node: its layer, or the operation and its place."""
        layer = self.graph.layers.get(node)
        return layer.name if layer else describe(node, self.graph.tensors)

    def by_name(self) -> dict[str, Facts]:
        """Facts of all tensors by the layer or module that makes them, else by the operation.

        The first call of several: a second one has no name of its own.
        """
        found: dict[str, Facts] = {}
        for node, facts in self.facts.items():
            layer = self.graph.layers.get(node)
            name = layer.name if layer else self.graph.sole.get(node, node.name)
            found.setdefault(name, facts)
        return found

    def can_wrap(self, node: fx.Node) -> bool:
        """True if something can be put in front of a layer or behind it: a module called once."""
        layer = self.graph.layers.get(node)
        return layer is not None and bool(layer.module) and layer.name not in self.shared

    def output_is_constant(self) -> bool:
        """True if the network's output is the same for every image."""
        (output,) = (n for n in self.graph.nodes if n.op == "output")
        told = [self.facts.get(n) for n in output.all_input_nodes]
        return all(facts is not None and bool((facts.state != LIVE).all()) for facts in told)

    def add(
        self,
        node: fx.Node,
        kind: str,
        shadow: Shadow | tuple[Shadow, ...],
        state: Tensor,
        value: Tensor | None = None,
        steady: Tensor | None = None,
        sources: list[tuple[fx.Node, Tensor]] | None = None,
        **more: Any,
    ) -> None:
        """Store what is known of a node's result."""
        count = len(state)
        value = torch.zeros(count, dtype=torch.float64) if value is None else value.clone()
        steady = torch.ones(count, dtype=torch.bool) if steady is None else steady.clone()
        needed = torch.zeros(count, dtype=torch.bool)
        state = state.to(torch.uint8, copy=True)
        state[(state == ZERO) & ~steady] = CONSTANT  # zero in eval mode only: not to be cut
        self.facts[node] = Facts(kind, state, value, steady, needed, sources or [], **more)
        self.values[node] = shadow


GONE, NEEDED, TIED, WALL, HELD = 0, 1, 2, 3, 4  # why a channel is there


REASONS = ("gone", "needed", "tied", "walled", "held")


@dataclass
class Keeps:
    """Why each channel of each tensor stays (0: it goes), and how the channels that stay lie."""

    why: dict[fx.Node, Tensor]  # (channels,), uint8: GONE, NEEDED, TIED, WALL or HELD
    residual: str
    min_channels: int = 1
    round_to: int = 1
    scatters: set[fx.Node] = field(default_factory=set)  # branch ends that may keep a subset
    emptied: dict[fx.Node, int] = field(default_factory=dict)  # dead branch ends: their stride
    blocks: dict[fx.Node, str] = field(default_factory=dict)  # modules that go with such an end
    numbers: dict[fx.Node, tuple] = field(default_factory=dict)  # arguments that should follow
    idle: set[fx.Node] = field(default_factory=set)  # nodes of dead branches: nobody reads them
    inside: dict[fx.Node, Tensor] = field(default_factory=dict)  # input positions, as they lie
    outside: dict[fx.Node, Tensor] = field(default_factory=dict)  # own channels, as they lie
    notes: list[str] = field(default_factory=list)
    full: set[fx.Node] = field(default_factory=set)  # grids that keep all of their rows

    def mask(self, node: fx.Node) -> Tensor:
        """Channels of a node's result that stay: bool."""
        return self.why[node] != GONE


def known(state: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Where a channel is neither live nor fixed its value is known.

    It stays zero if it was made of zeros. A constant that becomes 0 (a negative one behind a ReLU)
    stays a constant: it is 0 only as long as what it is made of is there.
    """
    still = (state == ZERO) & (value == 0)
    exact = torch.where(still, ZERO, CONSTANT).to(torch.uint8)
    state = torch.where(state >= FIXED, state.to(torch.uint8), exact)
    return state, value.masked_fill(state >= FIXED, 0)


def pick(x: Facts, at: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """State, value and steadiness of channels ``at``; -1 is zero."""
    safe, none = at.clamp(min=0), at < 0
    state = x.state[safe].masked_fill(none, ZERO)
    return state, x.value[safe].masked_fill(none, 0), x.steady[safe] | none
