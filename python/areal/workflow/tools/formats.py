"""How a call looks in a model's text, and a result in what it reads: text in, calls out, text (or chat messages) back.

A user's own format is an object with the three members of ``ToolFormat``. The smallest one there is, for a calculator whose call looks
like ``8*6=`` and whose result goes behind the sign:

    class InfixFormat:
        stop = ("=",)

        def parse(self, text):
            found = re.search(r"(\\d+[-+*]\\d+)=$", text)
            return [ToolCall("calculator", {"expression": found[1]})] if found else None

        def render(self, results):
            return results[0]
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from areal.tool_calls import ToolCall, from_json, hermes_calls


@runtime_checkable
class ToolFormat(Protocol):
    """The language of calls. ``parse`` sees what was written since the last result, or since the prompt.

    A format with ``in_template = True`` has the chat template tell the model of the tools: rows need ``messages`` then.
    """

    stop: Sequence[str]
    """Strings that end a call: the model stops there, and reads on behind the result. Only an answer that one of them ended can be a call,
    and one that is none goes on as if nothing was. Empty = a call stands at the end of the model's turn."""

    def parse(self, text: str) -> list[ToolCall] | None:
        """The calls to be made now; None = there is none. ``text`` ends at the stop string, or where the turn does."""
        ...

    def render(self, results: Sequence[str]) -> str | list[dict[str, Any]]:
        """What the model reads, one result for each call: text, or messages for the chat template."""
        ...


class HermesFormat:
    """``<tool_call>{"name": ..., "arguments": {...}}</tool_call>``, one or more at the end of a turn, and messages of the role tool: Hermes,
    Qwen, and others that were taught it. The template tells the model of the tools."""

    stop: Sequence[str] = ()
    in_template = True

    def parse(self, text: str) -> list[ToolCall] | None:
        """One that does not parse is a call too, whose result is what is wrong with it."""
        return [self._with_object(call) for call in hermes_calls(text)] or None

    def _with_object(self, call: ToolCall) -> ToolCall:
        if isinstance(call.arguments, str):  # as OpenAI has them
            with contextlib.suppress(ValueError):
                call.arguments = from_json(call.arguments)
        if not isinstance(call.arguments, Mapping):
            call.error = "the arguments of a tool call are a JSON object"
        return call

    def render(self, results: Sequence[str]) -> list[dict[str, Any]]:
        return [{"role": "tool", "content": result} for result in results]


class PythonFormat:
    """A fenced block of Python is run when its fence closes, and followed by a fenced block of output."""

    stop: Sequence[str] = ("```\n",)
    _BLOCK = re.compile(r"```([^\n`]*)\n(.*?)```", re.DOTALL)

    def parse(self, text: str) -> list[ToolCall] | None:
        """Blocks are paired off from the start: the fence that closes one is not taken for one that opens."""
        blocks = list(self._BLOCK.finditer(text))
        if not blocks or text[blocks[-1].end() :].strip() or blocks[-1][1].strip() not in ("python", "py"):
            return None
        return [ToolCall("python", {"code": blocks[-1][2]})]

    def render(self, results: Sequence[str]) -> str:
        return "".join(f"```output\n{result.rstrip()}\n```\n" for result in results)


FORMATS: dict[str, type[HermesFormat] | type[PythonFormat]] = {"hermes": HermesFormat, "python": PythonFormat}
