"""Chat messages in one form, so that equal ones are equal: what a client adds, leaves out or splits into parts makes no difference."""

from __future__ import annotations

from hashlib import blake2b
from typing import Any

import orjson

from areal.tool_calls import from_json, to_json

_ROLES = {"developer": "system"}
_OF_CLIENTS = ("refusal", "annotations", "audio", "function_call", "parsed")
"""Fields of OpenAI's answers that say nothing to a template."""


class BadMessage(ValueError):
    """Messages that are not chat messages, or hold more than text."""


def normalise(messages: Any) -> list[dict[str, Any]]:
    """Each with ``role`` and ``content`` (a string, "" for none), and ``tool_calls`` whose arguments are parsed; other fields as they are.

    Raises:
        BadMessage: naming the message.
    """
    if not isinstance(messages, list) or not messages:
        raise BadMessage("messages must be a list of at least one message")
    return [_message(message, f"messages[{i}]") for i, message in enumerate(messages)]


def _message(message: Any, where: str) -> dict[str, Any]:
    role = message.get("role") if isinstance(message, dict) else None
    if not isinstance(role, str):
        raise BadMessage(f"{where} must be an object with a role")
    one: dict[str, Any] = {"role": _ROLES.get(role, role), "content": _text(message.get("content"), where)}
    calls = message.get("tool_calls")
    if calls:
        if not isinstance(calls, list):
            raise BadMessage(f"{where}.tool_calls must be a list")
        one["tool_calls"] = [_tool_call(call, where) for call in calls]
    for key, value in message.items():
        if key not in one and key != "tool_calls" and key not in _OF_CLIENTS and value is not None:
            one[key] = value
    return one


def _text(content: Any, where: str) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise BadMessage(f"{where}.content must be a string or a list of parts")
    texts = [
        part.get("text") if isinstance(part, dict) and part.get("type") in ("text", "input_text", "output_text") else None
        for part in content
    ]
    if not all(isinstance(text, str) for text in texts):
        raise BadMessage(f"{where}.content has a part that is not text")
    return "\n".join(texts)  # type: ignore[arg-type]


def _tool_call(call: Any, where: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise BadMessage(f"{where}.tool_calls must be functions with a name")
    arguments = function.get("arguments")
    if isinstance(arguments, str):  # as OpenAI has it; templates want the object
        try:
            arguments = from_json(arguments) if arguments else {}
        except ValueError:
            pass  # a template can show the text as well
    return {"id": call.get("id"), "type": "function", "function": {"name": function["name"], "arguments": arguments}}


def chain_keys(messages: list[dict[str, Any]], before: bytes = b"") -> list[bytes]:
    """For each message a key of it and all before it: equal keys are equal conversations.

    Compared are role, content, and the names and arguments of tool calls; not their ids, which some frameworks write anew.
    """
    keys = []
    for message in messages:
        calls = [
            [call["function"]["name"], to_json(call["function"]["arguments"], in_order=True)] for call in message.get("tool_calls", ())
        ]
        text = orjson.dumps([message["role"], message["content"], calls])
        before = blake2b(before + text, digest_size=16).digest()
        keys.append(before)
    return keys
