"""What happens to each submodule: from the channels that stay to a spec in plain JSON.

Read ``plan`` first; ``surgery.operate`` carries it out. The report says what was cut and why not
more.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from dnal_mini.graph.ops import in_place
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


def plan(analysis: Analysis, keeps: Keeps) -> tuple[dict[str, dict], dict[str, Numbers], Report]:
    """What happens to every submodule that changes, as JSON-able entries; numbers; the report.

    Entries by qualified name: {"out", "in"} (positions of the full layer, in their new order),
    {"columns"} (each of "in" stands for so many columns), {"groups"}, {"bias": true} (gets one),
    {"gather", "scatter"} (a ChannelMap in front, behind), {"source"} for a ChannelMap, {"zeros",
    "stride"} for the end of a branch that is gone, {"gone"} for the rest of such a branch, {"of"}
    where the parameters are of a layer that is called as a function.
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
            modules[name] = entry | ({"of": analysis.bare[name]} if name in analysis.bare else {})
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
    fixed = {*analysis.shared, *analysis.bare}
    if keeps.residual == "tie" or str(node.target) in fixed or groups > 1:
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
