"""Does a cut network do what the full one does? And if not, which operation did not follow?

Sizes in a captured graph are those of the full network. Whether the user's code works them out
from the width, or has them written down, is seen by trying: read ``follows``.
"""

import traceback
from collections.abc import Sequence
from types import FrameType
from typing import Any

from torch import Tensor, fx, nn

from dnal_mini.graph.capture import Capture, capture
from dnal_mini.graph.places import modules_around
from dnal_mini.pruning.certificate import outputs
from dnal_mini.pruning.facts import Keeps
from dnal_mini.refused import Refused

TOLERANCE = 1e-6  # relative to the largest output; the cut net is compared in float64


def follows(expected: list[Tensor], cut: nn.Module, inputs: Sequence[Any]) -> Exception | None:
    """None if the cut network gives what is expected, in eval mode; else what it does instead."""
    try:
        found = outputs(cut, inputs)
    except Exception as error:  # whatever the user's forward raises on other widths
        return error
    if [t.shape for t in expected] != [t.shape for t in found]:
        return Refused("outputs of another shape")
    for a, b in zip(expected, found, strict=True):
        apart = float((a - b).nan_to_num().abs().max()) if a.numel() else 0.0
        if not apart <= TOLERANCE * max(float(a.nan_to_num().abs().max()), 1e-30):
            return Refused("other outputs")
    return None


def stubborn(
    cut: nn.Module, graph: Capture, keeps: Keeps, inputs: Sequence[Any], error: Exception
) -> dict[fx.Node, str]:
    """The operation that did not follow the widths, and why; all of them if none can be told."""
    try:
        narrow = capture(cut, inputs)
    except Refused as refusal:
        cause = refusal.__cause__ or error
        told = _at_line(cut, graph, keeps, cause) or _at_line(cut, graph, keeps, error)
        return told or _everything(graph, cause)
    for key, nodes in _numbered(graph, keeps).items():
        found = _numbered(narrow, None).get(key, [])
        for (node, wanted), (_, got) in zip(nodes, found, strict=False):
            if wanted != got and node not in graph.stubborn:
                return {node: f": its numbers stay {_short(got)}"}
    return _everything(graph, error)


def _everything(graph: Capture, error: BaseException) -> dict[fx.Node, str]:
    reason = f": with other widths {str(error).strip().splitlines()[0]}" if str(error) else ""
    return {node: reason for node in graph.nodes if node.op == "call_function"}


def _at_line(
    cut: nn.Module, graph: Capture, keeps: Keeps, error: BaseException
) -> dict[fx.Node, str]:
    """The first operation at the line of the user's code that does not run with other widths."""
    names = {id(vars(module)): name for name, module in cut.named_modules()}
    text = (str(error).strip().splitlines() or [type(error).__name__])[0]
    walked = reversed(list(traceback.walk_tb(error.__traceback__)))
    frames = [(f.f_code.co_filename, number, names[_own(f)]) for f, number in walked
              if _own(f) in names]  # fmt: skip
    left = [node for node in graph.nodes if node not in graph.stubborn]
    sized = {node for node in left if keeps.numbers.get(node, node.args) != node.args}
    for file, number, module in frames:
        line = f'File "{file}", line {number}, in'
        there = [
            node
            for node in left
            if line in node.meta.get("stack_trace", "") and module in ("", *modules_around(node))
        ]
        if there:  # the first that has a size to follow, or was called with another width
            return {next((n for n in there if n in sized), there[0]): f": with other widths {text}"}
    for *_, module in frames:  # code of no file has no lines: what has a size to follow, in order
        if node := next((n for n in left if n in sized and _inside(n) == module), None):
            return {node: f": with other widths {text}"}
    return {}


def _inside(node: fx.Node) -> str:
    return (modules_around(node) or [""])[-1]


def _own(frame: FrameType) -> int:
    """Which module's attributes the method in a frame works on: torch.export calls stand-ins."""
    own = frame.f_locals.get(next(iter(frame.f_code.co_varnames), ""))
    return id(vars(own)) if isinstance(own, nn.Module) else 0


def _numbered(graph: Capture, keeps: Keeps | None) -> dict[tuple, list[tuple[fx.Node, Any]]]:
    """The numbers among the arguments of all operations but layers, by operation and place."""
    found: dict[tuple, list[tuple[fx.Node, Any]]] = {}
    for node in graph.nodes:
        if node.op != "call_function" or (
            node in graph.layers and graph.layers[node].kind != "scale"
        ):
            continue
        if keeps and node in keeps.idle:
            continue
        args = keeps.numbers.get(node, node.args) if keeps else node.args
        numbers = [_number(value) for value in (*args, *node.kwargs.values())]
        key = (str(node.target), _inside(node))
        found.setdefault(key, []).append((node, numbers))
    return found


def _number(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_number(part) for part in value]
    return value if isinstance(value, int | float | str) else None


def _short(numbers: list[Any]) -> str:
    return ", ".join(str(number) for number in numbers if number is not None)
