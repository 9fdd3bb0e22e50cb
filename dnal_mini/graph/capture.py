"""Any network as a graph of operations: what the analysis, the gates and deployment read.

Read ``capture``. torch.export runs the forward code once and writes down each operation with the
tensors that it reads, parameters among them, however the user's code came to call it. What is
not an operation is gone: flags, branches and sizes are what they were for these images. Knows no
gate.
"""

import gc
import linecache
import logging
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from dnal_mini.graph.exact import as_exact_as
from dnal_mini.graph.layer import Layer, layer_at
from dnal_mini.graph.ops import in_place, is_random, name_of
from dnal_mini.graph.outputs import TensorsOnly
from dnal_mini.graph.places import modules_around
from dnal_mini.graph.rewrite import (
    as_products,
    channel_maps,
    settle_in_place,
    without_lookers,
    without_regions,
)
from dnal_mini.layers.mixed import parts
from dnal_mini.refused import Refused


@dataclass
class Capture:
    """The operations of one forward pass; structure only: the numbers are the network's own.

    ``graph``: nodes of aten's operations in the order in which they run. ``meta["val"]`` of a node
    is its result without numbers, ``meta["nn_module_stack"]`` the modules in whose forward it runs.
    """

    graph: fx.Graph
    tensors: dict[fx.Node, str]  # parameters and buffers: qualified name, the first of several
    constants: dict[fx.Node, Tensor]  # numbers that the forward code makes itself
    written: set[fx.Node]  # overwritten through a view and read afterwards
    layers: dict[fx.Node, Layer] = field(default_factory=dict)
    sole: dict[fx.Node, str] = field(default_factory=dict)  # modules of torch's that do just this
    notes: list[str] = field(default_factory=list)
    stubborn: dict[fx.Node, str] = field(default_factory=dict)  # found to follow no other width

    @property
    def read(self) -> set[str]:
        """Names of the parameters and buffers that some operation reads."""
        return {name for node, name in self.tensors.items() if node.users}

    @property
    def nodes(self) -> list[fx.Node]:
        return list(self.graph.nodes)


def capture(net: nn.Module, inputs: Sequence[Any]) -> Capture:
    """The graph of a network's forward pass in eval mode, as it runs on ``inputs``.

    A forward that uses parameters in train mode only (an auxiliary classifier) gives the graph of
    train mode, if it has all that eval mode has.

    Raises: ValueError with the true cause, and the user's line, where the forward cannot be
    followed: a wrapped or scripted net, a branch on the numbers in a tensor, random numbers.
    """
    refuse_wrapped(net)
    names = first_names(net)
    with evaluating(net):
        found = _exported(net, inputs, names)
        _refuse_random(net, found)
    learned = {name for name, _ in net.named_parameters()}
    if idle := learned - found.read:
        fuller = _in_train_mode(net, inputs, names)
        if fuller is not None and fuller.read & learned > found.read & learned:
            return fuller
        owner = min(idle).split(".")[0]
        found.notes.append(f"{owner} is not called in eval mode: left as it is")
    return found


def _in_train_mode(net: nn.Module, inputs: Sequence[Any], names: dict[str, str]) -> Capture | None:
    """The graph of train mode; None if such images are too small for it."""
    with evaluating(net):
        net.train()
        try:
            return _exported(net, inputs, names)
        except Refused:
            return None


def _exported(net: nn.Module, inputs: Sequence[Any], names: dict[str, str]) -> Capture:
    """Raises: ValueError with the forward's own reason if torch.export cannot follow it."""
    try:
        with _quiet(), _keeping_all(), torch.no_grad(), as_exact_as(net):
            program = torch.export.export(TensorsOnly(net), tuple(inputs), strict=False)
    except Exception as error:  # whatever the user's forward raises
        raise Refused(_reason(net, error)) from error
    graph, signature = without_regions(program.graph_module), program.graph_signature
    tensors, constants = {}, {}
    whose = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}  # made at each call
    lifted = signature.inputs_to_lifted_tensor_constants
    for node in graph.nodes:
        if stack := node.meta.get("nn_module_stack"):
            node.meta["nn_module_stack"] = _without_root(stack)
        if node.op != "placeholder":
            continue
        if node.name in whose:
            tensors[node] = names[whose[node.name].removeprefix("net.")]
        elif node.name in lifted:
            constants[node] = program.constants[lifted[node.name]]
    _outputs_only(graph, signature)
    channel_maps(graph, net)
    as_products(graph)
    found = Capture(graph, tensors, constants, settle_in_place(graph))
    without_lookers(graph)
    calls: dict[str, list[fx.Node]] = {}  # by the innermost module that runs them
    for node in graph.nodes:
        if layer := layer_at(node, tensors, net):
            found.layers[node] = layer
        if around := modules_around(node):
            calls.setdefault(around[-1], []).append(node)
    for path, nodes in calls.items():
        if len(nodes) == 1 and parts(type(net.get_submodule(path)))[0].__module__.startswith(OWN):
            found.sole[nodes[0]] = path
    return found


OWN = ("torch.nn.modules.", "dnal_mini.layers.")


@contextmanager
def _quiet() -> Iterator[None]:
    """What torch.export has to say is said again in one line, or of no interest."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


@contextmanager
def _keeping_all() -> Iterator[None]:
    """No search for garbage, a sixth of the time: next to nothing that torch.export makes is."""
    searched = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if searched:
            gc.enable()


def _without_root(stack: dict[str, tuple[str, Any]]) -> dict[str, tuple[str, Any]]:
    """The modules around a node as the network's own names, outermost first."""
    return {
        key: (path.removeprefix("net").removeprefix("."), kind)
        for key, (path, kind) in stack.items()
        if path
    }


def _outputs_only(graph: fx.Graph, signature: Any) -> None:
    """The output node returns what the forward does, no buffer that it changes; idle nodes go."""
    (output,) = (node for node in graph.nodes if node.op == "output")
    count = len(signature.user_outputs)
    output.args = (tuple(output.args[0])[-count:] if count else (),)
    for node in reversed(list(graph.nodes)):
        counts = in_place(node) and str(node.args[0]).endswith("num_batches_tracked")
        idle = node.op == "call_function" and not in_place(node)
        if (counts or idle) and not node.users:
            graph.erase_node(node)


def _refuse_random(net: nn.Module, found: Capture) -> None:
    for node in found.nodes:
        if is_random(node):
            raise Refused(
                f"got a {type(net).__name__} that uses random numbers in eval mode "
                f"({name_of(node)}{line_of(node)}); need a forward that does the same each time; "
                "do pass training=self.training"
            )


QUANTISED = ("torch.ao.nn.quantized", "torch.nn.quantized", "torch.ao.nn.intrinsic.quantized")


def refuse_wrapped(net: nn.Module) -> None:
    """Raises: ValueError for something around a network, or a network that is no longer code."""
    if not isinstance(net, nn.Module):
        raise Refused(f"got a {type(net).__name__}; need an nn.Module")
    kind = type(net)
    inner = next((n for n in ("module", "_orig_mod") if isinstance(getattr(net, n, None), nn.Module)
                  and kind.__module__.startswith("torch.")), None)  # fmt: skip
    if inner:
        raise Refused(
            f"got a {kind.__name__} around a network; need the network itself; do pass net.{inner}"
        )
    for name, module in net.named_modules():
        where = f" in {name}" if name else ""
        if isinstance(module, torch.jit.ScriptModule):
            raise Refused(f"got a scripted module{where}; need its Python source; do not script it")
        if any(nn.parameter.is_lazy(p) for p in module.parameters(recurse=False)):
            raise Refused(
                f"got lazy layers{where} without a shape yet; need a net that has run; do run one "
                "batch through it"
            )
        if type(module).__module__.startswith(QUANTISED):
            raise Refused(f"got a quantised layer{where}; need floating point; do prune it before")
    places = {str(t.device) for t in (*net.parameters(), *net.buffers())}
    if len(places) > 1:
        raise Refused(f"got a net on {' and '.join(sorted(places))}; need one device; do move it")
    if places == {"meta"}:
        raise Refused("got a net on the meta device, without numbers; need weights; do load them")


def _reason(net: nn.Module, error: Exception) -> str:
    """One line: what the forward does that cannot be followed, and the user's own line of it."""
    text = str(error)
    if "data-dependent" in text or "Could not guard" in text or "Could not extract" in text:
        why = "a branch on the numbers in a tensor"
    else:
        lines = [line for line in text.strip().splitlines() if line.strip()]
        why = lines[0].strip() if lines else type(error).__name__
    return (
        f"got a {type(net).__name__} whose forward cannot be followed ({why}{where(error)}); need "
        "one that runs such images by the same operations each time"
    )


def where(error: BaseException) -> str:
    """The last line of the network's own code on the way to an exception: file, number, text."""
    torchs = str(Path(torch.__file__).parent)
    found = ""
    cause: BaseException | None = error
    while cause is not None and not found:
        for frame, number in traceback.walk_tb(cause.__traceback__):
            file, own = frame.f_code.co_filename, frame.f_code.co_varnames[:1]
            is_module = own and isinstance(frame.f_locals.get(own[0]), nn.Module)
            if is_module and not file.startswith((torchs, __file__)):
                found = f" at {Path(file).name}:{number}: {linecache.getline(file, number).strip()}"
        cause = cause.__cause__ or cause.__context__
    return found


def line_of(node: fx.Node) -> str:
    """The user's line of code that calls a node."""
    lines = [text.strip() for text in node.meta.get("stack_trace", "").splitlines()]
    files = [at for at, text in enumerate(lines) if text.startswith("File ")]
    if not files or files[-1] + 1 >= len(lines):
        return ""
    file, number = lines[files[-1]].split(",")[:2]
    return f" at {Path(file[6:-1]).name}:{number.split()[-1]}: {lines[files[-1] + 1]}"


def first_names(net: nn.Module) -> dict[str, str]:
    """The first name of every parameter and buffer, by each of its names."""
    first: dict[int, str] = {}
    found = {}
    for named in (net.named_parameters, net.named_buffers):
        for name, tensor in named(remove_duplicate=False):
            found[name] = first.setdefault(id(tensor), name)
    return found


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


@contextmanager
def keeping_buffers(net: nn.Module) -> Iterator[None]:
    """Inside the block running statistics may move; afterwards they are what they were."""
    own = [
        (m, name, b, b.clone())
        for m in net.modules()
        for name, b in m._buffers.items()
        if b is not None
    ]
    try:
        yield
    finally:
        for module, name, buffer, before in own:
            buffer.copy_(before)
            module._buffers[name] = buffer


def replace_module(net: nn.Module, name: str, module: nn.Module) -> None:
    """Put ``module`` at a qualified name of ``net``, in place."""
    parent, _, child = name.rpartition(".")
    setattr(net.get_submodule(parent), child, module)


def replace_everywhere(net: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put ``new`` under all names of ``old``, in place."""
    for name, module in list(net.named_modules(remove_duplicate=False)):
        if module is old:
            replace_module(net, name, new)
