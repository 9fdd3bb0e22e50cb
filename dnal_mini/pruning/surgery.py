"""Replace submodules by smaller ones, as a plan says. The forward code stays as it is."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dnal_mini.graph.ops import TRANSPOSED
from dnal_mini.layers.channelmap import ChannelMap
from dnal_mini.pruning.foldgates import Places


@dataclass
class Numbers:
    """What the surgery changes in the numbers of a layer: constants move into its bias.

    A BatchNorm behind the layer takes them instead, in its running mean: no new parameter.
    """

    shift: Tensor  # (outputs of the full layer,), float64
    silent: list[int]  # places of the small layer's inputs that the shift stands for
    norm: str = ""  # name of the BatchNorm that takes the shift


def operate(net: nn.Module, modules: dict[str, dict]) -> None:
    """Replace submodules by smaller ones as the entries of ``plan`` say, in place.

    Raises: ValueError if an entry does not fit the network: it belongs to another architecture.
    """
    places = Places(net)
    for name, entry in modules.items():
        try:
            if "of" in entry:
                _cut_parameters(net, entry)
                continue
            module = net.get_submodule(name)
            places.replace(module, _smaller(module, entry))
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(
                f"got a spec whose layer {name!r} does not fit this {type(net).__name__} "
                f"({error}); need the architecture and widths it was made of"
            ) from error


def _cut_parameters(net: nn.Module, entry: dict[str, Any]) -> None:
    """Make the parameters of a layer smaller that forward calls as a function, in place."""
    for role, name in entry["of"].items():
        parent, _, last = name.rpartition(".")
        owner = net.get_submodule(parent)
        tensor = small = getattr(owner, last)
        if "in" in entry and role == "weight":
            columns = entry.get("columns", 1)
            keep = torch.tensor(entry["in"])[:, None] * columns + torch.arange(columns)
            small = small.detach().index_select(1, keep.flatten().to(tensor.device))
        if "out" in entry:
            small = small.detach().index_select(0, torch.tensor(entry["out"]).to(tensor.device))
        is_weight = isinstance(tensor, nn.Parameter)
        new = nn.Parameter(small.clone(), tensor.requires_grad) if is_weight else small.clone()
        setattr(owner, last, new)


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
        group_of = {int(row[0]) // width: row % width for row in rows}
        new = weight.new_zeros(len(weight), rows.shape[1], *weight.shape[2:])
        for o in range(len(weight)):
            if o // height in group_of:
                new[o] = weight[o].index_select(0, group_of[o // height].to(weight.device))
    else:
        new = layer.weight.detach().index_select(axis, keep.to(layer.weight.device)).clone()
    layer.weight = nn.Parameter(new, layer.weight.requires_grad)
    size = "in_features" if isinstance(layer, nn.Linear) else "in_channels"
    setattr(layer, size, len(keep))


SIZES = {"out_channels", "out_features", "num_features", "num_parameters"}


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
def write_numbers(net: nn.Module, modules: dict[str, dict], numbers: dict[str, Numbers]) -> None:
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
