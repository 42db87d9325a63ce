"""The Python tool: runs code in the sandbox, and tells what it printed."""

from __future__ import annotations

from areal.reward.run_python import MOST_CHARS, RunPython
from areal.reward.sandbox.limits import Isolation, Limits
from areal.workflow.tools.tool import Tool

_SHARE_OF_TIMEOUT = 2 / 3  # a program ends before its call is overdue: then its worker need not be killed


def python_tool(isolation: Isolation = "auto", timeout: float = 10.0, max_chars: int = MOST_CHARS) -> Tool:
    """The tool "python", each call of which has ``timeout`` seconds; a fault of the sandbox drops the group. See ``RunPython``."""
    seconds = _SHARE_OF_TIMEOUT * timeout
    code = {"type": "string", "description": "The program. What it prints is returned, or else the value of its last expression."}
    return Tool(
        "python",
        RunPython(isolation, Limits(wall_seconds=seconds, cpu_seconds=min(Limits.cpu_seconds, seconds)), max_chars),
        description="Runs Python code. Nothing is kept from one call to the next.",
        parameters={"type": "object", "properties": {"code": code}, "required": ["code"]},
        timeout=timeout,
        faults=("SandboxError", "LevelMissing"),
    )
