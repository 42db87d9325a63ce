"""Objects that claim to equal everything: an answer of that kind is none.

The tests are compiled so that every operand of their comparisons goes through a ``Look``. An object of a class that the program defined is
compared with things made this moment, which nothing honest equals.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Iterator
from os import urandom
from typing import Any

from .snapshot import Snapshot

_PLAIN = frozenset((int, float, str, bool, bytes, complex, type(None), type, range, bytearray, type(...), type(NotImplemented), object))
_CONTAINERS = frozenset((list, tuple, set, frozenset, dict, deque, defaultdict, OrderedDict, Counter))
_SEQUENCES = (list, tuple, set, frozenset, deque)
_MAX_DEPTH = 50
_MAX_OBJECTS = 1_000_000


class _Unheard:
    """An object like any other."""


class Look:
    """Called with a value, returns it; ``found`` tells of a cheat ever after."""

    __slots__ = ("_left", "_seen", "_snapshot", "found")

    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot
        self.found = False

    def __call__(self, value: Any) -> Any:
        if type(value) not in _PLAIN:
            self._left = _MAX_OBJECTS
            self._look(value, 0)
        return value

    def _look(self, value: Any, depth: int) -> None:
        kind = type(value)
        if kind in _PLAIN:
            return
        self._left -= 1
        if depth > _MAX_DEPTH or self._left < 0:
            return
        if kind not in _CONTAINERS and not self._snapshot.knows(kind) and self._claims_everything(value):
            self.found = True
            raise AssertionError(f"an object of class {kind.__name__} says that it equals everything")
        if isinstance(value, dict):
            for key, item in dict.items(value):
                self._look(key, depth + 1)
                self._look(item, depth + 1)
        elif isinstance(value, _SEQUENCES):
            for item in _plain_items(value):
                if type(item) not in _PLAIN:
                    self._look(item, depth + 1)

    def _claims_everything(self, value: Any) -> bool:
        kind = type(value)
        for other in (object(), _Unheard(), int.from_bytes(urandom(25)), urandom(25).hex(), [urandom(25)]):
            for name in (
                ("__eq__", "__contains__")
                if other.__class__ is not object
                else ("__eq__", "__lt__", "__le__", "__gt__", "__ge__", "__contains__")
            ):
                method = getattr(kind, name, None)
                if method is not None and _says_yes(method, value, other):
                    return True
        return False


def _says_yes(method: Any, value: Any, other: Any) -> bool:
    try:
        answer = method(value, other)
        return answer is not NotImplemented and bool(answer)
    except Exception:  # the program's own code, asked something it never expected
        return False


def _plain_items(value: Any) -> Iterator[Any]:
    """Its items, whatever ``__iter__`` a subclass has."""
    kind: Any = next(kind for kind in _SEQUENCES if isinstance(value, kind))
    return kind.__iter__(value)
