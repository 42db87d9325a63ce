"""unittest as the tests' witness: every result that it has counts, whether or not the tests look at it.

Done once, by the fork server, so that it is part of what is put back before the tests of a program run.
"""

from __future__ import annotations

import functools
import os
import unittest
from collections.abc import Callable
from typing import Any

from .own import BUILTINS as __builtins__  # type: ignore[no-redef]  # noqa: F401

BENEATH = ("contextlib", "collections", "functools", "re", "types", "warnings")
"""What unittest stands on: put back with it."""
_FOLDER = os.path.join(os.path.dirname(unittest.__file__), "")
verdicts: list[bool] = []
"""One for each run that has ended, and False for each failure in between."""


class Ended(SystemExit):
    """``unittest.main`` has ended the process."""


def is_unittest(file: str) -> bool:
    return file == __file__ or file.startswith(_FOLDER)


def record_results() -> None:
    result, runner = unittest.TestResult, unittest.TextTestRunner
    for name in ("addError", "addFailure", "addUnexpectedSuccess"):
        setattr(result, name, _recorded(getattr(result, name), lambda *args: False))
    result.addSubTest = _recorded(result.addSubTest, lambda test, subtest, error: error is None)  # type: ignore[method-assign]
    result.addSkip = _recorded(result.addSkip, lambda test, reason: _declared_skipped(test))  # type: ignore[method-assign]
    run = runner.run

    @functools.wraps(run)
    def recorded_run(self: Any, test: Any) -> Any:
        got = run(self, test)
        verdicts.append(_successful(got))
        return got

    runner.run = recorded_run  # type: ignore[method-assign]
    unittest.main = unittest.TestProgram = _RecordingProgram  # type: ignore[misc, assignment]


def fresh_loader() -> None:
    """The loader that unittest uses by default, without anything that a program has set on it."""
    loader = unittest.defaultTestLoader
    vars(loader).clear()
    unittest.TestLoader.__init__(loader)


def _recorded(method: Callable[..., Any], good: Callable[..., bool]) -> Any:
    @functools.wraps(method)
    def recorded(self: Any, *args: Any) -> Any:
        if not good(*args):
            verdicts.append(False)
        return method(self, *args)

    return recorded


class _RecordingProgram(unittest.TestProgram):
    def runTests(self) -> None:
        ends = self.__dict__["exit"]
        self.exit = False
        try:
            super().runTests()
        finally:
            verdicts.append("result" in self.__dict__ and _successful(self.result))
        if ends:
            raise Ended(not verdicts[-1])


def _successful(result: unittest.TestResult) -> bool:
    """All tests passed, and there were some; one that the program skipped by raising SkipTest did not pass."""
    skipped = [test for test, _ in result.skipped if not _declared_skipped(test)]
    return result.wasSuccessful() and not skipped and result.testsRun > len(result.skipped)


def _declared_skipped(test: Any) -> bool:
    method = getattr(type(test), getattr(test, "_testMethodName", ""), None)
    return bool(getattr(type(test), "__unittest_skip__", False) or getattr(method, "__unittest_skip__", False))
