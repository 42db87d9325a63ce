"""The Python tool: runs code in the sandbox of the code reward."""

from __future__ import annotations

from areal.workflow.tools.tool import Tool


async def run_python(code: str) -> str:
    """Runs Python code and returns what it prints, or else the value of its last expression.

    Args:
        code: The program. Nothing is kept from one call to the next.
    """
    raise NotImplementedError


def python_tool() -> Tool:
    return Tool("python", run_python)
