"""OpenAI's JSON, out: whole answers and streams of server-sent events."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import orjson

from areal.agent.openai_protocol import Call
from areal.tool_calls import ToolCall


@dataclass(slots=True)
class Choice:
    """One sampled answer, as the client gets it."""

    text: str
    """Without stop strings and tool calls."""
    finish_reason: str
    """stop, length or tool_calls."""
    tool_calls: list[ToolCall] = field(default_factory=list)
    logprobs: list[tuple[str, float]] | None = None
    """Text and log-prob of every sampled token, the end of the turn included; None = not asked for."""

    def message(self) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": self.text}
        if self.tool_calls:
            message["content"] = self.text or None
            message["tool_calls"] = [call.json() for call in self.tool_calls]
        return message


@dataclass(slots=True)
class Answer:
    """All choices of a call."""

    id: str
    choices: list[Choice]
    n_prompt: int
    n_output: int
    """Tokens of all choices together."""

    def usage(self) -> dict[str, int]:
        return {"prompt_tokens": self.n_prompt, "completion_tokens": self.n_output, "total_tokens": self.n_prompt + self.n_output}


def whole(call: Call, answer: Answer) -> bytes:
    """The body of an answer that is not streamed."""
    choices = [
        {"index": i, "finish_reason": choice.finish_reason, "logprobs": _logprobs(call, choice)}
        | ({"message": choice.message()} if call.is_chat else {"text": choice.text})
        for i, choice in enumerate(answer.choices)
    ]
    kind = "chat.completion" if call.is_chat else "text_completion"
    return orjson.dumps(_head(call, answer, kind) | {"choices": choices, "usage": answer.usage()})


def events(call: Call, answer: Answer) -> bytes:
    """The body of a streamed answer. It was whole before it is sent, so each choice is one piece of text."""
    kind = "chat.completion.chunk" if call.is_chat else "text_completion"
    head = _head(call, answer, kind)
    if call.include_usage:
        head["usage"] = None
    chunks = [head | {"choices": [piece]} for i, choice in enumerate(answer.choices) for piece in _pieces(call, choice, i)]
    if call.include_usage:
        chunks.append(head | {"choices": [], "usage": answer.usage()})
    return b"".join(b"data: %b\n\n" % orjson.dumps(chunk) for chunk in chunks) + b"data: [DONE]\n\n"


def _head(call: Call, answer: Answer, kind: str) -> dict[str, Any]:
    return {"id": answer.id, "object": kind, "created": int(time.time()), "model": call.model}


def _pieces(call: Call, choice: Choice, index: int) -> Iterator[dict[str, Any]]:
    """The role, the text, each tool call, the reason of the end."""
    if not call.is_chat:
        yield {"index": index, "text": choice.text, "logprobs": _logprobs(call, choice), "finish_reason": None}
        yield {"index": index, "text": "", "logprobs": None, "finish_reason": choice.finish_reason}
        return
    yield {"index": index, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
    if choice.text or call.logprobs:
        yield {"index": index, "delta": {"content": choice.text}, "logprobs": _logprobs(call, choice), "finish_reason": None}
    for i, tool_call in enumerate(choice.tool_calls):
        yield {"index": index, "delta": {"tool_calls": [{"index": i, **tool_call.json()}]}, "logprobs": None, "finish_reason": None}
    yield {"index": index, "delta": {}, "logprobs": None, "finish_reason": choice.finish_reason}


def _logprobs(call: Call, choice: Choice) -> dict[str, Any] | None:
    if choice.logprobs is None:
        return None
    if call.is_chat:
        entries = [
            {"token": text, "logprob": logprob, "bytes": list(text.encode()), "top_logprobs": []} for text, logprob in choice.logprobs
        ]
        return {"content": entries, "refusal": None}
    offsets, at = [], 0
    for text, _ in choice.logprobs:
        offsets.append(at)
        at += len(text)
    return {
        "tokens": [text for text, _ in choice.logprobs],
        "token_logprobs": [logprob for _, logprob in choice.logprobs],
        "top_logprobs": None,
        "text_offset": offsets,
    }
