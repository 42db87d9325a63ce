"""Objects that claim to equal everything: an answer of that kind is none.

The tests are compiled so that every operand of their comparisons goes through a ``Look``. An object of a class that the program defined is
asked about pairs of values made this moment. An honest object may equal one of a pair (a number modulo 7 equals many numbers, but never n
and n + 1), and may be greater than all (an infinity), but not equal to both, or greater and less.
"""

from __future__ import annotations

import operator
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator
from os import urandom
from typing import Any

from .own import BUILTINS as __builtins__  # type: ignore[no-redef]  # noqa: F401
from .snapshot import Snapshot

_PLAIN = frozenset((int, float, str, bool, bytes, complex, type(None), type, range, bytearray, type(...), type(NotImplemented), object))
_CONTAINERS = frozenset((list, tuple, set, frozenset, dict, deque, defaultdict, OrderedDict, Counter))
_SEQUENCES = (list, tuple, set, frozenset, deque)
_MAX_DEPTH = 50
_MAX_OBJECTS = 1_000_000
_mro: Callable[[type], tuple[type, ...]] = type.__dict__["__mro__"].__get__  # of the class itself, whatever its metaclass says
_names: Callable[[type], Any] = type.__dict__["__dict__"].__get__


class _Unheard:
    """An object like any other."""


class Look:
    """Called with a value, returns it; ``found`` tells of a cheat ever after."""

    __slots__ = ("_left", "_snapshot", "found")

    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot
        self.found = False

    def __call__(self, value: Any) -> Any:
        kind = type(value)
        if type(kind) is not type or kind not in _PLAIN:  # a metaclass can make a class look like another one
            self._left = _MAX_OBJECTS
            self._look(value, 0)
        return value

    def inside(self, value: Any) -> Any:
        """Of the right side of an ``in``."""
        if _defines(type(value), "__contains__") and not self._known(type(value)) and _both(_contains, value, object(), _Unheard()):
            self._tell(type(value))
        return self(value)

    def _look(self, value: Any, depth: int) -> None:
        kind = type(value)
        if type(kind) is type and kind in _PLAIN:
            return
        self._left -= 1
        if depth > _MAX_DEPTH or self._left < 0:
            return
        if not self._known(kind) and _claims_everything(value):
            self._tell(kind)
        if dict in _mro(kind):
            for key, item in dict.items(value):
                self._look(key, depth + 1)
                self._look(item, depth + 1)
        elif any(base in _SEQUENCES for base in _mro(kind) if type(base) is type):
            for item in _plain_items(value):
                if type(type(item)) is not type or type(item) not in _PLAIN:
                    self._look(item, depth + 1)

    def _known(self, kind: type) -> bool:
        return (type(kind) is type and (kind in _PLAIN or kind in _CONTAINERS)) or self._snapshot.knows(kind)

    def _tell(self, kind: type) -> None:
        self.found = True
        raise AssertionError(f"an object of class {type.__dict__['__name__'].__get__(kind)} says that it equals everything")


def _claims_everything(value: Any) -> bool:
    kind = type(value)
    n = 2 + int.from_bytes(urandom(2))
    if _defines(kind, "__eq__"):
        pairs = (
            (object(), _Unheard()),
            (n, n + 1),
            (n + 0.5, n + 1.25),
            (f"a{n:x}", f"b {n}"),
            ([n], [n + 1]),
            ((n,), (n, 1)),
            (True, False),
        )
        if any(_both(operator.eq, value, one, other) for one, other in pairs):
            return True
    if _defines(kind, "__lt__") and _both(_between, value, n, -n):
        return True
    if _defines(kind, "__sub__"):
        return _both(_near, value, n, -n)
    return _defines(kind, "__rsub__") and _both(_near_from_right, value, n, -n)


def _defines(kind: type, name: str) -> bool:
    return any(base is not object and name in _names(base) for base in _mro(kind))


def _both(holds: Callable[[Any, Any], Any], value: Any, one: Any, other: Any) -> bool:
    try:
        return bool(holds(value, one)) and bool(holds(value, other))
    except BaseException:  # the program's own code, asked something it never expected
        return False


def _contains(value: Any, other: Any) -> bool:
    return other in value


def _between(value: Any, other: Any) -> bool:
    return bool(value < other) and bool(value > other)


def _near(value: Any, other: Any) -> bool:
    return bool(abs(value - other) < 1e-9)


def _near_from_right(value: Any, other: Any) -> bool:
    return bool(abs(other - value) < 1e-9)


def _plain_items(value: Any) -> Iterator[Any]:
    """Its items, whatever ``__iter__`` a subclass has."""
    kind: Any = next(base for base in _mro(type(value)) if type(base) is type and base in _SEQUENCES)
    return kind.__iter__(value)
