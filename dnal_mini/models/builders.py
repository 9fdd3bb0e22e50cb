"""Networks by name: one of ``MODELS``, or ``package.module:function`` of the user's own.

Read ``build_named``. A function of the user's is imported and called; nothing else here runs code.
"""

import inspect
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import nn

from dnal_mini.models import MODELS
from dnal_mini.refused import Refused

NAME = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")  # package.module:function
ASKED = ("width", "image_size")  # given only where a signature has them


def is_builder(name: str) -> bool:
    """True for a name that a network can be built from."""
    return name in MODELS or NAME.fullmatch(name) is not None


def can_import(name: str) -> bool:
    """False for a builder whose module is not there, and for the class of a given net."""
    if name in MODELS:
        return True
    with _here():
        try:
            return is_builder(name) and find_spec(name.partition(":")[0]) is not None
        except ModuleNotFoundError:  # not even the package around it
            return False


def takes(name: str, argument: str) -> bool:
    """True if the builder of that name has the argument in its signature."""
    with _here():
        return argument in _arguments_of(_function(name))


def build_named(name: str, num_classes: int, **asked: Any) -> nn.Module:
    """A network by its builder's name, and how it was made in its ``config``, if it has none.

    ``asked``: width and image_size, given only where the signature has them. The folder that the
    process stands in can be imported from.

    Raises: ValueError for a module, function or network that is none, or a width that is not 1
    and that the function does not take.
    """
    with _here():
        function = _function(name)
        known = _arguments_of(function)
        if "width" not in known and asked.get("width", 1.0) != 1.0:
            raise Refused(
                f"got width {asked['width']} for {name}, which has no argument width; need 1; do "
                "set --width 1, or give the function one"
            )
        arguments = {"num_classes": num_classes}
        arguments |= {each: asked[each] for each in ASKED if each in known and each in asked}
        if name in MODELS:
            return function(**arguments)
        try:
            net = function(**arguments)
        except Exception as error:  # whatever the user's code raises
            told = ", ".join(f"{key}={value}" for key, value in arguments.items())
            raise Refused(
                f"got {type(error).__name__} from {name}({told}): {_first_line(error)}; need a "
                "function that gives a network for these arguments; do mend it"
            ) from error
    if not isinstance(net, nn.Module):
        raise Refused(
            f"got a {type(net).__name__} from {name}; need an nn.Module; do return the network"
        )
    if not hasattr(net, "config"):  # written into saved files: what to call the function with
        net.config = {"builder": name} | arguments  # type: ignore[assignment]
    return net


def _function(name: str) -> Callable[..., Any]:
    """What a name stands for. Raises: ValueError if there is no such thing to call."""
    if name in MODELS:
        return MODELS[name]
    if not is_builder(name):
        raise Refused(
            f"got model {name}; need package.module:function, or the net itself where a run was "
            "given one; do call dnal.run(config, out, net=...) again, or give --model its builder"
        )
    module, _, inner = name.partition(":")
    try:
        found: Any = import_module(module)
    except Exception as error:  # of the user's module, or of one that it imports
        raise Refused(
            f"got module {module}, which cannot be imported ({type(error).__name__}: "
            f"{_first_line(error)}); need one that can from {Path.cwd()}; do change the folder, "
            "or set PYTHONPATH"
        ) from error
    for part in inner.split("."):
        if not hasattr(found, part):
            names = [each for each, value in vars(found).items() if _is_own(value, module)]
            near = f" ({', '.join(names[:8])})" if names else ""
            raise Refused(f"got {name}, and {module} has no {inner}; need a function of it{near}")
        found = getattr(found, part)
    if not callable(found):
        raise Refused(f"got {name}, a {type(found).__name__}; need a function or class to call")
    return found


def _is_own(value: Any, module: str) -> bool:
    return callable(value) and getattr(value, "__module__", "") == module


def _arguments_of(function: Callable[..., Any]) -> set[str]:
    try:
        return {*inspect.signature(function).parameters}
    except (TypeError, ValueError):  # compiled code does not tell
        return set()


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), "no reason given")


@contextmanager
def _here() -> Iterator[None]:
    """The present folder can be imported from, as it can by ``python -m``."""
    here = str(Path.cwd())
    if here in sys.path or "" in sys.path:
        yield
        return
    sys.path.insert(0, here)
    try:
        yield
    finally:
        sys.path.remove(here)
