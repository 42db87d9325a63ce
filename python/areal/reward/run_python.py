"""Code that is run for what it prints: the Python tool of models. In the sandbox, as the code that is scored."""

from __future__ import annotations

from dataclasses import dataclass, field

from areal.reward.sandbox.client import Outcome, fork_server
from areal.reward.sandbox.limits import Isolation, Limits

_LIMITS = {"cpu": "its CPU time ran out", "wall": "its time ran out", "memory": "its memory ran out", "output": "it printed too much"}
# Parsed in the sandbox: hostile source can crash a parser. Errors are shown as an interpreter does that runs the code alone.
_PROGRAM = """
def _run(code):
    import ast, linecache, sys, traceback
    linecache.cache["tool.py"] = len(code), None, code.splitlines(True), "tool.py"
    try:
        tree = ast.parse(code, "tool.py")
        if tree.body and isinstance(tree.body[-1], ast.Expr):
            show = ast.parse("__import__('sys').displayhook(None)").body[0]
            show.value.args[0] = tree.body[-1].value
            tree.body[-1] = ast.fix_missing_locations(ast.copy_location(show, tree.body[-1]))
        compiled = compile(tree, "tool.py", "exec")
    except Exception as error:
        print("".join(traceback.format_exception_only(error)), file=sys.stderr, end="")
        sys.exit(1)
    try:
        exec(compiled, {{"__name__": "__main__"}})
    except SystemExit:
        raise
    except BaseException as error:
        traceback.print_exception(error.with_traceback(error.__traceback__.tb_next))
        sys.exit(1)
_run({code!r})
"""


MOST_CHARS = 4900
"""What any text may have: as JSON, in which a character has up to twelve bytes, it must fit into the answer of a worker (MAX_JSON)."""
_NOTE_CHARS = 40


@dataclass(frozen=True)
class RunPython:
    """``fn(code) -> str`` for a reward worker's process; a text of more than ``max_chars`` comes without its middle."""

    isolation: Isolation = "auto"
    limits: Limits = field(default_factory=Limits)
    max_chars: int = MOST_CHARS

    def __call__(self, code: str) -> str:
        """What the program prints, errors included, or the value of its last expression; what a limit of it did is said.

        Raises:
            SandboxError: the program could not be run.
            TypeError: ``code`` is no text.
        """
        if not isinstance(code, str):
            raise TypeError(f"code is a string, not {type(code).__name__}")
        with fork_server(self.isolation) as server:
            outcome: Outcome = server.run_program(_PROGRAM.format(code=code), "", self.limits)
        text = outcome.detail
        if why := _LIMITS.get(outcome.why):
            text = f"{text.rstrip()}\nError: the program was ended: {why}".lstrip()
        elif not outcome.passed and not text.strip():
            text = "Error: the program failed, and printed nothing"
        most = min(self.max_chars, MOST_CHARS)
        return text if len(text) <= most else clip(text, max(0, most - _NOTE_CHARS))


def clip(text: str, most: int) -> str:
    """Its beginning and its end, when it has more than ``most`` characters."""
    if len(text) <= most:
        return text
    half = most // 2
    return f"{text[:half]}\n[{len(text) - 2 * half} characters left out]\n{text[len(text) - half :]}"
