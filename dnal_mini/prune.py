"""From hard gates to a smaller network: drop the gates, plan the cut, cut, certify, save.

Read ``prune`` first. The surgery replaces submodules of a copy and never touches forward code;
what it does to each submodule is written down in a spec (plain JSON), and ``load`` repeats the
same surgery on a freshly built network. Which channels may go is decided in ``channels.py``.
"""

import copy
import hashlib
import inspect
import itertools
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from dnal_mini.channels import LIVE, ZERO, Analysis, ChannelMap, analyse, shape_of
from dnal_mini.cost import cost
from dnal_mini.gate import (
    GatedNorm,
    ScaledSigmoid,
    gates,
    is_activation,
    replace_module,
    set_gates,
    trace,
)

Residual = Literal["scatter", "tie"]
FORMAT = 1
TOLERANCE = 1e-8  # largest relative difference (float64) between gated and pruned output


@dataclass
class Report:
    """What was cut and why not more; printable.

    ``layers``: one row per convolution or linear layer: channels before / provably zero /
    not needed / kept because of a wall / after. ``walls``: operations that the analysis does not
    know. ``notes``: branches that went as a whole, layers that had to keep a dead channel.
    """

    layers: list[dict[str, Any]] = field(default_factory=list)
    walls: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        head = f"{'layer':32}{'before':>8}{'zero':>8}{'unneeded':>10}{'walled':>8}{'after':>8}"
        rows = [
            f"{r['layer']:32}{r['before']:>8}{r['zero']:>8}{r['unneeded']:>10}"
            f"{r['walled']:>8}{r['after']:>8}"
            for r in self.layers
        ]
        return "\n".join([head, *rows, *(f"wall: {w}" for w in self.walls), *self.notes])


@dataclass
class Pruned:
    """A smaller network with the papers that prove it: see ``prune``."""

    module: nn.Module
    spec: dict[str, Any]
    report: Report
    certificate: float


def prune(
    net: nn.Module, image_shape: Sequence[int] = (3, 32, 32), residual: Residual = "scatter"
) -> Pruned:
    """Cut every channel that the hard gates leave dead; the argument is left alone.

    ``module`` is a copy of ``net``'s own class with smaller submodules and no gates, ``spec`` the
    JSON-able description of the cut, ``report`` what was cut and why not more, ``certificate`` the
    largest absolute difference between hard-gated and pruned output in float64, eval mode.
    ``residual="scatter"``: a residual branch keeps its own channels and is added into the trunk at
    their places; "tie": all members of a channel set keep the union, plain narrower layers.
    A layer whose channels are all dead keeps one (zeroed), or its whole residual branch goes.

    Source: Guo et al. 2022, sec. 3.4 [guo2022dnal].
    Differs: removal is physical and exact; the authors' scripts mask, and ignore skips.
    Raises: ValueError if the net cannot be traced, no gate was ever trained, ``residual`` is
    unknown, or the two outputs differ by more than 1e-8 of the largest output.
    """
    if residual not in ("scatter", "tie"):
        raise ValueError(f"got residual {residual!r}; need 'scatter' or 'tie'")
    if gates(net) and all(bool((gate.s == 0).all()) for gate in gates(net).values()):
        raise ValueError("got gates that all have s = 0; need trained gates: run the arch stage")
    small = drop_gates(net)
    analysis = analyse(small, image_shape, residual)
    modules, report = plan(analysis)
    operate(small, modules)
    certificate, relative = largest_difference(net, small, image_shape)
    if not relative <= TOLERANCE:
        raise ValueError(f"got outputs that differ by {relative:.1e} of the largest; need 1e-8")
    spec = {
        "format": FORMAT,
        "config": getattr(net, "config", None),
        "image_shape": list(image_shape),
        "residual": residual,
        "modules": modules,
        "certificate": certificate,
        "cost": {"dense": _cost(net, image_shape), "pruned": _cost(small, image_shape)},
        "report": vars(report),
    }
    return Pruned(small, spec, report, certificate)


def _cost(net: nn.Module, image_shape: Sequence[int]) -> dict[str, int]:
    return dict(vars(cost(net, image_shape)))


# --- gates out -------------------------------------------------------------------------------


def drop_gates(net: nn.Module) -> nn.Module:
    """A copy without SS layers that computes what the hard-gated network computes, exactly.

    A closed gate becomes gamma = beta = 0 in its BatchNorm (or a zero filter in front of it).

    Raises: ValueError for a gate that stands behind neither a BatchNorm nor a convolution.
    """
    net = copy.deepcopy(net)
    graph = trace(net)
    for node in graph.graph.nodes:
        if node.op != "call_module":
            continue
        name, module = str(node.target), graph.get_submodule(str(node.target))
        if isinstance(module, GatedNorm):
            gain = module.gate.is_open
            if module.gate_first:
                _scale(_producer(node, graph), gain, name)
            else:
                _scale(module.norm, gain, name)
            _replace_everywhere(net, module, module.norm)
        elif isinstance(module, ScaledSigmoid):
            _scale(_producer(node, graph), module.is_open, name)
            _replace_everywhere(net, module, nn.Identity())
    return net


def _replace_everywhere(net: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Replace a module under every name it has."""
    for name, module in list(net.named_modules(remove_duplicate=False)):
        if module is old:
            replace_module(net, name, new)


def _producer(gate: fx.Node, graph: fx.GraphModule) -> nn.Module | None:
    """The BatchNorm or convolution whose output reaches a gate, past activations that keep 0."""
    node = gate.all_input_nodes[0]
    while is_activation(node, graph) and len(node.users) == 1:
        if node.op == "call_module" and graph.get_submodule(str(node.target))(torch.zeros(1)) != 0:
            return None
        if getattr(node.target, "__name__", node.target) in ("sigmoid", "softplus", "hardsigmoid"):
            return None
        node = node.all_input_nodes[0]
    one_use = node.op == "call_module" and len(node.users) == 1
    return graph.get_submodule(str(node.target)) if one_use else None


@torch.no_grad()
def _scale(layer: nn.Module | None, gain: Tensor, name: str) -> None:
    """Multiply a layer's output channels by 0 or 1, in place."""
    if isinstance(layer, nn.BatchNorm2d) and not layer.affine:
        layer.affine = True
        layer.weight = nn.Parameter(torch.ones(layer.num_features, device=gain.device))
        layer.bias = nn.Parameter(torch.zeros(layer.num_features, device=gain.device))
    if not isinstance(layer, nn.BatchNorm2d | nn.Conv2d):
        raise ValueError(f"got gate {name} behind neither a BatchNorm2d nor a Conv2d; move it")
    layer.weight[~gain] = 0
    if layer.bias is not None:
        layer.bias[~gain] = 0


# --- the plan: what happens to each submodule ------------------------------------------------


def plan(analysis: Analysis) -> tuple[dict[str, dict], Report]:
    """Channel indices to keep for every submodule that changes, as JSON-able entries, and why.

    Entries by qualified name: {"out", "in", "gather", "scatter", "columns"} (lists of channel
    indices of the full network; missing means all), {"source"} for a ChannelMap, {"zeros",
    "stride"} for the end of a branch that is gone, {"gone"} for the rest of such a branch.
    """
    report = Report(walls=list(analysis.walls))
    keep = analysis.keeps()
    nodes = [n for n in analysis.facts if n.op == "call_module"]
    for node in reversed(nodes):  # consumers first: they decide whether a dead layer keeps one
        _revive(node, analysis, keep, report)
    modules = {}
    for node in nodes:
        if entry := _entry(node, analysis, keep):
            modules[str(node.target)] = entry
            if "zeros" in entry:
                report.notes.append(f"branch gone: {node.target} adds nothing")
    report.layers = [
        _report_row(node, analysis, keep)
        for node in nodes
        if analysis.kinds[node] in ("conv", "linear", "depthwise")
    ]
    return modules, report


def _revive(node: fx.Node, analysis: Analysis, keep: dict[int, Tensor], report: Report) -> None:
    """A layer that stays needs an input: its dead input layout keeps one channel."""
    facts = analysis.facts[node]
    if node in analysis.scatters and not keep[facts.layout].any():
        if _branch_stride(node, analysis, keep) is None:
            keep[facts.layout][0] = True  # its image cannot be had by striding: keep a zero channel
        return
    if not keep[facts.layout].any() or analysis.kinds[node] not in ("conv", "linear", "map"):
        return
    before = analysis.facts[node.all_input_nodes[0]]
    if not keep[before.layout].any():
        keep[before.layout][0] = True
        total = len(keep[before.layout])
        report.notes.append(f"all dead: the input of {node.target} keeps 1 of {total} channels")


def _branch_stride(end: fx.Node, analysis: Analysis, keep: dict[int, Tensor]) -> int | None:
    """Stride that gives a dead branch's image from the image that enters it, if one does."""
    start = end
    while not keep[analysis.facts[start].layout].any() and start.op != "placeholder":
        start = start.all_input_nodes[0]
    before, after = shape_of(start)[2:], shape_of(end)[2:]
    stride = max(1, round(before[0] / after[0]))
    fits = all((b + stride - 1) // stride == a for b, a in zip(before, after, strict=True))
    return stride if fits else None


def _entry(node: fx.Node, analysis: Analysis, keep: dict[int, Tensor]) -> dict[str, Any]:
    """What the surgery does to one submodule; empty if nothing."""
    kind, facts = analysis.kinds[node], analysis.facts[node]
    out = keep[facts.layout]
    own_place = node in analysis.scatters
    if not out.any():
        if own_place:
            width = int(keep[analysis.facts[next(iter(node.users))].layout].sum())
            stride = _branch_stride(node, analysis, keep)
            return {"zeros": width, "stride": stride} if width else {"gone": True}
        return {"gone": True}
    entry: dict[str, Any] = {}
    if kind in ("conv", "linear", "depthwise", "norm") and not out.all():
        entry["out"] = _indices(out)
    before = analysis.facts[node.all_input_nodes[0]]
    given = keep[before.layout]
    if kind in ("conv", "linear"):
        may_gather = kind == "conv" and analysis.residual == "scatter"
        used = given & before.kept if may_gather else given
        if not used.any():
            used = torch.zeros_like(given)
            used[int(given.nonzero()[0])] = True
        if not used.all():
            entry["in"] = _indices(used)
        if not torch.equal(used, given):
            entry["gather"] = _places(given)[used].tolist()
        if before.columns > 1:
            entry["columns"] = before.columns
    elif kind == "map":
        source = analysis.module(node).source.cpu()[out]
        places = _places(given)[source.clamp(min=0)]
        entry["source"] = torch.where(source < 0, -1, places).tolist()
    if own_place:
        into = keep[analysis.facts[next(iter(node.users))].layout]
        if not torch.equal(into, out):
            entry["scatter"] = _places(out)[into].tolist()
    if kind in ("conv", "linear") and not set(entry) - {"columns"}:
        return {}
    return entry


def _indices(mask: Tensor) -> list[int]:
    return mask.nonzero()[:, 0].tolist()


def _places(kept: Tensor) -> Tensor:
    """For every channel its position among the kept ones; -1 if it is not one of them."""
    return torch.where(kept, kept.cumsum(0) - 1, -1)


def _report_row(node: fx.Node, analysis: Analysis, keep: dict[int, Tensor]) -> dict[str, Any]:
    """Channel counts of a layer, judged at the end of its norm and activation."""
    end = node
    while len(end.users) == 1 and analysis.kinds[nxt := next(iter(end.users))] in (
        "norm",
        "pointwise",
    ):
        end = nxt
    facts = analysis.facts[end]
    dead = ~facts.kept
    walled = dead & keep[facts.layout] if facts.layout in analysis.pinned else torch.zeros(0)
    return {
        "layer": str(node.target),
        "before": len(facts.state),
        "zero": int((facts.state == ZERO).sum()),
        "unneeded": int(((facts.state != ZERO) & ~facts.needed).sum()),
        "walled": int(walled.sum()),
        "after": int(keep[analysis.facts[node].layout].sum()),
        "live": int((facts.state == LIVE).sum()),
    }


# --- the surgery -----------------------------------------------------------------------------


def operate(net: nn.Module, modules: dict[str, dict]) -> None:
    """Replace submodules by smaller ones as the entries of ``plan`` say, in place.

    Raises: ValueError if an entry does not fit the network: it belongs to another architecture.
    """
    for name, entry in modules.items():
        try:
            module = net.get_submodule(name)
            replace_module(net, name, _smaller(module, entry))
        except (AttributeError, IndexError, RuntimeError, TypeError) as error:
            raise ValueError(
                f"got a spec whose layer {name!r} does not fit this {type(net).__name__} "
                f"({error}); need the architecture and widths it was made of"
            ) from error


def _smaller(module: Any, entry: dict[str, Any]) -> nn.Module:
    """The replacement of one submodule."""
    if "gone" in entry:
        return nn.Identity()
    device = next(itertools.chain(module.parameters(), module.buffers())).device
    if "zeros" in entry:
        return ChannelMap([-1] * entry["zeros"], entry["stride"]).to(device)
    if "source" in entry:
        return ChannelMap(entry["source"], module.stride).to(device)
    small = copy.deepcopy(module)
    if "in" in entry:
        _slice(small, 1, entry["in"], entry.get("columns", 1))
    if "out" in entry:
        _slice(small, 0, entry["out"])
    parts = [small]
    if "gather" in entry:
        parts.insert(0, ChannelMap(entry["gather"]).to(device))
    if "scatter" in entry:
        parts.append(ChannelMap(entry["scatter"]).to(device))
    return small if len(parts) == 1 else nn.Sequential(*parts)


SIZES = ({"out_channels", "out_features", "num_features"}, {"in_channels", "in_features"})


def _slice(layer: Any, axis: int, keep: list[int], columns: int = 1) -> None:
    """Keep the given output (axis 0) or input (axis 1) channels of a layer, in place."""
    index = torch.tensor(keep)
    if columns > 1:
        index = (index[:, None] * columns + torch.arange(columns)).flatten()
    depthwise = isinstance(layer, nn.Conv2d) and layer.groups > 1
    for name, tensor in [*layer.named_parameters(), *layer.named_buffers()]:
        if tensor.dim() > axis:  # biases and statistics have one axis only
            small = tensor.detach().index_select(axis, index.to(tensor.device)).clone()
            keeps_gradient = tensor.requires_grad
            is_weight = isinstance(tensor, nn.Parameter)
            new = nn.Parameter(small, keeps_gradient) if is_weight else small
            setattr(layer, name, new)
    for size in SIZES[axis] & set(vars(layer)):
        setattr(layer, size, len(index))
    if depthwise:
        layer.groups = layer.in_channels = len(index)


# --- the certificate -------------------------------------------------------------------------


@torch.no_grad()
def largest_difference(
    net: nn.Module, small: nn.Module, image_shape: Sequence[int], batch: int = 4, seed: int = 0
) -> tuple[float, float]:
    """Largest |hard-gated - pruned| output on random images in float64, eval mode.

    Returns the absolute difference and the same relative to the largest |output|.
    """
    draw = torch.Generator().manual_seed(seed)
    images = torch.randn(batch, *image_shape, generator=draw, dtype=torch.float64)
    full, cut = copy.deepcopy(net).cpu().double().eval(), copy.deepcopy(small).cpu().double().eval()
    set_gates(full, mode="hard")
    expected = full(images)
    difference = float((expected - cut(images)).abs().max())
    return difference, difference / max(float(expected.abs().max()), 1e-300)


# --- files -----------------------------------------------------------------------------------


def save(small: Pruned, path: str | os.PathLike) -> None:
    """Write tensors and spec as one safetensors file; no pickle. The file appears whole or not."""
    from safetensors.torch import save_file

    path = Path(path)
    tensors = {k: v.detach().cpu().contiguous() for k, v in small.module.state_dict().items()}
    text = json.dumps(small.spec, sort_keys=True)
    metadata = {"dnal_mini": text, "sha256": _digest(text, tensors)}
    part = path.with_name(path.name + ".part")
    save_file(tensors, part, metadata=metadata)
    part.replace(path)


def load(path: str | os.PathLike, build: Callable[..., nn.Module]) -> Pruned:
    """Rebuild a saved network: ``build`` makes the full one, the spec in the file cuts it.

    ``build`` is called with the keyword arguments stored in the file as far as it takes them.

    Raises: FileNotFoundError; ValueError for a file that is cut short, edited, of another format,
    or made of another architecture than ``build`` gives.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"got {path}, which is not there; need a file that save() wrote")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"got {path}, cut short or damaged ({error}); save it again") from error
    text = metadata.get("dnal_mini")
    if text is None:
        raise ValueError(f"got {path} without a dnal_mini spec; need a file that save() wrote")
    if metadata.get("sha256") != _digest(text, tensors):
        raise ValueError(f"got {path}, edited since it was saved (checksum differs); save it again")
    spec = json.loads(text)
    if spec.get("format") != FORMAT:
        raise ValueError(f"got {path} of format {spec.get('format')}; this version reads {FORMAT}")
    module = build(**_arguments(build, spec["config"] or {}))
    operate(module, spec["modules"])
    try:
        module.load_state_dict(tensors)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise ValueError(f"got {path} of another net than build() gives ({reason})") from error
    return Pruned(module, spec, Report(**spec["report"]), spec["certificate"])


def _arguments(build: Callable, config: dict[str, Any]) -> dict[str, Any]:
    """The stored keyword arguments that ``build`` takes."""
    known = inspect.signature(build).parameters
    return {name: value for name, value in config.items() if name in known}


def _digest(text: str, tensors: dict[str, Tensor]) -> str:
    """SHA-256 over the spec and every tensor's name, dtype and bytes."""
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name}:{tensor.dtype}".encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
