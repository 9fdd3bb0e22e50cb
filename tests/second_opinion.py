"""Which channels stay, worked out a second time: by torch.fx, from the laws and nothing else.

``opinion`` walks the forward code that ``torch.fx.symbolic_trace`` writes down. Every entry of
every tensor carries the number of the channel that it belongs to, so that ``cat`` and ``flatten``
need no law: they move the numbers. Shares no line with ``dnal_mini.graph`` and
``dnal_mini.pruning``, and takes fewer nets: what is not in a table here is ``NotTaken``.
"""

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from dnal_mini.layers.channelmap import ChannelMap

ZERO, CONSTANT, FIXED, LIVE = range(4)  # as in the analysis that is held against this one
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
WEIGHTS = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)
SAME = {
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.SiLU, nn.GELU, nn.ELU, nn.Hardswish, nn.Sigmoid, nn.Tanh,
    nn.Hardsigmoid, nn.Softplus, nn.Mish, nn.Hardtanh, nn.Softshrink, nn.Threshold, F.relu,
    torch.relu, F.silu, F.gelu, torch.sigmoid, torch.tanh, F.hardswish, F.leaky_relu, F.softplus,
    F.elu, torch.clamp, F.relu6, F.hardsigmoid, F.hardtanh, F.relu_, torch.relu_, torch.neg,
    operator.neg, operator.pow, "relu", "relu_", "sigmoid", "clamp", "abs",
}  # fmt: skip
DROPOUT = {nn.Dropout, nn.Dropout2d, F.dropout}
POOL = {
    nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.Upsample, F.max_pool2d, F.avg_pool2d,
    F.adaptive_avg_pool2d, F.interpolate,
}  # fmt: skip
MEAN = {"mean", torch.mean, "amax"}
MOVE = {
    nn.Flatten, torch.flatten, "flatten", "contiguous", "detach", "squeeze", "unsqueeze", "view",
    "reshape", operator.getitem,
}  # fmt: skip
SUMS = {operator.add, operator.iadd, operator.sub, torch.add, torch.sub, "add", "add_", "sub"}
TIMES = {operator.mul, torch.mul, "mul"}
JOIN = {*SUMS, *TIMES, torch.maximum, torch.min}


class NotTaken(Exception):
    """The net does what no table here holds."""


class OneLayerOneLeaf(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, qualname: str) -> bool:
        torchs = type(m).__module__.startswith("torch.nn")
        return type(m) is ChannelMap or (torchs and not isinstance(m, nn.Sequential))


class Opinion:
    """Facts per channel, over all tensors of a net; ``needed`` and ``stays`` are the answer."""

    def __init__(self, net: nn.Module, shape: tuple[int, ...]) -> None:
        if len(list(net.parameters())) < len(list(net.named_parameters(remove_duplicate=False))):
            raise NotTaken("a parameter of two layers")
        self.net, self.graph = net, OneLayerOneLeaf().trace(net)
        self.state = torch.zeros(0, dtype=torch.int64)
        self.value = torch.zeros(0, dtype=torch.float64)  # of a constant, in eval mode
        self.steady = torch.zeros(0, dtype=torch.bool)  # the same in train mode
        self.real: dict[fx.Node, Any] = {}  # what the nodes return
        self.ids: dict[fx.Node, Tensor] = {}  # the same with channel numbers for entries
        self.own: dict[fx.Node, Tensor] = {}  # channels that a node makes, in order
        self.kind: dict[fx.Node, str] = {}
        self.reads: dict[fx.Node, list[fx.Node]] = {}
        self.now: dict[fx.Node, fx.Node] = {}  # overwritten in place, or the same: read this one
        self.ties: list[tuple[fx.Node, fx.Node, Tensor, Tensor]] = []  # both there, or neither
        self.asks: list[tuple[Tensor, Tensor]] = []  # if the first is there, so must be the second
        self.back: list[Callable[[], None]] = []  # who needs a channel, in order of the forward
        self.called: set[nn.Module] = set()
        self.pinned = torch.zeros(0, dtype=torch.int64)  # inputs and outputs
        self.held = torch.zeros(0, dtype=torch.int64)
        for node in self.graph.nodes:
            self._see(node, shape)
        self.needed = torch.zeros(len(self.state), dtype=torch.bool)
        self.needed[self.pinned] = True
        for step in reversed(self.back):
            step()

    def _see(self, node: fx.Node, shape: tuple[int, ...]) -> None:
        """Run a node on numbers and on channel numbers."""
        inputs = [self.now.get(n, n) for n in node.all_input_nodes]
        self.reads[node] = [n for n in inputs if n in self.ids]
        if node.op == "output":
            for n in self.reads[node]:
                self.pinned = torch.cat([self.pinned, self.ids[n].unique()])
            return
        if node.op == "get_attr":
            raise NotTaken("a parameter that forward reads")
        if node.op == "placeholder":
            self.real[node] = torch.randn(1, *shape, dtype=torch.float64)
            count = shape[0]
            self._make(node, "input", torch.full((count,), LIVE))
            self.pinned = torch.cat([self.pinned, self.own[node]])
            self.ids[node] = spread(self.own[node], (1, *shape))
            return
        target: Any = (
            self.net.get_submodule(node.target) if node.op == "call_module" else node.target
        )
        if type(target) is nn.Identity:
            self.now[node] = inputs[0]
            return
        versions = {n: t._version for n, t in self.real.items() if isinstance(t, Tensor)}
        with torch.no_grad():
            self.real[node] = self._call(node, target, self.real)
        if not isinstance(self.real[node], Tensor):
            if self.reads[node] and target not in (getattr, "size"):
                raise NotTaken(f"several results of {target}")
            return
        self._law(node, target)
        for n, version in versions.items():  # in place: whoever reads on reads this result
            if self.real[n]._version != version:
                if self.real[n].shape != self.real[node].shape or n not in inputs:
                    raise NotTaken("a view that is overwritten")
                self.now |= {k: node for k, v in [*self.now.items(), (n, n)] if v is n}

    def _target(self, node: fx.Node) -> Any:
        return self.net.get_submodule(node.target) if node.op == "call_module" else node.target

    def _call(self, node: fx.Node, target: Any, values: dict[fx.Node, Any]) -> Any:
        def of(n: fx.Node) -> Any:
            n = self.now.get(n, n)
            return values[n] if n in values else self.real[n]

        args, kwargs = fx.map_arg(node.args, of), fx.map_arg(node.kwargs, of)
        if node.op == "call_method":
            return getattr(args[0], target)(*args[1:], **kwargs)
        return target(*args, **kwargs)

    def _law(self, node: fx.Node, target: Any) -> None:
        word = type(target) if isinstance(target, nn.Module) else target
        tensors = self.reads[node]
        if isinstance(target, nn.Module) and next(target.parameters(), None) is not None:
            if target in self.called:
                raise NotTaken("a layer that is called again")
            self.called.add(target)
        if word in WEIGHTS:
            self._weights(node, target)
        elif word in NORMS:
            self._norm(node, target)
        elif word is nn.PReLU and len(target.weight) > 1:
            self._slopes(node, target)
        elif word is ChannelMap:
            self._map(node, target)
        elif word in MOVE:
            self._move(node, word)
        elif word is torch.cat:
            self._cat(node)
        elif word is F.pad:
            self._pad(node)
        elif word in JOIN and len(set(tensors)) == 2:
            self._join(node, word)
        elif word in (nn.PReLU, *SAME, *DROPOUT, *JOIN) and len(tensors) == 1:
            self._one(node, "same", self._with_value(node, word), None)
        elif word in (*POOL, *MEAN) and len(tensors) == 1:
            self._pool(node, target, word)
        else:
            raise NotTaken(str(word))

    def _make(self, node: fx.Node, kind: str, state: Tensor, value: Tensor | None = None,
              steady: Tensor | None = None) -> None:  # fmt: skip
        """New channels."""
        count = len(state)
        value = torch.zeros(count, dtype=torch.float64) if value is None else value
        steady = torch.ones(count, dtype=torch.bool) if steady is None else steady
        state = torch.where((state == ZERO) & ((value != 0) | ~steady), CONSTANT, state)
        self.own[node] = torch.arange(count) + len(self.state)
        self.kind[node] = kind
        self.state = torch.cat([self.state, state])
        self.value = torch.cat([self.value, value.masked_fill(state >= FIXED, 0)])
        self.steady = torch.cat([self.steady, steady])

    def _wants(self, child: Tensor, parent: Tensor) -> None:
        """A needed channel that is not zero anyway needs the one it is made of."""

        def step() -> None:
            active = self.needed[child] & (self.state[child] != ZERO)
            self.needed[parent[active]] = True

        self.back.append(step)

    def _with_value(self, node: fx.Node, word: Any) -> tuple[Tensor, Tensor, Tensor]:
        """What an elementwise operation makes of the channels that it reads."""
        (x,) = self.reads[node]
        at = self.ids[x].unique()
        state, steady = self.state[at], self.steady[at]
        if word in DROPOUT:
            return state, self.value[at], steady & (state != CONSTANT)
        target: Any = (
            self.net.get_submodule(node.target) if node.op == "call_module" else node.target
        )
        return state, self._call(node, target, {x: self.value[at].clone()}), steady

    def _one(self, node: fx.Node, kind: str, facts: tuple, keys: Tensor | None) -> None:
        """Channel by channel; ``keys``: the ids of the result by old numbers, if it is resized."""
        (x,) = self.reads[node]
        at, back = (self.ids[x] if keys is None else keys).unique(return_inverse=True)
        self._make(node, kind, *facts)
        self.ids[node] = self.own[node][back]
        self.ties.append((node, x, self.own[node], at))
        self._wants(self.own[node], at)

    def _pool(self, node: fx.Node, target: Any, word: Any) -> None:
        (x,) = self.reads[node]
        at = channels(self.ids[x])
        shape = self.real[node].shape
        if len(shape) < 2 or shape[1] != len(at) or self.real[x].dim() < 3:
            raise NotTaken("a mean over channels")
        if word in MEAN and node.kwargs.get("dim", (node.args[1:] or (None,))[0]) is None:
            raise NotTaken("a mean over images")
        state = self.state[at].clone()
        padding = node.kwargs.get("padding", (*node.args, 0, 0, 0, 0)[3])
        padded = target.padding if word is nn.AvgPool2d else padding if word is F.avg_pool2d else 0
        if padded not in (0, (0, 0)):
            state[state == CONSTANT] = FIXED
        kind = "mean" if word in MEAN else "pool"
        facts = state, self.value[at], self.steady[at]
        if not bool((at[1:] > at[:-1]).all()):
            raise NotTaken("channels in another order")
        self._one(node, kind, facts, spread(at, shape))

    def _move(self, node: fx.Node, word: Any) -> None:
        """Run the operation on the numbers of channels."""
        sizes = [s for s in node.args[1:] if isinstance(s, int)]
        if word in ("view", "reshape") and any(s > 1 for s in sizes):
            raise NotTaken("a size that is written down")
        if word is operator.getitem and not starts_whole(node.args[1]):
            raise NotTaken("some of the channels")
        target = self._target(node)
        self.ids[node] = self._call(node, target, dict(self.ids))
        self.kind[node] = "move"

    def _cat(self, node: fx.Node) -> None:
        """New channels for every operand, one tensor twice or not."""
        parts = [self.now.get(n, n) for n in node.args[0]]
        at = [channels(self.ids[n]) for n in parts]
        all_at = torch.cat(at)
        if self.real[node].shape[1] != len(all_at):
            raise NotTaken("images beside each other")
        self._make(node, "move", self.state[all_at], self.value[all_at], self.steady[all_at])
        own = self.own[node]
        self.ids[node] = spread(own, self.real[node].shape)
        for source, ids, mine in zip(parts, at, own.split([len(a) for a in at]), strict=True):
            self.ties.append((node, source, mine, ids))
        self._wants(own, all_at)

    def _pad(self, node: fx.Node) -> None:
        """New channels in front and behind; pixels that are padded with what the channel is not."""
        (x,), pads, fill = self.reads[node], [*node.args[1], 0, 0], node.kwargs.get("value") or 0.0
        if node.kwargs.get("mode") or len(node.args) > 2 or min(pads) < 0 or self.real[x].dim() < 4:
            raise NotTaken("a pad that mirrors or cuts")
        at = F.pad(channels(self.ids[x]), pads[4:6], value=-1)
        old = at >= 0
        state = torch.where(old, self.state[at], ZERO if fill == 0 else CONSTANT)
        value = torch.where(old, self.value[at], fill)
        meets = old & (value != fill) & (state < FIXED) & any(pads[:4])
        self._make(node, "pad", state.masked_fill(meets, FIXED), value, ~old | self.steady[at])
        own = self.own[node]
        self.ids[node] = spread(own, self.real[node].shape)
        self.ties.append((node, x, own[old], at[old]))
        self.held = torch.cat([self.held, own[~old]])  # forward code puts them there
        self._wants(own[old], at[old])

    def _join(self, node: fx.Node, word: Any) -> None:
        tensors = [self.now.get(n, n) for n in node.args]
        if node.kwargs.keys() - {"alpha"} or len(tensors) != 2:
            raise NotTaken("a join with options")
        a, b = torch.broadcast_tensors(*(self.ids[n] for n in tensors))
        width = len(self.state)
        pairs, back = (a * width + b).unique(return_inverse=True)
        x, y = pairs // width, pairs % width
        state = torch.maximum(self.state[x], self.state[y])
        values = {tensors[0]: self.value[x].clone(), tensors[1]: self.value[y].clone()}
        value, steady = self._call(node, node.target, values), self.steady[x] & self.steady[y]
        if word in TIMES:
            zero = (self.state[x] == ZERO) | (self.state[y] == ZERO)
            state, value = state.masked_fill(zero, ZERO), value.masked_fill(zero, 0)
            steady = steady | zero
        self._make(
            node, "sum" if word in SUMS and not node.kwargs else "join", state, value, steady
        )
        own = self.own[node]
        self.ids[node] = own[back]
        for source, at in zip(tensors, (x, y), strict=True):
            if len(at.unique()) == len(at):
                self.ties.append((node, source, own, at))
            else:  # broadcast
                self.asks.append((own, at))
            self._wants(own, at)

    def _norm(self, node: fx.Node, norm: Any) -> None:
        (x,) = self.reads[node]
        at = channels(self.ids[x])
        count = len(at)
        gamma = torch.ones(count).double() if norm.weight is None else norm.weight.detach().double()
        beta = torch.zeros(count).double() if norm.bias is None else norm.bias.detach().double()
        state, value, steady = self.state[at].clone(), self.value[at], self.steady[at]
        closed = gamma == 0
        if norm.running_mean is None:
            state[~closed & (state < FIXED)] = FIXED
        else:
            spread_of = (norm.running_var.double() + norm.eps).sqrt()
            value = beta + gamma * (value - norm.running_mean.double()) / spread_of
        state[closed] = torch.where(beta[closed] == 0, ZERO, CONSTANT)
        value = torch.where(closed, beta, value)
        self._make(node, "norm", state, value, closed | (steady & (state >= FIXED)))
        own = self.own[node]
        self.ids[node] = spread(own, self.real[node].shape)
        self.ties.append((node, x, own, at))

        def step() -> None:
            active = self.needed[own] & (self.state[own] != ZERO) & ~closed
            self.needed[at[active]] = True

        self.back.append(step)

    def _slopes(self, node: fx.Node, layer: nn.PReLU) -> None:
        (x,) = self.reads[node]
        at = channels(self.ids[x])
        value = self.value[at] * torch.where(self.value[at] > 0, 1, layer.weight.detach().double())
        self._one(node, "scale", (self.state[at], value, self.steady[at]), self.ids[x])
        if not torch.equal(at, at.sort().values):
            raise NotTaken("channels in another order")

    def _map(self, node: fx.Node, layer: ChannelMap) -> None:
        (x,) = self.reads[node]
        there, at = layer.source >= 0, channels(self.ids[x])[layer.source.clamp(min=0)]
        state = self.state[at].masked_fill(~there, ZERO)
        value = self.value[at].masked_fill(~there, 0)
        self._make(node, "map", state, value, self.steady[at] | ~there)
        own = self.own[node]
        self.ids[node] = spread(own, self.real[node].shape)
        self._wants(own[there], at[there])  # it chooses: nothing is tied

    def _weights(self, node: fx.Node, layer: Any) -> None:
        """Convolution and linear: zero of zeros alone; a constant in front can become a bias."""
        (x,) = self.reads[node]
        linear, turned = type(layer) is nn.Linear, type(layer) is nn.ConvTranspose2d
        at = self.ids[x].flatten() if linear else channels(self.ids[x])
        groups, count = getattr(layer, "groups", 1), self.real[node].shape[1]
        weight = layer.weight.detach().double()
        weight = (weight.transpose(0, 1) if turned else weight).reshape(*weight.shape[:2], -1)
        if linear and self.real[x].dim() != 2:
            raise NotTaken("a linear layer on maps")
        if groups > 1:
            if turned or groups != layer.in_channels or groups != count:
                raise NotTaken("groups of several channels")
            weight = torch.diag_embed(weight[:, 0].T).permute(1, 2, 0)  # one group, mostly zeros
        elif turned:
            weight = layer.weight.detach().double().transpose(0, 1).flatten(2)
        keeps = linear or not (turned or pads_with_zeros(layer))
        uses = (weight != 0).any(2)
        state = (uses * self.state[at]).amax(1)
        if not keeps:
            state[(state == CONSTANT) & (uses & (self.value[at] != 0)).any(1)] = FIXED
        known = self.value[at].masked_fill(self.state[at] != CONSTANT, 0)
        value = weight.sum(2) @ known
        if layer.bias is not None:
            value = value + layer.bias.detach().double()
        steady = ~(uses & ~self.steady[at]).any(1)
        self._make(node, "conv" if groups == 1 else "depthwise", state, value, steady)
        own = self.own[node]
        self.ids[node] = spread(own, self.real[node].shape)
        if groups > 1:
            self.ties.append((node, x, own, at))

        def step() -> None:
            readers = self._readers(node)
            into_norm = len(readers) == 1 and self.kind.get(readers[0]) == "norm"
            constant = self.state[at] == CONSTANT
            folds = constant & (self.steady[at] | into_norm) & (groups == 1) & keeps
            silent = constant & (self.value[at] == 0) & self.steady[at]
            active = self.needed[own] & (self.state[own] != ZERO)
            self.needed[at[(uses & active[:, None]).any(0) & ~folds & ~silent]] = True

        self.back.append(step)

    def _readers(self, node: fx.Node) -> list[fx.Node]:
        return [n for n, read in self.reads.items() if node in read]

    def _branch_ends(self) -> set[fx.Node]:
        """Last layers of residual branches: a sum may add them at some of its channels."""
        ends = set()
        for node in [n for n, kind in self.kind.items() if kind == "sum"]:
            for operand, at in [(p, at) for n, p, _, at in self.ties if n is node]:
                end = operand
                while self.kind[end] in ("same", "pool") and len(self._readers(end)) == 1:
                    end = self.reads[end][0]
                layer = self.kind[end] in ("conv", "depthwise", "norm", "scale")
                if layer and len(self._readers(end)) == 1 and len(at) == len(at.unique()):
                    ends |= {end} if self._behind_conv(end) else set()
        return ends

    def _behind_conv(self, node: fx.Node) -> bool:
        while len(self._readers(node)) == 1 and self.kind[node] != "conv":
            if self.kind[node] not in ("norm", "pool", "same", "scale", "depthwise"):
                return False
            node = self.reads[node][0]
        return len(self._readers(node)) == 1

    def stays(self, residual: str) -> Tensor:
        """Channels that are there in the end: bool, over all tensors."""
        there = (self.state != ZERO) & self.needed
        ends = {
            end
            for end in self._branch_ends()
            if residual == "scatter" or not bool(there[self.own[end]].any())  # it goes as a whole
        }
        there[self.pinned] = there[self.held] = True
        pairs = list(self.asks)
        for _, parent, a, b in self.ties:
            pairs += [(b, a)] if parent in ends else [(b, a), (a, b)]
        first, second = (torch.cat(side) for side in zip(*pairs, strict=True))
        while bool((there[first] & ~there[second]).any()):
            there[second[there[first]]] = True
        return there

    def layers(self, residual: str) -> tuple[dict[str, tuple[list[bool], list[bool]]], bool]:
        """By layer: what is needed and not zero, and what stays. And if a tensor is all dead.

        What becomes of a tensor that is all dead is a choice, and no law.
        """
        kept, stays = (self.state != ZERO) & self.needed, self.stays(residual)
        found = {
            str(node.target): (kept[own].tolist(), stays[own].tolist())
            for node, own in self.own.items()
            if self.kind[node] in ("conv", "depthwise", "norm", "scale", "map")
        }
        return found, any(not bool(stays[own].any()) for own in self.own.values())


def spread(own: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Numbers of channels, along axis 1, over an image."""
    return own.reshape(1, -1, *[1] * (len(shape) - 2)).expand(1, *shape[1:]).contiguous()


def starts_whole(index: Any) -> bool:
    """True if an index takes all images and all channels."""
    return isinstance(index, tuple) and index[:2] == (slice(None), slice(None))


def pads_with_zeros(conv: nn.Conv2d) -> bool:
    if conv.padding_mode != "zeros" or conv.padding in ((0, 0), "valid"):
        return False
    return conv.padding != "same" or max(conv.kernel_size) > 1


def channels(ids: Tensor) -> Tensor:
    """The channel at each place of axis 1."""
    first = ids.flatten(2)[0, :, 0] if ids.dim() > 2 else ids[0]
    if not bool((ids == spread(first, tuple(ids.shape))).all()):
        raise NotTaken("channels that do not lie along axis 1")
    return first
