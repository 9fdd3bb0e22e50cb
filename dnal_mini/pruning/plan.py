"""What happens to each submodule: from the channels that stay to a spec in plain JSON.

Read ``plan`` first; ``surgery.operate`` carries it out. The report says what was cut and why not
more.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx

from dnal_mini.graph.layer import Layer
from dnal_mini.graph.ops import in_place
from dnal_mini.layers.mapped import ROLES
from dnal_mini.pruning.analysis import folds, wanted
from dnal_mini.pruning.facts import (
    CONSTANT,
    GONE,
    HELD,
    LIVE,
    NEEDED,
    TIED,
    WALL,
    ZERO,
    Analysis,
    Keeps,
)
from dnal_mini.pruning.surgery import Numbers
from dnal_mini.pruning.weights import WEIGHTS, constant_part

FATES = {
    "n": "needed", "t": "tied", "w": "walled", "h": "held",
    "z": "zero, gone", "c": "constant, gone", "u": "unneeded, gone",
}  # fmt: skip


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
        wide = 2 + max([len(row["layer"]) for row in self.layers] + [len("layer")])
        lines = ["layer".ljust(wide) + "".join(f"{name:>9}" for name in columns)]
        for row in self.layers:
            counts = "".join(f"{row.get(name, 0):>9}" for name in columns)
            lines.append(row["layer"].ljust(wide) + counts)
        return "\n".join([*lines, *(f"wall: {wall}" for wall in self.walls), *self.notes])


Tables = dict[str, dict[str, Any]]


def plan(
    analysis: Analysis, keeps: Keeps, put_in: Mapping[str, dict[str, Any]] | None = None
) -> tuple[dict[str, Tables], dict[str, Numbers], Report]:
    """What happens to every tensor and submodule that changes, JSON-able; numbers; the report.

    "keep": by parameter or buffer, axis by axis the indices that stay, in their new order.
    "modules": what no index says, by submodule: {"inputs"} (positions of a grouped convolution's
    full input), {"bias": true} (gets one), {"source", "stride"} (a ChannelMap in its place),
    {"gone"} (nothing in its place), {"num_features"}, {"affine": true}. All names are those of
    the net without gates, where LAYER.gather is a ChannelMap in front of a layer and
    LAYER.scatter one behind it. ``put_in`` is what ``drop_and_tell`` tells. "in_place", where it
    is added: the layer that is gone stays where it is, hollow.
    """
    report = Report(notes=list(keeps.notes))
    keep: Tables = {}
    modules: Tables = {}
    numbers: dict[str, Numbers] = {}
    for end, stride in keeps.emptied.items():
        modules |= _dead_branch(end, stride, analysis, keeps)
        report.notes.append(
            f"branch gone: {keeps.blocks.get(end) or analysis.name(end)} adds nothing"
        )
    for node, layer in analysis.graph.layers.items():
        name = layer.module or layer.owner
        if node in keeps.idle or name in modules:
            continue
        if node in analysis.walls or node not in keeps.outside:
            continue
        tensors, entry, folded = _entry(node, analysis, keeps)
        for role in ROLES:
            if role in entry:
                modules[f"{name}.{role}"] = {"source": entry.pop(role), "stride": 1}
        if folded is not None and bool(folded.shift.any()):
            folded.shift = folded.shift[keeps.outside[node]]
            numbers[name] = folded
            where = f"the running mean of {folded.norm}" if folded.norm else f"the bias of {name}"
            report.notes.append(f"constants folded: into {where}")
            if "bias" not in layer.roles and not folded.norm:
                entry["bias"] = True
        keep |= tensors
        if entry:
            modules[name] = entry
    _add_put_in(put_in or {}, modules)
    rows = (n for n in analysis.facts if analysis.facts[n].kind in WEIGHTS)
    report.layers = [_report_row(node, analysis, keeps) for node in rows]
    report.walls = list(dict.fromkeys(_walls(analysis, keeps)))
    report.notes += analysis.graph.notes
    return {"keep": keep, "modules": modules}, numbers, report


def _add_put_in(put_in: Mapping[str, dict[str, Any]], modules: Tables) -> None:
    """Say what dropping gates has put in, as far as it is still there."""
    whole = tuple(f"{name}." for name, entry in modules.items() if "source" in entry)
    for name, entry in put_in.items():
        if "source" in entry and "gone" in modules.get(name, {}):
            del modules[name]
        elif not name.startswith(whole):
            modules[name] = entry | modules.get(name, {})


def _dead_branch(end: fx.Node, stride: int, analysis: Analysis, keeps: Keeps) -> Tables:
    """Entries for a branch that adds nothing: its end emits zeros, what can go goes."""
    (user,) = end.users
    zeros = {"source": [-1] * int(keeps.mask(user).sum()), "stride": stride}
    if end in keeps.blocks:
        return {keeps.blocks[end]: zeros}
    chain = [end]
    while chain[-1].all_input_nodes[0] in keeps.idle:
        chain.append(chain[-1].all_input_nodes[0])
    names = {n: analysis.graph.sole.get(n, "") for n in chain}
    removed = [n for n in chain[1:] if names[n]]
    entries: Tables = {names[n]: {"gone": True} for n in removed}
    if any(n not in removed and in_place(n) for n in chain[1:]):  # would overwrite
        entries[names[removed[-1]]] = {"source": [-1], "stride": 1}  # what enters the branch
    entries[names[end]] = zeros
    return entries


def _entry(
    node: fx.Node, analysis: Analysis, keeps: Keeps
) -> tuple[Tables, dict[str, Any], Numbers | None]:
    """What stays of one layer's tensors, its module's entry, and the constants that it folds."""
    facts, layer = analysis.facts[node], analysis.layer(node)
    entry: dict[str, Any] = {}
    out = inputs = folded = None
    lying = keeps.outside[node].tolist()
    if layer.kind == "map":
        source = keeps.inside[node].tolist()
        same = source == list(layer.given["source"])
        return {}, {} if same else {"source": source, "stride": layer.given["stride"]}, None
    if facts.kind in WEIGHTS or facts.inputs is not None:
        out = lying if lying != list(range(len(facts.state))) else None
        if facts.kind in WEIGHTS and facts.inputs is not None:
            inputs, folded = _inputs(node, entry, analysis, keeps)
    keep, of_groups = tables_of(layer, out, inputs)
    if node in keeps.scatters:
        (user,) = node.users
        (at,) = (at for source, at in analysis.facts[user].sources if source is node)
        target = at[keeps.mask(user)].tolist()
        if target != lying:
            places = {channel: place for place, channel in enumerate(lying)}
            entry["scatter"] = [places.get(channel, -1) for channel in target]
    return keep, entry | of_groups, folded


def tables_of(
    layer: Layer, out: list[int] | None, inputs: list[int] | None
) -> tuple[Tables, dict[str, Any]]:
    """What stays of a layer as a spec says it: its part of "keep", its entry in "modules".

    ``out``, ``inputs``: its channels and the positions of its full input that stay, in their new
    order, None for all.
    """
    keep: Tables = {}
    entry: dict[str, Any] = {}
    if inputs is not None and layer.groups > 1:
        entry["inputs"], inputs = inputs, None
    if out is not None and not layer.roles:
        entry["num_features"] = len(out)
    for role, tensor in layer.roles.items():
        turned = role == "weight" and layer.kind == "transposed"
        axes = {
            str(layer.axis + int(turned)): out,
            str(layer.axis + int(not turned)): inputs if role == "weight" else None,
        }
        if stays := {axis: index for axis, index in axes.items() if index is not None}:
            keep[tensor] = stays
    return keep, entry


def _inputs(
    node: fx.Node, entry: dict[str, Any], analysis: Analysis, keeps: Keeps
) -> tuple[list[int] | None, Numbers | None]:
    """Input positions that a layer keeps, None for all; constants. A gather goes into ``entry``."""
    facts, groups = analysis.facts[node], analysis.layer(node).groups
    assert facts.inputs is not None
    x = analysis.facts[node.all_input_nodes[0]]
    given = keeps.inside[node]
    reads = (wanted(node, analysis) & x.kept[facts.inputs])[given]
    before = analysis.graph.layers.get(node.all_input_nodes[0])
    gathers = before and before.module == f"{analysis.layer(node).module}.gather"
    if keeps.residual == "tie" or not analysis.can_wrap(node) or groups > 1 or gathers:
        used = given
    elif len(facts.inputs) != len(facts.inputs.unique()) or _axis(node, analysis) != 1:
        used = given  # several columns for a channel: a gather would cost more than it saves
    else:
        used = given[_at_least_one(reads, keeps.round_to)]
    inputs = None if used.tolist() == list(range(len(facts.inputs))) else used.tolist()
    if len(used) != len(given):
        places = {position: place for place, position in enumerate(given.tolist())}
        entry["gather"] = [places[position] for position in used.tolist()]
    if groups > 1:
        return inputs, None
    constant = folds(node, analysis)
    silent = constant[used] & ~x.needed[facts.inputs[used]]
    constant[used] = silent
    shift = constant_part(node, analysis, constant, x.value[facts.inputs])
    norm = ""
    reader = next(iter(node.users), node)
    kinds = [analysis.facts[n].kind for n in node.users if n in analysis.facts]
    if kinds == ["norm"] and len(node.users) == 1 and analysis.name(reader) not in analysis.shared:
        norm = analysis.layer(reader).module or analysis.layer(reader).owner
    return inputs, Numbers(shift, silent.nonzero()[:, 0].tolist(), norm)


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
        "layer": analysis.name(node),
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
