"""Tests that nobody calls are called, as a runner like pytest would: a program that only defines them would pass whatever it is about."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from areal.reward.code_guard import last_name

_CLASS = """
for _name in [n for n in dir({name}) if n.startswith("test")]:
    _case = {name}()
    for _setup in ("setup_method", "setUp"):
        if hasattr(_case, _setup):
            getattr(_case, _setup)(*[getattr(_case, _name)][: getattr(_case, _setup).__code__.co_argcount - 1])
    {call}
    if hasattr(_case, "teardown_method"):
        _case.teardown_method(*[getattr(_case, _name)][: _case.teardown_method.__code__.co_argcount - 1])
"""
_PARAMETRIZED = """
def {run}(test):
    import itertools
    marks = [m for m in getattr(test, "pytestmark", ()) if m.name == "parametrize"]
    for row in itertools.product(*(m.args[1] for m in marks)):
        given = {{}}
        for mark, values in zip(marks, row):
            names = mark.args[0]
            names = [n.strip() for n in names.split(",") if n.strip()] if (text := isinstance(names, str)) else list(names)
            if type(values).__name__ == "ParameterSet":
                values = values.values
            elif text and len(names) == 1:
                values = (values,)
            if len(names) != len(values):
                raise ValueError(f"parametrize of {{test.__name__}}: {{names}} and {{values}}")
            given.update(zip(names, values))
        test(**given)
"""
_RUN = "_run_parametrized"


def call_forgotten(tree: ast.Module) -> None:
    """Adds the calls to the end of the test program.

    Raises:
        ValueError: a test has parameters that nothing gives, or is a coroutine.
    """
    tree.body = [node for node in tree.body if not _runs_pytest(node)]
    read = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    lines: list[str] = []
    cases = False
    for node in tree.body:
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) if name.startswith("test") and name not in read:
                lines.append(_call(node, name))
            case ast.ClassDef(bases=bases) if any(last_name(base).endswith("TestCase") for base in bases):
                cases = True
            case ast.ClassDef(name=name) if name.startswith("Test") and name not in read and (tests := list(_methods(node))):
                calls = {_call(test, "getattr(_case, _name)", method=True) for test in tests}
                if not calls & {""}:
                    lines.append(_CLASS.format(name=name, call=f"{_RUN}(getattr(_case, _name))" if len(calls) > 1 else calls.pop()))
    own_main = any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in tree.body)
    if cases and not any(isinstance(node, ast.Call) and _runs_cases(node.func, own_main) for node in ast.walk(tree)):
        lines.append("import unittest\nunittest.main()")
    if any(_RUN in line for line in lines):
        lines.insert(0, _PARAMETRIZED.format(run=_RUN))
    tree.body += ast.parse("\n".join(lines)).body


def _runs_pytest(node: ast.stmt) -> bool:
    """``pytest.main([__file__])``, perhaps under a main guard or as an exit code: there is no file, and we do what it would do."""
    if not isinstance(node, (ast.Expr, ast.If)):
        return False
    return any(isinstance(call, ast.Call) and ast.unparse(call.func) == "pytest.main" for call in ast.walk(node))


def _runs_cases(function: ast.expr, own_main: bool) -> bool:
    name = last_name(function)
    if name == "main":
        return (isinstance(function, ast.Name) and not own_main) or ast.unparse(function) == "unittest.main"
    return name in ("TextTestRunner", "TestSuite", "makeSuite", "TestProgram") or name.startswith("loadTestsFrom")


def _methods(node: ast.ClassDef) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for child in node.body:
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)) and child.name.startswith("test"):
            yield child


def _call(test: ast.FunctionDef | ast.AsyncFunctionDef, text: str, *, method: bool = False) -> str:
    decorators = test.decorator_list
    arguments = [*test.args.posonlyargs, *test.args.args, *test.args.kwonlyargs]
    with_default = len(test.args.defaults) + sum(default is not None for default in test.args.kw_defaults)
    names = [argument.arg for argument in arguments[: len(arguments) - with_default]]
    if method and not any(last_name(decorator) in ("staticmethod", "classmethod") for decorator in decorators):
        names = names[1:]
    given = [names for decorator in decorators if (names := _parametrized(decorator))]
    if isinstance(test, ast.AsyncFunctionDef):
        raise ValueError(f"the row's 'tests' define a coroutine {test.name}, and nothing calls it")
    if missing := [name for name in names if not any(name in some for some in given)]:
        raise ValueError(
            f"the row's 'tests' define {test.name}({', '.join(names)}), and nothing gives it {', '.join(missing)}: fixtures are not supported"
        )
    return f"{_RUN}({text})" if given else f"{text}()"


def _parametrized(decorator: ast.expr) -> list[str]:
    """The parameters that ``pytest.mark.parametrize`` gives."""
    match decorator:
        case ast.Call(func=func, args=[ast.Constant(value=str(names)), *_]) if last_name(func) == "parametrize":
            return [name.strip() for name in names.split(",")]
        case ast.Call(func=func, args=[ast.List(elts=names) | ast.Tuple(elts=names), *_]) if last_name(func) == "parametrize":
            return [str(name.value) for name in names if isinstance(name, ast.Constant)]
    return []


def checks_nothing(tree: ast.Module) -> bool:
    """Nothing is called but where something is defined."""
    defines = False
    for statement in tree.body:
        if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            defines = True
        elif any(isinstance(node, (ast.Call, ast.Assert, ast.Raise, ast.Compare, ast.Await)) for node in ast.walk(statement)):
            return False
    return defines
