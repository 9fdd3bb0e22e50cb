"""Any network as a graph of operations: what the analysis, the gates and deployment read.

Read ``trace``. Knows no gate: a layer that must stay one operation says so by ``fx_leaf``.
"""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from dnal_mini.layers.mapped import Mapped
from dnal_mini.layers.mixed import parts
from dnal_mini.refused import Refused


class LeafTracer(fx.Tracer):
    """Traces a network down to torch's layers and to modules marked ``fx_leaf``."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return getattr(m, "fx_leaf", False) or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        if not isinstance(m, Mapped):
            return super().call_module(m, forward, args, kwargs)
        name = self.path_of_module(m)
        for part in (f"{name}.gather", name, f"{name}.scatter"):
            if part == name or hasattr(m, part.rpartition(".")[2]):
                args = (self.create_proxy("call_module", part, args, {}),)
        return args[0]


def trace(net: nn.Module) -> fx.GraphModule:
    """The graph of a network's forward pass, sharing the network's modules.

    Raises: ValueError with the reason if torch.fx cannot follow the forward code.
    """
    try:
        graph = LeafTracer().trace(net)
    except Exception as error:  # torch.fx raises whatever the user's forward raises on a proxy
        reason = str(error).strip().splitlines()[0] if str(error) else type(error).__name__
        raise Refused(
            f"got a {type(net).__name__} that torch.fx cannot trace ({reason}{_line_of(error)}); "
            "need a forward without data-dependent control flow"
        ) from error
    traced = fx.GraphModule(net, graph)
    for name, module in list(traced.named_modules()):
        if isinstance(module, Mapped):  # its maps are operations of their own
            alone: Any = object.__new__(parts(type(module))[0])
            alone.__dict__ = vars(module)
            replace_module(traced, name, alone)
    return traced


def _line_of(error: Exception) -> str:
    """File and line of the user's code in which an exception arose, and the line itself."""
    torchs, here = str(Path(torch.__file__).parent), __file__
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if not f.filename.startswith(torchs) and f.filename != here]
    if not own:
        return ""
    return f" at {Path(own[-1].filename).name}:{own[-1].lineno}: {own[-1].line}"


@contextmanager
def evaluating(net: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block; afterwards every module has its own flag back."""
    flags = [(module, module.training) for module in net.modules()]
    net.eval()
    try:
        yield
    finally:
        for module, flag in flags:
            module.training = flag


def replace_module(net: nn.Module, name: str, module: nn.Module) -> None:
    """Put ``module`` at a qualified name of ``net``, in place."""
    parent, _, child = name.rpartition(".")
    setattr(net.get_submodule(parent), child, module)


def replace_everywhere(net: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put ``new`` under all names of ``old``, in place."""
    for name, module in list(net.named_modules(remove_duplicate=False)):
        if module is old:
            replace_module(net, name, new)
