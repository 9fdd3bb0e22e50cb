"""What a run was made with: versions, commit, device, time."""

import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib import import_module, metadata
from pathlib import Path

from dnal_mini.runs.runlog import Row


def describe_run(device: str = "cpu") -> Row:
    """Versions, commit, device and time of writing: what a reader needs to repeat a run."""
    commit, dirty = _commit()
    return {
        "versions": versions(),
        "commit": commit,
        "dirty": dirty,
        "device": _device(device),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def versions() -> dict[str, str | None]:
    """Installed versions, read from the packages' metadata: nothing is imported for it."""
    found = {
        "python": platform.python_version(),
        "dnal_mini": import_module("dnal_mini").__version__,
    }
    for name in ("torch", "torchvision", "numpy"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def _commit() -> tuple[str | None, bool | None]:
    """Commit of the package's checkout, and whether the package differs from it.

    (None, None) for an installed package: a repository that merely contains the environment does
    not track this file.
    """
    package = Path(__file__).resolve().parents[1]

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(package), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
        return done.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", ".")
        return git("rev-parse", "HEAD"), bool(git("status", "--porcelain", "--", "."))
    except (OSError, subprocess.SubprocessError):
        return None, None


def _device(device: str) -> Row:
    """Type and name of the device, threads that torch computes with, cores of the machine."""
    import torch

    chosen = torch.device(device)
    name = torch.cuda.get_device_name(chosen) if chosen.type == "cuda" else _processor()
    counts = {"threads": torch.get_num_threads(), "cpu_count": os.cpu_count()}
    return {"type": chosen.type, "name": name, **counts}


def _processor() -> str:
    """The processor's own name where the system tells it, else its family."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
