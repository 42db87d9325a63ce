"""What is done to the source of a test program before it is compiled.

The operands of its comparisons and subtractions, and the arguments of ``assert*`` calls, go through ``Look`` (sandbox/look.py). Builtins that
it uses are found whatever the program calls so: a completion's own ``def all(x): return True`` is not what ``assert all(...)`` calls. Both are
constants of the code, put there by the harness, so that no name has to be looked up where the program could have changed it.
"""

from __future__ import annotations

import ast
import builtins
from typing import Any

from areal.reward.sandbox.harness import LOOK, LOOK_INSIDE, PLACE
from areal.reward.sandbox.snapshot import PREIMPORTED

_BUILTINS = frozenset(name for name in vars(builtins) if not name.startswith("_") and name != "super")
_EXCEPTIONS = frozenset(name for name, value in vars(builtins).items() if isinstance(value, type) and issubclass(value, BaseException))
_CLOSE = ("isclose", "allclose", "array_equal", "approx", "eq")
_LEAVING = ("exit", "quit")


def last_name(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def own_exits(tree: ast.Module) -> frozenset[int]:
    """Lines in which the tests say that they end."""
    lines: set[int] = set()
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=func) if last_name(func) in _LEAVING:
                pass
            case ast.Raise(exc=ast.Name(id="SystemExit") | ast.Call(func=ast.Name(id="SystemExit"))):
                pass
            case _:
                continue
        lines.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return frozenset(lines)


def own_changes(tree: ast.Module) -> frozenset[str]:
    """Attributes that the tests set themselves, of whatever it is."""
    names: set[str] = set()
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(attr=name, ctx=ast.Store() | ast.Del()):
                names.add(name)
            case ast.Call(func=func, args=args) if last_name(func) in ("setattr", "delattr", "patch", "object", "start"):
                names.update(a.value.rpartition(".")[2] for a in args if isinstance(a, ast.Constant) and isinstance(a.value, str))
    return frozenset(names)


class Names:
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
        self.modules.update({name: False for name in sorted(_submodules(tree)) if name not in self.modules})
        self.builtins = (loaded & _BUILTINS) - bound
        """Builtins that it uses, as far as it does not give these names another meaning."""
        self.exceptions = self.builtins & _EXCEPTIONS
        of_solution = {a.name for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module == "solution" for a in n.names}
        self.free = {name for name in loaded - bound if not hasattr(builtins, name)} | of_solution
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


def _submodules(tree: ast.Module) -> set[str]:
    """Of ``import numpy as np`` and ``np.testing.assert_equal``: numpy.testing, which may only be loaded when it is used."""
    roots = {
        alias.asname or alias.name: alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
        if alias.asname or "." not in alias.name
    }
    found = set()
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(value=ast.Attribute(value=ast.Name(id=root), attr=name)) if root in roots:
                if roots[root] not in PREIMPORTED:
                    found.add(f"{roots[root]}.{name}")
    return found - {"solution"}


class Guard(ast.NodeTransformer):
    """
    Args:
        builtins: names that are to mean the builtin.
    """

    def __init__(self, builtins: set[str]) -> None:
        self._builtins = builtins

    def visit_Name(self, node: ast.Name) -> ast.AST:
        if node.id in self._builtins and isinstance(node.ctx, ast.Load):
            return _placed(PLACE + node.id, node)
        return node

    def visit_MatchClass(self, node: ast.MatchClass) -> ast.AST:
        return node  # its class must stay a name

    def visit_Compare(self, node: ast.Compare) -> ast.AST:
        self.generic_visit(node)
        inside = [False, *(isinstance(operator, (ast.In, ast.NotIn)) for operator in node.ops)]
        operands = [_look(operand, inside=flag) for operand, flag in zip([node.left, *node.comparators], inside, strict=True)]
        node.left, node.comparators = operands[0], operands[1:]
        return node

    def visit_BinOp(self, node: ast.BinOp) -> ast.AST:
        self.generic_visit(node)
        if isinstance(node.op, ast.Sub):
            node.left, node.right = _look(node.left), _look(node.right)
        return node

    def visit_Match(self, node: ast.Match) -> ast.AST:
        self.generic_visit(node)
        node.subject = _look(node.subject)
        return node

    def visit_Call(self, node: ast.Call) -> ast.AST:
        name = last_name(node.func)
        self.generic_visit(node)
        if name.startswith("assert") or name in _CLOSE:
            node.args = [operand if isinstance(operand, ast.Starred) else _look(operand) for operand in node.args]
            for argument in node.keywords:
                if argument.arg is not None:
                    argument.value = _look(argument.value)
        return node


def _look(operand: ast.expr, *, inside: bool = False) -> ast.expr:
    if isinstance(operand, (ast.Constant, ast.JoinedStr)):
        return operand
    return ast.copy_location(ast.Call(_placed(LOOK_INSIDE if inside else LOOK, operand), [operand], []), operand)


def _placed(text: str, where: Any) -> ast.Constant:
    return ast.copy_location(ast.Constant(text), where)
