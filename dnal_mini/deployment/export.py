"""A network as a file for other runtimes; named once it has computed what the net does."""

import importlib
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from dnal_mini.deployment.fold import deploy, refuse_gates
from dnal_mini.graph.copies import copied
from dnal_mini.graph.outputs import TensorsOnly, tensors_in
from dnal_mini.refused import UNFIT, Refused, need_numbers, need_path, need_shape

TOLERANCES = {torch.float32: 1e-4, torch.float64: 1e-9}  # file against network, relative


TRACED_BATCH, CHECKED_BATCHES = 2, (1, 5)


ONE_FILE_BYTES = 2**31 - 2**20  # an ONNX file cannot hold more; its weights then get a second file


TORCH_WARNS = r"`isinstance\(treespec, LeafSpec\)` is deprecated"  # of its own code, in exporting


ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")


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
    Example:
        >>> written = dnal.export(dnal.models.vgg16(width=0.125), "net.pt2", fold=True)
        >>> written.path.name, written.difference < 1e-5
        ('net.pt2', True)
    """
    path = need_path(path)
    write = {".pt2": _write_pt2, ".onnx": _write_onnx}.get(path.suffix)
    if write is None:
        raise Refused(f"got file name {path.name!r}; need .pt2 or .onnx at its end; do add it")
    if not path.parent.is_dir():
        raise Refused(f"got folder {path.parent}; need one that is there; do create it")
    if path.exists() and not path.is_file():
        raise Refused(f"got {path}, which is no regular file; need a file name; do change it")
    if path.suffix == ".onnx":
        for name in ONNX_PACKAGES:
            _package(name)
    refuse_gates(net)
    need_numbers(net)
    eager = copied(net).cpu().eval()
    images = _images(eager, TRACED_BATCH, image_shape)
    _outputs(eager, images)  # a wrong shape is told here, before the exporters tell it at length
    with torch.no_grad():
        plain = eager(images)
    if not all(isinstance(leaf, Tensor) for leaf in tree_leaves(plain)):  # files hold tensors
        eager = TensorsOnly(eager)
    with (
        warnings.catch_warnings(),
        tempfile.TemporaryDirectory(prefix=".export-", dir=path.parent) as folder,
    ):
        warnings.filterwarnings("ignore", TORCH_WARNS, FutureWarning)
        run = write(deploy(eager, image_shape) if fold else eager, images, Path(folder) / path.name)
        difference = _difference(eager, run, image_shape)
        limit = TOLERANCES[images.dtype]
        if not difference <= limit:
            raise Refused(
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
        raise Refused(
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
        raise Refused(
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
    batch: Any = {0: torch.export.Dim("batch", min=1)}
    shapes = ((batch,),) if isinstance(net, TensorsOnly) else (batch,)  # it takes *inputs
    try:
        program = torch.export.export(net, (images,), dynamic_shapes=shapes)
    except Exception as error:  # torch.export raises many kinds, half of them not public
        raise Refused(
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
        raise Refused(f"got a net in {dtype}; need float32 or float64; do convert a copy")
    draw = torch.Generator().manual_seed(batch)
    shape = need_shape(image_shape)
    try:
        return torch.randn(batch, *shape, generator=draw, dtype=dtype)
    except RuntimeError as error:  # torch has no class of its own for memory that is not there
        raise Refused(
            f"got image_shape {shape} ({_reason(error)}); need images that fit into memory; "
            "do take smaller ones"
        ) from error


@torch.no_grad()
def _outputs(net: nn.Module, images: Tensor) -> list[Tensor]:
    """The output tensors of a net in order. Raises: ValueError if it does not take the images."""
    try:
        output = net(images)
    except Refused:
        raise
    except UNFIT as error:
        shape = tuple(images.shape[1:])
        raise Refused(
            f"got image_shape {shape} ({_reason(error)}); need one that the net takes; do change it"
        ) from error
    return tensors_in(output)


def _package(name: str) -> Any:
    """An optional package. Raises: ValueError that says how to get it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Refused(
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
