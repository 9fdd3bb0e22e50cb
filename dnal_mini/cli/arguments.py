"""The words of a command line as typed settings, and one line for a word that is not known.

For ``__main__`` only; knows no command and reads no file. Read ``overrides`` first.
"""

import contextlib
import io
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

from dnal_mini.config import Budget, SearchConfig, known
from dnal_mini.methods import METHODS
from dnal_mini.refused import Refused, need_folder


def overrides(words: list[str], config: SearchConfig) -> dict[str, Any]:
    """``--field value`` pairs as a dict of typed values; "out" and "budget" may be among them.

    The fields of all methods are known here; ``SearchConfig.replace`` says whose they are.

    Raises: ValueError for a word without a flag, a flag without a value or twice, an unknown field,
    or a value of another type.
    """
    types = get_type_hints(type(config)) | {"method": str, "out": str}
    for method in METHODS.values():
        types |= {field.name: get_type_hints(method)[field.name] for field in fields(method)}
    budget = {f"budget.{field.name}": float for field in fields(Budget)}
    names = [name for name in types if name not in ("budget", "ranges")]
    rest, values, share = list(words), {}, {}
    while rest:
        flag, equals, text = rest.pop(0).partition("=")
        if not flag.startswith("--"):
            raise Refused(f"got {flag!r} alone; need --field value; do put the recipe first")
        name = flag[2:].replace("-", "_").replace("target_macs", "budget.macs")
        name = known(name, [*names, *budget], "field")
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise Refused(f"got {flag} alone; need {flag} VALUE; do add the value")
            text = rest.pop(0)
        if name in values or name.partition(".")[2] in share:
            raise twice(flag)
        if name in budget:
            share[name.partition(".")[2]] = typed(flag, text, float)
        else:
            values[name] = typed(flag, text, types[name])
    return values | ({"budget": Budget(**share)} if share else {})


def twice(flag: str) -> Refused:
    """An option that comes again: which of the two is meant?"""
    return Refused(f"got {flag} twice; need it once; do leave one out")


def typed(flag: str, value: Any, kind: Any) -> Any:
    """The value as one of the annotation, read by tyro.

    Raises: ValueError for a value of another type, with what is needed.
    """
    import tyro

    values = value if isinstance(value, list) else [value]
    words = [str(word).capitalize() if kind is bool else str(word) for word in values]
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # tyro's box, said in one line below
            return tyro.cli(kind, args=words, console_outputs=False)
    except SystemExit:
        choices = (True, False) if kind is bool else getattr(kind, "__args__", (kind,))
        need = " or ".join(str(getattr(choice, "__name__", choice)) for choice in choices)
        got = " ".join(repr(word) for word in values)
        raise Refused(f"got {flag} {got}; need {need}; do see dnal run --help") from None


def take(words: list[str], flag: str) -> str | None:
    """The text of ``--flag TEXT`` or ``--flag=TEXT``, taken out of the words; None if not there.

    Raises: ValueError for a flag without a text, or twice.
    """
    found = take_all(words, flag, 1)
    if found is None:
        return None
    if not found or not found[0]:
        raise Refused(f"got {flag} alone; need {flag} VALUE; do add the value")
    return found[0]


def take_folder(words: list[str], flag: str) -> Path | None:
    """The folder of ``--flag DIR`` as ``take``, there or to be made.

    Raises: ValueError for anything else.
    """
    text = take(words, flag)
    return None if text is None else need_folder(text, flag)


def take_all(words: list[str], flag: str, most: int | None = None) -> list[str] | None:
    """The texts of ``--flag A B ...``, taken out of the words; None if the flag is not there.

    ``most``: how many it takes, the rest is left. Raises: ValueError for a flag that comes twice.
    """
    found: list[str] | None = None
    at = 0
    while at < len(words):
        name, equals, text = words[at].partition("=")
        if name.replace("_", "-") != flag:
            at += 1
            continue
        if found is not None:
            raise twice(flag)
        last = len(words) if most is None else min(len(words), at + 1 + most)
        end = at + 1
        while not equals and end < last and not words[end].startswith("--"):
            end += 1
        found = [text] if equals else words[at + 1 : end]
        del words[at:end]
    return found


def paths_and_switches(words: list[str], switches: tuple[str, ...]) -> tuple[list[Path], set[str]]:
    """Folders and files, and which of the command's switches are among the words."""
    paths = [Path(word) for word in words if not word.startswith("-")]
    flags = [word for word in words if word.startswith("-")]
    if again := [flag for k, flag in enumerate(flags) if flag in flags[:k]]:
        raise twice(again[0])
    if not all(words):
        raise Refused("got '' for a path; need the name of a file or folder; do leave it out")
    return paths, {known(flag, switches, "option") for flag in flags}


def print_fields(config: SearchConfig, command: str) -> None:
    """tyro's help page: every field with its value in this recipe and what it is for."""
    import tyro

    with contextlib.suppress(SystemExit):
        tyro.cli(
            type(config),
            default=config,
            args=["--help"],
            prog=command,
            description=(
                f"The recipe {config.name}, with its settings. Results go to stdout. "
                f"--method {{{','.join(METHODS)}}} (default: {config.method.name}) decides which "
                "channels stay and brings its own settings: --method NAME --help shows them. "
                f"--{' or --'.join(f'budget.{field.name}' for field in fields(Budget))} SHARE: "
                "what the pruned net may cost, as a share of the dense one."
            ),
            config=(
                tyro.conf.FlagConversionOff,
                tyro.conf.OmitArgPrefixes,
                tyro.conf.AvoidSubcommands,
            ),
        )
