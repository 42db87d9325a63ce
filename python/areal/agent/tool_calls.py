"""Tool calls in the text of an answer, in the form of Hermes and Qwen: ``<tool_call>{"name": ..., "arguments": {...}}</tool_call>``."""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass, field
from typing import Any

import orjson

_BLOCK = re.compile(r"<tool_call>(.*?)(?:</tool_call>|\Z)", re.DOTALL)


@dataclass(slots=True)
class ToolCall:
    """One call that the model asks for."""

    name: str
    arguments: Any
    """A JSON value, an object in most cases."""
    id: str = field(default_factory=lambda: f"call_{secrets.token_hex(12)}")

    def json(self) -> dict[str, Any]:
        """In the form of OpenAI, which has the arguments as text."""
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": orjson.dumps(self.arguments).decode()}}


def hermes(text: str) -> tuple[str, list[ToolCall]]:
    """The text before the first call, and the calls; all of the text and no calls where one of them does not parse.

    A call at the very end may lack its closing tag: models end their turn there.
    """
    blocks = list(_BLOCK.finditer(text))
    if not blocks:
        return text, []
    calls = []
    for block in blocks:
        try:
            said = orjson.loads(block[1])
        except orjson.JSONDecodeError:
            return text, []
        if not isinstance(said, dict) or not isinstance(said.get("name"), str):
            return text, []
        calls.append(ToolCall(said["name"], said.get("arguments", said.get("parameters", {}))))
    return text[: blocks[0].start()].strip(), calls
