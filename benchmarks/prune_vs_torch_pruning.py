"""The same dead channels for Torch-Pruning and for dnal_mini: what does each leave?

Closed channels have gamma = beta = 0 in their BatchNorm. Torch-Pruning's dependency graph names the
coupled groups, and each channel of a group goes whose values are all zero where they leave the
group; ours prunes as always. Promise: ours leaves no more MACs on every net and fewer on every
residual one; ResNet50 in at most 3 s on two threads (``surgery_s``: analysis and surgery;
``ours_s`` adds the copy in float64, two certificates and two costs). Two gate patterns:
"independent" gates, and "coupled" ones that close whole groups, where Torch-Pruning can cut
everything.
Prints one JSON line per net and pattern. Needs ``pip install torch-pruning`` (1.6.1).
Run: ``python benchmarks/prune_vs_torch_pruning.py [NET ...]``.
"""

import argparse
import copy
import json
import time
import warnings
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

import dnal_mini as dnal  # before torchvision, whose missing operators it repairs
from dnal_mini.pruning.pruner import cut_net

KEEP = 0.5
NETS = (
    "resnet18", "resnet50", "vgg16_bn", "mobilenet_v2", "densenet121", "resnext50_32x4d",
    "regnet_x_400mf", "resnet56",
)  # fmt: skip
RESIDUAL = {"resnet18", "resnet50", "mobilenet_v2", "resnext50_32x4d", "regnet_x_400mf", "resnet56"}
LAYERS = (nn.Conv2d, nn.Linear, nn.BatchNorm2d)


def dense_net(name: str) -> tuple[nn.Module, tuple[int, int, int]]:
    """A net in eval mode and the shape of its images."""
    if name == "resnet56":
        return dnal.models.resnet56().eval(), (3, 32, 32)
    from torchvision import models

    return models.get_model(name, weights=None, num_classes=10).eval(), (3, 224, 224)


# --- Torch-Pruning ---------------------------------------------------------------------------


def dependency_graph(net: nn.Module, shape: tuple[int, int, int]) -> Any:
    import torch_pruning

    with torch.enable_grad():  # it follows the gradients
        graph = torch_pruning.DependencyGraph()
        return graph.build_dependency(net, torch.randn(1, *shape), verbose=False)


def whole_groups(net: nn.Module, graph: Any) -> Iterator[tuple[nn.Module, int, Any]]:
    """Every coupled group at full width: its root convolution, its width, the group."""
    import torch_pruning

    seen: set[nn.Module] = set()
    for module in net.modules():
        if isinstance(module, nn.Conv2d) and module not in seen:
            width = module.out_channels
            every = list(range(width))
            group = graph.get_pruning_group(module, torch_pruning.prune_conv_out_channels, every)
            members = [(item.dep.target.module, item.dep.handler) for item in group.items]
            seen |= {
                member for member, handler in members if graph.is_out_channel_pruning_fn(handler)
            }
            yield module, width, group


def writes_out(node: Any) -> bool:
    """True if what a layer writes reaches a reader or the output before another norm does."""
    for after in node.outputs:
        module = after.module
        per_channel = isinstance(module, nn.Conv2d) and 1 < module.groups == module.in_channels
        if isinstance(module, nn.BatchNorm2d) or per_channel:
            continue
        if isinstance(module, LAYERS) or writes_out(after):
            return True
    return not node.outputs


def writers(group: Any, graph: Any) -> Iterator[tuple[Any, Tensor, Tensor]]:
    """Layers that write channels of a group: node, own channel indices, indices at the root."""
    for item in group.items:
        node = item.dep.target
        if isinstance(node.module, LAYERS) and graph.is_out_channel_pruning_fn(item.dep.handler):
            yield node, torch.tensor(list(item.idxs)), torch.tensor(list(item.root_idxs))


def is_dead(layer: nn.Module) -> Tensor:
    """Which output channels of a layer are zero by its own weights: (channels,) bool."""
    dead = (layer.weight == 0).flatten(1).all(1) if layer.weight.dim() > 1 else layer.weight == 0
    return dead if layer.bias is None else dead & (layer.bias == 0)


def prune_theirs(net: nn.Module, shape: tuple[int, int, int]) -> nn.Module:
    """Remove, in place, every channel of a coupled group that leaves the group as zero."""
    import torch_pruning

    graph = dependency_graph(net, shape)
    cuts: list[tuple[nn.Module, list[int]]] = []
    for root, width, group in whole_groups(net, graph):
        if any(uneven(item.dep.target.module) for item in group.items):
            continue  # channels of a grouped convolution cannot go one by one
        dead = torch.ones(width, dtype=torch.bool)
        for node, own, at_root in writers(group, graph):
            if writes_out(node):
                dead[at_root] &= is_dead(node.module)[own]
        if dead.all():
            dead[0] = False
        if dead.any():
            cuts.append((root, dead.nonzero()[:, 0].tolist()))
    for root, indices in cuts:
        cut = graph.get_pruning_group(root, torch_pruning.prune_conv_out_channels, indices)
        cut.prune()
    return net


def uneven(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and 1 < module.groups < module.in_channels


# --- the comparison --------------------------------------------------------------------------


@torch.no_grad()
def close_channels(
    net: nn.Module, shape: tuple[int, int, int], pattern: str, draw: torch.Generator
) -> None:
    """Statistics as after training, and gamma = beta = 0 for half of the channels, in place."""
    norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.weight.uniform_(0.5, 1.5, generator=draw)
        norm.bias.uniform_(-0.4, 0.6, generator=draw)
    if pattern == "independent":
        for norm in norms:
            closed = torch.rand(norm.num_features, generator=draw) >= KEEP
            norm.weight[closed] = norm.bias[closed] = 0
    else:
        graph = dependency_graph(net, shape)
        for _, width, group in whole_groups(net, graph):
            closed = torch.rand(width, generator=draw) >= KEEP
            for node, own, at_root in writers(group, graph):
                if isinstance(node.module, nn.BatchNorm2d):
                    places = own[closed[at_root]]
                    node.module.weight[places] = node.module.bias[places] = 0
    for norm in norms:
        norm.momentum = 1.0
        norm.train()
    net(torch.randn(4, *shape, generator=draw))
    for norm in norms:
        norm.momentum = 0.1
        norm.running_var.clamp_(min=0.05)
    net.eval()


@torch.no_grad()
def relative_difference(net: nn.Module, small: nn.Module, shape: tuple[int, int, int]) -> float:
    images = torch.randn(2, *shape, dtype=torch.float64)
    expected, got = (copy.deepcopy(m).double().eval()(images) for m in (net, small))
    return float((expected - got).abs().max() / expected.abs().max())


def compared(name: str, pattern: str, seed: int) -> dict[str, Any]:
    """What both leave of one net."""
    torch.manual_seed(seed)
    net, shape = dense_net(name)
    close_channels(net, shape, pattern, torch.Generator().manual_seed(seed))
    dense = dnal.cost(net, shape)
    found: dict[str, Any] = {
        "benchmark": "prune_vs_torch_pruning", "net": name, "pattern": pattern, "keep": KEEP,
        "seed": seed, "threads": torch.get_num_threads(), "macs": dense.macs,
        "params": dense.params, "torch_pruning": version("torch-pruning"),
    }  # fmt: skip
    ways = {
        "theirs": lambda: prune_theirs(copy.deepcopy(net), shape),
        "surgery": lambda: cut_net(net, shape)[0],
        "ours": lambda: dnal.prune(net, shape).module,
        "ours_tie": lambda: dnal.prune(net, shape, "tie").module,
    }
    for way, prune in ways.items():
        start = time.perf_counter()
        try:
            small = prune()
            found[f"{way}_s"] = round(time.perf_counter() - start, 2)
            left = dnal.cost(small, shape)
            found[f"{way}_difference"] = relative_difference(net, small, shape)
        except Exception as error:  # a failure of either side belongs into the record
            found[f"{way}_error"] = f"{type(error).__name__}: {error}".splitlines()[0]
            continue
        found[f"{way}_macs"], found[f"{way}_params"] = left.macs, left.params
    if found.get("theirs_difference", 1) <= 1e-9 and "ours_macs" in found:
        found["ratio"] = round(found["ours_macs"] / found["theirs_macs"], 3)
        strict = name in RESIDUAL and pattern == "independent"
        found["reached"] = found["ratio"] < 1 if strict else found["ratio"] <= 1
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("nets", nargs="*", default=NETS, metavar="NET")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    warnings.filterwarnings("ignore", category=UserWarning)  # what Torch-Pruning says of weights
    for name in options.nets:
        for pattern in ("independent", "coupled"):
            print(json.dumps(compared(name, pattern, options.seed)), flush=True)


if __name__ == "__main__":
    main()
