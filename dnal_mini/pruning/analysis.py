"""Which channels of a network are zero, and which are needed: the analysis behind the pruner.

Pruning is dead-code elimination on channels. Two facts are computed for every channel of every
tensor of the captured network:

* forward, from the input: the channel is provably ``ZERO``, ``CONSTANT`` (one value everywhere),
  ``FIXED`` (the same for every image, but not over its pixels: a constant that met a padded
  border), or ``LIVE``;
* backward, from the output: somebody *needs* the channel, or nobody does.

A channel that is zero or unneeded can go. An operation that is not known (``graph/ops.py``) is a
wall: all that touches it is kept and the report names it. So the analysis is never wrong, only
less greedy. Read ``analyse`` first. What each operation does to the states is in ``transfer.py``,
which dead channels must stay for the sake of others in ``keepsets.py``, cutting in ``pruner.py``.
"""

from collections.abc import Collection, Sequence

import torch
from torch import Tensor, fx, nn

from dnal_mini.graph.capture import Capture
from dnal_mini.graph.ops import LAYERS, in_place, kind_of
from dnal_mini.graph.places import describe, like, shape_of
from dnal_mini.pruning.facts import CONSTANT, LIVE, ZERO, Analysis, Facts, Unknown
from dnal_mini.pruning.prepare import prepare, read_again, tensors_of
from dnal_mini.pruning.provenance import REFUSALS, fresh
from dnal_mini.pruning.transfer import RULES
from dnal_mini.pruning.weights import affine, blocks_of, keeps_constants


def analyse(
    net: nn.Module, image_shape: Sequence[int], *, zeroed: Collection[str] = ()
) -> Analysis:
    """Facts for every tensor of a network without gates (``prune.drop_gates`` makes one).

    ``zeroed`` names layers whose output is to be taken as zero: what if this layer died?
    Constants have their eval-mode value; ``Facts.steady`` says where batch statistics agree.

    Raises: ValueError if the forward cannot be followed or the image does not fit it.
    """
    return facts_of(prepare(net, image_shape), tensors_of(net), zeroed)


def facts_of(
    graph: Capture,
    tensors: dict[str, Tensor],
    zeroed: Collection[str] = (),
    *,
    forward_only: bool = False,
) -> Analysis:
    """``analyse`` for a capture that ``prepare`` made; cheap enough to ask many questions.

    ``forward_only`` leaves out who needs a channel.
    """
    shared, lent = read_again(graph)
    analysis = Analysis(graph, tensors, shared=shared, lent=lent)
    for node in graph.nodes:
        _forward(node, analysis)
        layer = graph.layers.get(node)
        dead = layer is not None and layer.name in zeroed
        if node in analysis.facts and (node in graph.written or dead):
            facts = analysis.facts[node]
            facts.state.fill_(LIVE if node in graph.written else ZERO)
            facts.value.zero_()
            facts.needed |= node in graph.written
    for node in () if forward_only else reversed(graph.nodes):
        _backward(node, analysis)
    return analysis


def _forward(node: fx.Node, analysis: Analysis) -> None:
    """Find how the channels of a node come from those of its inputs, and their states."""
    graph, shape = analysis.graph, shape_of(node)
    if node.op == "output":
        return
    if node.op == "placeholder":
        if (name := graph.tensors.get(node)) is not None:
            analysis.values[node] = analysis.tensors[name]
        elif node in graph.constants:
            analysis.values[node] = graph.constants[node]
        elif len(shape) > 1:
            analysis.add(node, "placeholder", fresh(shape[1], shape), _live(shape[1]))
        else:
            analysis.values[node] = Unknown()
        return
    layer = graph.layers.get(node)
    kind = layer.kind if layer else kind_of(node)
    if kind in LAYERS and layer is None:
        kind = "wall"
    if kind == "scale" and layer is None:
        kind = "same"
    tensors = [n for n in node.all_input_nodes if n in analysis.facts]
    if not tensors and _is_learned(node, analysis):
        analysis.values[node] = like(node, *fx.node.map_arg(node.args, analysis.values.get),
                                     **node.kwargs)  # fmt: skip
        return
    lent = layer is not None and layer.name in analysis.lent
    try:
        if kind == "wall" or not tensors or lent or node in graph.stubborn:
            _wall(node, analysis)
        else:
            RULES[kind](node, analysis)
    except REFUSALS:
        _wall(node, analysis)  # the operation is used in a way that the rules do not cover


def _is_learned(node: fx.Node, analysis: Analysis) -> bool:
    """True for a number that is worked out from parameters and nothing else."""
    values = [analysis.values.get(n) for n in node.all_input_nodes]
    computed = bool(values) and all(isinstance(value, Tensor) for value in values)
    return computed and not in_place(node) and isinstance(node.meta.get("val"), Tensor)


def _live(count: int) -> Tensor:
    return torch.full((count,), LIVE)


def _wall(node: fx.Node, analysis: Analysis) -> None:
    """Nothing is known: every channel of the result is live, and of its inputs needed."""
    why = analysis.graph.stubborn.get(node, "")
    analysis.walls[node] = describe(node, analysis.graph.tensors) + why
    shape = shape_of(node)
    if len(shape) > 1:
        analysis.add(node, "wall", fresh(shape[1], shape), _live(shape[1]))
    else:
        analysis.values[node] = Unknown()


def _backward(node: fx.Node, analysis: Analysis) -> None:
    """Mark the input channels that the needed output channels of a node depend on."""
    tensors = [analysis.facts[n] for n in node.all_input_nodes if n in analysis.facts]
    facts = analysis.facts.get(node)
    if node.op == "output" or node in analysis.walls:
        for x in tensors:
            x.needed.fill_(True)
        return
    if facts is None or node.op == "placeholder":
        return
    if not facts.sources:
        _backward_weights(node, facts, tensors[0], analysis)
        return
    needed = facts.needed & (facts.state != ZERO)  # what is zero anyway needs no input
    if facts.kind == "norm":
        needed &= affine(node, analysis, len(needed))[0] != 0
    for source, at in facts.sources:
        analysis.facts[source].needed[at[needed & (at >= 0)]] = True


def _backward_weights(node: fx.Node, facts: Facts, x: Facts, analysis: Analysis) -> None:
    """Of a layer's inputs those with a weight that is not 0; constants become part of its bias."""
    if facts.inputs is None:
        x.needed.fill_(True)
    else:
        x.needed[facts.inputs[wanted(node, analysis)]] = True


def wanted(node: fx.Node, analysis: Analysis) -> Tensor:
    """Input positions on which the needed outputs of a layer depend: bool."""
    facts = analysis.facts[node]
    at = facts.inputs
    assert at is not None
    weight = blocks_of(node, analysis)
    needed = (facts.needed & (facts.state != ZERO)).reshape(weight.shape[0], -1, 1)
    used = ((weight != 0).any(3) & needed).any(1).flatten()
    return used & ~folds(node, analysis) & ~analysis.facts[node.all_input_nodes[0]].silent[at]


def folds(node: fx.Node, analysis: Analysis) -> Tensor:
    """Input positions whose constant can become part of the layer's bias, exactly, in both modes.

    A constant that differs between the modes cancels in a BatchNorm that reads the layer.
    """
    facts = analysis.facts[node]
    assert facts.inputs is not None
    x = analysis.facts[node.all_input_nodes[0]]
    constant = x.state == CONSTANT
    layer = analysis.layer(node)
    own = analysis.can_wrap(node) and layer.groups == 1
    if not own or not keeps_constants(layer):
        return torch.zeros(len(facts.inputs), dtype=torch.bool)
    readers = [analysis.facts[u].kind if u in analysis.facts else "" for u in node.users]
    if readers != ["norm"]:
        constant &= x.steady
    return constant[facts.inputs]
