"""The one error that says to a user: not so; and what public functions ask of their arguments.

What is raised otherwise is a fault of the program.
"""

import inspect
import math
import os
from collections.abc import Collection, Iterable, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from torch import nn

LONGEST_NAME = 255  # bytes of a file name, on all usual file systems
LARGEST_SIDE = 65536  # pixels of an image
MOST_NUMBERS = 2**30  # of one image
LARGEST_SEED = 2**62  # of a generator
# What a forward raises at images that it was not built for, or at calls of another kind.
UNFIT = (RuntimeError, TypeError, ValueError, LookupError)


class Refused(ValueError):
    """Got this, need that, do so: one line that names the real cause."""


def line_of(error: BaseException) -> str:
    """First line of an error's text, or its type."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def shown(value: object) -> str:
    """Anything in one short line."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:60]}… ({type(value).__name__})"


def need_module(net: Any, name: str = "net") -> None:
    """Raises: ValueError for what is no network."""
    if isinstance(net, nn.Module):
        return
    do = "build it first" if callable(net) else "pass the network itself"
    do = "pass its .module" if isinstance(getattr(net, "module", None), nn.Module) else do
    raise Refused(f"got {name} {shown(net)}; need an nn.Module; do {do}")


def need_numbers(net: Any, name: str = "net") -> None:
    """Raises: ValueError for what is no network, or one without numbers of its own."""
    need_module(net, name)
    if bare := [key for key, tensor in net.named_parameters() if tensor.is_meta]:
        raise Refused(
            f"got {name} with {bare[0]} on the meta device, where tensors hold no numbers; need "
            "weights; do build it on a device, or load them with assign=True"
        )


def need_shape(image_shape: Any, dims: Collection[int] = (1, 2, 3, 4)) -> tuple[int, ...]:
    """Channels, then height and width or what else there is. Raises: ValueError for others."""
    sizes: tuple[Any, ...] = tuple(image_shape) if isinstance(image_shape, Sequence) else ()
    whole = all(isinstance(n, Integral) and not isinstance(n, bool) for n in sizes)
    if len(sizes) not in dims or not whole or not all(n > 0 for n in sizes):
        need = "positive ints, such as channels, height, width"
        raise Refused(f"got image_shape {shown(image_shape)}; need {need}; do leave the batch out")
    if math.prod(sizes) > MOST_NUMBERS:
        raise Refused(f"got image_shape {shown(image_shape)}; need at most {MOST_NUMBERS} numbers")
    return tuple(map(int, sizes))


def need_number(
    name: str,
    value: Any,
    low: float = -math.inf,
    high: float = math.inf,
    *,
    whole: bool = False,
    ends: bool = True,
) -> Any:
    """The value as a plain number; ``ends``: it may be ``low`` or ``high`` too.

    Raises: ValueError for what is no finite number of the range, or no int where one is needed.
    """
    value = value.item() if getattr(value, "shape", None) == () else value
    kind: Any = Integral if whole else Real
    finite = isinstance(value, kind) and not isinstance(value, bool) and abs(value) < math.inf
    if finite and (low <= value <= high if ends else low < value < high):
        return value
    what = "an int" if whole else "a finite number"
    least = "" if low == -math.inf else f" of at least {low:g}" if ends else f" above {low:g}"
    most = "" if high == math.inf else f" up to {high:g}" if ends else f" and below {high:g}"
    raise Refused(f"got {name} {shown(value)}; need {what}{least}{most}")


def need_name(name: str, value: Any) -> None:
    """Raises: ValueError for what could not be the name of one file or folder."""
    plain = isinstance(value, str) and value.strip(". ") and value.isprintable()
    if not plain or {*"/\\"} & {*value} or len(os.fsencode(value)) > LONGEST_NAME // 2:
        raise Refused(f"got {name} {shown(value)}; need a name without / or \\, as of a folder")


def need_word(name: str, value: Any, words: Iterable[str]) -> None:
    """Raises: ValueError for what is none of the words."""
    words = tuple(words)
    if not isinstance(value, str) or value not in words:
        raise Refused(f"got {name} {shown(value)}; need one of {', '.join(words)}")


def need_callable(name: str, value: Any, *takes: str) -> None:
    """Raises: ValueError for what cannot be called with these, if any; a network is none, too."""
    need = f"need a function of ({', '.join(takes)})" if takes else "need a function"
    if not callable(value) or isinstance(value, nn.Module):
        raise Refused(f"got {name} {shown(value)}; {need}")
    try:
        inspect.signature(value).bind(*takes) if takes else None
    except TypeError as error:
        raise Refused(f"got {name} {shown(value)} ({error}); {need}") from error
    except ValueError:  # one of C, that does not tell
        return


def need_folder(value: Any, what: str = "folder (--out)") -> Path:
    """A folder that is there or could be made. Raises: ValueError for anything else."""
    path = need_path(value, what)
    there = next((place for place in (path, *path.parents) if os.path.lexists(place)), Path())
    if not there.is_dir():
        raise Refused(f"got {what} {path}, where {there} is no folder; need one; do choose another")
    return path


def need_path(value: Any, what: str = "path") -> Path:
    """A path that a file system could have. Raises: ValueError for anything else."""
    if isinstance(value, str | os.PathLike) and isinstance(text := os.fspath(value), str):
        long = any(len(os.fsencode(part)) > LONGEST_NAME for part in Path(text).parts)
        if text and "\0" not in text and not long:
            return Path(text)
    raise Refused(f"got {what} {shown(value)}; need the path of a file or folder; do give one")
