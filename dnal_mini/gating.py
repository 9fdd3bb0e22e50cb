"""Gates in any CNN: put in, found, set, priced.

Read ``add_gates``. The layer itself is ``layers/scaled_sigmoid.py``; nothing here knows of
training, pruning or particular networks.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dnal_mini.graph.cache import captured
from dnal_mini.graph.capture import refuse_wrapped, replace_everywhere
from dnal_mini.graph.copies import copied
from dnal_mini.graph.inputs import given, like, taken_by
from dnal_mini.graph.layer import CONVS
from dnal_mini.graph.observed import (
    activations_behind,
    convolutions_at_the_end,
    difference,
    tolerance,
)
from dnal_mini.layers.gated_norm import Gated, GatedFirst, GatedLate, put_gate, take_gate
from dnal_mini.layers.hollow import Hollow
from dnal_mini.layers.scaled_sigmoid import Mode, ScaledSigmoid
from dnal_mini.refused import Refused, need_callable, need_module, need_number, need_word

Order = Literal["conv-bn-ss-relu", "conv-bn-relu-ss", "conv-ss-bn-relu"]


Objective = Literal["paper", "code"]


DeltaForm = Literal["paper", "code", "linear", "constant"]


Where = Callable[[str, nn.Module], bool]


MOST_EPOCHS = 10**6


def add_gates(
    net: nn.Module,
    order: Order = "conv-bn-ss-relu",
    where: Where | None = None,
    image_shape: Sequence[int] | None = None,
    *,
    example_inputs: Any = None,
) -> nn.Module:
    """A copy of any CNN with an SS layer at its BatchNorms (1d, 2d, 3d, Sync).

    A norm stays in its place and under its name, in class and parameters; NAME.gate is its gate.
    In a net without any BatchNorm the convolutions get the gates, behind their bias, but for
    those that make the net's output. ``where(name, layer)`` tells which of them do. Without it
    the network's own ``gate_here(name)`` decides if it has one (the paper's placement), else all.
    Gates start in mode "off", so the copy computes what ``net`` computes: both are compared, in
    both modes, on images of ``image_shape``, by default of a usual size that the net takes; if
    it takes none, they are not.
    ``example_inputs``, for a forward that takes more than images: as ``prune`` takes them.
    For "conv-bn-relu-ss" running it shows where a gate goes. A layer whose output not one
    activation alone reads, or one that does not keep 0 (sigmoid), has its gate itself.

    Source: Guo et al. 2022, sec. 3.2, fig. 2 and fig. 4 [guo2022dnal].
    Raises: ValueError for an unknown order, a net that already has gates, no layer chosen or one
    with no place for a gate, images that the net does not take, a forward that ``prune`` could not
    follow, or one that does something else once there are gates; for "conv-bn-relu-ss" and a net
    without norms, if no images are found.
    Example:
        >>> net, images = dnal.models.vgg16(width=0.125).eval(), torch.randn(2, 3, 32, 32)
        >>> gated = dnal.add_gates(net)
        >>> len(dnal.gates(net)), len(dnal.gates(gated))
        (0, 13)
        >>> torch.equal(net(images), gated(images))
        True
        >>> isinstance(gated.features.bn1, torch.nn.BatchNorm2d)
        True
    """
    need_word("order", order, get_args(Order))
    if where is not None:
        need_callable("where", where, "name", "norm")
    if gates(net):
        raise Refused("got a net that has gates already; need a plain one: gate a fresh net")
    refuse_wrapped(net)
    need_finite(net)
    inputs = taken_by(net, given(net, image_shape, example_inputs))
    sites = gate_sites(net, where, inputs)
    _need_one(sites)
    late: dict[str, str] = {}
    if order == "conv-bn-relu-ss":
        late = activations_behind(net, _known(inputs), sites)
    gated = copied(net)
    for name in sites:
        _put(gated.get_submodule(name), order, late.get(name), like(net))
    if inputs is not None:
        captured(net, inputs)  # what cannot be followed now cannot be cut later
        _compare(net, gated, inputs, sites)
    return gated


def _put(layer: nn.Module, order: Order, activation: str | None, like: Tensor) -> None:
    """Give a layer a gate, in place; ``activation``: the name of the one that it goes behind."""
    if activation is not None:
        put_gate(layer, GatedLate, like, activation)
    else:
        first = order == "conv-ss-bn-relu" and isinstance(layer, _BatchNorm)
        put_gate(layer, GatedFirst if first else Gated, like)


@torch.no_grad()
def need_finite(net: nn.Module) -> None:
    """Raises: ValueError for NaN or infinite numbers in a parameter or in a norm's statistics."""
    norms = [name for name, module in net.named_modules() if isinstance(module, _BatchNorm)]
    buffers = ((n, b) for n, b in net.named_buffers() if n.rpartition(".")[0] in norms)
    for name, tensor in (*net.named_parameters(), *buffers):  # another buffer may be a mask
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise Refused(f"got NaN or infinite numbers in {name}; need a network that works")


def gate_sites(net: nn.Module, where: Where | None, inputs: tuple | None) -> list[str]:
    """Names of the layers to which ``add_gates`` gives a gate; ``inputs``: what the net takes."""
    own = getattr(net, "gate_here", None)
    chosen = where or ((lambda name, layer: own(name)) if own else (lambda name, layer: True))
    layers: dict[str, nn.Module]
    there = {name: m for name, m in net.named_modules() if not isinstance(m, Hollow)}
    layers = {name: m for name, m in there.items() if isinstance(m, _BatchNorm)}
    if not layers:
        layers = {name: m for name, m in there.items() if isinstance(m, CONVS)}
        ends = convolutions_at_the_end(net, _known(inputs)) if layers else set()
        layers = {name: m for name, m in layers.items() if name not in ends}
    return [name for name, layer in layers.items() if chosen(name, layer)]


def _need_one(sites: list[str]) -> None:
    if not sites:
        raise Refused(
            "got no BatchNorm to gate, and no convolution before another layer; need at least "
            "one: change `where` or the network"
        )


def _known(inputs: tuple | None) -> tuple:
    if inputs is None:
        raise Refused("got a net that takes no image of a usual size; need image_shape; do give it")
    return inputs


def _compare(net: nn.Module, gated: nn.Module, inputs: tuple, sites: Collection[str]) -> None:
    """Raises: ValueError if copies of both compute different things, or by layers of the first."""
    pair, strayed = (copied(net), copied(gated)), list[str]()
    if difference(pair[0], pair[0], inputs) > tolerance(net):
        raise Refused(
            f"got a {type(net).__name__} that gives one image two answers in eval mode; need a "
            "forward whose output depends on its input alone; do not count or draw numbers in it"
        )
    hooks = [
        net.get_submodule(name).register_forward_pre_hook(lambda *_, n=name: strayed.append(n))
        for name in sites
    ]
    gaps = {"eval": difference(*pair, inputs)}
    for hook in hooks:
        hook.remove()
    if strayed:
        raise Refused(
            f"got a {type(net).__name__} whose copy calls {strayed[0]} of the original; need a "
            "forward that finds its layers by self; do not hold them in a lambda or a global"
        )
    gaps["train"] = difference(*pair, inputs, train=True)
    for mode, gap in gaps.items():
        if gap > tolerance(net):
            raise Refused(
                f"got a {type(net).__name__} whose copy with gates, all off, differs by {gap:.1e} "
                f"in {mode} mode; need a forward that does not look at what a layer is made of"
            )


def strip_gates(net: nn.Module) -> None:
    """Take all SS layers out of a network, in place, whatever they do."""
    for layer in [m for m in net.modules() if isinstance(m, Gated)]:
        take_gate(layer)
    for gate in gates(net).values():
        replace_everywhere(net, gate, nn.Identity())


def site_of(net: nn.Module, gate: str) -> str:
    """Name of the layer that a gate belongs to; the gate's own if the net calls it by itself."""
    name = gate.rpartition(".")[0]
    return name if isinstance(net.get_submodule(name), Gated) else gate


def gates(net: nn.Module) -> dict[str, ScaledSigmoid]:
    """All gates of a network by qualified name, in the network's own order.

    Example:
        >>> gated = dnal.add_gates(dnal.models.vgg16(width=0.125))
        >>> name, gate = next(iter(dnal.gates(gated).items()))
        >>> name, len(gate.s)
        ('features.bn1.gate', 8)
    """
    need_module(net)
    return {name: m for name, m in net.named_modules() if isinstance(m, ScaledSigmoid)}


def check_gates(net: nn.Module) -> dict[str, ScaledSigmoid]:
    """All gates of a network, as ``gates``.

    Raises: ValueError for a gate that was set by hand to what no gate can be.
    """
    every = gates(net)
    for name, gate in every.items():
        layer = net.get_submodule(name.rpartition(".")[0])
        sizes = [getattr(layer, n, None) for n in ("num_features", "out_channels")]
        count = next((n for n in sizes if n and isinstance(layer, Gated)), gate.s.numel())
        need_word(f"mode of {name}", gate.mode, get_args(Mode))
        need_number(f"delta of {name}", gate.delta, 0, ends=False)
        need_number(f"threshold of {name}", gate.threshold, 0, 1, ends=False)
        if gate.s.shape != (count,) or bool(gate.s.isnan().any()):
            raise Refused(
                f"got s of {name} of shape {tuple(gate.s.shape)} with {int(gate.s.isnan().sum())} "
                f"NaN; need a number for each channel, ({count},); do go back to such a state"
            )
    return every


def set_gates(
    net: nn.Module,
    mode: Mode | None = None,
    delta: float | None = None,
    threshold: float | None = None,
) -> None:
    """Set the mode, the steepness and the threshold of every gate, in place.

    A network without gates is left as it is.

    Raises: ValueError for an unknown mode, delta not finite and positive in the gates' dtype,
    threshold not in (0, 1).
    Example:
        >>> gated = dnal.add_gates(dnal.models.vgg16(width=0.125))
        >>> dnal.set_gates(gated, mode="soft", delta=100.0)
        >>> {(gate.mode, float(gate.delta)) for gate in dnal.gates(gated).values()}
        {('soft', 100.0)}
    """
    every = gates(net)
    if mode is not None:
        need_word("mode", mode, get_args(Mode))
    if delta is not None:
        delta = need_number("delta", delta, 0, ends=False)
        for name, gate in every.items():
            held = float(torch.tensor(delta, dtype=torch.float64).to(gate.delta.dtype))
            if not 0 < held < torch.inf:
                raise Refused(f"got delta {delta}, which is {held:g} in the dtype of {name}; need "
                              "one that it can hold")  # fmt: skip
    if threshold is not None:
        need_number("threshold", threshold, 0, 1, ends=False)
    for gate in every.values():
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
    need_number("epochs", epochs, 1, MOST_EPOCHS, whole=True)
    need_number("delta_max", delta_max, 1)
    need_word("form", form, get_args(DeltaForm))
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
    need_number("bins", bins, 1, 10**6, whole=True)
    rows = {}
    for name, gate in check_gates(net).items():
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
