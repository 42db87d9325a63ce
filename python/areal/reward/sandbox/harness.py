"""What runs in a program's process: the completion, and then its tests.

Who waits on whom: the judge (judge.py) has sent the completion; it sends the tests, and a token, only after it was told that the
completion's own body has run to its end, and it takes the token, sent back once the whole test program has run, as the only proof of a
pass. How the process ends means nothing. Whatever else arrives at the judge is a failed test.
"""

from __future__ import annotations

import atexit
import builtins
import gc
import linecache
import marshal
import os
import random
import struct
import sys
import threading
import types
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from .audit import refuse_frames
from .look import Look
from .own import BUILTINS
from .own import BUILTINS as __builtins__  # type: ignore[no-redef]  # noqa: F401
from .snapshot import Snapshot
from .unit import Ended, is_unittest, verdicts

STARTED, IMPORT_FAILED, FAULT = b"s", b"i", b"!"
STOP = b"x"
"""The judge's word to the fork server that a program is to end. It may have ended by itself meanwhile."""
HEADER = struct.Struct("<Q")
_NAME = "solution"
PLACE = "\0areal:"
"""How the constants begin in whose places the harness's own functions, and builtins, are put into the code of the tests."""
LOOK, LOOK_INSIDE = PLACE + "?look", PLACE + "?inside"
_RUNS_TESTS = ("load_tests", "setUpModule", "tearDownModule")
"""What unittest would take from a module: the program's are none."""


def read_frame(fd: int, read: Callable[[int, int], bytes] = os.read) -> bytes:
    """One message of the judge.

    Raises:
        EOFError: the judge has gone.
    """

    def exactly(n: int) -> bytes:
        parts = []
        while n:
            part = read(fd, n)
            if not part:
                raise EOFError("the judge has gone")
            parts.append(part)
            n -= len(part)
        return b"".join(parts)

    (size,) = HEADER.unpack(exactly(HEADER.size))
    return exactly(size)


def _begin(name: str) -> types.ModuleType:
    """The module that a program is; the interpreter as a fresh one would be."""
    module = types.ModuleType(name)
    module.__dict__["__builtins__"] = builtins
    sys.modules["__main__"] = module if name == "__main__" else types.ModuleType("__main__")
    sys.modules[_NAME] = module
    random.seed(0)  # the same program has the same score
    gc.enable()
    return module


def run_case(channel: int, source: str) -> NoReturn:
    """A program that reads stdin and writes stdout. The judge compares what it wrote and asks the fork server for its exit status."""
    module = _begin("__main__")
    code = 0
    os.write(channel, STARTED)
    os.close(channel)
    try:
        exec(compile(source, f"{_NAME}.py", "exec", dont_inherit=True), module.__dict__)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 0 if error.code is None else 1
    except BaseException:  # the program's own
        sys.__excepthook__(*sys.exc_info())
        code = 1
    try:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        sys.stdout.flush()
    except BaseException:  # the same
        code = code or 1
    os._exit(code & 0xFF)


def run_tests(channel: int, sources: Sequence[str], nonce: bytes, modules: dict[str, bool], snapshot: Snapshot) -> NoReturn:
    """The completion's body, then the tests in the same module.

    Args:
        sources: the completion; the first that compiles is it.
        modules: what the tests use, and whether they fail without it.
    """
    module = _begin(_NAME)
    # They are there, and known, before the program can change them.
    for index, (name, needed) in enumerate(modules.items()):
        if not snapshot.has(name) and not _import(name, snapshot) and needed:
            os.write(channel, IMPORT_FAILED + bytes([index]))
            os._exit(0)
    look = Look(snapshot)
    names, pid = module.__dict__, os.getpid()
    # What the program cannot reach by changing a module.
    write, leave, getpid, read, loads, show = os.write, os._exit, os.getpid, os.read, marshal.loads, sys.__excepthook__
    run, excinfo, receive, prepare, finish = exec, sys.exc_info, read_frame, _prepare, _run_to_the_end
    restore, changed = snapshot.restorer(modules)
    refuse_frames()
    write(channel, STARTED)
    try:
        run(_compiled(sources), names)
    except:  # noqa: E722  the program's own; even the name BaseException may be its work by now
        show(*excinfo())
        leave(1)
    restore()
    if getpid() != pid:
        leave(0)  # a child that came back out of the program
    write(channel, nonce)
    token, compiled, exits, own_changes = loads(receive(channel, read))
    code = prepare(loads(compiled), names, module, look)
    verdicts.clear()
    if finish(code, names, exits) and all(verdicts) and not look.found and not changed(own_changes):
        write(channel, token)
    leave(0)


def _compiled(sources: Sequence[str]) -> types.CodeType:
    for source in sources:
        try:
            code = compile(source, f"{_NAME}.py", "exec", dont_inherit=True)
        except SyntaxError:
            if source is sources[-1]:
                raise
            continue
        linecache.cache[f"{_NAME}.py"] = len(source), None, source.splitlines(keepends=True), f"{_NAME}.py"
        return code
    raise AssertionError


def _import(name: str, snapshot: Snapshot) -> bool:
    try:
        snapshot.add(name)
    except Exception:  # a module's own code
        return False
    return True


def _prepare(code: types.CodeType, names: dict[str, Any], module: types.ModuleType, look: Look) -> types.CodeType:
    """The tests, with our functions in them, and the module as they expect it."""
    for name in _RUNS_TESTS:
        names.pop(name, None)
    names["__builtins__"] = builtins
    names["__name__"] = "__main__"
    sys.modules["__main__"] = sys.modules[_NAME] = module

    def put(const: Any) -> Any:
        if isinstance(const, types.CodeType):
            return const.replace(co_consts=tuple(map(put, const.co_consts)))
        if isinstance(const, (tuple, frozenset)):
            return type(const)(map(put, const))
        if not isinstance(const, str) or not const.startswith(PLACE):
            return const
        name = const.removeprefix(PLACE)
        return look if const == LOOK else look.inside if const == LOOK_INSIDE else _meant(name, names)

    return put(code)  # type: ignore[no-any-return]


def _meant(name: str, names: dict[str, Any]) -> Any:
    """The builtin; of exceptions also a class of the program that has the same name (and could not catch an AssertionError)."""
    true, own = BUILTINS[name], names.get(name)
    is_exception = isinstance(true, type) and issubclass(true, BaseException)
    if is_exception and isinstance(own, type) and type.__getattribute__(own, "__module__") == _NAME and BaseException in type.mro(own):
        return own
    return true


def _run_to_the_end(code: types.CodeType, names: dict[str, Any], exits: frozenset[int]) -> bool:
    """Whether the test program ended, and not something in it."""
    try:
        exec(code, names)
    except SystemExit as error:
        ended = error.code is None or (type(error.code) in (int, bool) and error.code == 0)
        return ended and _raised_by_tests(error, code, exits)
    except BaseException:  # an assert of the tests, or anything that the program raised
        sys.__excepthook__(*sys.exc_info())
        return False
    return True


def _raised_by_tests(error: SystemExit, code: types.CodeType, exits: frozenset[int]) -> bool:
    """Whether the tests themselves ended, in one of the lines where they say so, and not the program that they called."""
    mine = set(map(id, _all_codes(code)))
    line, after, trace = 0, list[str](), error.__traceback__
    while trace is not None:
        if id(trace.tb_frame.f_code) in mine:
            line, after = trace.tb_lineno, []
        else:
            after.append(trace.tb_frame.f_code.co_filename)
        trace = trace.tb_next
    if isinstance(error, Ended):
        return line > 0 and all(map(is_unittest, after))
    return line in exits and all("_sitebuiltins" in file for file in after)


def _all_codes(code: types.CodeType) -> list[types.CodeType]:
    return [code, *(inner for const in code.co_consts if isinstance(const, types.CodeType) for inner in _all_codes(const))]
