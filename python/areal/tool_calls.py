"""Tool calls in the text of an answer, in the form of Hermes and Qwen: ``<tool_call>{"name": ..., "arguments": {...}}</tool_call>``."""

from __future__ import annotations

import json
import re
import secrets
from dataclasses import dataclass, field
from typing import Any

_BLOCK = re.compile(r"<tool_call>(.*?)(?:</tool_call>|\Z)", re.DOTALL)


@dataclass(slots=True)
class ToolCall:
    """One call that the model asks for."""

    name: str
    arguments: Any = field(default_factory=dict)
    """A JSON value, an object in most cases."""
    error: str = ""
    """What is wrong with how it was written; empty = nothing."""
    id: str = field(default_factory=lambda: f"call_{secrets.token_hex(12)}")

    def json(self) -> dict[str, Any]:
        """In the form of OpenAI, which has the arguments as text."""
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": to_json(self.arguments)}}


def hermes(text: str) -> tuple[str, list[ToolCall]]:
    """The text before the first call, and the calls; all of the text and no calls where one of them does not parse.

    A call at the very end may lack its closing tag: models end their turn there.
    """
    calls = hermes_calls(text)
    if not calls or any(call.error for call in calls):
        return text, []
    return text[: text.index("<tool_call>")].strip(), calls


def hermes_calls(text: str) -> list[ToolCall]:
    """All calls, those that do not parse with their ``error``."""
    return [_call(block) for block in _BLOCK.findall(text)]


def _call(block: str) -> ToolCall:
    try:
        said = from_json(block)
    except ValueError as error:
        return ToolCall("", error=f"a tool call is a JSON object with name and arguments ({error})")
    if not isinstance(said, dict) or not isinstance(said.get("name"), str):
        return ToolCall("", error="a tool call is a JSON object with name and arguments")
    return ToolCall(said["name"], said.get("arguments", said.get("parameters", {})))


def from_json(text: str) -> Any:
    """By the standard library's parser: faster ones make floats of large integers.

    Raises:
        ValueError: it is no JSON (NaN is none), nested too deeply, or has half of a character, which no tokenizer takes.
    """
    try:
        value = json.loads(text, parse_constant=_refuse)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if "\\ud" in text.lower():
        json.dumps(value, ensure_ascii=False).encode()
    return value


def to_json(value: Any, *, in_order: bool = False) -> str:
    """Of a value of ``from_json``; ``in_order``: equal values give equal texts."""
    return json.dumps(value, separators=(",", ":"), sort_keys=in_order)


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is no JSON")
