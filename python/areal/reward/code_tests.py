"""The tests of a row as what the sandbox runs: stdin cases, or a test program compiled so that a completion cannot talk its way through
(code_guard.py)."""

from __future__ import annotations

import ast
import functools
import json
import marshal
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from areal.reward.code_guard import Guard, Names, own_changes, own_exits
from areal.reward.code_runner import call_forgotten, checks_nothing
from areal.reward.sandbox.judge import Case, TestProgram


def read_tests(tests: Any, row: Mapping[str, Any]) -> TestProgram | list[Case]:
    """What the columns of a row mean.

    Args:
        tests: the text of a test program (or a list of its parts), a list of {"stdin", "stdout"}, or such a list as JSON.
        row: ``entry_point``: what a HumanEval test's ``check`` is called with, a function's name or ``Solution().name``; ``test_list``, ``test_setup_code``,
            ``test_imports``: asserts as MBPP has them, where there is no ``tests``.

    Raises:
        ValueError: there are none, or they are malformed: a fault of the data.
    """
    if tests is None and row.get("test_list"):
        parts = [*(row.get("test_imports") or ()), row.get("test_setup_code") or "", *row["test_list"]]
        tests = "\n".join(map(str, parts))
    if isinstance(tests, str) and tests.lstrip().startswith("["):
        try:
            tests = json.loads(tests)
        except ValueError:
            pass  # a test program may begin with a list
    if isinstance(tests, list) and tests and all(isinstance(part, str) for part in tests):
        tests = "\n".join(tests)
    if isinstance(tests, str):
        entry_point = row.get("entry_point")
        tests = tests.removeprefix("\ufeff")
        if not tests.strip():
            raise ValueError("the row's 'tests' are empty")
        return _compile(tests, None if entry_point is None else str(entry_point))
    if tests is None:
        raise ValueError("the row has no 'tests': neither a test program nor a list of {stdin, stdout}")
    return _read_cases(tests)


def _read_cases(tests: Any) -> list[Case]:
    if not isinstance(tests, Sequence) or isinstance(tests, bytes):
        raise ValueError(f"the row's 'tests' are {type(tests).__name__}, not the text of a test program or a list of {{stdin, stdout}}")
    if not tests:
        raise ValueError("the row's 'tests' are an empty list")
    cases = []
    for number, case in enumerate(tests):
        if not isinstance(case, Mapping) or not isinstance(case.get("stdin"), str) or not isinstance(case.get("stdout"), str):
            raise ValueError(f"entry {number} of the row's 'tests' is not {{stdin: text, stdout: text}}: {str(case)[:80]}")
        cases.append(Case(case["stdin"], case["stdout"]))
    return cases


@functools.lru_cache(maxsize=64)  # the samples of a group have the same
def _compile(text: str, entry_point: str | None) -> TestProgram:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(text)
            subject = set[str]()
            if entry_point is not None:
                called = _expression(entry_point)
                subject = {node.id for node in ast.walk(called) if isinstance(node, ast.Name)}
                if _wants_check(tree):
                    tree.body += ast.parse(f"check({entry_point})").body
            call_forgotten(tree)
            if checks_nothing(tree):
                raise ValueError("the row's 'tests' only define functions or classes, and call none: any program would pass")
            names = Names(tree)
            if not names.free and entry_point is None:  # what is tested is named like a builtin
                subject = names.builtins - names.exceptions
            exits, changes = own_exits(tree), own_changes(tree)
            tree = ast.fix_missing_locations(Guard(names.builtins - subject).visit(tree))
            code = marshal.dumps(compile(tree, "<tests>", "exec", dont_inherit=True))
    except (SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError(f"the row's 'tests' do not compile: {error}") from error
    return TestProgram(code, names.modules, frozenset(names.free | subject), exits, changes)


def _expression(entry_point: str) -> ast.expr:
    try:
        return ast.parse(entry_point, mode="eval").body
    except (SyntaxError, ValueError):
        raise ValueError(f"the row's 'entry_point' is {entry_point!r}, not the name of a function") from None


def _wants_check(tree: ast.Module) -> bool:
    """HumanEval: the tests define ``check(candidate)`` and leave it to others to call it."""
    defines = any(isinstance(node, ast.FunctionDef) and node.name == "check" for node in tree.body)
    calls = any(isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "check" for node in ast.walk(tree))
    return defines and not calls
