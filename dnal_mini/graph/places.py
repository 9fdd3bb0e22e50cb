"""Where a node stands: shape, modules around it, and its name for the reader of a report."""

from typing import Any

import torch
from torch import Tensor, fx

from dnal_mini.graph.ops import name_of


def shape_of(node: fx.Node) -> tuple[int, ...]:
    """Shape of the tensor that a node returns, () if it returns anything else."""
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, Tensor) else ()


def modules_around(node: fx.Node) -> list[str]:
    """Qualified names of the modules in whose forward a node runs, outermost first."""
    return [path for path, _ in node.meta.get("nn_module_stack", {}).values() if path]


def call_of(node: fx.Node, name: str) -> str | None:
    """Which call of the module ``name`` a node runs in: a module may be called again."""
    stack = node.meta.get("nn_module_stack", {})
    return next((key for key, (path, _) in stack.items() if path == name), None)


def describe(node: fx.Node, names: dict[fx.Node, str]) -> str:
    """Operation, the parameters that it reads, and its place, for the reader of a report."""
    place = (modules_around(node) or ["forward"])[-1]
    *_, (_, kind) = node.meta.get("nn_module_stack", {"": ("", "")}).values()
    if str(kind).startswith("torch.nn.modules.") and place != "forward":
        return f"{str(kind).rpartition('.')[2]} {place}"
    _, told = node.meta.get("torch_fn", ("", ""))  # the function of torch that the user called
    name = name_of(node) or getattr(node.target, "__name__", str(node.target))
    name = told.removeprefix("function.") if told.startswith("function.") else name
    read = [names[n] for n in node.all_input_nodes if n in names]
    return f"{name}{' with ' * bool(read)}{', '.join(read)} in {place}"


def like(node: fx.Node, *args: Any, **kwargs: Any) -> Any:
    """Run a node's operation on other arguments; without gradient."""
    assert callable(node.target)
    with torch.no_grad():
        return node.target(*args, **kwargs)
