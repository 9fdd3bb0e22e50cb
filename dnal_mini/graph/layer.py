"""An operation with parameters: which of a network's tensors it reads, and in which role.

Read ``layer_at``. A layer called as a module, as a function or inside a user's own class is the
same thing here.
"""

from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn

from dnal_mini.graph.ops import CONV_DIMS, LAYERS, TRANSPOSED_DIMS, arguments, kind_of, name_of
from dnal_mini.layers.mixed import parts

ROLES = ("weight", "bias", "running_mean", "running_var")


CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


TORCHS = (*CONVS, *TRANSPOSED, *NORMS, nn.Linear, nn.PReLU)


@dataclass(frozen=True)
class Layer:
    """The tensors of one operation, by role, and the numbers that decide what it does to channels.

    ``module``: the layer of torch's own that is this operation and nothing else; "" where a user's
    own forward calls it: its tensors can be cut, and nothing can be put in front of it or behind.
    """

    kind: str  # conv, transposed, linear, norm, scale or map
    name: str  # for the reader of a report: its module, or its first tensor
    roles: dict[str, str]  # weight, bias, running_mean, running_var -> name of the tensor
    module: str = ""
    dims: int = 0  # axes of an image, of a convolution
    groups: int = 1
    pads_with_zeros: bool = False
    eps: float = 0.0
    axis: int = 0  # of a scale's tensor: where its channels lie
    given: dict[str, Any] = field(default_factory=dict, compare=False)

    @property
    def owner(self) -> str:
        """The module that holds the layer's weight; its attributes follow what is cut."""
        weight = self.roles.get("weight")
        return self.module if weight is None else weight.rpartition(".")[0]


def layer_at(node: fx.Node, tensors: dict[fx.Node, str], net: nn.Module) -> Layer | None:
    """The layer that a node calls; None if it is none, or reads numbers that are computed."""
    kind = kind_of(node)
    if kind == "map":
        path = str(node.meta["map"])
        return Layer("map", path, {}, path, given={"source": node.args[1], "stride": node.args[2]})
    if kind not in (*LAYERS, "scale", "join"):
        return None
    given = arguments(node)
    if kind in ("scale", "join"):
        return _scale(node, given, tensors, _module(node, net) if name_of(node) == "prelu" else "")
    read = {role: given[role] for role in ROLES if given.get(role) is not None}
    if not all(tensor in tensors for tensor in read.values()):
        return None
    roles = {role: tensors[tensor] for role, tensor in read.items()}
    if kind in ("conv", "transposed"):
        padding = given["padding"]
        size = read["weight"].meta["val"].shape[2:]
        pads = padding == "same" and any(k > 1 for k in size)
        pads |= not isinstance(padding, str) and any(p != 0 for p in padding)
        more: dict[str, Any] = {"groups": given["groups"], "pads_with_zeros": pads}
        more["dims"] = (CONV_DIMS | TRANSPOSED_DIMS)[name_of(node)]
        owner = net.get_submodule(roles["weight"].rpartition(".")[0])
        if given["groups"] > 1 and (kind == "transposed" or not isinstance(owner, TORCHS)):
            return None  # nobody would tell the user's forward how many groups are left
    else:
        more = {"eps": given["eps"]} if kind == "norm" else {}
    module = _module(node, net)
    return Layer(kind, _name(roles, module), roles, module, given=given, **more)


def _scale(
    node: fx.Node, given: dict[str, Any], tensors: dict[fx.Node, str], module: str
) -> Layer | None:
    """PReLU, or a join of a tensor with a parameter that has a number for each channel."""
    names = ("self", "weight") if "weight" in given else ("self", "other")
    operands = [given.get(name) for name in names]
    learned = [x for x in operands if x in tensors]
    if len(learned) != 1 or not all(isinstance(x, fx.Node) for x in operands):
        return None
    (weight,) = learned
    shape = weight.meta["val"].shape
    wide = [axis for axis, size in enumerate(shape) if size > 1]
    if len(wide) != 1:
        return None
    name = tensors[weight].removesuffix(".weight")
    return Layer("scale", name, {"weight": tensors[weight]}, module, axis=wide[0], given=given)


def _module(node: fx.Node, net: nn.Module) -> str:
    """The innermost module around a node, if it is a layer of torch's own."""
    path = next(reversed([p for p, _ in node.meta.get("nn_module_stack", {}).values()]), "")
    return path if path and parts(type(net.get_submodule(path)))[0] in TORCHS else ""


def _name(roles: dict[str, str], module: str) -> str:
    first = next(iter(roles.values()), "")
    return first.removesuffix(".weight") if first else module
