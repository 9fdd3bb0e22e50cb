"""From hard gates to a smaller network: drop the gates, plan the cut, cut, certify.

Read ``prune`` first. The surgery replaces submodules of a copy and never touches forward code;
what it does to each submodule is written down in a spec (plain JSON), and ``netfile.load`` repeats
the same surgery on a freshly built network. Which channels are dead is decided in ``analysis.py``,
which of the dead ones must stay in ``keepsets.py``.
"""

import contextlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from dnal_mini.deployment.fold import fold
from dnal_mini.gating import check_gates, gates, need_finite, set_gates
from dnal_mini.graph.copies import copied
from dnal_mini.graph.inputs import Given, Inputs, drawn, given, like, recorded, written
from dnal_mini.layers.mixed import parts
from dnal_mini.measure.cost import cost_of
from dnal_mini.pruning.analysis import facts_of
from dnal_mini.pruning.certificate import Trial, certified, outputs
from dnal_mini.pruning.facts import Analysis, Keeps
from dnal_mini.pruning.foldgates import drop_and_tell
from dnal_mini.pruning.keepsets import settle
from dnal_mini.pruning.plan import Report, plan
from dnal_mini.pruning.prepare import prepare, tensors_of
from dnal_mini.pruning.surgery import Numbers, is_role, operate, write_numbers
from dnal_mini.pruning.trial import follows, stubborn
from dnal_mini.refused import Refused, need_number, need_numbers, need_word

Residual = Literal["scatter", "tie"]


FORMAT = 4


@dataclass
class Pruned:
    """A smaller network with the papers that prove it.

    ``module`` is a copy of the net's own class with smaller submodules and no gates, ``spec`` the
    JSON-able description of the cut, ``report`` what was cut and why not more, ``certificate`` the
    largest absolute difference between hard-gated and pruned output in float64, over images of two
    sizes and both modes (each is in ``spec["trials"]``, float32 too in ``spec["certificate"]``).

    Example:
        >>> net = dnal.models.vgg16(width=0.125).eval()
        >>> net.features.bn1.weight.data[:3] = net.features.bn1.bias.data[:3] = 0  # as by gates
        >>> small = dnal.prune(net)
        >>> isinstance(small, dnal.Pruned), small.module.features.conv1
        (True, Conv2d(3, 5, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1)))
    """

    module: nn.Module
    spec: dict[str, Any]
    report: Report
    certificate: float

    def deploy(self) -> nn.Module:
        """The network for inference: a copy in eval mode with every BatchNorm folded away."""
        return fold(self.module, written(self.spec))


def prune(
    net: nn.Module,
    image_shape: Sequence[int] = (3, 32, 32),
    residual: Residual = "scatter",
    *,
    min_channels: int = 1,
    round_to: int = 1,
    absorb: bool = False,
    max_gap: float = 1e-2,
    example_inputs: Any = None,
) -> Pruned:
    """Cut every channel that the hard gates leave dead; the argument is left alone.

    ``residual="scatter"``: a residual branch keeps its own channels and is added into the trunk at
    their places; "tie": all members of a channel set keep the union, plain narrower layers.
    ``min_channels`` and ``round_to`` let dead channels stay until every layer has that many and a
    multiple of that: regular shapes for some MACs; the report calls them held.
    ``absorb`` multiplies the p < 1 of an open gate into its norm instead of rounding it to 1.
    ``max_gap``: how far a soft gate may be from 0 and 1 (``absorb``: a closed one from 0).
    ``example_inputs``, in place of ``image_shape``, for a forward that takes more than images: a
    tuple of its arguments, or a dict. Tensors of floating point are drawn anew in their range.
    A layer whose channels are all dead keeps one (zeroed), or its whole residual branch goes.

    Source: Guo et al. 2022, sec. 3.4 [guo2022dnal].
    Differs: removal is physical and exact; the authors' scripts mask, and ignore skips.
    Raises: ValueError if the forward cannot be followed, no gate was ever trained, gates are still
    soft, numbers are not finite, BatchNorm has seen no batch, an option is unknown, or the outputs
    differ by more than 1e-8 of how much they vary with the image.
    Example:
        >>> gated = dnal.add_gates(dnal.models.vgg16(width=0.125).eval())
        >>> for gate in dnal.gates(gated).values():
        ...     gate.s.data = torch.linspace(-99, 99, len(gate.s))  # half of them are closed
        >>> small = dnal.prune(gated)
        >>> round(dnal.cost(gated).macs / dnal.cost(small.module).macs, 1), small.certificate < 1e-8
        (3.8, True)
    """
    _check_options(residual, min_channels, round_to, absorb, max_gap)
    _check_gates(net, absorb, max_gap)
    _check_numbers(net)
    what: Given = given(net, image_shape, example_inputs)
    dense, exact = _cost(net, what), _decided(net, absorb)  # cost: tells a wrong shape
    expected = outputs(exact, drawn(what, like(exact), 0))
    plain = drop_and_tell(exact, absorb, what)
    cut = settled(*plain, what, residual, min_channels, round_to, expected)
    small = cut.module
    trials = certified(exact, small, what, expected)
    small.to(like(net).dtype)
    spec: dict[str, Any] = {
        "format": FORMAT,
        "builder": parts(type(net))[0].__name__,
        "config": _config(net),
        **recorded(what),
        "residual": residual,
        **cut.tables,
        "certificate": _summary(trials, exact.to(like(net).dtype), small, what),
        "trials": [asdict(trial) | {"image_shape": list(trial.image_shape)} for trial in trials],
        "cost": {"dense": dense, "pruned": _cost(small, what)},
        "report": vars(cut.report),
    }
    return Pruned(small, spec, cut.report, spec["certificate"]["absolute"])


def cut_net(
    exact: nn.Module,
    image_shape: Given,
    residual: Residual = "scatter",
    min_channels: int = 1,
    round_to: int = 1,
    absorb: bool = False,
) -> tuple[nn.Module, dict[str, dict], Report]:
    """``prune`` without the papers: the smaller copy of a net whose gates are decided.

    Also "keep" and "modules" of its spec, and the report.
    """
    gateless, put_in = drop_and_tell(exact, absorb, image_shape)
    cut = settled(gateless, put_in, image_shape, residual, min_channels, round_to)
    return cut.module, cut.tables, cut.report


@dataclass
class Cut:
    """A smaller network without papers, and what was found on the way to it."""

    module: nn.Module
    tables: dict[str, dict]
    report: Report
    analysis: Analysis
    keeps: Keeps


def settled(
    net: nn.Module,
    put_in: dict[str, dict],
    image_shape: Given,
    residual: str = "scatter",
    min_channels: int = 1,
    round_to: int = 1,
    expected: list[Tensor] | None = None,
) -> Cut:
    """The smallest copy of a net without gates that does what it does, found by trying.

    An operation whose sizes turn out not to follow the widths becomes a wall, and all is settled
    again. In the end nothing is cut, so this ends. ``expected``: the ``outputs`` of the net, if
    they are known.

    Raises: ValueError for a net that gives one image two answers.
    """
    graph, inputs = prepare(net, image_shape), drawn(image_shape, like(net), 0)
    expected = outputs(net, inputs) if expected is None else expected
    while True:
        analysis = facts_of(graph, tensors_of(net))
        keeps = settle(analysis, residual, min_channels, round_to)
        tables, numbers, report = plan(analysis, keeps, put_in)
        small = _operated(net, tables, numbers)
        if (error := follows(expected, small, inputs)) is None:
            return Cut(small, tables, report, analysis, keeps)
        away = [
            entry
            for name, entry in tables["modules"].items()
            if entry.keys() & {"gone", "source"} and not is_role(name)
        ]
        for entry in away:  # forward code may look at a layer that is gone, or keep it in a list
            entry["in_place"] = True
        hollowed = _operated(net, tables, numbers) if away else small
        if away and follows(expected, hollowed, inputs) is None:
            return Cut(hollowed, tables, report, analysis, keeps)
        before = len(graph.stubborn)
        graph.stubborn.update(stubborn(small, graph, keeps, inputs, error))
        if len(graph.stubborn) == before:
            raise Refused(
                f"got a {type(net).__name__} that does not do the same twice ({error}); need one "
                "whose output depends on its input alone"
            )


def _operated(net: nn.Module, tables: dict[str, dict], numbers: dict[str, Numbers]) -> nn.Module:
    """A cut copy."""
    small = copied(net)
    operate(small, tables)
    write_numbers(small, numbers)
    return small


def _cost(net: nn.Module, what: Given) -> dict[str, int]:
    return dict(vars(cost_of(net, what)))


def _config(net: nn.Module) -> dict[str, Any] | None:
    """How to rebuild a net, if it says so in JSON; another attribute of that name is its own."""
    config = getattr(net, "config", None)
    with contextlib.suppress(TypeError, ValueError):
        return json.loads(json.dumps(config)) if isinstance(config, dict) else None
    return None


def _check_options(
    residual: str, min_channels: int, round_to: int, absorb: bool, max_gap: float
) -> None:
    need_word("residual", residual, get_args(Residual))
    need_number("min_channels", min_channels, 1, whole=True)
    need_number("round_to", round_to, 1, whole=True)
    need_number("max_gap", max_gap, 0, 1)
    if not isinstance(absorb, bool):
        raise Refused(f"got absorb {absorb!r}; need True or False")


def _check_numbers(net: nn.Module) -> None:
    """Raises: ValueError for weights or statistics that cannot be those of a trained network."""
    need_finite(net)
    for name, norm in net.named_modules():
        if not isinstance(norm, nn.modules.batchnorm._BatchNorm) or norm.running_mean is None:
            continue
        seen = norm.num_batches_tracked
        untouched = (norm.running_mean == 0) & (norm.running_var == 1)
        fresh = seen is not None and int(seen) == 0 and bool(untouched.all())
        if norm.training and fresh:
            raise Refused(
                f"got a net in training mode whose {name} has seen no batch; need settled "
                "statistics: run some batches through it, or call eval() if they are meant"
            )


def _check_gates(net: nn.Module, absorb: bool, max_gap: float) -> None:
    """Raises: ValueError for gates that were never trained, or are not yet switches."""
    need_numbers(net)
    every = check_gates(net)
    if every and all(bool((gate.s == 0).all()) for gate in every.values()):
        raise Refused("got gates that all have s = 0; need trained gates: run the arch stage")
    for name, gate in every.items():
        if gate.mode != "soft":
            continue
        p = gate.p.detach()
        gap = float((p * ~gate.is_open if absorb else torch.minimum(p, 1 - p)).max())
        if gap > max_gap:
            raise Refused(
                f"got soft gates: binarisation gap {gap:.2g} in {name}; need at most {max_gap:g}: "
                "raise delta, set_gates(net, mode='hard') to round them, or allow a larger max_gap"
            )


@torch.no_grad()
def _decided(net: nn.Module, absorb: bool) -> nn.Module:
    """A copy in float64 with every gate at 0 or 1 (``absorb``: at 0 or its own p)."""
    exact = copied(net).double()
    for gate, own in zip(gates(exact).values(), gates(net).values(), strict=True):
        is_open = own.is_open  # decided in the network's own precision
        gate.s[~is_open] = -torch.inf
        if absorb:
            gate.threshold = 0.0
        else:
            gate.s[is_open] = torch.inf
    set_gates(exact, mode="soft")
    return exact


def _summary(
    trials: list[Trial], full: nn.Module, small: nn.Module, image_shape: Given
) -> dict[str, Any]:
    """The certificate of a spec: the largest difference of any comparison."""
    rounded = _difference(full, small, image_shape)
    return {
        "absolute": max(trial.absolute for trial in trials),
        "relative": max(trial.relative for trial in trials),
        "relative_float32": rounded,
    }


def _difference(full: nn.Module, small: nn.Module, image_shape: Given) -> float:
    """Largest difference in the networks' own precision, relative to the largest output."""
    inputs = drawn(image_shape, like(full), 0, None if isinstance(image_shape, Inputs) else 1)
    pairs = list(zip(outputs(full, inputs), outputs(small, inputs), strict=True))
    largest = max(float((a - b).abs().max()) for a, b in pairs)
    return largest / max(*(float(a.abs().max()) for a, _ in pairs), 1e-300)
