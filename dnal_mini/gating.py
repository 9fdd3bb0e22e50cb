"""Gates in any CNN: put in, found, set, priced.

Read ``add_gates``. The layer itself is ``layers/scaled_sigmoid.py``; nothing here knows of
training, pruning or particular networks.
"""

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Literal, get_args

import torch
from torch import Tensor, fx, nn

from dnal_mini.graph.capture import replace_module, trace
from dnal_mini.graph.ops import is_activation
from dnal_mini.layers.gated_norm import GatedNorm
from dnal_mini.layers.scaled_sigmoid import Mode, ScaledSigmoid
from dnal_mini.refused import Refused

Order = Literal["conv-bn-ss-relu", "conv-bn-relu-ss", "conv-ss-bn-relu"]


Objective = Literal["paper", "code"]


DeltaForm = Literal["paper", "code", "linear", "constant"]


Where = Callable[[str, nn.Module], bool]


def add_gates(
    net: nn.Module, order: Order = "conv-bn-ss-relu", where: Where | None = None
) -> nn.Module:
    """A copy of any CNN with an SS layer at its BatchNorm2d layers; the argument is untouched.

    ``where(name, norm)`` tells which BatchNorm2d get a gate. Without it the network's own
    ``gate_here(name)`` decides if it has one (the paper's placement), else all are gated.
    Gates start in mode "off", so the copy computes what ``net`` computes.
    For "conv-bn-relu-ss" the copy is a ``torch.fx.GraphModule``, since activations are often
    shared or functional; a BatchNorm that feeds no activation is gated itself.

    Source: Guo et al. 2022, sec. 3.2, fig. 2 and fig. 4 [guo2022dnal].
    Raises: ValueError for an unknown order, a net that already has gates, or no layer chosen.
    Example:
        >>> net, images = dnal.models.vgg16(width=0.125).eval(), torch.randn(2, 3, 32, 32)
        >>> gated = dnal.add_gates(net)
        >>> len(dnal.gates(net)), len(dnal.gates(gated))
        (0, 13)
        >>> torch.equal(net(images), gated(images))
        True
    """
    if order not in get_args(Order):
        raise Refused(f"got order {order!r}; need one of {', '.join(get_args(Order))}")
    if gates(net):
        raise Refused("got a net that has gates already; need a plain one: gate a fresh net")
    own = getattr(net, "gate_here", None)
    chosen = where or ((lambda name, norm: own(name)) if own else (lambda name, norm: True))
    net = copy.deepcopy(net)
    sites = {
        name: module
        for name, module in net.named_modules()
        if isinstance(module, nn.BatchNorm2d) and chosen(name, module)
    }
    if not sites:
        raise Refused(
            "got no BatchNorm2d to gate; need at least one: change `where` or the network"
        )
    if order == "conv-bn-relu-ss":
        return _gate_after_activation(net, sites)
    for norm in sites.values():
        gated = GatedNorm(norm, _gate_like(norm), gate_first=order == "conv-ss-bn-relu")
        for alias, module in list(net.named_modules(remove_duplicate=False)):
            if module is norm:
                replace_module(net, alias, gated)
    return net


def _gate_like(norm: nn.BatchNorm2d) -> ScaledSigmoid:
    """A fresh gate on the device and in the dtype of a BatchNorm."""
    like = norm.weight if norm.affine else norm.running_mean
    gate = ScaledSigmoid(norm.num_features)
    return gate.to(like) if like is not None else gate


def _gate_after_activation(net: nn.Module, sites: dict[str, nn.BatchNorm2d]) -> nn.Module:
    """Insert each gate behind the activation that follows its BatchNorm, by rewriting the graph."""
    traced = trace(net)
    for node in list(traced.graph.nodes):
        if node.op == "call_module" and node.target in sites:
            put_behind_activation(traced, node, _gate_like(sites[node.target]))
    traced.recompile()
    if hasattr(net, "config"):  # how to rebuild the net: the pruner writes it into the spec
        traced.config = net.config
    return traced


def put_behind_activation(traced: fx.GraphModule, norm: fx.Node, module: nn.Module) -> None:
    """Insert a module behind the activation that alone follows a norm, else behind the norm.

    Its name is the norm's with "_gate" behind it. The graph is to be recompiled afterwards.
    """
    users = list(norm.users)
    site = users[0] if len(users) == 1 and is_activation(users[0], traced) else norm
    name = f"{norm.target}_gate"
    if name in dict(traced.named_modules()):
        raise Refused(f"{norm.target} is called twice; need one call per gated BatchNorm")
    traced.add_submodule(name, module)
    with traced.graph.inserting_after(site):
        gate = traced.graph.call_module(name)
    site.replace_all_uses_with(gate)
    gate.args = (site,)


def gates(net: nn.Module) -> dict[str, ScaledSigmoid]:
    """All gates of a network by qualified name, in the network's own order.

    Example:
        >>> gated = dnal.add_gates(dnal.models.vgg16(width=0.125))
        >>> name, gate = next(iter(dnal.gates(gated).items()))
        >>> name, len(gate.s)
        ('features.bn1.gate', 8)
    """
    return {name: m for name, m in net.named_modules() if isinstance(m, ScaledSigmoid)}


def set_gates(
    net: nn.Module,
    mode: Mode | None = None,
    delta: float | None = None,
    threshold: float | None = None,
) -> None:
    """Set the mode, the steepness and the threshold of every gate, in place.

    Raises: ValueError for an unknown mode, delta not finite and positive, threshold not in (0, 1).
    Example:
        >>> gated = dnal.add_gates(dnal.models.vgg16(width=0.125))
        >>> dnal.set_gates(gated, mode="soft", delta=100.0)
        >>> {(gate.mode, float(gate.delta)) for gate in dnal.gates(gated).values()}
        {('soft', 100.0)}
    """
    if mode is not None and mode not in get_args(Mode):
        raise Refused(f"got mode {mode!r}; need one of {', '.join(get_args(Mode))}")
    if delta is not None and not (math.isfinite(delta) and delta > 0):
        raise Refused(f"got delta {delta}; need a finite number above 0")
    if threshold is not None and not 0 < threshold < 1:
        raise Refused(f"got threshold {threshold}; need a number between 0 and 1")
    for gate in gates(net).values():
        gate.mode = gate.mode if mode is None else mode
        gate.threshold = gate.threshold if threshold is None else threshold
        if delta is not None:
            gate.delta.fill_(delta)


def arch_parameters(net: nn.Module) -> Iterator[nn.Parameter]:
    """The architecture parameters ``s``, one (channels,) tensor per gate."""
    return (gate.s for gate in gates(net).values())


def weight_parameters(net: nn.Module) -> Iterator[nn.Parameter]:
    """Everything that is not an architecture parameter."""
    own = {id(s) for s in arch_parameters(net)}
    return (parameter for parameter in net.parameters() if id(parameter) not in own)


def delta_schedule(epochs: int, form: DeltaForm = "paper", delta_max: float = 1e4) -> list[float]:
    """Steepness of the gates for each architecture epoch.

    "paper": from 1 to ``delta_max`` by a constant factor, both trained (Algorithm 1; a single
    epoch gets ``delta_max``). "code": multiplied before each epoch, so that delta = 1 is never
    trained. To compare with: "linear" goes from 1 to ``delta_max`` in equal steps, "constant" has
    ``delta_max`` from the start.

    Source: Guo et al. 2022, Algorithm 1 [guo2022dnal].
    Raises: ValueError for epochs < 1 or delta_max < 1.
    Example:
        >>> [round(delta, 1) for delta in dnal.delta_schedule(5)]
        [1.0, 10.0, 100.0, 1000.0, 10000.0]
        >>> [round(delta, 1) for delta in dnal.delta_schedule(5, "code")]
        [6.3, 39.8, 251.2, 1584.9, 10000.0]
    """
    if epochs < 1:
        raise Refused(f"got {epochs} epochs; need at least 1")
    if not (math.isfinite(delta_max) and delta_max >= 1):
        raise Refused(f"got delta_max {delta_max}; need a finite number of at least 1")
    if form not in get_args(DeltaForm):
        raise Refused(f"got form {form!r}; need one of {', '.join(get_args(DeltaForm))}")
    if form == "constant" or epochs == 1:
        return [delta_max] * epochs
    if form == "code":
        return [delta_max ** (k / epochs) for k in range(1, epochs + 1)]
    shares = [i / (epochs - 1) for i in range(epochs)]
    if form == "linear":
        return [1 + (delta_max - 1) * share for share in shares]
    return [delta_max**share for share in shares]


def open_gates(
    net: nn.Module, objective: Objective = "paper", weights: Mapping[str, float] | None = None
) -> Tensor:
    """The number that ``gate_price`` multiplies: a scalar with gradient, summed over all gates.

    "paper": sum of ``sigmoid(delta * s)``; "code": sum of ``sigmoid(s)`` (delta left out, as in
    the authors' scripts). ``weights``: what a gate of each name counts for, 1 without it.

    Source: Guo et al. 2022, eq. 7 [guo2022dnal].
    """
    every = {
        name: gate.p if objective == "paper" else torch.sigmoid(gate.s)
        for name, gate in gates(net).items()
    }
    if weights:
        every = {name: p * weights[name] for name, p in every.items()}
    return torch.cat(list(every.values())).sum()


def gate_report(net: nn.Module, bins: int = 10) -> dict[str, dict]:
    """What every gate does now, by layer: JSON-able numbers.

    ``channels``, ``open`` (hard decision), ``soft`` (sum of p), ``undecided`` (share of p in
    (0.1, 0.9)), ``gap`` (largest min(p, 1 - p): 0 when binary), ``histogram`` (counts of p in
    ``bins`` equal bins of [0, 1]).
    """
    rows = {}
    for name, gate in gates(net).items():
        p = gate.p.detach().double().cpu()
        rows[name] = {
            "channels": len(p),
            "open": int(gate.is_open.sum()),
            "soft": float(p.sum()),
            "undecided": float(((p > 0.1) & (p < 0.9)).double().mean()),
            "gap": float(torch.minimum(p, 1 - p).max()),
            "histogram": torch.histc(p, bins, 0, 1).int().tolist(),
        }
    return rows
