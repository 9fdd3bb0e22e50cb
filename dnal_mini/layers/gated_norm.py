"""A norm and its gate in one place: the gate costs nothing when it is folded into the affine."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dnal_mini.layers.mixed import Mixed, adopt_inside, drop, parts
from dnal_mini.layers.scaled_sigmoid import ScaledSigmoid
from dnal_mini.refused import Refused

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Gated(Mixed):
    """What a BatchNorm becomes: its own class, and a gate behind gamma and beta.

    ``p * (gamma * x + beta) = (p * gamma) * x + p * beta``: the gate costs nothing when it is
    folded into the affine. ``folded=False`` runs the two one after the other instead; both give
    the same values and gradients. A convolution without a norm can have its gate so, too.
    """

    folded = True
    gate: ScaledSigmoid

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        gain = self.gate.gain()
        if gain is None:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        if not (self.folded and takes_gain(self)):
            return self.gate(super().forward(*args, **kwargs))  # type: ignore[misc]
        with _scaled(self, gain):
            return super().forward(*args, **kwargs)  # type: ignore[misc]


class GatedFirst(Gated):
    """A BatchNorm with a gate in front of it."""

    def forward(self, input: Tensor) -> Any:
        return super(Gated, self).forward(self.gate(input))  # type: ignore[misc]


class GatedLate(Gated):
    """A layer with a gate behind the activation that alone reads what it puts out.

    The activation, ``follows`` by its name, is called by the user's code: as a module, a function
    or a method, perhaps one that many layers share. So the tensor itself carries the gate there.
    """

    follows: str

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super(Gated, self).forward(*args, **kwargs)  # type: ignore[misc]
        return output if self.gate.mode == "off" else _awaiting(output, self)


@torch._disable_dynamo  # torch.compiler.disable imports the whole compiler
def _awaiting(output: Any, layer: GatedLate) -> Any:
    """The same tensor, which awaits its activation; a compiler leaves the code until then alone."""
    output.__class__, output.gate, output.follows = Awaiting, layer.gate, layer.follows
    return output


class Awaiting(Tensor):
    """A tensor like any other, but what its activation makes of it goes through a gate."""

    gate: ScaledSigmoid
    follows: str

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        x = args[0] if args else kwargs.get("input")
        with torch._C.DisableTorchFunctionSubclass():
            if not isinstance(x, Awaiting) or func.__name__.rstrip("_") != x.follows:
                return func(*args, **kwargs)
            gate, x.__class__ = x.gate, Tensor  # type: ignore[assignment]
            rest = {name: value for name, value in kwargs.items() if name != "input"}
            in_place = any(a is True for a in (*args[1:], *rest.values()))
            if not (in_place or func.__name__.endswith("_")):
                return gate(func(*args, **kwargs))
            value = func(x.clone(), *args[1:], **rest)
            return x.copy_(gate(value))  # who reads x afterwards sees what the gate lets through


def put_gate(
    layer: Any, kind: type[Gated] = Gated, like: Tensor | None = None, follows: str = ""
) -> None:
    """Give a BatchNorm or a convolution a gate on its device and in its dtype, in place.

    ``like`` tells them for a norm that has no numbers of its own.

    Raises: ValueError for a layer whose forward or attributes leave no place for one.
    """
    if "forward" in vars(layer) or hasattr(layer, "gate"):
        has = "a forward of its own put over it" if "forward" in vars(layer) else "a `gate`"
        raise Refused(f"got a {type(layer).__name__} with {has}; need one without; do leave it out")
    tensors = (*layer.parameters(recurse=False), *layer.buffers(recurse=False))
    like = next((t for t in tensors if t.is_floating_point()), like)
    norm = isinstance(layer, _BatchNorm)
    adopt_inside(layer, kind)
    gate = ScaledSigmoid(layer.num_features if norm else layer.out_channels)
    layer.gate = gate if like is None else gate.to(like)
    if follows:
        layer.follows = follows


def take_gate(layer: Any) -> None:
    """Make a gated layer a plain one, in place."""
    drop(layer, Gated)
    del layer.gate
    for name in ("follows", "folded"):
        vars(layer).pop(name, None)


def takes_gain(layer: Any) -> bool:
    """True if a factor on a layer's own weight, and bias, is one behind its affine."""
    base = parts(type(layer))[0]
    known = base in CONVS or issubclass(base, _BatchNorm)
    return known and layer._parameters.get("weight") is not None


def times(gain: Tensor, tensor: Tensor) -> Tensor:
    """A weight or bias with its first axis, the outputs, multiplied."""
    return gain.reshape(-1, *[1] * (tensor.dim() - 1)) * tensor


@contextmanager
def _scaled(layer: Any, gain: Tensor) -> Iterator[None]:
    """Weight and bias times the gain, inside the block."""
    own = {k: layer._parameters.get(k) for k in ("weight", "bias")}
    own = {name: tensor for name, tensor in own.items() if tensor is not None}
    try:
        layer._parameters.update({name: times(gain, tensor) for name, tensor in own.items()})
        yield
    finally:
        layer._parameters.update(own)
