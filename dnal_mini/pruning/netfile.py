"""Pruned networks as files: tensors and a JSON spec in one safetensors file. No pickle.

``save`` writes what ``prune`` returned, ``load`` cuts a freshly built network by the spec and
fills in the tensors. Loading runs no code from the file.
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

from dnal_mini.graph.capture import evaluating
from dnal_mini.pruning.plan import Report
from dnal_mini.pruning.pruner import FORMAT, Pruned
from dnal_mini.pruning.surgery import operate

PARTS = {"format", "config", "image_shape", "modules", "report", "certificate"}  # of a spec


def save(small: Pruned, path: str | os.PathLike) -> None:
    """Write tensors and spec as one safetensors file; no pickle. The file appears whole or not.

    Example:
        >>> small = dnal.prune(dnal.models.vgg16(width=0.125).eval())
        >>> dnal.save(small, "net.safetensors")
        >>> again = dnal.load("net.safetensors", dnal.models.vgg16).module.eval()
        >>> images = torch.randn(2, 3, 32, 32)
        >>> torch.equal(small.module(images), again(images))
        True
    """
    from safetensors.torch import save_file

    path = Path(path)
    tensors = {k: v.detach().cpu().contiguous() for k, v in small.module.state_dict().items()}
    text = json.dumps(small.spec, sort_keys=True)
    metadata = {"dnal_mini": text, "sha256": _digest(text, tensors)}
    part = path.with_name(path.name + ".part")
    save_file(tensors, part, metadata=metadata)
    part.replace(path)


def load(path: str | os.PathLike, build: Callable[..., nn.Module]) -> Pruned:
    """Rebuild a saved network: ``build`` makes the full one, the spec in the file cuts it.

    ``build`` is called with the keyword arguments stored in the file as far as it takes them.

    Raises: FileNotFoundError; ValueError for a file that is cut short, edited, of another format,
    or made of another architecture than ``build`` gives.
    Example:
        >>> dnal.save(dnal.prune(dnal.models.vgg16(width=0.125).eval()), "net.safetensors")
        >>> small = dnal.load("net.safetensors", build=dnal.models.vgg16)
        >>> print(dnal.cost(small.module))
        236.56 k parameters, 5.09 M MACs, 0.0655 MB of activations at the peak
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"got {path}, which is not there; need a file that save() wrote")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"got {path}, cut short or damaged ({error}); save it again") from error
    text = metadata.get("dnal_mini")
    if text is None:
        raise ValueError(f"got {path} without a dnal_mini spec; need a file that save() wrote")
    if metadata.get("sha256") != _digest(text, tensors):
        raise ValueError(f"got {path}, edited since it was saved (checksum differs); save it again")
    spec = json.loads(text)
    if missing := sorted(PARTS - set(spec)):
        raise ValueError(f"got {path} whose spec lacks {', '.join(missing)}; save it again")
    module = build(**_arguments(build, spec["config"] or {}))
    spec = _of_this_format(spec, module, path)
    operate(module, spec["modules"])
    try:
        module.load_state_dict(tensors)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise ValueError(f"got {path} of another net than build() gives ({reason})") from error
    _run_once(module, spec["image_shape"], path)
    report, certificate = Report(**spec["report"]), spec["certificate"]["absolute"]
    return Pruned(module, spec, report, certificate)


@torch.no_grad()
def _run_once(net: nn.Module, image_shape: list[int], path: Path) -> None:
    """Raises: ValueError if the rebuilt network does not take an image: its spec is wrong."""
    like = next(net.parameters())
    try:
        with evaluating(net):
            net(torch.zeros(1, *image_shape).to(like))
    except (RuntimeError, IndexError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"got {path} whose net cannot run ({reason}); save it again") from error


def _of_this_format(spec: dict[str, Any], net: nn.Module, path: Path) -> dict[str, Any]:
    """The spec as this version writes it.

    Raises: ValueError for a file of a later version, with what to do.
    """
    version = spec.get("format")
    if version not in (1, FORMAT):
        raise ValueError(
            f"got {path} of format {version}; this version reads 1 to {FORMAT}: install the "
            "version of dnal-mini that wrote it, or a later one"
        )
    if version == FORMAT:
        return spec
    modules = {name: dict(entry) for name, entry in spec["modules"].items()}
    grouped = {n for n, m in net.named_modules() if getattr(m, "groups", 1) > 1}
    for name in grouped & set(modules):  # a depthwise layer was cut by its outputs alone
        if out := modules[name].get("out"):
            modules[name] |= {"in": out, "groups": len(out)}
    certificate = {"absolute": spec["certificate"]}
    return spec | {"format": FORMAT, "modules": modules, "certificate": certificate}


def _arguments(build: Callable, config: dict[str, Any]) -> dict[str, Any]:
    """The stored keyword arguments that ``build`` takes."""
    known = inspect.signature(build).parameters
    return {name: value for name, value in config.items() if name in known}


def _digest(text: str, tensors: dict[str, Tensor]) -> str:
    """SHA-256 over the spec and every tensor's name, dtype and bytes."""
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name}:{tensor.dtype}".encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
