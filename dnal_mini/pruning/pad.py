"""A cut network run at widths that hardware likes; its numbers stay those of the cut one.

Read ``padded``. A layer of 53 channels takes longer than one of 56. So every set of channels that
goes through norms, activations and sums together gets channels of zeros at its end while the
network trains. Parameters, their gradients, running statistics and files are those of the cut net.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call
from torch.nn import functional as F

from dnal_mini.graph.capture import replace_module
from dnal_mini.graph.copies import copied
from dnal_mini.graph.inputs import Given, drawn, like
from dnal_mini.graph.ops import DIVISIONS, name_of
from dnal_mini.layers.channelmap import ChannelMap
from dnal_mini.pruning.analysis import facts_of
from dnal_mini.pruning.certificate import outputs
from dnal_mini.pruning.facts import Analysis
from dnal_mini.pruning.prepare import prepare, tensors_of
from dnal_mini.pruning.surgery import holders, keep_indices
from dnal_mini.pruning.trial import follows
from dnal_mini.pruning.weights import WEIGHTS

Ends = dict[str, dict[int, int]]  # by tensor: along which axis how many zeros come at the end


class Padded(nn.Module):
    """Runs ``wide`` on the numbers of ``net`` with zeros behind them. See ``padded``.

    Parameters and buffers are the net's own; the wide one lends its forward code and its sizes.
    """

    def __init__(self, net: nn.Module, wide: nn.Module, ends: Ends) -> None:
        super().__init__()
        self.net, self.ends = net, ends
        self.lent = [wide]  # in a list: no part of this module
        self.training = net.training

    def forward(self, *inputs: Any) -> Any:
        (wide,) = self.lent
        for own, other in zip(self.net.modules(), wide.modules(), strict=True):
            other.training = own.training
        own_buffers = {
            f"{at}{'.' * bool(at)}{name}": buffer
            for at, module in self.net.named_modules()
            if not isinstance(module, ChannelMap)
            for name, buffer in module.named_buffers(recurse=False)
        }
        numbers = {
            name: self._longer(name, tensor)
            for name, tensor in (*self.net.named_parameters(), *own_buffers.items())
        }
        output = functional_call(wide, numbers, inputs)
        with torch.no_grad():
            for name in own_buffers.keys() & self.ends.keys() if self.training else ():
                found = numbers[name]
                own_buffers[name].copy_(found.narrow(0, 0, len(own_buffers[name])))
        return output

    def _longer(self, name: str, tensor: Tensor) -> Tensor:
        if name not in self.ends:
            return tensor
        more = [0, 0] * tensor.dim()
        for axis, count in self.ends[name].items():
            more[2 * (tensor.dim() - axis) - 1] = count
        return F.pad(tensor, more, value=float(name.endswith("running_var")))


@torch.no_grad()
def padded(net: nn.Module, image_shape: Given, multiple: int = 8) -> nn.Module:
    """The network, run with zero channels up to the next ``multiple``; itself where none fit.

    Function, gradients and running statistics are those of ``net``, but for rounding: both are
    compared, in both modes. Its forward code and classes are as they were. Left as they are:
    channels that are split, joined end to end or turned, that meet an operation that the analysis
    does not know, and those of images and output.

    Differs: not in the paper.
    """
    analysis = facts_of(prepare(net, image_shape), tensors_of(net))
    sets = _Sets(analysis)
    ends, wide = _ends(analysis, sets, multiple), copied(net)
    maps = {n: sets.more(n, multiple) for n, f in analysis.facts.items() if f.kind == "map"}
    if not ends:
        return net
    for node, layer in analysis.graph.layers.items():
        if layer.groups > 1 and analysis.facts[node].kind in WEIGHTS and sets.more(node, multiple):
            owner: Any = wide.get_submodule(layer.owner)
            owner.groups += sets.more(node, multiple)
    held = holders(wide)
    for name, axes in ends.items():
        size = analysis.tensors[name].shape
        index = {str(a): [*range(size[a]), *[0] * more] for a, more in axes.items()}
        keep_indices(wide, name, index, held)
    for node, more in maps.items():
        layer = analysis.layer(node)
        source = [*layer.given["source"], *[-1] * more]
        device = like(net).device
        replace_module(wide, layer.module, ChannelMap(source, layer.given["stride"]).to(device))
    return Padded(net, wide, ends) if _agree(net, wide, ends, image_shape) else net


def _agree(net: nn.Module, wide: nn.Module, ends: Ends, image_shape: Given) -> bool:
    """True if both compute the same in both modes, in float64."""
    exact = copied(net).double()
    other, inputs = Padded(exact, copied(wide).double(), ends), drawn(image_shape, like(exact), 0)
    if follows(outputs(exact, inputs), other, inputs) is not None:
        return False
    pair = (outputs(each, inputs, batch_statistics=True) for each in (exact, other))
    return all(
        float((a - b).abs().max()) <= 1e-6 * float(a.abs().max())
        for a, b in zip(*pair, strict=True)
    )


class _Sets:
    """Tensors whose channels must be padded together, and those that must not be."""

    def __init__(self, analysis: Analysis) -> None:
        self.analysis = analysis
        self.first = {node: node for node in analysis.facts}
        self.left: set[fx.Node] = set(analysis.graph.written) & analysis.facts.keys()
        for node in analysis.graph.nodes:
            self._see(node)
        for calls in analysis.shared.values():
            for pair in ([n for n in calls if n in analysis.facts], self._read_by(calls)):
                for node in pair[1:]:
                    self._join(pair[0], node)

    def more(self, node: fx.Node, multiple: int) -> int:
        """How many channels of zeros a tensor gets."""
        root = self._root(node)
        if any(self._root(other) is root for other in self.left):
            return 0
        return -len(self.analysis.facts[node].state) % multiple

    def _read_by(self, calls: list[fx.Node]) -> list[fx.Node]:
        return [n for call in calls for n in call.all_input_nodes if n in self.analysis.facts]

    def _root(self, node: fx.Node) -> fx.Node:
        while self.first[node] is not node:
            node = self.first[node]
        return node

    def _join(self, a: fx.Node, b: fx.Node) -> None:
        self.first[self._root(a)] = self._root(b)

    def _see(self, node: fx.Node) -> None:
        """What an operation says of the channels of its result and of what it reads."""
        analysis = self.analysis
        facts, layer = analysis.facts.get(node), analysis.graph.layers.get(node)
        tensors = [n for n in node.all_input_nodes if n in analysis.facts]
        if facts is None or node in analysis.walls:
            self.left |= {node, *tensors} & analysis.facts.keys()
            return
        match facts.kind:
            case "map":
                return
            case "conv" | "transposed" | "linear" if layer and self._in_order(
                facts.inputs, tensors
            ):
                if layer.groups == 1:
                    return
                if layer.groups == len(facts.state) == len(analysis.facts[tensors[0]].state):
                    self._join(node, tensors[0])
                    return
            case "norm" | "same" | "pool" | "mean" | "scale" | "join":
                divides = facts.kind == "scale" and name_of(node) in DIVISIONS
                whole = [x for x, at in facts.sources if self._in_order(at, [node])]
                lonely = [x for x in tensors if len(analysis.facts[x].state) == 1]
                if not divides and {*whole, *lonely} >= {*tensors}:
                    for x in whole:
                        self._join(node, x)
                    self.left |= {*lonely} - {*whole}
                    return
        self.left |= {node, *tensors}

    def _in_order(self, at: Tensor | None, tensors: list[fx.Node]) -> bool:
        """True if the channels are those of a tensor, one by one."""
        count = len(self.analysis.facts[tensors[0]].state)
        return at is not None and torch.equal(at, torch.arange(count))


def _ends(analysis: Analysis, sets: _Sets, multiple: int) -> Ends:
    ends: Ends = {}
    for node, layer in analysis.graph.layers.items():
        if node not in analysis.facts or node in analysis.walls or layer.kind == "map":
            continue
        for name, axis, more in _of_layer(node, analysis, sets, multiple):
            if more:
                ends.setdefault(name, {})[axis] = more
    return ends


def _of_layer(
    node: fx.Node, analysis: Analysis, sets: _Sets, multiple: int
) -> Iterator[tuple[str, int, int]]:
    """Tensors of a layer, with the axis and the number of zeros that each gets."""
    layer = analysis.layer(node)
    x = next(n for n in node.all_input_nodes if n in analysis.facts)
    turned = layer.kind == "transposed"
    for role, name in layer.roles.items():
        is_filter = role == "weight" and layer.kind in WEIGHTS
        yield name, layer.axis + int(is_filter and turned), sets.more(node, multiple)
        if is_filter and layer.groups == 1:
            yield name, int(not turned), sets.more(x, multiple)
