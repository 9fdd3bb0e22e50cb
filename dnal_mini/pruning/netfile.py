"""Pruned networks as files: tensors and a JSON spec in one safetensors file. No pickle.

``save`` writes what ``prune`` returned, ``load`` cuts a freshly built network by the spec, fills
in the tensors, and asks it what the saved one was asked: see ``probe``. Loading runs no code from
the file.
"""

import hashlib
import inspect
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dnal_mini.gating import strip_gates
from dnal_mini.graph.copies import copied
from dnal_mini.graph.inputs import Given, Inputs, drawn, like, written
from dnal_mini.pruning.oldformats import renewed
from dnal_mini.pruning.plan import Report
from dnal_mini.pruning.pruner import FORMAT, Pruned, outputs
from dnal_mini.pruning.spec import check
from dnal_mini.pruning.surgery import operate
from dnal_mini.refused import Refused, line_of, need_callable, need_module, need_path, shown

PARTS = {"config", "image_shape", "modules", "report", "certificate"}  # of a spec of any format


ANSWERS = 24  # numbers of each output tensor that a probe notes, spread evenly over it


TOLERANCE = 1e-5  # relative; a net of float64 may be loaded in float32


def save(small: Pruned, path: str | os.PathLike) -> None:
    """Write tensors, spec and probe as one safetensors file; the same net gives the same bytes.

    The file appears whole or not.

    Raises: ValueError for a place that cannot be written, or extra state that is no JSON.
    Example:
        >>> small = dnal.prune(dnal.models.vgg16(width=0.125).eval())
        >>> dnal.save(small, "net.safetensors")
        >>> again = dnal.load("net.safetensors", dnal.models.vgg16).module.eval()
        >>> images = torch.randn(2, 3, 32, 32)
        >>> torch.equal(small.module(images), again(images))
        True
    """
    from safetensors.torch import save as as_bytes

    path = need_path(path)
    if not isinstance(small, Pruned):
        raise Refused(f"got {shown(small)}; need what prune() or load() returns; do prune first")
    if not path.parent.is_dir() or (path.exists() and not path.is_file()):
        what = "which is no regular file" if path.exists() else "in a folder that is not there"
        raise Refused(f"got {path}, {what}; need a file name in a folder; do make or change it")
    whole = torch.contiguous_format  # a tensor of its own for each name: some share their numbers
    state = small.module.state_dict()
    more = {name: value for name, value in state.items() if not isinstance(value, Tensor)}
    tensors = {
        name: value.detach().cpu().clone(memory_format=whole)
        for name, value in state.items()
        if name not in more
    }
    told = {"seed": 0, "outputs": probe(small.module, written(small.spec), seed=0)}
    try:
        text = json.dumps(small.spec | {"probe": told, "extra_state": more}, sort_keys=True)
    except (TypeError, ValueError) as error:
        names = ", ".join(more) or "its spec"
        raise Refused(f"got a net whose {names} is no JSON ({error}); need JSON") from error
    text = json.dumps(json.loads(text) | {"sha256": _digest(text, tensors)}, sort_keys=True)
    part = path.with_name(path.name + ".part")
    try:  # one entry of metadata: the order of several would differ from time to time
        part.write_bytes(as_bytes(tensors, metadata={"dnal_mini": text}))
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise Refused(f"got {error.strerror} for {path}; need room and access") from error


def load(path: str | os.PathLike, build: Callable[..., nn.Module]) -> Pruned:
    """Rebuild a saved network: ``build`` makes the full one, the spec in the file cuts it.

    ``build`` is called with the keyword arguments stored in the file as far as it takes them, and
    gives the net without gates (gates in it are taken out).

    Raises: FileNotFoundError; ValueError for a file that is cut short, edited, of a later format,
    made of another architecture than ``build`` gives, or whose outputs come out differently.
    Example:
        >>> dnal.save(dnal.prune(dnal.models.vgg16(width=0.125).eval()), "net.safetensors")
        >>> small = dnal.load("net.safetensors", build=dnal.models.vgg16)
        >>> print(dnal.cost(small.module))
        236.56 k parameters, 5.09 M MACs, 0.0655 MB of activations at the peak
    """
    path = need_path(path)
    need_callable("build", build)
    spec, tensors = _contents(path)
    module = build(**_arguments(build, spec["config"] or {}))
    need_module(module, "what build() gives:")
    strip_gates(module)
    module, spec, tensors = renewed(module, spec, tensors)
    asked = spec.pop("probe", None)
    operate(module, spec)
    for name, tensor in module.state_dict().items():
        own, other = (isinstance(t, Tensor) and t.is_floating_point()
                      for t in (tensor, tensors.get(name, tensor)))  # fmt: skip
        if own != other:
            raise _wrong(path, f" whose {name} is {tensors[name].dtype}, not {tensor.dtype}")
    try:
        module.load_state_dict(tensors | spec.pop("extra_state", {}))
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise _wrong(path, f" of another net than build() gives ({reason})") from error
    _ask(module, written(spec), asked, path)
    return Pruned(module, spec, Report(**spec["report"]), spec["certificate"]["absolute"])


def _wrong(path: Path, what: str) -> Refused:
    return Refused(f"got {path}{what}; need a file as save() wrote it; do save the net again")


def _contents(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Spec and tensors of a file.

    Raises: FileNotFoundError; ValueError for a file that ``save`` of this version or an older one
    did not write, or that is not what was written.
    """
    from safetensors import SafetensorError, safe_open

    if not path.exists():
        raise FileNotFoundError(f"got {path}, which is not there; need a file that save() wrote")
    if not path.is_file():
        raise _wrong(path, ", which is no regular file")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise _wrong(path, f", cut short or damaged ({error})") from error
    text = metadata.get("dnal_mini")
    if text is None:
        raise _wrong(path, " without a dnal_mini spec")
    try:
        spec = json.loads(text)
        if not isinstance(spec, dict):
            raise Refused("no JSON object")
    except (ValueError, RecursionError) as error:
        raise _wrong(path, f" with a damaged spec ({line_of(error)})") from error
    digest = metadata.get("sha256")  # of older files
    if digest is None:
        digest = spec.pop("sha256", None)
        text = json.dumps(spec, sort_keys=True)
    if digest != _digest(text, tensors):
        raise _wrong(path, ", edited since it was saved (checksum differs)")
    version = spec.get("format")
    if type(version) is not int or version not in range(1, FORMAT + 1):
        raise Refused(
            f"got {path} of format {version}; need 1 to {FORMAT}; install a later dnal-mini"
        )
    parts = PARTS | ({"keep", "probe"} if version == FORMAT else set())
    if missing := sorted(parts - set(spec)):
        raise _wrong(path, f" whose spec lacks {', '.join(missing)}")
    check(spec, path)
    return spec, tensors


def probe(net: nn.Module, what: Given, seed: int) -> list[dict[str, Any]]:
    """What a net answers to two images drawn from a seed: a note on each output tensor.

    Shape, largest size, and ``ANSWERS`` of its numbers. Computed in eval mode on the CPU and in
    float64, whatever the net is in: in float32 machines differ by more than ``TOLERANCE``.
    """
    exact = copied(net).cpu().double()
    draw = torch.Generator().manual_seed(seed)
    if isinstance(what, Inputs):
        inputs = drawn(what, like(exact), seed)
    else:
        inputs = (torch.rand(2, *what, generator=draw).double() * 2 - 1,)
    with torch.no_grad():
        found = outputs(exact, inputs)
    return [
        {
            "shape": list(tensor.shape),
            "largest": float(tensor.abs().amax()) if tensor.numel() else 0.0,
            "numbers": tensor.flatten()[:: -(-tensor.numel() // ANSWERS) or 1].tolist(),
        }
        for tensor in (tensor.nan_to_num() for tensor in found)
    ]


def _ask(net: nn.Module, what: Given, asked: dict[str, Any] | None, path: Path) -> None:
    """Raises: ValueError if the rebuilt network does not answer what the saved one did."""
    try:
        found = probe(net, what, asked["seed"] if asked else 0)
    except (RuntimeError, IndexError, ValueError, TypeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise _wrong(path, f" whose net cannot run ({reason})") from error
    expected = asked["outputs"] if asked else found
    apart = 0.0 if len(found) == len(expected) else 1.0
    for a, b in zip(expected, found, strict=False):
        pairs = zip(a["numbers"], b["numbers"], strict=False)
        largest = max((abs(x - y) for x, y in pairs), default=0.0)
        apart = max(apart, largest / (a["largest"] or 1.0), float(a["shape"] != b["shape"]))
    if not apart <= TOLERANCE:
        raise Refused(
            f"got {path} whose outputs are {apart:.1e} of the largest from those that were saved; "
            "need the build() that was pruned; compare its arguments and its forward"
        )


def _arguments(build: Callable, config: dict[str, Any]) -> dict[str, Any]:
    """The stored keyword arguments that ``build`` takes. Raises: ValueError if it needs others."""
    signature = inspect.signature(build)
    given = {name: value for name, value in config.items() if name in signature.parameters}
    try:
        signature.bind(**given)
    except TypeError as error:
        raise Refused(
            f"got a build that wants more than the file says ({error}); need a function of "
            f"({', '.join(config)}); do fill in the others, by functools.partial"
        ) from error
    return given


def _digest(text: str, tensors: dict[str, Tensor]) -> str:
    """SHA-256 over the spec and every tensor's name, dtype and bytes."""
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name}:{tensor.dtype}".encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
