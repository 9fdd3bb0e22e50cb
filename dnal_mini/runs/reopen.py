"""The settings and the networks that a run left in its folder."""

import json
import warnings
from pathlib import Path
from typing import Any

from torch import nn

from dnal_mini.config import MEANS, SearchConfig, upgraded
from dnal_mini.gating import add_gates, gates
from dnal_mini.methods.contract import Designer
from dnal_mini.models import MODELS
from dnal_mini.models.builders import build_named
from dnal_mini.pruning.foldgates import drop_gates
from dnal_mini.pruning.netfile import load
from dnal_mini.pruning.pruner import Pruned
from dnal_mini.refused import Refused
from dnal_mini.runs import runlog
from dnal_mini.runs.checkpoint import load_state
from dnal_mini.runs.runlog import Row


def settings_in(folder: Path) -> SearchConfig:
    """The settings of the run in a folder; not the record's, which do not say where the data is.

    Raises: ValueError if there are none, if they are another version's, or not the record's.
    """
    path = folder / "config.json"
    try:
        if path.exists() and not path.is_file():  # to open a pipe would wait for ever
            raise Refused("no regular file")
        stored = upgraded(dict(json.loads(path.read_bytes())))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise Refused(f"got {path} ({error}); need a run's settings; do start it anew") from None
    config = SearchConfig.of(stored)
    if told := recorded(folder).get("config"):
        for name, (there, here) in differing(SearchConfig.of(told), config).items():
            raise Refused(
                f"got {path} with {name}={here!r}, the record beside it with {there!r}; need the "
                "settings that the run began with; do restore one of them, or start in a new folder"
            )
    return config


def recorded(folder: Path) -> Row:
    """The first row of a run's record, which says what the run is made of; empty without one."""
    if not (folder / runlog.FILE_NAME).exists():
        return {}
    with warnings.catch_warnings(action="ignore"):  # a cut last line is told where it matters
        rows = runlog.read(folder)
    return rows[0] if rows else {}


def differing(theirs: SearchConfig, ours: SearchConfig) -> dict[str, tuple[Any, Any]]:
    """Settings that differ, by name and without means: (theirs, ours)."""
    a, b = theirs.settings(), ours.settings()
    pairs = {name: (a.get(name), b.get(name)) for name in sorted({*a, *b} - {*MEANS})}
    return {name: (there, here) for name, (there, here) in pairs.items() if there != here}


def nets_in(path: Path, model: str = "") -> tuple[dict[str, nn.Module], tuple[int, ...]]:
    """The dense and the pruned net of a run folder, or the pruned one of a file; their images.

    ``model``: ``package.module:function`` that makes the dense net, where it was given to the run.
    """
    whole = path.is_dir()
    file = path / "small.safetensors" if whole else path
    if whole and not file.exists():
        raise Refused(f"got {path} without {file.name}; need a finished run; do dnal resume it")
    if not whole and path.suffix != ".safetensors":
        raise Refused(f"got {path}; need a run folder or a .safetensors file; do check the path")
    if not whole:
        small = saved(file, model)
        return {"pruned": small.module}, tuple(small.spec["image_shape"])
    config, count = settings_in(path), (recorded(path).get("net") or {}).get("num_classes", 10)
    model = model or config.model
    small = saved(file, "" if isinstance(config.method, Designer) else model, count)
    shape, plain = tuple(small.spec["image_shape"]), build(model, small, config.width, count)
    gated = add_gates(plain, config.order, image_shape=shape)
    return {"dense": _dense(path, config, gated), "pruned": small.module}, shape


def saved(path: Path, model: str = "", num_classes: int = 10) -> Pruned:
    """A file of ``save``, cut from a net of ``model``, or else of ours that the file names.

    No code is imported because a file names it.
    """

    def whole(
        builder: str = "", num_classes: int = num_classes, width: float = 1.0,
        image_size: int | None = None,
    ) -> nn.Module:  # fmt: skip
        if not model and builder not in MODELS:
            raise Refused(
                f"got {path} of another model; need one of {', '.join(MODELS)}, or the function "
                "that made it; do add --model package.module:function, or call dnal.export"
            )
        more = {} if image_size is None else {"image_size": image_size}
        return build_named(model or builder, num_classes, width=width, **more)

    return load(path, whole)


def build(model: str, small: Pruned, width: float, num_classes: int) -> nn.Module:
    """The whole net that a small one was cut from, with new weights."""
    side = small.spec["image_shape"][1]
    sized = {} if side == 32 and model in MODELS else {"image_size": side}
    count = (small.spec["config"] or {}).get("num_classes", num_classes)
    return build_named(model, count, width=width, **sized)


def _dense(folder: Path, config: SearchConfig, net: nn.Module) -> nn.Module:
    """The dense net that the run compared with: the baseline, else as its first stage left it."""
    first, second, *_ = config.stages()
    path = folder / f"{second.name if second.name == 'baseline' else first.name}.pt"
    try:
        net.load_state_dict(load_state(path)["net"])
    except Exception as error:  # torch raises several kinds for a damaged file
        reason = " ".join(str(error.__cause__ or error).split())[:80]
        raise Refused(f"got {path} ({reason}); need this run's; do resume the run") from error
    for gate in gates(net).values():
        nn.init.constant_(gate.s, float("inf"))  # open, whatever delta and threshold
    return drop_gates(net)
