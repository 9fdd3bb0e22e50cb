"""What a search has to be compared with: rules that choose channels without one.

Each rule gives every gated channel a score, which becomes its ``s``: the higher, the sooner it
stays. How many stay is decided by a common shift of all s (``stages.meet_target``), so that a rule
and a search can be compared at the same number of MACs.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from dnal_mini.gating import gates
from dnal_mini.layers.gated_norm import GatedNorm
from dnal_mini.layers.scaled_sigmoid import ScaledSigmoid

Rule = Literal["search", "random", "uniform", "l1-norm"]


@torch.no_grad()
def rank_by(net: nn.Module, rule: Rule, seed: int) -> None:
    """Set every ``s`` of a gated net to what a rule thinks of its channel, in place.

    "random": normal numbers, so that layers keep about the same share, by chance. "uniform":
    evenly spaced numbers in random order, so that they keep the same share. "l1-norm": the sum of
    the absolute weights of a channel's filter, divided by the mean of its layer, minus 1.

    Source: Li et al. 2017 [li2017filters] for the L1 norm.
    Differs: there each layer is given its share by hand; here all layers are ranked together.
    Raises: ValueError for "search", which is no rule.
    """
    if rule == "search":
        raise ValueError("got rule 'search'; need random, uniform or l1-norm")
    draw = torch.Generator().manual_seed(seed)
    norms = filter_norms(net) if rule == "l1-norm" else {}
    for name, gate in gates(net).items():
        count = len(gate.s)
        if rule == "random":
            score = torch.randn(count, generator=draw)
        elif rule == "uniform":
            score = (torch.randperm(count, generator=draw) + 0.5) / count - 0.5
        else:
            score = norms[name] / norms[name].mean() - 1
        gate.s.copy_(score)


def filter_norms(net: nn.Module) -> dict[str, Tensor]:
    """Sum of absolute weights of the filter that makes each gated channel, by gate: (channels,).

    The filter is that of the convolution which ran last before the gate's BatchNorm, in the order
    in which modules are defined; this is so in all networks of ours.
    Raises: ValueError for a gate without a convolution of its width in front of it.
    """
    norms: dict[str, Tensor] = {}
    last: nn.Conv2d | None = None
    for name, module in net.named_modules():
        if isinstance(module, nn.Conv2d):
            last = module
        elif isinstance(module, ScaledSigmoid):
            count = len(module.s)
            conv = convolution_of(net, name) or last
            if conv is None or conv.out_channels != count:
                raise ValueError(f"got gate {name} without a convolution of {count} channels")
            norms[name] = conv.weight.detach().abs().sum((1, 2, 3))
    return norms


def convolution_of(net: nn.Module, gate: str) -> nn.Conv2d | None:
    """The convolution before a gate that a rewritten graph calls after all modules; else None."""
    if not isinstance(net, torch.fx.GraphModule) or isinstance(net.get_submodule(gate), GatedNorm):
        return None
    for node in net.graph.nodes:
        if node.op == "call_module" and node.target == gate:
            while node.op != "placeholder":
                node = node.all_input_nodes[0]
                if node.op == "call_module" and isinstance(
                    module := net.get_submodule(str(node.target)), nn.Conv2d
                ):
                    return module
    return None
