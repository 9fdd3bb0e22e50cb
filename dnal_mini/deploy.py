"""From a trained network to one that runs elsewhere: fold its norms, write it, check the file.

Read ``deploy`` first (every norm that can be folded into the layer before it is), then ``export``:
a file gets its name only after it has computed what the network computes.
"""

import copy
import importlib
import os
import re
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from dnal_mini.gate import gates, is_activation, replace_module, trace
from dnal_mini.operations import CONVS, NORMS, TRANSPOSED

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
TOLERANCES = {torch.float32: 1e-4, torch.float64: 1e-9}  # file against network, relative
TRACED_BATCH, CHECKED_BATCHES = 2, (1, 5)
ONE_FILE_BYTES = 2**31 - 2**20  # an ONNX file cannot hold more; its weights then get a second file
TORCH_WARNS = r"`isinstance\(treespec, LeafSpec\)` is deprecated"  # of its own code, in exporting
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")


# --- norms into the layers before them --------------------------------------------------------


def deploy(net: nn.Module) -> nn.Module:
    """A copy for inference, in eval mode: each BatchNorm folded into the layer before it.

    Folded is a BatchNorm with running statistics that directly follows a convolution (any
    dimension, grouped, transposed) or a linear layer, if nobody else reads what the layer puts
    out and both are called once. The norm becomes an ``nn.Identity``; class and forward code stay.
    Everything else is left as it is: layers with hooks or parametrizations, classes derived from
    torch's own, a linear layer whose output may be more than (batch, features).

    Raises: ValueError for a net with gates or one that torch.fx cannot trace.
    """
    _refuse_gates(net)
    net = copy.deepcopy(net).eval()
    graph = trace(net)
    nodes = list(graph.graph.nodes)
    calls = Counter(id(_module(node, graph)) for node in nodes if node.op == "call_module")
    attributes = {**dict(graph.named_parameters()), **dict(graph.named_buffers())}
    read = {id(attributes.get(str(node.target))) for node in nodes if node.op == "get_attr"}
    for node in nodes:
        pair = _foldable(node, graph)
        if pair is None or any(calls[id(module)] > 1 for module in pair):
            continue
        layer, norm = pair
        tensors = (*layer.parameters(), *norm.parameters(), *norm.buffers())
        if read.isdisjoint(map(id, tensors)):
            _fold(layer, norm)
            for name, module in list(net.named_modules(remove_duplicate=False)):
                if module is norm:
                    replace_module(net, name, nn.Identity())
    return net


def _refuse_gates(net: nn.Module) -> None:
    if count := len(gates(net)):
        raise ValueError(f"got a net with {count} gates; need one without; do prune it first")


def _module(node: fx.Node, graph: fx.GraphModule) -> Any:
    return graph.get_submodule(str(node.target)) if node.op == "call_module" else None


def _foldable(node: fx.Node, graph: fx.GraphModule) -> tuple[Any, Any] | None:
    """The layer and the norm that read each other's tensor and nobody else's, if node is a norm."""
    norm = _module(node, graph)
    if type(norm) not in NORMS or norm.running_mean is None or len(node.all_input_nodes) != 1:
        return None
    before = node.all_input_nodes[0]
    layer = _module(before, graph)
    if type(layer) not in (*CONVS, *TRANSPOSED, nn.Linear) or len(before.users) > 1:
        return None
    if type(layer) is nn.Linear and not _is_matrix(before, graph):
        return None
    watched = any(getattr(m, hooks) for m in (layer, norm) for hooks in HOOKS)
    changed = any("forward" in vars(module) for module in (layer, norm))
    return None if watched or changed else (layer, norm)


def _is_matrix(node: fx.Node, graph: fx.GraphModule) -> bool:
    """True if a tensor surely is (batch, features): a norm then counts the last dimension."""
    keeps_rank = (nn.Linear, nn.Dropout, nn.Identity, *NORMS)
    while isinstance(_module(node, graph), keeps_rank) or is_activation(node, graph):
        node = node.all_input_nodes[0]
    module = _module(node, graph)
    if isinstance(module, nn.Flatten):
        return (module.start_dim, module.end_dim) == (1, -1)
    arguments = (*node.args[1:], *node.kwargs.values())
    match getattr(node.target, "__name__", node.target):
        case "flatten":
            return arguments in ((1,), (1, -1))
        case "mean":
            return arguments in (((2, 3),), ([2, 3],), ((-2, -1),), ([-2, -1],))
        case "view" | "reshape":
            return node.op == "call_method" and len(arguments) == 2
    return False


@torch.no_grad()
def _fold(layer: Any, norm: Any) -> None:
    """Scale a layer's filters and shift its bias by what the norm does in eval mode, in place."""
    weight, grouped = layer.weight, isinstance(layer, TRANSPOSED)
    if grouped:  # (inputs, outputs / groups, ...) -> (inputs / groups, outputs, ...)
        weight = weight.unflatten(0, (layer.groups, -1)).transpose(0, 1).flatten(1, 2)
    statistics = (norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias)
    folded, bias = fuse_conv_bn_weights(weight, layer.bias, *statistics, transpose=grouped)
    if grouped:
        folded = folded.unflatten(1, (layer.groups, -1)).transpose(0, 1).flatten(0, 1)
    layer.weight = nn.Parameter(folded.detach(), layer.weight.requires_grad)
    layer.bias = nn.Parameter(bias.detach(), layer.weight.requires_grad)


# --- files ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Exported:
    """A file that was compared with its network.

    ``difference``: largest |file - network| over random images of two batch sizes, relative to the
    network's largest |output|.
    """

    path: Path
    bytes: int
    difference: float


def export(
    net: nn.Module,
    path: str | os.PathLike,
    image_shape: Sequence[int] = (3, 32, 32),
    *,
    fold: bool = False,
) -> Exported:
    """Write the network in eval mode for another runtime; the batch size stays free.

    The suffix decides: ".pt2" is a ``torch.export`` program, ".onnx" an ONNX model in one file
    (weights above 2 GB go into a second one, ".onnx.data"). ``fold`` writes ``deploy(net)``. The
    file is read back, run on the CPU with two batch sizes other than the traced one, and compared
    with ``net`` itself; only then does it appear at ``path``. The net is left alone.

    Raises: ValueError for a net with gates or neither in float32 nor float64, another suffix, a
    missing folder or package, a shape that the net does not take, an operator that cannot be
    exported (it is named), or a file that differs by more than 1e-4 (float64: 1e-9).
    """
    path = Path(path)
    write = {".pt2": _write_pt2, ".onnx": _write_onnx}.get(path.suffix)
    if write is None:
        raise ValueError(f"got file name {path.name!r}; need .pt2 or .onnx at its end; do add it")
    if not path.parent.is_dir():
        raise ValueError(f"got folder {path.parent}; need one that is there; do create it")
    if path.suffix == ".onnx":
        for name in ONNX_PACKAGES:
            _package(name)
    _refuse_gates(net)
    eager = copy.deepcopy(net).cpu().eval()
    images = _images(eager, TRACED_BATCH, image_shape)
    _outputs(eager, images)  # a wrong shape is told here, before the exporters tell it at length
    with (
        warnings.catch_warnings(),
        tempfile.TemporaryDirectory(prefix=".export-", dir=path.parent) as folder,
    ):
        warnings.filterwarnings("ignore", TORCH_WARNS, FutureWarning)
        run = write(deploy(eager) if fold else eager, images, Path(folder) / path.name)
        difference = _difference(eager, run, image_shape)
        limit = TOLERANCES[images.dtype]
        if not difference <= limit:
            raise ValueError(
                f"got {path.name} that differs from the net by {difference:.1e} of its largest "
                f"output; need {limit:.0e}; do look for infinite weights or export in float64"
            )
        parts = sorted(Path(folder).iterdir(), key=lambda part: part.name == path.name)
        size = sum(part.stat().st_size for part in parts)
        for part in parts:  # the model last: when it is there, so are its weights
            part.replace(path.parent / part.name)
    return Exported(path, size, difference)


def onnx_runner(
    model: str | os.PathLike | bytes, threads: int | None = None
) -> Callable[[np.ndarray], Any]:
    """A function that runs an ONNX model (a file or its bytes) on the CPU: images to outputs.

    The function takes (batch, channels, height, width) in the model's dtype and returns an array,
    or a tuple of them if the model has several outputs. ``threads=None`` leaves their number to
    onnxruntime.

    Raises: ValueError if onnxruntime is missing or cannot read the model.
    """
    onnxruntime = _package("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or 0
    options.log_severity_level = 3  # errors only
    source = model if isinstance(model, bytes) else os.fspath(model)
    try:
        session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has a class per kind of damage, none of them public
        what = f"{len(source)} bytes" if isinstance(source, bytes) else source
        raise ValueError(
            f"got {what} ({_reason(error)}); need a whole ONNX model; do export it anew"
        ) from error
    name = session.get_inputs()[0].name

    def run(images: np.ndarray) -> Any:
        outputs = session.run(None, {name: images})
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    return run


def _write_pt2(net: nn.Module, images: Tensor, path: Path) -> Callable[[Tensor], list[Tensor]]:
    """Write a torch.export program; returns the function that the file holds."""
    torch.export.save(_program(net, images), path)
    module = torch.export.load(path).module()
    return lambda x: _outputs(module, x)


def _write_onnx(net: nn.Module, images: Tensor, path: Path) -> Callable[[Tensor], list[Tensor]]:
    """Write an ONNX model; returns the function that the file holds, run by onnxruntime."""
    try:
        model = torch.onnx.export(
            _program(net, images), (), dynamo=True, input_names=["images"], verbose=False
        )
    except torch.onnx.errors.OnnxExporterError as error:
        raise ValueError(
            f"got a {type(net).__name__} whose {_operator(error)} ONNX does not have; "
            "need operators that it has; do write .pt2 or replace the operator"
        ) from error
    assert model is not None  # None is for the older exporter
    weights = sum(t.numel() * t.element_size() for t in net.state_dict().values())
    model.save(path, external_data=weights > ONE_FILE_BYTES)
    run = onnx_runner(path)

    def outputs(x: Tensor) -> list[Tensor]:
        found = run(x.numpy())
        return [torch.from_numpy(y) for y in (found if isinstance(found, tuple) else (found,))]

    return outputs


def _program(net: nn.Module, images: Tensor) -> torch.export.ExportedProgram:
    """The net as a torch.export program with a free batch size, without traces of this machine."""
    batch = torch.export.Dim("batch", min=1)
    try:
        program = torch.export.export(net, (images,), dynamic_shapes=({0: batch},))
    except Exception as error:  # torch.export raises many kinds, half of them not public
        raise ValueError(
            f"got a {type(net).__name__} that torch.export cannot follow ({_reason(error)}); "
            "need a forward that is the same for every batch; do change that line"
        ) from error
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # names source files of this machine
    program.example_inputs = None
    return program


def _difference(net: nn.Module, run: Callable, image_shape: Sequence[int]) -> float:
    """Largest relative difference between the outputs of a net and of a file; may be NaN."""
    differences = []
    for batch in CHECKED_BATCHES:
        images = _images(net, batch, image_shape)
        for expected, got in zip(_outputs(net, images), run(images), strict=True):
            largest = expected.double().abs().max().clamp(min=1e-300)
            differences.append((expected.double() - got.double()).abs().max() / largest)
    return float(torch.stack(differences).max())


def _images(net: nn.Module, batch: int, image_shape: Sequence[int]) -> Tensor:
    """Repeatable random images in the dtype of the net.

    Raises: ValueError if that is no dtype that the files are checked in.
    """
    dtype = next((p.dtype for p in net.parameters() if p.is_floating_point()), torch.float32)
    if dtype not in TOLERANCES:
        raise ValueError(f"got a net in {dtype}; need float32 or float64; do convert a copy")
    draw = torch.Generator().manual_seed(batch)
    return torch.randn(batch, *image_shape, generator=draw, dtype=dtype)


@torch.no_grad()
def _outputs(net: nn.Module, images: Tensor) -> list[Tensor]:
    """The output tensors of a net in order. Raises: ValueError if it does not take the images."""
    try:
        output = net(images)
    except RuntimeError as error:
        shape = tuple(images.shape[1:])
        raise ValueError(
            f"got image_shape {shape} ({_reason(error)}); need one that the net takes; do change it"
        ) from error
    return list(_tensors(output))


def _tensors(output: Any) -> Iterator[Tensor]:
    """The tensors in a tensor, tuple, list or dict."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, dict | list | tuple):
        for part in output.values() if isinstance(output, dict) else output:
            yield from _tensors(part)


# --- what the exporters need and say ----------------------------------------------------------


def _package(name: str) -> Any:
    """An optional package. Raises: ValueError that says how to get it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(
            f"got no package {name} ({error}); need it for ONNX; do pip install dnal-mini[export]"
        ) from None


def _reason(error: BaseException) -> str:
    """The first line of an error, without the exporters' advice."""
    lines = str(error).strip().splitlines()
    return lines[0].split("  ")[0].rstrip(".") if lines else type(error).__name__


def _operator(error: BaseException | None) -> str:
    """The operator that an exporter's chain of errors names."""
    while error is not None:
        if found := re.search(r"OpOverload\(op='([^']+)'", str(error)):
            return f"operator {found[1]}"
        if found := re.search(r"target=torch\.ops\.([\w.]+)", str(error)):
            return f"operator {found[1]}"
        error = error.__cause__ or error.__context__
    return "operator"
