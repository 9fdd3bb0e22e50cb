"""What a run is made of beside its settings: its images, and a network of the user's own.

Both are told in the first row of a record, and compared before anything is answered, resumed or
taken over. Read ``check_made_of``.
"""

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dnal_mini.data.imageset import ImageSet
from dnal_mini.pruning.netfile import probe
from dnal_mini.refused import Refused
from dnal_mini.runs.reopen import recorded
from dnal_mini.runs.runlog import Row

APART = 1e-3  # relative: how far two answers of one network may be apart on two machines


def images_of(data: ImageSet) -> Row:
    """What a record says of its images."""
    sizes = {"train": len(data.train), "val": len(data.val)}
    return {"name": data.name, **sizes, "fingerprint": data.fingerprint()}


def net_of(net: nn.Module, data: ImageSet, given: bool) -> Row:
    """What a record says of a network that is not one of ours as its seed makes it.

    ``structure``: digest of names and classes of its modules, shapes of parameters and buffers.
    ``weights``: digest of all that it starts with, if it was ``given`` with them; None if a
    builder drew them from the seed. ``answer``: what it says to two images, for what no digest
    sees, such as another stride or forward. ``num_classes``: to call a builder with.
    """
    return {
        "class": class_of(net),
        "params": sum(parameter.numel() for parameter in net.parameters()),
        "structure": _structure(net),
        "weights": _weights(net) if given else None,
        "answer": [float(f"{x:.6g}") for x in probe(net, data.image_shape, 0)[0]["numbers"]],
        "num_classes": data.num_classes,
    }


def class_of(net: nn.Module) -> str:
    """The class of a network with its module, as a run's settings name it."""
    return f"{type(net).__module__}.{type(net).__qualname__}"


def _structure(net: nn.Module) -> str:
    lines = [f"{name} {type(module).__qualname__}" for name, module in net.named_modules()]
    tensors = (*net.named_parameters(), *net.named_buffers())
    lines += [f"{name} {tuple(tensor.shape)} {tensor.dtype}" for name, tensor in tensors]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def _weights(net: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, value in net.state_dict().items():
        if isinstance(value, Tensor):
            plain = value.detach().cpu().contiguous().view(-1).view(torch.uint8)
            digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
            digest.update(plain.numpy().tobytes())
        else:
            digest.update(f"{name} {value!r}".encode())
    return digest.hexdigest()[:16]


def check_made_of(folder: Path, ours: Row) -> None:
    """Compare images and network of the run in a folder with ours: "data" and "net" of a record.

    What one of them does not tell, as older versions did not, is not compared.
    Raises: ValueError with what differs.
    """
    theirs = recorded(folder)
    if theirs.get("data") and ours.get("data"):
        _check_images(folder, theirs["data"], ours["data"])
    if theirs and "net" in ours:
        _check_net(folder, theirs.get("net"), ours["net"])


def _check_images(folder: Path, theirs: Row, ours: Row) -> None:
    if theirs.get("fingerprint", ours["fingerprint"]) == ours["fingerprint"]:
        return
    now, then = (
        f"{d['train']} to train and {d['val']} to validate (fingerprint {d['fingerprint']})"
        for d in (ours, theirs)
    )
    raise Refused(
        f"got images, {now}, that are not those of {folder}; need {then}; do restore them, or "
        "start in a new folder (--out)"
    )


def _check_net(folder: Path, theirs: Row | None, ours: Row | None) -> None:
    do = "do give that one, or start in a new folder (--out)"
    if theirs is None or ours is None:
        if theirs is not ours:
            now, then = (
                "weights drawn from the seed"
                if net is None
                else f"given weights ({net['weights']})"
                for net in (ours, theirs)
            )
            raise Refused(f"got {now} to start from in {folder}; need {then}; {do}")
        return
    if theirs["structure"] != ours["structure"]:
        now, then = (f"{net['class']}, {net['params']:,} parameters" for net in (ours, theirs))
        raise Refused(
            f"got another net than that of {folder}: {now} (structure {ours['structure']}); need "
            f"{then} (structure {theirs['structure']}); {do}"
        )
    if theirs["weights"] != ours["weights"]:
        now, then = (net["weights"] or "drawn from the seed" for net in (ours, theirs))
        raise Refused(
            f"got a net that starts from other weights ({now}) than the run in {folder}; need "
            f"those ({then}); {do}"
        )
    if not _near(theirs["answer"], ours["answer"]):
        raise Refused(
            f"got a net that answers otherwise than the one of {folder}, with the same modules "
            f"({ours['class']}); need its forward, and its layers' settings, as they were; {do}"
        )


def _near(theirs: list[Any], ours: list[Any]) -> bool:
    """True for numbers that one network can have answered; None stands for no number."""
    if len(theirs) != len(ours):
        return False
    a, b = (torch.tensor([x or 0.0 for x in row], dtype=torch.float64) for row in (theirs, ours))
    return bool((a - b).abs().max() <= APART * max(float(a.abs().max()), 1e-12))
