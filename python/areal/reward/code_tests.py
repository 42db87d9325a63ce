"""The tests of a row as what the sandbox runs: stdin cases, or a test program compiled so that a completion cannot talk its way through.

Two things are done to the source of a test program. The operands of its comparisons, where an assert or a raise hangs on them, and the
arguments of ``assert*`` calls go through ``__look__`` (sandbox/look.py). And builtins that it uses are found under other names, so that a
completion's own ``def all(x): return True`` is not what ``assert all(...)`` calls.
"""

from __future__ import annotations

import ast
import builtins
import functools
import json
import keyword
import marshal
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from areal.reward.sandbox.judge import Case, TestProgram
from areal.reward.sandbox.snapshot import PREIMPORTED

_BUILTINS = frozenset(
    name
    for name, value in vars(builtins).items()
    if not name.startswith("_") and name != "super" and not (isinstance(value, type) and issubclass(value, BaseException))
)


def read_tests(tests: Any, row: Mapping[str, Any]) -> TestProgram | list[Case]:
    """What the columns of a row mean.

    Args:
        tests: the text of a test program (or a list of its parts), a list of {"stdin", "stdout"}, or such a list as JSON.
        row: ``entry_point``: the function that a HumanEval test's ``check`` is called with; ``test_list``, ``test_setup_code``,
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
            if entry_point is not None and _wants_check(tree):
                if not entry_point.isidentifier() or keyword.iskeyword(entry_point):
                    raise ValueError(f"the row's 'entry_point' is {entry_point!r}, not the name of a function")
                tree.body += ast.parse(f"check({entry_point})").body
            tree.body += ast.parse(_forgotten_calls(tree)).body
            names = _Names(tree)
            subject = {entry_point} if names.free or entry_point is not None else names.builtins
            true_names = {f"__true_{name}__": name for name in sorted(names.builtins - subject)}
            tree = ast.fix_missing_locations(_Guard({name: alias for alias, name in true_names.items()}).visit(tree))
            code = marshal.dumps(compile(tree, "<tests>", "exec", dont_inherit=True))
    except (SyntaxError, RecursionError) as error:
        raise ValueError(f"the row's 'tests' do not compile: {error}") from error
    return TestProgram(code, names.modules, true_names)


def _wants_check(tree: ast.Module) -> bool:
    """HumanEval: the tests define ``check(candidate)`` and leave it to others to call it."""
    defines = any(isinstance(node, ast.FunctionDef) and node.name == "check" for node in tree.body)
    calls = any(isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "check" for node in ast.walk(tree))
    return defines and not calls


def _forgotten_calls(tree: ast.Module) -> str:
    """Tests that a runner like pytest would find and call: a program that only defines them would pass whatever it is about."""
    called = {name for node in ast.walk(tree) if isinstance(node, ast.Call) and (name := _last_name(node.func))}
    read = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    lines = []
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test") and node.name not in read and not ast.unparse(node.args):
            lines.append(f"{node.name}()")
    cases = any(isinstance(node, ast.ClassDef) and any(_last_name(base).endswith("TestCase") for base in node.bases) for node in tree.body)
    if cases and not called & {"main", "run", "TextTestRunner", "debug"}:
        lines.append("import unittest\nunittest.main()")
    return "\n".join(lines)


def _last_name(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


class _Names:
    """Which names a test program takes from where."""

    def __init__(self, tree: ast.Module) -> None:
        loaded: set[str] = set()
        bound: set[str] = set()
        self.modules: dict[str, bool] = {}
        """Modules that it uses, and whether it fails without."""
        for node in ast.walk(tree):
            match node:
                case ast.Name(id=name, ctx=ast.Load()):
                    loaded.add(name)
                case (
                    ast.Name(id=name)
                    | ast.arg(arg=name)
                    | ast.FunctionDef(name=name)
                    | ast.ClassDef(name=name)
                    | ast.AsyncFunctionDef(name=name)
                ):
                    bound.add(name)
                case ast.ExceptHandler(name=str(name)) | ast.MatchAs(name=str(name)) | ast.MatchStar(name=str(name)):
                    bound.add(name)
                case ast.alias(name=name, asname=other):
                    bound.add(other or name.partition(".")[0])
                case ast.Global(names=names) | ast.Nonlocal(names=names):
                    bound.update(names)
            for name in _imported(node):
                self.modules.setdefault(name, False)
        for node in tree.body:
            for name in _imported(node):
                self.modules[name] = True
        self.builtins = (loaded & _BUILTINS) - bound
        """Builtins that it uses, as far as it does not give these names another meaning."""
        self.free = {name for name in loaded - bound if not hasattr(builtins, name)}
        """What it expects of the completion."""
        self.modules.update({name: False for name in sorted(self.free.intersection(PREIMPORTED)) if name not in self.modules})


def _imported(node: ast.AST) -> list[str]:
    match node:
        case ast.Import(names=aliases):
            found = [alias.name for alias in aliases]
        case ast.ImportFrom(module=str(module), level=0):
            found = [module]
        case _:
            found = []
    return [name for name in found if name.partition(".")[0] not in ("solution", "__future__", "__main__")]


class _Guard(ast.NodeTransformer):
    def __init__(self, aliases: Mapping[str, str]) -> None:
        self._aliases = aliases
        self._judging = 0  # inside of what decides about an assert or a raise

    def visit_Name(self, node: ast.Name) -> ast.AST:
        node.id = self._aliases.get(node.id, node.id)
        return node

    def visit_Assert(self, node: ast.Assert) -> ast.AST:
        node.test = self._judge(node.test)
        if node.msg is not None:
            node.msg = self.visit(node.msg)
        return node

    def visit_If(self, node: ast.If) -> ast.AST:
        raises = any(isinstance(child, ast.Raise) for child in node.body)
        node.test = self._judge(node.test) if raises else self.visit(node.test)
        node.body = [self.visit(child) for child in node.body]
        node.orelse = [self.visit(child) for child in node.orelse]
        return node

    def _judge(self, test: ast.expr) -> ast.expr:
        self._judging += 1
        try:
            return self.visit(test)
        finally:
            self._judging -= 1

    def visit_Compare(self, node: ast.Compare) -> ast.AST:
        self.generic_visit(node)
        if self._judging:
            node.left = _look(node.left)
            node.comparators = [_look(operand) for operand in node.comparators]
        return node

    def visit_Call(self, node: ast.Call) -> ast.AST:
        name = _last_name(node.func)
        self.generic_visit(node)
        if name.startswith("assert"):
            node.args = [operand if isinstance(operand, ast.Starred) else _look(operand) for operand in node.args]
            for argument in node.keywords:
                if argument.arg is not None:
                    argument.value = _look(argument.value)
        return node


def _look(operand: ast.expr) -> ast.expr:
    if isinstance(operand, ast.Constant):
        return operand
    return ast.Call(ast.Name("__look__", ast.Load()), [operand], [])
