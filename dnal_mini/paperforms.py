"""The paper's and the authors' forms where they differ from ours, and what they change.

For comparison only: nothing in a search uses this file. ``printed_gate_gradient`` is a formula as
printed, ``masked_rule`` the weights that the authors' scripts cut, ``masked_counting`` what they
count then; ``differences`` reads from run records what a setting of theirs changes in training.
"""

import copy
import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from dnal_mini import runlog
from dnal_mini.config import MEANS, SearchConfig
from dnal_mini.cost import AuthorsCount, layer_table
from dnal_mini.gate import ScaledSigmoid, gates

BESIDE = ("shortcut", "downsample")  # convolutions of a skip: the scripts' rule passes them by


def printed_gate_gradient(s: Tensor, delta: float) -> Tensor:
    """The factor from dL/dp to dL/ds as the paper prints it: ``delta^2 s (1 - delta s)``.

    The right one is ``delta p (1 - p)``: in print, p has been replaced by ``delta s``.

    Source: Guo et al. 2022, eq. 6, read from a garbled print [guo2022dnal].
    """
    return delta**2 * s * (1 - delta * s)


def masked_rule(net: nn.Module, beside: Sequence[str] = BESIDE) -> dict[str, Tensor]:
    """Which weights the authors' scripts keep in a gated net: a boolean mask per layer name.

    A closed gate cuts the filter of the convolution before it, in the order of the modules, the
    filter before that one too if it is depthwise, and the inputs of the next convolution or of the
    linear layer. Skips are not looked at, so that the function may change where there are any.
    ``beside``: layers with such a word in their name keep all weights.

    Source: the pruning step of the authors' scripts [guo2022dnal]. ``prune`` is ours: exact.
    Raises: ValueError if a gate and the convolution behind it have different widths.
    """
    layers = [
        (name, module)
        for name, module in net.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear | ScaledSigmoid)
    ]
    masks = {
        name: torch.ones_like(module.weight, dtype=torch.bool)
        for name, module in layers
        if not isinstance(module, ScaledSigmoid)
    }
    layers = [(name, module) for name, module in layers if not any(w in name for w in beside)]
    for place, (name, gate) in enumerate(layers):
        if not isinstance(gate, ScaledSigmoid):
            continue
        closed = ~gate.is_open
        before = [(n, m) for n, m in layers[:place] if isinstance(m, nn.Conv2d)]
        masks[before[-1][0]][closed] = False
        if before[-1][1].groups > 1:
            masks[before[-2][0]][closed] = False
        after = next(n for n, m in layers[place:] if not isinstance(m, ScaledSigmoid))
        repeats = masks[after].shape[1] // len(closed)  # pixels of a channel that was flattened
        if repeats * len(closed) != masks[after].shape[1]:
            raise ValueError(f"got {len(closed)} gates {name} before {after}; need equal widths")
        masks[after][:, closed.repeat_interleave(repeats)] = False
    return masks


@torch.no_grad()
def masked_copy(net: nn.Module, beside: Sequence[str] = BESIDE) -> nn.Module:
    """A copy of a gated net whose weights are 0 where ``masked_rule`` cuts them."""
    masked = copy.deepcopy(net)
    for name, mask in masked_rule(net, beside).items():
        masked.get_submodule(name).weight.mul_(mask)  # type: ignore[operator]
    return masked


def masked_counting(
    net: nn.Module, image_shape: Sequence[int] = (3, 32, 32), beside: Sequence[str] = BESIDE
) -> AuthorsCount:
    """``authors_counting`` of a gated net over the weights that ``masked_rule`` keeps.

    With all gates open it is ``authors_counting``; in a plain chain that of the pruned net.

    Source: the summary script of the authors' repository [guo2022dnal].
    Raises: ValueError as ``masked_rule`` and ``layer_table`` do.
    """
    flops, params = 0, 0
    masks = masked_rule(net, beside)
    for row in layer_table(net, image_shape):
        if row["name"] not in masks:
            continue
        mask, layer = masks[str(row["name"])], net.get_submodule(str(row["name"]))
        weights, outputs = int(mask.sum()), int(mask.flatten(1).any(1).sum())
        biases = 0 if layer.bias is None else outputs
        norms = outputs if isinstance(layer, nn.Conv2d) else 0
        flops += weights * int(row["height"]) * int(row["width"]) + norms + biases
        params += weights + 2 * norms + biases
    return AuthorsCount(flops, params)


def open_share(net: nn.Module) -> float:
    """Share of all gates of a net that are open, in [0, 1]."""
    every = torch.cat([gate.is_open for gate in gates(net).values()])
    return float(every.double().mean())


def differences(variants: Iterable[Path], base: Iterable[Path]) -> list[runlog.Row]:
    """What each variant of a run changes against the ``base`` run of the same seed.

    Both are records named ``<variant>-seed<k>.jsonl``; runs that are not finished are left out,
    and variants that have no seed in common with ``base``. A row: ``variant``, ``changed`` (the
    settings that differ, with the variant's values), ``seeds``, and a list with one difference per
    seed for ``accuracy`` (fine-tuned), ``hard_accuracy`` and ``macs_kept`` (share of the dense).
    """
    plain = {rows[0]["config"]["seed"]: rows for rows in map(runlog.read, base) if _ended(rows)}
    found: dict[str, dict[int, list[runlog.Row]]] = defaultdict(dict)
    for path in sorted(variants):
        if _ended(rows := runlog.read(path)):
            found[path.stem.rpartition("-seed")[0]][rows[0]["config"]["seed"]] = rows
    table = []
    for variant, runs in found.items():
        if seeds := sorted(runs.keys() & plain.keys()):
            pairs = [(_outcome(runs[seed]), _outcome(plain[seed])) for seed in seeds]
            changed = _changed(runs[seeds[0]], plain[seeds[0]])
            lists = {key: [a[key] - b[key] for a, b in pairs] for key in pairs[0][0]}
            table.append({"variant": variant, "changed": changed, "seeds": seeds, **lists})
    return table


def _ended(rows: list[runlog.Row]) -> bool:
    return bool(rows) and rows[-1]["kind"] == "result"


def _outcome(rows: list[runlog.Row]) -> dict[str, float]:
    """What a finished run is judged by, from its last row."""
    last = rows[-1]
    return {
        "accuracy": last["fine_tuned_accuracy"],
        "hard_accuracy": last["hard_accuracy"],
        "macs_kept": last["macs"][1] / last["macs"][0],
    }


def _changed(rows: list[runlog.Row], base: list[runlog.Row]) -> runlog.Row:
    """Settings that differ from ``base``; name, seed, place and the dense rival do not count."""
    defaults = dataclasses.asdict(SearchConfig())
    own, other = defaults | rows[0]["config"], defaults | base[0]["config"]
    apart = {"name", "seed", "baseline", *MEANS}
    return {key: own[key] for key in own if key not in apart and own[key] != other.get(key)}
