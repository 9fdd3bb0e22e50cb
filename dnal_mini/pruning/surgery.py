"""Make tensors smaller and replace submodules, as a spec says. The forward code stays as it is."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from dnal_mini.graph.capture import replace_everywhere
from dnal_mini.graph.inputs import like
from dnal_mini.graph.layer import CONVS, TRANSPOSED
from dnal_mini.layers.channelmap import ChannelMap
from dnal_mini.layers.hollow import hollow
from dnal_mini.layers.mapped import ROLES, put_map
from dnal_mini.pruning.foldgates import make_affine
from dnal_mini.refused import Refused

UNFIT = (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)


@dataclass
class Numbers:
    """What the surgery changes in the numbers of a layer: constants move into its bias.

    A BatchNorm behind the layer takes them instead, in its running mean: no new parameter.
    """

    shift: Tensor  # (outputs of the small layer,), float64
    silent: list[int]  # places of the small layer's inputs that the shift stands for
    norm: str = ""  # name of the BatchNorm that takes the shift


def operate(net: nn.Module, spec: Mapping[str, Any]) -> None:
    """Cut a network as ``spec["keep"]`` and ``spec["modules"]`` of ``plan`` say, in place.

    Raises: ValueError if an entry does not fit the network: it belongs to another architecture.
    """
    name, modules = "", spec["modules"]
    some = like(net)
    try:
        for name, entry in modules.items():
            _prepare(net, name, entry, some)
        held = holders(net)
        for name, axes in spec["keep"].items():
            keep_indices(net, name, axes, held)
        for name in sorted(modules, key=is_role):  # a map goes around what is left of a layer
            _replace(net, name, modules[name], some.device)
    except UNFIT as error:
        raise Refused(
            f"got a spec whose {name!r} does not fit this {type(net).__name__} "
            f"({error}); need the architecture and widths it was made of"
        ) from error


def is_role(name: str) -> bool:
    """True for the name of a map in front of a layer or behind it, and not of a layer."""
    return name.rpartition(".")[2] in ROLES


def _prepare(net: nn.Module, name: str, entry: Mapping[str, Any], some: Tensor) -> None:
    """What cutting tensors along an axis cannot do: new ones, unequal picks of groups; in place."""
    layer: Any = (
        net.get_submodule(name) if entry.keys() & {"affine", "num_features", "inputs"} else None
    )
    if "affine" in entry:
        make_affine(layer, some)
    if "num_features" in entry:
        layer.num_features = int(entry["num_features"])
    if "inputs" in entry:  # each output row reads the inputs of its own group
        weight, keep = layer.weight.detach(), torch.tensor(entry["inputs"])
        width, height = weight.shape[1], len(weight) // layer.groups
        groups = len((keep // width).unique())
        rows = keep.reshape(groups, -1)
        new = weight.new_zeros(len(weight), rows.shape[1], *weight.shape[2:])
        for row in rows:
            of_group = slice(int(row[0]) // width * height, (int(row[0]) // width + 1) * height)
            new[of_group] = weight[of_group].index_select(1, (row % width).to(weight.device))
        layer.weight = nn.Parameter(new, layer.weight.requires_grad)
        layer.groups, layer.in_channels = groups, len(keep)


Holders = dict[int, list[tuple[nn.Module, str]]]  # by id of a tensor: whose it is, and its name


def holders(net: nn.Module) -> Holders:
    """The modules that hold each parameter and buffer."""
    found: Holders = {}
    for owner in net.modules():
        for name, tensor in chain(owner._parameters.items(), owner._buffers.items()):
            if tensor is not None:
                found.setdefault(id(tensor), []).append((owner, name))
    return found


def keep_indices(
    net: nn.Module, name: str, axes: Mapping[str, Sequence[int]], held: Holders
) -> None:
    """Keep the given indices of the given axes of a parameter or buffer, in place.

    By whatever names it goes: layers that share it go on sharing. ``held``: ``holders`` of the
    net, brought up to date.
    """
    parent, _, last = name.rpartition(".")
    tensor = small = getattr(net.get_submodule(parent), last)
    for axis, index in axes.items():
        small = small.detach().index_select(int(axis), torch.tensor(index, device=tensor.device))
    is_weight = isinstance(tensor, nn.Parameter)
    small = nn.Parameter(small, tensor.requires_grad) if is_weight else small
    held[id(small)] = held.pop(id(tensor))
    for owner, own in held[id(small)]:
        setattr(owner, own, small)
        _follow(owner, own, small)


def _follow(owner: Any, name: str, small: Tensor) -> None:
    """Let the attributes of a layer say what its cut tensor has, in place."""
    if isinstance(owner, _NormBase):
        owner.num_features = len(small)
    elif isinstance(owner, nn.PReLU):
        owner.num_parameters = len(small)
    elif name == "weight" and isinstance(owner, nn.Linear):
        owner.out_features, owner.in_features = small.shape
    elif name == "weight" and isinstance(owner, CONVS):
        owner.out_channels, owner.in_channels = len(small), small.shape[1] * owner.groups
    elif name == "weight" and isinstance(owner, TRANSPOSED):
        owner.in_channels, owner.out_channels = small.shape[:2]


def _replace(net: nn.Module, name: str, entry: Mapping[str, Any], device: torch.device) -> None:
    """Put a ChannelMap, nothing or a bias where an entry says so, in place."""
    owner, _, last = name.rpartition(".")
    parent: Any = net.get_submodule(owner)
    if "bias" in entry:
        layer: Any = net.get_submodule(name)
        count = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
        layer.bias = nn.Parameter(layer.weight.new_zeros(count))
    if "source" in entry:
        new: Any = ChannelMap(entry["source"], entry["stride"]).to(device)
        if last in ROLES and not hasattr(parent, last):
            put_map(parent, last, new)
            return
    elif "gone" in entry:
        new = nn.Identity()
    else:
        return
    old = net.get_submodule(name)
    if "in_place" not in entry:
        replace_everywhere(net, old, new)
        return
    hollow(old)
    if "source" in entry:
        put_map(old, "scatter", new)


@torch.no_grad()
def write_numbers(net: nn.Module, numbers: Mapping[str, Numbers]) -> None:
    """Add folded constants to biases or running means; silence inputs that they stand for."""
    for name, new in numbers.items():
        layer: Any = net.get_submodule(name)
        layer.weight[:, new.silent] = 0
        norm: Any = net.get_submodule(new.norm) if new.norm else None
        if norm is None:
            layer.bias += new.shift.to(layer.bias)
        elif norm.running_mean is not None:
            norm.running_mean -= new.shift.to(norm.running_mean)
