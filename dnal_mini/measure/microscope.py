"""A look at every gate of a network: what holds it open, what moves it, whether it still can move.

``look`` measures one moment of an architecture stage without disturbing it. It is for figures and
for finding out what a search does; nothing in a search depends on it.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dnal_mini.data.imageset import ImageSet, Split
from dnal_mini.gating import gates
from dnal_mini.graph.copies import copied
from dnal_mini.refused import Refused
from dnal_mini.training.loop import as_input, autocast
from dnal_mini.training.stage import Feed

FROZEN = 1e-4  # a gate with p (1 - p) below it: the slope is under 1/2500 of its peak


def look(
    net: nn.Module,
    split: Split,
    data: ImageSet,
    feed: Feed = Feed(),  # noqa: B008 - frozen
    *,
    batch: int = 64,
) -> dict[str, dict[str, Tensor]]:
    """State and pull of every gate, by name; ``net`` is untouched, its gates must be soft.

    For each gate float64 tensors (channels,): ``s``; ``p``; ``slope`` = delta p (1 - p), the
    derivative of p by s; ``pull`` = - dL0/dp, what the mean cross-entropy (nats) over the images
    of ``split`` would fall by per unit that the gate is opened further. A channel gains from
    staying open where ``pull`` is above the gate price. Norms use the statistics of each batch of
    ``batch`` images, as the architecture stage does; images that fill no batch are left out.

    Source: the derivation in Guo et al. 2022, eq. 5-7 [guo2022dnal], solved for dL0/dp.
    Raises: ValueError for fewer images than a batch, or for gates that are not soft.
    """
    if wrong := [name for name, gate in gates(net).items() if gate.mode != "soft"]:
        raise Refused(f"got gate {wrong[0]} that is not soft; do set_gates(net, mode='soft')")
    if len(split) < batch:
        raise Refused(f"got {len(split)} images; need at least a batch, {batch}")
    net = copied(net).train()
    leaves: dict[str, Tensor] = {}
    for name, gate in gates(net).items():
        leaves[name] = p = gate.p.detach().requires_grad_()
        gate.gain = partial(lambda p: p, p)  # type: ignore[method-assign]
    for parameter in net.parameters():
        parameter.requires_grad_(False)
    sums = {name: torch.zeros(len(p), dtype=torch.float64) for name, p in leaves.items()}
    starts = range(0, len(split) - batch + 1, batch)
    dtype = feed.dtype(split.device)
    for start in starts:
        images, labels = split.batch(torch.arange(start, start + batch, device=split.device))
        with autocast(images.device, dtype):
            logits = net(as_input(images, data, dtype, feed.channels_last))
        loss = F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels)
        for name, g in zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True):
            sums[name] -= g.double().cpu() / len(starts)
    found = {}
    for name, gate in gates(net).items():
        s, delta = gate.s.detach().double().cpu(), float(gate.delta)
        p = torch.sigmoid(delta * s)
        slope = delta * p * torch.sigmoid(-delta * s)
        found[name] = {"s": s, "p": p, "slope": slope, "pull": sums[name]}
    return found


def summary(seen: dict[str, dict[str, Tensor]], gate_price: float, bins: int = 20) -> dict:
    """What ``look`` saw, by layer, as JSON-able numbers for a record.

    ``histogram`` (counts of p in ``bins`` equal bins of [0, 1]), ``undecided`` (share of p in
    (0.1, 0.9)), ``frozen`` (share with p (1 - p) < 1e-4), ``gradient`` (mean over channels of the
    size of dL/ds, price included), ``data_gradient`` (the same without the price), ``pull``
    (quartiles, nats), ``worth`` (share of channels whose pull is above ``gate_price``).
    """
    rows: dict[str, dict[str, Any]] = {}
    for name, gate in seen.items():
        p, slope, pull = gate["p"], gate["slope"], gate["pull"]
        quartiles = torch.quantile(pull, torch.tensor([0.25, 0.5, 0.75], dtype=pull.dtype))
        rows[name] = {
            "histogram": torch.histc(p, bins, 0, 1).int().tolist(),
            "undecided": float(((p > 0.1) & (p < 0.9)).double().mean()),
            "frozen": float((p * (1 - p) < FROZEN).double().mean()),
            "gradient": float((slope * (pull - gate_price)).abs().mean()),
            "data_gradient": float((slope * pull).abs().mean()),
            "pull": quartiles.tolist(),
            "worth": float((pull > gate_price).double().mean()),
        }
    return rows
