"""What not every system has; a test that asks for it in vain skips itself."""

import os
from pathlib import Path

import pytest


def pipe(path: str | Path) -> str:
    """Make a named pipe; returns its path."""
    if not hasattr(os, "mkfifo"):
        pytest.skip("Windows has no named pipes among its files")
    os.mkfifo(path)
    return str(path)


def device(path: str) -> str:
    """The path of a device such as /dev/zero."""
    if not Path(path).exists():
        pytest.skip(f"this system has no {path}")
    return path


def obeys_permissions() -> bool:
    """Whether a mode keeps this user out: not on Windows, and not the superuser."""
    return hasattr(os, "geteuid") and os.geteuid() != 0
