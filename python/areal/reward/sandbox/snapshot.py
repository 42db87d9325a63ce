"""The modules that tests rely on, as they were before the program ran, and put back before its tests run.

A program may replace ``builtins.all``, ``math.isclose`` or the code of ``unittest.TestCase.assertEqual``; it earns nothing by that. What it
adds to a module stays: honest programs do that.
"""

from __future__ import annotations

import builtins
import gc
import importlib
import sys
import types
from collections.abc import Callable, Iterable
from typing import Any

from .own import BUILTINS as __builtins__  # type: ignore[no-redef]  # noqa: F401
from .unit import BENEATH, fresh_loader

PREIMPORTED = (
    "abc",
    "argparse",
    "array",
    "ast",
    "base64",
    "bisect",
    "builtins",
    "calendar",
    "cmath",
    "collections",
    "collections.abc",
    "contextlib",
    "copy",
    "dataclasses",
    "datetime",
    "decimal",
    "difflib",
    "enum",
    "fractions",
    "functools",
    "hashlib",
    "heapq",
    "inspect",
    "io",
    "itertools",
    "json",
    "math",
    "numbers",
    "operator",
    "os",
    "os.path",
    "pickle",
    "pprint",
    "queue",
    "random",
    "re",
    "secrets",
    "statistics",
    "string",
    "struct",
    "sys",
    "tempfile",
    "textwrap",
    "threading",
    "time",
    "traceback",
    "types",
    "typing",
    "unittest",
    "unittest.mock",
    "uuid",
    "warnings",
    "weakref",
    "zlib",
)
"""In the fork server's memory, so that programs import them for nothing."""

_CHANGEABLE = 1 << 8 | 1 << 9  # type flags: immutable, on the heap
_NOT_OURS_TO_SET = frozenset(("__dict__", "__weakref__", "__abstractmethods__", "_abc_impl"))
_SYS = (
    *("__displayhook__", "__excepthook__", "__stderr__", "__stdin__", "__stdout__", "displayhook", "excepthook", "unraisablehook"),
    *("argv", "meta_path", "modules", "path", "path_hooks", "stderr", "stdin", "stdout", "exit"),
)
"""Of ``sys`` by default; all of it only for tests that use it. Every object that is touched costs the copy of a page."""
_Function = types.FunctionType
_DESCRIPTORS = (staticmethod, classmethod, property)
_FREE = frozenset(("input", "print", "open", "exit", "quit", "help", "breakpoint", "copyright", "credits", "license"))
"""Builtins that no verdict depends on."""


class _Module:
    """One module as it was: its names, its classes and the code of its functions."""

    def __init__(self, module: types.ModuleType) -> None:
        self.module = module
        self.names = vars(module)
        self.saved_names = dict(self.names)
        self.classes: list[tuple[type, tuple[type, ...], dict[str, Any]]] = []
        self.functions: list[tuple[types.FunctionType, Any, Any, Any]] = []
        self.cells: list[tuple[types.CellType, Any]] = []
        for value in self.saved_names.values():
            if isinstance(value, _Function) and value.__module__ == module.__name__:
                self._add_function(value)
            elif isinstance(value, type) and value.__module__ == module.__name__ and value.__flags__ & _CHANGEABLE == 1 << 9:
                self.classes.append((value, value.__bases__, dict(vars(value))))
                for member in vars(value).values():
                    function = getattr(member, "__func__", member)
                    if isinstance(function, _Function):
                        self._add_function(function)

    def _add_function(self, function: types.FunctionType) -> None:
        if any(known is function for known, *_ in self.functions[-4:]):
            return
        self.functions.append((function, function.__code__, function.__defaults__, function.__kwdefaults__))
        for cell in function.__closure__ or ():
            try:
                self.cells.append((cell, cell.cell_contents))
            except ValueError:  # empty
                continue
            if isinstance(cell.cell_contents, _Function) and cell.cell_contents.__module__ == function.__module__:
                self._add_function(cell.cell_contents)  # what a decorator has wrapped

    def changed(self, by_tests: frozenset[str]) -> str:
        """A function or class that is another one than it was, if there is any; names that the tests themselves set do not count."""
        for name, value in self.saved_names.items():
            if callable(value) and self.names.get(name) is not value and name not in by_tests:
                return name
        for function, code, defaults, keywords in self.functions:
            if function.__code__ is not code or function.__defaults__ is not defaults or function.__kwdefaults__ is not keywords:
                return function.__name__
        for cell, contents in self.cells:
            if callable(contents) and cell.cell_contents is not contents:
                return self.saved_names["__name__"]
        for kind, bases, saved in self.classes:
            live = vars(kind)
            if kind.__bases__ != bases:
                return kind.__name__
            for name, value in saved.items():
                if live.get(name) is not value and (callable(value) or isinstance(value, _DESCRIPTORS)) and name not in by_tests:
                    return name
        return ""

    def restore(self) -> None:
        if type(self.module) is not types.ModuleType and self.saved_names.get("__name__") != "os":
            self.module.__class__ = types.ModuleType
        self.names.update(self.saved_names)
        sys.modules[self.saved_names["__name__"]] = self.module
        for function, code, defaults, keywords in self.functions:
            if function.__code__ is not code:
                function.__code__ = code
            if function.__defaults__ is not defaults:
                function.__defaults__ = defaults
            if function.__kwdefaults__ is not keywords:
                function.__kwdefaults__ = keywords
        for cell, contents in self.cells:
            if cell.cell_contents is not contents:
                cell.cell_contents = contents
        for kind, bases, saved in self.classes:
            if kind.__bases__ != bases:
                kind.__bases__ = bases
            _restore_class(kind, saved)


def _restore_class(kind: type, saved: dict[str, Any]) -> None:
    live = vars(kind)
    for name in [name for name in live if name not in saved and name not in _NOT_OURS_TO_SET]:
        type.__delattr__(kind, name)
    for name, value in saved.items():
        if name not in _NOT_OURS_TO_SET and live.get(name) is not value:
            type.__setattr__(kind, name, value)


class Snapshot:
    """All of ``modules``; what is put back are those that a program's tests use, because touching an object costs a copy of its page."""

    def __init__(self, modules: Iterable[str]) -> None:
        self._modules: dict[str, _Module] = {}
        self._inside: dict[str, list[str]] = {}
        self._interpreter = {name: getattr(sys, name) for name in _SYS}
        self._known: frozenset[int] = frozenset()
        for name in modules:
            self.add(name)

    def add(self, name: str) -> None:
        """A module and those inside it, as they are now.

        Raises:
            ImportError: it cannot be imported.
        """
        importlib.import_module(name)
        self._inside[name] = []
        for loaded in [m for m in sys.modules if m == name or m.startswith(name + ".")]:
            if loaded not in self._modules and type(sys.modules[loaded]) is types.ModuleType:
                self._modules[loaded] = _Module(sys.modules[loaded])
            if loaded in self._modules:
                self._inside[name].append(loaded)

    def has(self, name: str) -> bool:
        return name in self._inside

    def knows(self, kind: type) -> bool:
        """Whether a class was one of the modules' that the tests use, before the program ran."""
        return id(kind) in self._known

    def _chosen(self, used: Iterable[str]) -> list[_Module]:
        roots = [*used, *(BENEATH if _has_unittest(used) else ())]
        return [self._modules[name] for root in dict.fromkeys(roots) for name in self._inside.get(root, ())]

    def restorer(self, used: Iterable[str]) -> tuple[Callable[[], None], Callable[[frozenset[str]], str]]:
        """What puts back the modules ``used``, with those inside them, and the interpreter's own; and what tells whether they still are
        so when the tests have ended. They look up no name that a program could have changed."""
        chosen = self._chosen(used)
        self._known = frozenset(id(kind) for module in chosen for kind, _, _ in module.classes)
        settrace, setprofile, collector = sys.settrace, sys.setprofile, gc.callbacks
        live, saved = vars(builtins), self._modules["builtins"].saved_names
        interpreter, with_unittest = vars(sys), _has_unittest(used)

        def restore() -> None:
            settrace(None)
            setprofile(None)
            live.update(saved)
            interpreter.update(self._interpreter)
            interpreter["argv"] = ["solution.py"]
            collector.clear()
            for module in chosen:
                module.restore()
            if with_unittest:
                fresh_loader()

        def changed(by_tests: frozenset[str]) -> str:
            for name, value in saved.items():
                if live.get(name) is not value and name not in by_tests and name not in _FREE and callable(value):
                    return name
            return next((name for module in chosen if (name := module.changed(by_tests))), "")

        return restore, changed


def _has_unittest(used: Iterable[str]) -> bool:
    return any(name.partition(".")[0] == "unittest" for name in used)
