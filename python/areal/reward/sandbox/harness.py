"""What runs in a program's process: the completion, and then its tests.

Who waits on whom: the judge (judge.py) has sent the completion; it sends the tests, and a token, only after it was told that the
completion's own body has run to its end, and it takes the token, sent back once the whole test program has run, as the only proof of a
pass. How the process ends means nothing. Whatever else arrives at the judge is a failed test.
"""

from __future__ import annotations

import atexit
import gc
import marshal
import os
import random
import struct
import sys
import threading
import types
import unittest
from collections.abc import Callable
from typing import Any, NoReturn

from .look import Look
from .snapshot import Snapshot

STARTED, IMPORT_FAILED, FAULT = b"s", b"i", b"!"
HEADER = struct.Struct("<Q")
_NAME = "solution"


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
    module.__dict__["__builtins__"] = __builtins__
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


def run_tests(channel: int, source: str, nonce: bytes, modules: dict[str, bool], snapshot: Snapshot) -> NoReturn:
    """The completion's body, then the tests in the same module. ``modules``: what the tests use, and whether they fail without it."""
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
    restore, run, code_of, excinfo = snapshot.restorer(modules), exec, compile, sys.exc_info
    write(channel, STARTED)
    try:
        run(code_of(source, f"{_NAME}.py", "exec", dont_inherit=True), names)
    except:  # noqa: E722  the program's own; even the name BaseException may be its work by now
        show(*excinfo())
        leave(1)
    restore()
    if getpid() != pid:
        leave(0)  # a child that came back out of the program
    names["__builtins__"] = __builtins__
    names["__name__"] = "__main__"
    sys.modules["__main__"] = sys.modules[_NAME] = module
    write(channel, nonce)
    token, compiled, true_names = loads(read_frame(channel, read))
    names.update({alias: __builtins__[true] for alias, true in true_names.items()})  # type: ignore[index]
    names["__look__"] = look
    verdicts: list[bool] = []
    if "unittest" in modules:
        unittest.main = unittest.TestProgram = _recording_main(verdicts)  # type: ignore[misc, assignment]
    if _run_to_the_end(loads(compiled), names) and all(verdicts) and not look.found:
        write(channel, token)
    leave(0)


def _import(name: str, snapshot: Snapshot) -> bool:
    try:
        snapshot.add(name)
    except ImportError:
        return False
    return True


class _UnittestEnded(BaseException):
    """``unittest.main`` would have ended the process."""


def _recording_main(verdicts: list[bool]) -> type[unittest.TestProgram]:
    class RecordingProgram(unittest.TestProgram):
        def runTests(self) -> None:
            ends = self.__dict__["exit"]
            self.exit = False
            super().runTests()
            verdicts.append(_successful(self.result))
            if ends:
                raise _UnittestEnded

    return RecordingProgram


def _successful(result: unittest.TestResult) -> bool:
    """All tests passed, and there were some; one that the program skipped by raising SkipTest did not pass."""
    skipped = [test for test, _ in result.skipped if not _declared_skipped(test)]
    return result.wasSuccessful() and not skipped and result.testsRun > len(result.skipped)


def _declared_skipped(test: Any) -> bool:
    method = getattr(type(test), getattr(test, "_testMethodName", ""), None)
    return bool(getattr(type(test), "__unittest_skip__", False) or getattr(method, "__unittest_skip__", False))


def _run_to_the_end(code: types.CodeType, names: dict[str, Any]) -> bool:
    """Whether the test program ended, and not something in it."""
    try:
        exec(code, names)
    except _UnittestEnded:
        pass
    except SystemExit as error:
        return error.code in (None, 0) and _raised_by(error, code)
    except BaseException:  # an assert of the tests, or anything that the program raised
        sys.__excepthook__(*sys.exc_info())
        return False
    return True


def _raised_by(error: BaseException, code: types.CodeType) -> bool:
    """Whether the tests themselves ended, and not the program that they called."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and trace.tb_frame.f_code in _all_codes(code)


def _all_codes(code: types.CodeType) -> list[types.CodeType]:
    return [code, *(inner for const in code.co_consts if isinstance(const, types.CodeType) for inner in _all_codes(const))]
