"""Which channels of a network are zero, and which are needed: the analysis behind the pruner.

Pruning is dead-code elimination on channels. Two facts are computed for every channel of every
tensor of the traced network:

* forward, from the input: the channel is provably ``ZERO``, ``CONSTANT`` (one value everywhere),
  ``FIXED`` (the same for every image, but not over its pixels: a constant that met a padded
  border), or ``LIVE``;
* backward, from the output: somebody *needs* the channel, or nobody does.

A channel that is zero or unneeded can go. An operation that is not known here is a wall: all that
touches it is kept and the report names it. So the analysis is never wrong, only less greedy.
Read ``analyse`` first. Cutting is the business of ``prune.py``.
"""

import copy
import math
import operator
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from dnal_mini.gate import is_activation, trace

ZERO, CONSTANT, FIXED, LIVE = 0, 1, 2, 3


class ChannelMap(nn.Module):
    """Output channel j is input channel ``source[j]``, or all zeros where ``source[j]`` is -1.

    Input: (n, c, h, w); output: (n, len(source), ceil(h / stride), ceil(w / stride)): every
    ``stride``-th pixel is taken. One module serves as gather, as scatter, as ResNet's
    parameter-free shortcut, and (all -1) as a branch that is gone.

    Source: He et al. 2016, shortcut option A.
    Raises: ValueError for an index under -1 or a stride under 1.
    """

    source: Tensor  # (out channels,), long
    _to: Tensor
    _from: Tensor
    fx_leaf = True

    def __init__(self, source: Sequence[int] | Tensor, stride: int = 1) -> None:
        super().__init__()
        source = torch.as_tensor(source, dtype=torch.long)
        if source.dim() != 1 or len(source) == 0 or int(source.min()) < -1 or stride < 1:
            raise ValueError(f"got source {source.tolist()}, stride {stride}; need indices >= -1")
        self.stride = stride
        self.register_buffer("source", source, persistent=False)
        self.register_buffer("_to", (source >= 0).nonzero()[:, 0], persistent=False)
        self.register_buffer("_from", source[source >= 0], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.stride > 1:
            x = x[:, :, :: self.stride, :: self.stride]
        if len(self._to) == len(self.source):
            return x.index_select(1, self.source)
        out = x.new_zeros(x.shape[0], len(self.source), x.shape[2], x.shape[3])
        return out.index_copy(1, self._to, x.index_select(1, self._from))

    def extra_repr(self) -> str:
        return f"{int(self.source.max()) + 1}+ -> {len(self.source)}, stride={self.stride}"


@dataclass
class Facts:
    """What is known of one tensor, per channel (all vectors: (channels,))."""

    state: Tensor  # ZERO, CONSTANT, FIXED or LIVE
    value: Tensor  # the constant, float64, in eval mode; 0 where there is none
    needed: Tensor  # bool
    layout: int  # tensors with the same layout hold the same channels in the same order
    columns: int = 1  # entries per channel: height * width after a flatten

    @property
    def kept(self) -> Tensor:
        """Channels that must physically be there: not zero, and needed."""
        return (self.state != ZERO) & self.needed


@dataclass
class Analysis:
    """The traced network with its facts; made by ``analyse``."""

    graph: fx.GraphModule
    kinds: dict[fx.Node, str]
    facts: dict[fx.Node, Facts]
    walls: list[str] = field(default_factory=list)
    scatters: set[fx.Node] = field(default_factory=set)  # branch ends that may keep a subset
    pinned: set[int] = field(default_factory=set)  # layouts that keep every channel
    residual: str = "scatter"

    def module(self, node: fx.Node) -> Any:
        """The module that a call_module node calls; of the class that its kind promises."""
        return self.graph.get_submodule(str(node.target))

    def keeps(self) -> dict[int, Tensor]:
        """For each layout the channels that at least one of its tensors must hold: bool masks."""
        keeps: dict[int, Tensor] = {}
        for facts in self.facts.values():
            pinned = facts.layout in self.pinned
            kept = torch.ones_like(facts.kept) if pinned else facts.kept
            keeps[facts.layout] = keeps.get(facts.layout, torch.zeros_like(kept)) | kept
        return keeps

    def output_is_constant(self) -> bool:
        """True if the network's output is the same for every image."""
        (output,) = (n for n in self.graph.graph.nodes if n.op == "output")
        return all(bool((self.facts[n].state != LIVE).all()) for n in output.all_input_nodes)


def analyse(
    net: nn.Module,
    image_shape: Sequence[int],
    residual: str = "scatter",
    zeroed: Collection[str] = (),
) -> Analysis:
    """Facts for every tensor of a network without gates (``prune.drop_gates`` makes one).

    ``residual="scatter"`` lets the last layer of a residual branch keep fewer channels than the
    sum it feeds; "tie" gives all members of a channel set the same channels. ``zeroed`` names
    modules whose output is to be taken as zero: what if this layer died?

    Raises: ValueError if torch.fx cannot trace the network or the image does not fit it.
    """
    graph = trace(net)
    _measure_shapes(graph, image_shape)
    kinds = _kinds(graph)
    analysis = Analysis(graph, kinds, {}, residual=residual)
    for node in graph.graph.nodes:
        if not shape_of(node):
            continue
        analysis.facts[node] = _forward(node, analysis)
        if str(node.target) in zeroed and node.op == "call_module":
            analysis.facts[node].state.fill_(ZERO)
            analysis.facts[node].value.zero_()
    for node in reversed(list(graph.graph.nodes)):
        _backward(node, analysis)
    _layouts(analysis)
    return analysis


def shape_of(node: fx.Node) -> tuple[int, ...]:
    """Shape of the tensor that a node returns, () if it returns anything else."""
    return () if node.op == "output" else getattr(node.meta.get("tensor_meta"), "shape", ())


def _measure_shapes(graph: fx.GraphModule, image_shape: Sequence[int]) -> None:
    """Store the shape of every tensor in its node, by running one image through in eval mode."""
    modes = [(module, module.training) for module in graph.modules()]
    first = next(graph.parameters(), torch.zeros(()))
    graph.eval()
    try:
        with torch.no_grad():
            ShapeProp(graph).propagate(torch.zeros(1, *image_shape).to(first))
    except RuntimeError as error:
        reason = str(error.__cause__ or error).splitlines()[0]
        raise ValueError(f"got image_shape {tuple(image_shape)}, which fails: {reason}") from error
    finally:
        for module, mode in modes:
            module.training = mode


POOLS = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.Dropout)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
ADDITIONS = (operator.add, operator.iadd, torch.add, "add", "add_")


def _kinds(graph: fx.GraphModule) -> dict[fx.Node, str]:
    """One word per node: what the rules below make of it; "wall" for what they do not know."""
    calls: dict[object, int] = {}
    for node in graph.graph.nodes:
        if node.op == "call_module":
            calls[node.target] = calls.get(node.target, 0) + 1
    kinds = {}
    for node in graph.graph.nodes:
        if node.op in ("placeholder", "output"):
            kinds[node] = node.op
        elif node.op == "call_module":
            module = graph.get_submodule(str(node.target))
            has_state = any(True for _ in module.parameters()) or isinstance(module, ChannelMap)
            shared = calls[node.target] > 1 and has_state
            kinds[node] = "wall" if shared else _module_kind(module, node, graph)
        elif is_activation(node, graph):
            kinds[node] = "pointwise"
        else:
            kinds[node] = _function_kind(node)
    return kinds


def _module_kind(module: nn.Module, node: fx.Node, graph: fx.GraphModule) -> str:
    if isinstance(module, nn.Conv2d):
        if module.groups == 1:
            return "conv"
        per_channel = module.groups == module.in_channels == module.out_channels
        return "depthwise" if per_channel else "wall"
    if isinstance(module, nn.Linear):
        return "linear"
    if isinstance(module, NORMS):
        return "norm"
    if isinstance(module, ChannelMap):
        return "map"
    if isinstance(module, nn.Flatten) and (module.start_dim, module.end_dim) == (1, -1):
        return "flatten"
    if isinstance(module, (nn.Identity, *POOLS)):
        return "pool"
    per_channel = isinstance(module, nn.PReLU) and module.num_parameters > 1
    return "pointwise" if is_activation(node, graph) and not per_channel else "wall"


def _function_kind(node: fx.Node) -> str:
    """Kind of a function or method call; sizes and shapes are walls like all that is unknown."""
    if node.target in ADDITIONS:
        shapes = {shape_of(n) for n in node.all_input_nodes}
        return (
            "add"
            if len(node.args) == 2 == len(node.all_input_nodes) and len(shapes) == 1
            else "wall"
        )
    arguments = (*node.args[1:], *node.kwargs.values())
    if node.target in (torch.flatten, "flatten") and arguments in ((1,), (1, -1)):
        return "flatten"
    if (
        node.target in (torch.mean, "mean")
        and arguments
        and arguments[0] in ((2, 3), [2, 3], (-2, -1), [-2, -1])
    ):
        return "pool"
    return "wall"


# --- forward: zero, constant or live ---------------------------------------------------------


def _forward(node: fx.Node, analysis: Analysis) -> Facts:
    """State of each output channel of a node from the states of its inputs."""
    kind, shape = analysis.kinds[node], shape_of(node)
    inputs = [analysis.facts[n] for n in node.all_input_nodes if n in analysis.facts]
    if kind in ("placeholder", "wall"):
        return _facts(torch.full((shape[1] if len(shape) > 1 else 1,), LIVE))
    x = inputs[0]
    match kind:
        case "conv" | "linear" | "depthwise":
            return _forward_weights(analysis.module(node), x, kind)
        case "norm":
            return _forward_norm(analysis.module(node), x)
        case "map":
            source = analysis.module(node).source.cpu()
            state, value = x.state[source.clamp(min=0)], x.value[source.clamp(min=0)]
            return _facts(state.masked_fill(source < 0, ZERO), value.masked_fill(source < 0, 0))
        case "pointwise":
            return _known(x.state, _apply(node, analysis, x.value), x.columns)
        case "pool":
            padded = getattr(analysis.module(node), "padding", 0) if node.op == "call_module" else 0
            state = x.state if padded in (0, (0, 0)) else x.state.clone()
            if state is not x.state:  # a padded mean of a constant differs at the border
                state[state == CONSTANT] = FIXED
            return _facts(state.clone(), x.value.clone(), x.columns)
        case "flatten":
            columns = math.prod(shape_of(node.all_input_nodes[0])[2:])
            return _facts(x.state.clone(), x.value.clone(), x.columns * columns)
        case "add":
            y = inputs[-1]
            return _known(torch.maximum(x.state, y.state), x.value + y.value, x.columns)
    raise AssertionError(kind)


def _facts(state: Tensor, value: Tensor | None = None, columns: int = 1) -> Facts:
    value = torch.zeros(len(state), dtype=torch.float64) if value is None else value
    return Facts(state, value, torch.zeros(len(state), dtype=torch.bool), -1, columns)


def _known(state: Tensor, value: Tensor, columns: int = 1) -> Facts:
    """Facts where whatever is neither live nor fixed has a known value: zero or another."""
    state = torch.where(state >= FIXED, state, torch.where(value == 0, ZERO, CONSTANT))
    return _facts(state, value.masked_fill(state >= FIXED, 0), columns)


def _apply(node: fx.Node, analysis: Analysis, value: Tensor) -> Tensor:
    """Run an elementwise activation on float64 values."""
    if node.op == "call_module":
        return copy.deepcopy(analysis.module(node)).cpu().double()(value.clone()).detach()
    arguments = {k: v for k, v in node.kwargs.items() if k != "inplace"}
    function = (
        node.target if callable(node.target) else getattr(torch, str(node.target).rstrip("_"))
    )
    function = torch.relu if getattr(function, "__name__", "") == "relu_" else function
    return function(value.clone(), *node.args[1:], **arguments)


def _forward_weights(module: Any, x: Facts, kind: str) -> Facts:
    """Convolution or linear: zero if only zeros come in, constant if it is one everywhere."""
    weight = module.weight.detach().double().cpu()
    bias = torch.zeros(len(weight)) if module.bias is None else module.bias.detach()
    if kind == "depthwise":
        uses, sums = (weight != 0).flatten(1).any(1)[:, None], weight.flatten(1).sum(1)[:, None]
        state, value = x.state[:, None], x.value[:, None]
    else:
        per_channel = weight.reshape(len(weight), len(x.state), -1)
        uses, sums = (per_channel != 0).any(2), per_channel.sum(2)
        state, value = x.state[None], x.value[None]
    state = torch.where(uses, state, ZERO).amax(1)
    if any(p != 0 for p in getattr(module, "padding", (0,))):
        state = torch.where(state == CONSTANT, FIXED, state)  # it meets the padding at the border
    total = (sums * value).sum(1) + bias.double().cpu()
    return _known(state, total)


def _affine(norm: Any) -> tuple[Tensor, Tensor]:
    """gamma and beta of a BatchNorm in float64; ones and zeros if it has none."""
    if not norm.affine:
        count = norm.num_features
        return torch.ones(count, dtype=torch.float64), torch.zeros(count, dtype=torch.float64)
    return norm.weight.detach().double().cpu(), norm.bias.detach().double().cpu()


def _forward_norm(norm: Any, x: Facts) -> Facts:
    """BatchNorm: gamma = 0 leaves beta; a constant input leaves a constant that depends on mode.

    A channel with gamma = beta = 0 is zero in eval and in train mode: this is a closed gate.
    A constant that comes in is ``beta`` in train mode and shifted in eval mode (value: eval).
    """
    gamma, beta = _affine(norm)
    state = torch.where(gamma == 0, CONSTANT, x.state)
    value = beta.clone()
    if norm.running_mean is not None:
        mean, variance = norm.running_mean.double().cpu(), norm.running_var.double().cpu()
        value = beta + gamma * (x.value - mean) / torch.sqrt(variance + norm.eps)
    else:
        state = torch.where((gamma != 0) & (x.state < FIXED), FIXED, state)
    facts = _known(state, torch.where(gamma == 0, beta, value), x.columns)
    leaks = (facts.state == ZERO) & (gamma != 0)  # zero in eval mode only: not to be cut
    facts.state[leaks] = CONSTANT
    return facts


# --- backward: needed or not -----------------------------------------------------------------


def _backward(node: fx.Node, analysis: Analysis) -> None:
    """Mark the input channels that the needed output channels of a node depend on."""
    kind = analysis.kinds[node]
    inputs = [analysis.facts[n] for n in node.all_input_nodes if n in analysis.facts]
    if kind in ("output", "wall"):
        for x in inputs:
            x.needed.fill_(True)
        return
    if kind == "placeholder":
        return
    facts = analysis.facts[node]
    needed = facts.needed & (facts.state != ZERO)  # what is zero anyway needs no input
    match kind:
        case "conv" | "linear":
            weight = analysis.module(node).weight.detach()
            uses = (weight.reshape(len(weight), len(inputs[0].state), -1) != 0).any(2).cpu()
            inputs[0].needed |= (uses & needed[:, None]).any(0)
        case "norm":
            inputs[0].needed |= needed & (_affine(analysis.module(node))[0] != 0)
        case "map":
            source = analysis.module(node).source.cpu()
            inputs[0].needed[source[needed & (source >= 0)]] = True
        case _:  # channel by channel
            for x in inputs:
                x.needed |= needed


# --- layouts: which tensors hold the same channels -------------------------------------------


def _layouts(analysis: Analysis) -> None:
    """Join tensors that must hold the same channels; find the branch ends that may hold fewer."""
    nodes = list(analysis.facts)
    parent = {node: node for node in nodes}

    def find(node: fx.Node) -> fx.Node:
        while parent[node] is not node:
            node = parent[node]
        return node

    pinned: list[fx.Node] = []
    for node in analysis.graph.graph.nodes:
        kind = analysis.kinds[node]
        inputs = [n for n in node.all_input_nodes if n in parent]
        if kind in ("placeholder", "wall", "output"):
            pinned += [n for n in (node, *inputs) if n in parent]
            if kind == "wall":
                analysis.walls.append(f"{node.target} ({node.name})")
        elif kind not in ("conv", "linear", "map"):
            for x in inputs:
                may_end = analysis.residual == "scatter" or not analysis.facts[x].kept.any()
                if kind == "add" and may_end and _ends_branch(x, analysis):
                    analysis.scatters.add(x)
                else:
                    parent[find(x)] = find(node)
    numbers = {node: number for number, node in enumerate(nodes)}
    for node in nodes:
        analysis.facts[node].layout = numbers[find(node)]
    analysis.pinned = {analysis.facts[node].layout for node in pinned}


def _ends_branch(node: fx.Node, analysis: Analysis) -> bool:
    """True if a tensor is read once and comes from a convolution by modules that keep channels."""
    while len(node.users) == 1 and node.op == "call_module":
        kind = analysis.kinds[node]
        if kind == "conv":
            return True
        if kind not in ("norm", "pool", "depthwise", "pointwise"):
            return False
        node = node.all_input_nodes[0]
    return False
