"""From hard gates to a smaller network: drop the gates, plan the cut, cut, certify.

Read ``prune`` first. The surgery replaces submodules of a copy and never touches forward code;
what it does to each submodule is written down in a spec (plain JSON), and ``netfile.load`` repeats
the same surgery on a freshly built network. Which channels are dead is decided in ``channels.py``,
which of the dead ones must stay in ``keeps.py``.
"""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from dnal_mini.channelmap import ChannelMap
from dnal_mini.channels import analyse, folds, wanted
from dnal_mini.cost import cost
from dnal_mini.deploy import deploy
from dnal_mini.facts import CONSTANT, LIVE, ZERO, Analysis
from dnal_mini.gate import (
    GatedNorm,
    ScaledSigmoid,
    gates,
    is_activation,
    replace_module,
    set_gates,
    trace,
)
from dnal_mini.graphs import lent
from dnal_mini.keeps import GONE, HELD, NEEDED, TIED, WALL, Keeps, settle
from dnal_mini.operations import in_place, is_changed
from dnal_mini.rules import WEIGHTS, constant_part

FATES = {
    "n": "needed", "t": "tied", "w": "walled", "h": "held",
    "z": "zero, gone", "c": "constant, gone", "u": "unneeded, gone",
}  # fmt: skip
Residual = Literal["scatter", "tie"]
FORMAT = 2
TOLERANCE = 1e-8  # largest relative difference (float64) between gated and pruned output


@dataclass
class Report:
    """What was cut and why not more; printable.

    ``layers``: one row per convolution or linear layer: channels before, provably zero, not
    needed; of the dead ones those that stay because a sum, a module called again (tied), a wall
    (walled), equal groups or a wanted width (held) keep them; channels after. ``walls``:
    operations that the analysis does not know. ``notes``: branches that went as a whole, layers
    that had to keep a dead channel, constants that moved into a bias.
    """

    layers: list[dict[str, Any]] = field(default_factory=list)
    walls: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def fates(self) -> list[dict[str, Any]]:
        """One row per channel: layer, channel, fate (a word of ``FATES``); for a figure."""
        return [
            {"layer": row["layer"], "channel": channel, "fate": FATES[letter]}
            for row in self.layers
            for channel, letter in enumerate(row["fates"])
        ]

    def __str__(self) -> str:
        columns = ("before", "zero", "unneeded", "tied", "walled", "held", "after")
        lines = [f"{'layer':40}" + "".join(f"{name:>9}" for name in columns)]
        for row in self.layers:
            lines.append(f"{row['layer']:40}" + "".join(f"{row.get(c, 0):>9}" for c in columns))
        return "\n".join([*lines, *(f"wall: {wall}" for wall in self.walls), *self.notes])


@dataclass
class Pruned:
    """A smaller network with the papers that prove it: see ``prune``."""

    module: nn.Module
    spec: dict[str, Any]
    report: Report
    certificate: float

    def deploy(self) -> nn.Module:
        """The network for inference: a copy in eval mode with every BatchNorm folded away."""
        return deploy(self.module)


def prune(
    net: nn.Module,
    image_shape: Sequence[int] = (3, 32, 32),
    residual: Residual = "scatter",
    *,
    min_channels: int = 1,
    round_to: int = 1,
    absorb: bool = False,
    max_gap: float = 1e-2,
) -> Pruned:
    """Cut every channel that the hard gates leave dead; the argument is left alone.

    ``module`` is a copy of ``net``'s own class with smaller submodules and no gates, ``spec`` the
    JSON-able description of the cut, ``report`` what was cut and why not more, ``certificate`` the
    largest absolute difference between hard-gated and pruned output in float64, eval mode (the
    relative ones, float32 too, are in ``spec["certificate"]``).
    ``residual="scatter"``: a residual branch keeps its own channels and is added into the trunk at
    their places; "tie": all members of a channel set keep the union, plain narrower layers.
    ``min_channels`` and ``round_to`` let dead channels stay until every layer has that many and a
    multiple of that: a trade of MACs for regular shapes; the report calls them held.
    ``absorb`` multiplies the p < 1 of an open gate into its norm instead of rounding it to 1.
    ``max_gap`` is the largest distance of a soft gate from 0 and 1 (with ``absorb``: of a closed
    one from 0) that is rounded away without a word.
    A layer whose channels are all dead keeps one (zeroed), or its whole residual branch goes.

    Source: Guo et al. 2022, sec. 3.4 [guo2022dnal].
    Differs: removal is physical and exact; the authors' scripts mask, and ignore skips.
    Raises: ValueError if the net cannot be traced, no gate was ever trained, gates are still soft,
    numbers are not finite, BatchNorm has seen no batch, an option is unknown, or the two outputs
    differ by more than 1e-8 of the largest output.
    """
    _check_options(residual, min_channels, round_to)
    _check_gates(net, absorb, max_gap)
    _check_numbers(net)
    exact = _decided(net, absorb)
    small, modules, report = surgery(exact, image_shape, residual, min_channels, round_to, absorb)
    absolute, relative = _difference(exact, small, image_shape)
    if not relative <= TOLERANCE:
        raise ValueError(f"got outputs that differ by {relative:.1e} of the largest; need 1e-8")
    small.to(_dtype(net))
    spec = {
        "format": FORMAT,
        "builder": type(net).__name__,
        "config": getattr(net, "config", None),
        "image_shape": list(image_shape),
        "residual": residual,
        "modules": modules,
        "certificate": {
            "absolute": absolute,
            "relative": relative,
            "relative_float32": _difference(exact.to(_dtype(net)), small, image_shape)[1],
        },
        "cost": {"dense": _cost(net, image_shape), "pruned": _cost(small, image_shape)},
        "report": vars(report),
    }
    return Pruned(small, spec, report, absolute)


def surgery(
    exact: nn.Module,
    image_shape: Sequence[int],
    residual: Residual = "scatter",
    min_channels: int = 1,
    round_to: int = 1,
    absorb: bool = False,
) -> tuple[nn.Module, dict[str, dict], Report]:
    """``prune`` without the papers: the smaller copy of a net whose gates are decided, its spec."""
    small = drop_gates(exact, absorb)
    analysis = analyse(small, image_shape)
    keeps = settle(analysis, residual, min_channels, round_to)
    modules, numbers, report = plan(analysis, keeps)
    operate(small, modules)
    _write_numbers(small, modules, numbers)
    return small, modules, report


def _cost(net: nn.Module, image_shape: Sequence[int]) -> dict[str, int]:
    return dict(vars(cost(net, image_shape)))


def _dtype(net: nn.Module) -> torch.dtype:
    return next((p.dtype for p in net.parameters() if p.is_floating_point()), torch.float32)


# --- what cannot be pruned -------------------------------------------------------------------


def _check_options(residual: str, min_channels: int, round_to: int) -> None:
    if residual not in ("scatter", "tie"):
        raise ValueError(f"got residual {residual!r}; need 'scatter' or 'tie'")
    if min_channels < 1 or round_to < 1:
        raise ValueError(f"got min_channels {min_channels}, round_to {round_to}; need at least 1")


def _check_numbers(net: nn.Module) -> None:
    """Raises: ValueError for weights or statistics that cannot be those of a trained network."""
    for name, tensor in net.state_dict().items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise ValueError(f"got NaN or infinite numbers in {name}; need a network that works")
    for name, norm in net.named_modules():
        if not isinstance(norm, nn.modules.batchnorm._BatchNorm) or norm.running_mean is None:
            continue
        seen = norm.num_batches_tracked
        untouched = (norm.running_mean == 0) & (norm.running_var == 1)
        fresh = seen is not None and int(seen) == 0 and bool(untouched.all())
        if norm.training and fresh:
            raise ValueError(
                f"got a net in training mode whose {name} has seen no batch; need settled "
                "statistics: run some batches through it, or call eval() if they are meant"
            )


def _check_gates(net: nn.Module, absorb: bool, max_gap: float) -> None:
    """Raises: ValueError for gates that were never trained, or are not yet switches."""
    every = gates(net)
    if every and all(bool((gate.s == 0).all()) for gate in every.values()):
        raise ValueError("got gates that all have s = 0; need trained gates: run the arch stage")
    for name, gate in every.items():
        if gate.mode != "soft":
            continue
        p = gate.p.detach()
        gap = float((p * ~gate.is_open if absorb else torch.minimum(p, 1 - p)).max())
        if gap > max_gap:
            raise ValueError(
                f"got soft gates: binarisation gap {gap:.2g} in {name}; need at most {max_gap:g}: "
                "raise delta, set_gates(net, mode='hard') to round them, or allow a larger max_gap"
            )


@torch.no_grad()
def _decided(net: nn.Module, absorb: bool) -> nn.Module:
    """A copy in float64 with every gate at 0 or 1 (``absorb``: at 0 or its own p)."""
    exact = copy.deepcopy(net).double()
    for gate, own in zip(gates(exact).values(), gates(net).values(), strict=True):
        is_open = own.is_open  # decided in the network's own precision
        gate.s[~is_open] = -torch.inf
        if absorb:
            gate.threshold = 0.0
        else:
            gate.s[is_open] = torch.inf
    set_gates(exact, mode="soft")
    return exact


# --- gates out -------------------------------------------------------------------------------


def drop_gates(net: nn.Module, absorb: bool = False) -> nn.Module:
    """A copy without SS layers that computes what the hard-gated network computes, exactly.

    A closed gate becomes gamma = beta = 0 in its BatchNorm, or a zero filter in front of it; where
    there is neither, or others use the same numbers, a ``ChannelMap`` puts zeros there. An open
    gate counts as 1, or with ``absorb`` as its p: gamma and beta are multiplied by it.

    Raises: ValueError, with ``absorb`` only, for a gate whose p fits into no layer.
    """
    net = copy.deepcopy(net)
    graph, places = trace(net), Places(net)
    calls = [n for n in graph.graph.nodes if n.op == "call_module"]
    nodes = {str(n.target): n for n in calls}
    common = lent(net) | {str(n.target) for n in calls if n is not nodes[str(n.target)]}
    owned = {m.gate for m in net.modules() if isinstance(m, GatedNorm)}
    for module, names in places.names.items():
        gate = module.gate if isinstance(module, GatedNorm) else module
        if not isinstance(gate, ScaledSigmoid) or module in owned:
            continue
        gain = gate.is_open.to(gate.s) * (gate.p if absorb else 1)
        norm = module.norm if isinstance(module, GatedNorm) else nn.Identity()
        behind = isinstance(module, GatedNorm) and not module.gate_first
        layer: nn.Module | None
        if behind:
            layer = None if common & {f"{name}.norm" for name in names} else norm
        else:
            node = next((nodes[name] for name in names if name in nodes), None)
            layer = _producer(node, graph, common, homogeneous=absorb)
        places.replace(module, _without_gate(norm, layer, gain, names[0], behind))
    return net


def _without_gate(
    norm: nn.Module, layer: nn.Module | None, gain: Tensor, name: str, behind: bool
) -> nn.Module:
    """What takes a gate's place: the norm alone if a layer can take the gate's factors."""
    if layer is not None:
        _scale(layer, gain)
        return norm
    if not bool(((gain == 0) | (gain == 1)).all()):
        raise ValueError(f"got gate {name} with p < 1 and no layer to take it; need absorb=False")
    if bool((gain == 1).all()):
        return norm
    places = torch.arange(len(gain), device=gain.device).masked_fill(gain == 0, -1)
    zeros = ChannelMap(places).to(gain.device)
    if isinstance(norm, nn.Identity):
        return zeros
    return nn.Sequential(norm, zeros) if behind else nn.Sequential(zeros, norm)


class Places:
    """All names of every module, to replace a shared one under each of them."""

    def __init__(self, net: nn.Module) -> None:
        self.net = net
        self.names: dict[nn.Module, list[str]] = {}
        for name, module in net.named_modules(remove_duplicate=False):
            self.names.setdefault(module, []).append(name)

    def replace(self, old: nn.Module, new: nn.Module) -> None:
        """Put ``new`` wherever ``old`` is."""
        for name in self.names[old]:
            replace_module(self.net, name, new)


def _producer(
    gate: fx.Node | None, graph: fx.GraphModule, common: set[str], homogeneous: bool
) -> nn.Module | None:
    """The BatchNorm or convolution whose output reaches a gate, past activations that keep 0.

    ``homogeneous``: past those only that keep any positive factor (ReLU and its leaky kin). None
    if there is no such layer, or if others read it, call it or share its numbers.
    """
    if gate is None or str(gate.target) in common:
        return None
    node = gate.all_input_nodes[0]
    while is_activation(node, graph) and len(node.users) == 1 and len(node.all_input_nodes) == 1:
        if node.op == "call_module":
            activation = graph.get_submodule(str(node.target))
            name = type(activation).__name__.lower()
            zero = torch.zeros(1, dtype=next(iter(activation.parameters()), torch.zeros(())).dtype)
            keeps_zero = name != "prelu" and float(activation(zero).detach()) == 0
        else:
            name = str(getattr(node.target, "__name__", node.target)).rstrip("_")
            keeps_zero = name not in ("sigmoid", "softplus", "hardsigmoid")
        if not keeps_zero or (homogeneous and name not in ("relu", "leaky_relu", "leakyrelu")):
            return None
        node = node.all_input_nodes[0]
    if node.op != "call_module" or len(node.users) != 1 or str(node.target) in common:
        return None
    layer = graph.get_submodule(str(node.target))
    return layer if type(layer) in (nn.BatchNorm2d, nn.Conv2d) and not is_changed(layer) else None


@torch.no_grad()
def _scale(layer: Any, gain: Tensor) -> None:
    """Multiply a layer's output channels by a factor each, in place."""
    if isinstance(layer, nn.BatchNorm2d) and not layer.affine:
        layer.affine = True
        layer.weight = nn.Parameter(torch.ones_like(gain))
        layer.bias = nn.Parameter(torch.zeros_like(gain))
    layer.weight.mul_(gain.reshape(-1, *[1] * (layer.weight.dim() - 1)))
    if layer.bias is not None:
        layer.bias.mul_(gain)


# --- the plan: what happens to each submodule ------------------------------------------------


@dataclass
class Numbers:
    """What the surgery changes in the numbers of a layer: constants move into its bias.

    A BatchNorm behind the layer takes them instead, in its running mean: no new parameter.
    """

    shift: Tensor  # (outputs of the full layer,), float64
    silent: list[int]  # places of the small layer's inputs that the shift stands for
    norm: str = ""  # name of the BatchNorm that takes the shift


def plan(analysis: Analysis, keeps: Keeps) -> tuple[dict[str, dict], dict[str, Numbers], Report]:
    """What happens to every submodule that changes, as JSON-able entries; numbers; the report.

    Entries by qualified name: {"out", "in"} (positions of the full layer, in their new order),
    {"columns"} (each of "in" stands for so many columns), {"groups"}, {"bias": true} (gets one),
    {"gather", "scatter"} (a ChannelMap in front, behind), {"source"} for a ChannelMap, {"zeros",
    "stride"} for the end of a branch that is gone, {"gone"} for the rest of such a branch.
    """
    report = Report(notes=list(keeps.notes))
    modules: dict[str, dict] = {}
    numbers: dict[str, Numbers] = {}
    for end, stride in keeps.emptied.items():
        modules |= _dead_branch(end, stride, analysis, keeps)
        report.notes.append(f"branch gone: {keeps.blocks.get(end, end.target)} adds nothing")
    for node in analysis.facts:
        name = str(node.target)
        if node.op != "call_module" or node in keeps.idle or name in modules:
            continue
        if node in analysis.walls or node not in keeps.outside:
            continue
        entry, folded = _entry(node, analysis, keeps)
        if folded is not None and bool(folded.shift.any()):
            numbers[name] = folded
            where = f"the running mean of {folded.norm}" if folded.norm else f"the bias of {name}"
            report.notes.append(f"constants folded: into {where}")
            if analysis.module(node).bias is None and not folded.norm:
                entry["bias"] = True
        if entry:
            modules[name] = entry
    rows = (n for n in analysis.facts if analysis.facts[n].kind in WEIGHTS)
    report.layers = [_report_row(node, analysis, keeps) for node in rows]
    report.walls = list(_walls(analysis, keeps))
    report.notes += [note for note in (analysis.graph.meta.get("left_out"),) if note]
    return modules, numbers, report


def _dead_branch(
    end: fx.Node, stride: int, analysis: Analysis, keeps: Keeps
) -> dict[str, dict[str, Any]]:
    """Entries for a branch that adds nothing: its end emits zeros, what can go goes."""
    (user,) = end.users
    zeros = {"zeros": int(keeps.mask(user).sum()), "stride": stride}
    if end in keeps.blocks:
        return {keeps.blocks[end]: zeros}
    chain = [end]
    while chain[-1].all_input_nodes[0] in keeps.idle:
        chain.append(chain[-1].all_input_nodes[0])
    removed = [n for n in chain[1:] if n.op == "call_module"]
    removed = [n for n in removed if str(n.target) not in analysis.shared]
    entries: dict[str, dict[str, Any]] = {str(n.target): {"gone": True} for n in removed}
    if any(n not in removed and in_place(n, analysis.graph) for n in chain[1:]):
        entries[str(removed[-1].target)] = {"zeros": 1, "stride": 1}  # must not overwrite the trunk
    entries[str(end.target)] = zeros
    return entries


def _entry(
    node: fx.Node, analysis: Analysis, keeps: Keeps
) -> tuple[dict[str, Any], Numbers | None]:
    """What the surgery does to one submodule; empty if nothing. Constants that it folds."""
    facts, module = analysis.facts[node], analysis.module(node)
    entry: dict[str, Any] = {}
    folded = None
    out = keeps.outside[node].tolist()
    if facts.kind == "map":
        source = keeps.inside[node].tolist()
        return ({} if source == module.source.tolist() else {"source": source}), None
    if facts.kind not in (*WEIGHTS, "norm", "scale"):
        if node not in keeps.scatters:
            return {}, None
    elif facts.inputs is not None or facts.kind in WEIGHTS:
        if out != list(range(len(facts.state))):
            entry["out"] = out
        if facts.kind in WEIGHTS and facts.inputs is not None:
            folded = _inputs(node, entry, analysis, keeps)
    if node in keeps.scatters:
        (user,) = node.users
        (at,) = (at for source, at in analysis.facts[user].sources if source is node)
        target = at[keeps.mask(user)].tolist()
        if target != out:
            places = {channel: place for place, channel in enumerate(out)}
            entry["scatter"] = [places.get(channel, -1) for channel in target]
    return entry, folded


def _inputs(
    node: fx.Node, entry: dict[str, Any], analysis: Analysis, keeps: Keeps
) -> Numbers | None:
    """Fill in which inputs a layer keeps, and how it gets at them; returns constants to fold."""
    facts, module = analysis.facts[node], analysis.module(node)
    assert facts.inputs is not None
    x = analysis.facts[node.all_input_nodes[0]]
    given = keeps.inside[node]
    groups = getattr(module, "groups", 1)
    reads = (wanted(node, analysis) & x.kept[facts.inputs])[given]
    if keeps.residual == "tie" or str(node.target) in analysis.shared or groups > 1:
        used = given
    elif len(facts.inputs) != len(facts.inputs.unique()) or _axis(node, analysis) != 1:
        used = given  # several columns for a channel: a gather would cost more than it saves
    else:
        used = given[_at_least_one(reads, keeps.round_to)]
    positions = len(facts.inputs)
    if used.tolist() != list(range(positions)):
        entry["in"] = used.tolist()
        columns = positions // len(facts.inputs.unique())
        blocks = used.reshape(-1, columns) if len(used) % columns == 0 else used[:, None]
        first = blocks[:, 0] // columns
        regular = first[:, None] * columns + torch.arange(columns)
        if columns > 1 and torch.equal(regular, blocks):
            entry |= {"in": first.tolist(), "columns": columns}
    if groups > 1 and "in" in entry:
        entry["groups"] = len((used // (positions // groups)).unique())
        entry.setdefault("out", list(range(len(facts.state))))
    if len(used) != len(given):
        places = {position: place for place, position in enumerate(given.tolist())}
        entry["gather"] = [places[position] for position in used.tolist()]
    if groups > 1:
        return None
    constant = folds(node, analysis)
    silent = constant[used] & ~x.needed[facts.inputs[used]]
    constant[used] = silent
    shift = constant_part(module, facts.kind, constant, x.value[facts.inputs])
    norm = ""
    if len(node.users) == 1 and (reader := next(iter(node.users))) in analysis.facts:
        own = str(reader.target) not in analysis.shared
        norm = str(reader.target) if own and analysis.facts[reader].kind == "norm" else ""
    return Numbers(shift, silent.nonzero()[:, 0].tolist(), norm)


def _axis(node: fx.Node, analysis: Analysis) -> int:
    return analysis.values[node.all_input_nodes[0]].axis


def _at_least_one(wanted: Tensor, round_to: int) -> Tensor:
    """The mask with more entries let in: one at least, and a multiple of ``round_to``."""
    count = max(1, int(wanted.sum()))
    count = min(len(wanted), -(-count // round_to) * round_to)
    wanted = wanted.clone()
    wanted[(~wanted).nonzero()[: count - int(wanted.sum()), 0]] = True
    return wanted


def _report_row(node: fx.Node, analysis: Analysis, keeps: Keeps) -> dict[str, Any]:
    """Channel counts of a layer, judged at the end of its norm and activation."""
    end = node
    while len(end.users) == 1 and (after := next(iter(end.users))) in analysis.facts:
        if analysis.facts[after].kind not in ("norm", "same", "scale"):
            break
        end = after
    facts = analysis.facts[end]
    dead, why = ~facts.kept, keeps.why[end]
    stays = {GONE: "", NEEDED: "n", TIED: "t", WALL: "w", HELD: "h"}
    goes = {ZERO: "z", CONSTANT: "c"}
    pairs = zip(why.tolist(), facts.state.tolist(), strict=True)
    left = 0 if node in keeps.idle else len(keeps.outside.get(node, ()))
    return {
        "layer": str(node.target),
        "before": len(facts.state),
        "zero": int((facts.state == ZERO).sum()),
        "unneeded": int(((facts.state != ZERO) & ~facts.needed).sum()),
        "tied": int((dead & (why == TIED)).sum()),
        "walled": int((dead & (why == WALL)).sum()),
        "held": int((dead & (why == HELD)).sum()),
        "after": left,
        "live": int((facts.state == LIVE).sum()),
        "fates": "".join(stays[reason] or goes.get(state, "u") for reason, state in pairs),
    }


def _walls(analysis: Analysis, keeps: Keeps) -> Iterator[str]:
    """Names of the walls, each with the number of dead channels that it holds."""
    for node, name in analysis.walls.items():
        tensors = [n for n in (node, *node.all_input_nodes) if n in analysis.facts]
        count = sum(int((~analysis.facts[n].kept & (keeps.why[n] == WALL)).sum()) for n in tensors)
        yield f"{name}: keeps {count} dead channels" if count else name


# --- the surgery -----------------------------------------------------------------------------


def operate(net: nn.Module, modules: dict[str, dict]) -> None:
    """Replace submodules by smaller ones as the entries of ``plan`` say, in place.

    Raises: ValueError if an entry does not fit the network: it belongs to another architecture.
    """
    places = Places(net)
    for name, entry in modules.items():
        try:
            module = net.get_submodule(name)
            places.replace(module, _smaller(module, entry))
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(
                f"got a spec whose layer {name!r} does not fit this {type(net).__name__} "
                f"({error}); need the architecture and widths it was made of"
            ) from error


def _smaller(module: Any, entry: dict[str, Any]) -> nn.Module:
    """The replacement of one submodule."""
    if "gone" in entry:
        return nn.Identity()
    tensors = [*module.parameters(), *module.buffers()]
    device = tensors[0].device if tensors else None
    if "zeros" in entry:
        return ChannelMap([-1] * entry["zeros"], entry["stride"]).to(device)
    if "source" in entry:
        return ChannelMap(entry["source"], module.stride).to(device)
    small = copy.deepcopy(module)
    if "in" in entry:
        _cut_inputs(small, entry)
    if "out" in entry:
        _cut_outputs(small, entry["out"], entry.get("groups"))
    if "bias" in entry:
        count = small.out_features if isinstance(small, nn.Linear) else small.out_channels
        small.bias = nn.Parameter(small.weight.new_zeros(count))
    parts = [small]
    if "gather" in entry:
        parts.insert(0, ChannelMap(entry["gather"]).to(device))
    if "scatter" in entry:
        parts.append(ChannelMap(entry["scatter"]).to(device))
    return small if len(parts) == 1 else nn.Sequential(*parts)


def _cut_inputs(layer: Any, entry: dict[str, Any]) -> None:
    """Keep some input positions of a layer with weights, in place."""
    keep = torch.tensor(entry["in"])
    if columns := entry.get("columns"):
        keep = (keep[:, None] * columns + torch.arange(columns)).flatten()
    axis = 0 if isinstance(layer, TRANSPOSED) else 1
    groups = getattr(layer, "groups", 1)
    if groups > 1:  # each output row reads the inputs of its own group
        weight = layer.weight.detach()
        width, height = weight.shape[1], len(weight) // groups
        rows = keep.reshape(entry["groups"], -1)
        out = torch.arange(len(weight))
        group_of = {int(row[0]) // width: row % width for row in rows}
        new = weight.new_zeros(len(weight), rows.shape[1], *weight.shape[2:])
        for o in out.tolist():
            if o // height in group_of:
                new[o] = weight[o].index_select(0, group_of[o // height].to(weight.device))
    else:
        new = layer.weight.detach().index_select(axis, keep.to(layer.weight.device)).clone()
    layer.weight = nn.Parameter(new, layer.weight.requires_grad)
    size = "in_features" if isinstance(layer, nn.Linear) else "in_channels"
    setattr(layer, size, len(keep))


SIZES = {"out_channels", "out_features", "num_features", "num_parameters"}
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def _cut_outputs(layer: Any, keep: list[int], groups: int | None) -> None:
    """Keep some output channels of a layer, or channels of a norm, in place."""
    index = torch.tensor(keep)
    for name, tensor in [*layer.named_parameters(), *layer.named_buffers()]:
        axis = 1 if isinstance(layer, TRANSPOSED) and name == "weight" else 0
        if tensor.dim() <= axis:  # the number of batches seen
            continue
        small = tensor.detach().index_select(axis, index.to(tensor.device)).clone()
        is_weight = isinstance(tensor, nn.Parameter)
        setattr(layer, name, nn.Parameter(small, tensor.requires_grad) if is_weight else small)
    for size in SIZES & set(vars(layer)):
        setattr(layer, size, len(index))
    if groups:
        layer.groups = groups


@torch.no_grad()
def _write_numbers(net: nn.Module, modules: dict[str, dict], numbers: dict[str, Numbers]) -> None:
    """Add folded constants to biases or running means; silence inputs that they stand for."""
    for name, new in numbers.items():
        layer = _core(net.get_submodule(name))
        layer.weight[:, new.silent] = 0
        shift = new.shift
        if "out" in modules.get(name, {}):
            shift = shift[modules[name]["out"]]
        norm = _core(net.get_submodule(new.norm)) if new.norm else None
        if norm is None:
            layer.bias += shift.to(layer.bias)
        elif norm.running_mean is not None:
            norm.running_mean -= shift.to(norm.running_mean)


def _core(module: Any) -> Any:
    """The layer itself where the surgery has put a ChannelMap in front of it or behind."""
    if not isinstance(module, nn.Sequential):
        return module
    return next(part for part in module if not isinstance(part, ChannelMap))


# --- the certificate -------------------------------------------------------------------------


def largest_difference(
    net: nn.Module, small: nn.Module, image_shape: Sequence[int], batch: int = 4, seed: int = 0
) -> tuple[float, float]:
    """Largest |hard-gated - pruned| output on random images in float64, eval mode.

    Returns the absolute difference and the same relative to the largest |output|; all tensors of
    a tuple or dict are compared.
    """
    full, cut = (copy.deepcopy(n).cpu().double() for n in (net, small))
    set_gates(full, mode="hard")
    return _difference(full, cut, image_shape, batch, seed)


@torch.no_grad()
def _difference(
    full: nn.Module, cut: nn.Module, image_shape: Sequence[int], batch: int = 4, seed: int = 0
) -> tuple[float, float]:
    """The same for two nets on one device, in their own precision."""
    like = next(full.parameters(), torch.zeros(()))
    draw = torch.Generator().manual_seed(seed)
    images = torch.randn(batch, *image_shape, generator=draw, dtype=torch.float64).to(like)
    expected, found = (_outputs(net, images) for net in (full, cut))
    pairs = list(zip(expected, found, strict=True))
    absolute = max(float((a - b).abs().max()) for a, b in pairs)
    return absolute, absolute / max(*(float(a.abs().max()) for a, _ in pairs), 1e-300)


def _outputs(net: nn.Module, images: Tensor) -> list[Tensor]:
    """All tensors that a net returns, in float64, run in eval mode."""
    modes = [(module, module.training) for module in net.modules()]
    try:
        output = net.eval()(images.clone())
    finally:
        for module, training in modes:
            module.training = training
    return [t.double() for t in tree_leaves(output) if isinstance(t, Tensor)]
