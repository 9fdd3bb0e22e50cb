"""Ctrl-C and SIGTERM: a run ends its step and saves."""

import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

OWN_GROUP: dict[str, Any]
if sys.platform == "win32":  # where a process can be sent nothing but Ctrl-Break, in its own group
    STOP, POLITE = (signal.SIGINT, signal.SIGTERM, signal.SIGBREAK), signal.CTRL_BREAK_EVENT
    OWN_GROUP = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
else:
    STOP, POLITE = (signal.SIGINT, signal.SIGTERM), signal.SIGTERM
    OWN_GROUP = {"start_new_session": True}


@contextmanager
def asked_to_stop() -> Iterator[Callable[[], bool]]:
    """Tells whether SIGINT or SIGTERM has come; a second SIGINT interrupts at once."""
    asked: list[int] = []

    def ask(number: int, _: Any) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    if threading.current_thread() is not threading.main_thread():  # signals go to the main one
        yield lambda: False
        return
    before = {number: signal.signal(number, ask) for number in STOP}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


@contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM, which batch systems send, interrupts as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():  # signals go to the main one
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)
