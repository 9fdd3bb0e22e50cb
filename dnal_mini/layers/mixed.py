"""A layer gains a habit by a change of its class, in place: nothing is wrapped or renamed.

So it keeps its name, its parameters at their names, hooks and flags, its place in the user's lists,
and what ``isinstance`` says of it. Read ``adopt``.
"""

from functools import cache
from typing import Any


class Mixed:
    """What a class of ``mixed`` has besides that of the layer and that of the habit."""

    habit: type
    plain: type

    def __reduce_ex__(self, protocol: Any) -> Any:
        made: Any = super().__reduce_ex__(protocol)
        return _blank, parts(type(self)), *made[2:]  # pickle cannot find the class by its name


@cache
def mixed(plain: Any, habit: Any) -> Any:
    """The class of layers of the class ``plain`` with a habit; one and the same for each pair."""
    own = {"habit": habit, "plain": plain, "__module__": habit.__module__}
    return type(f"{habit.__name__}{plain.__name__}", (habit, plain), own)


def parts(kind: Any) -> tuple[type, tuple[type, ...]]:
    """The class of a layer without its habits, and these, innermost first."""
    habits: tuple[type, ...] = ()
    while issubclass(kind, Mixed):
        kind, habits = kind.plain, (kind.habit, *habits)
    return kind, habits


def adopt(layer: Any, habit: type) -> None:
    """Give a layer a habit that stands around those that it has, in place."""
    layer.__class__ = _composed(type(layer), (habit,))


def adopt_inside(layer: Any, habit: type) -> None:
    """Give a layer a habit that stands inside those that it has, in place."""
    base, habits = parts(type(layer))
    layer.__class__ = _composed(base, (habit, *habits))


def drop(layer: Any, habit: type) -> None:
    """Take a habit, or what derives from it, from a layer, in place."""
    base, habits = parts(type(layer))
    layer.__class__ = _composed(base, tuple(h for h in habits if not issubclass(h, habit)))


def _composed(base: Any, habits: tuple[type, ...]) -> Any:
    for habit in habits:
        base = mixed(base, habit)
    return base


def _blank(base: type, habits: tuple[type, ...]) -> Any:
    kind = _composed(base, habits)
    return kind.__new__(kind)
