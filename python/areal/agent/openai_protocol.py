"""OpenAI's JSON, in: what a request asks for, or a refusal in OpenAI's form. The way out is in ``openai_answers.py``.

Fields that change what is sampled are honoured or refused, never ignored; fields that are unknown, or say nothing about sampling, are
ignored. ``seed`` is too: the random numbers of an episode are those of the run.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import orjson

from areal.agent.messages import BadMessage, normalise

_MOST_CHOICES = 128
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (None, 0),
    "presence_penalty": (None, 0),
    "repetition_penalty": (None, 1),
    "min_p": (None, 0),
    "logit_bias": (None, {}),
    "best_of": (None, 1),
    "suffix": (None, ""),
    "echo": (None, False),
    "functions": (None, []),
    "audio": (None,),
    "top_logprobs": (None, 0),
    "ignore_eos": (None, False),
    "min_tokens": (None, 0),
    "stop_token_ids": (None, []),
    "allowed_token_ids": (None, []),
    "bad_words": (None, []),
    "use_beam_search": (None, False),
    "structured_outputs": (None,),
    "guided_json": (None,),
    "guided_regex": (None,),
    "guided_choice": (None,),
    "guided_grammar": (None,),
    "json_schema": (None,),
    "regex": (None,),
    "ebnf": (None,),
}
"""Values at which a field asks for nothing that is not done anyway."""


class ApiError(Exception):
    """A call that is answered by an error in OpenAI's form."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None, kind: str = "invalid_request_error"
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.kind = kind

    def body(self) -> bytes:
        return orjson.dumps({"error": {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}})


@dataclass(slots=True)
class Sampling:
    """What a request says about sampling; None where it says nothing."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()


@dataclass(slots=True)
class Call:
    """One request."""

    model: str
    sampling: Sampling
    messages: list[dict[str, Any]] = field(default_factory=list)
    """In the one form of ``messages.normalise``; empty for /v1/completions."""
    prompt: str | list[int] | None = None
    """Of /v1/completions: text or token ids."""
    tools: list[dict[str, Any]] | None = None
    template_options: dict[str, Any] = field(default_factory=dict)
    n: int = 1
    stream: bool = False
    include_usage: bool = False
    logprobs: bool = False

    @property
    def is_chat(self) -> bool:
        return self.prompt is None


def parse_chat(body: bytes) -> Call:
    """POST /v1/chat/completions. Raises ApiError naming the field."""
    fields = _object(body)
    longest = fields.get("max_completion_tokens")
    call = _common(fields, fields.get("max_tokens") if longest is None else longest)
    try:
        call.messages = normalise(fields.get("messages"))
    except BadMessage as error:
        raise ApiError(400, str(error), param="messages") from error
    call.tools = _tools(fields)
    options = fields.get("chat_template_kwargs") or {}
    if not isinstance(options, dict):
        raise ApiError(400, "chat_template_kwargs must be an object", param="chat_template_kwargs")
    call.template_options = options
    call.logprobs = _flag(fields, "logprobs")
    wanted = fields.get("response_format")
    if wanted is not None and not (isinstance(wanted, dict) and wanted.get("type") == "text"):
        raise ApiError(400, "response_format must be text: answers are sampled without a grammar", param="response_format")
    if (fields.get("modalities") or ["text"]) != ["text"]:
        raise ApiError(400, "modalities must be text", param="modalities")
    return call


def parse_completion(body: bytes) -> Call:
    """POST /v1/completions. Raises ApiError naming the field."""
    fields = _object(body)
    call = _common(fields, fields.get("max_tokens"))
    prompt = fields.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str | list):
        prompt = prompt[0]
    if not isinstance(prompt, str) and not _is_ids(prompt):
        raise ApiError(400, "prompt must be one text or one list of token ids; send several prompts as several requests", param="prompt")
    if not prompt:
        raise ApiError(400, "prompt is empty", param="prompt")
    call.prompt = prompt
    wanted = fields.get("logprobs")
    if wanted is not None and wanted not in (0, 1, False, True):
        raise ApiError(400, "logprobs must be 0 or 1: there are log-probs of the sampled tokens only", param="logprobs")
    call.logprobs = wanted is not None and wanted is not False
    return call


def _object(body: bytes) -> dict[str, Any]:
    try:
        fields = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise ApiError(400, f"the body is not JSON ({error})") from error
    if not isinstance(fields, dict):
        raise ApiError(400, "the body must be a JSON object")
    return fields


def _common(fields: dict[str, Any], max_tokens: Any) -> Call:
    for name, values in _NEUTRAL.items():
        if fields.get(name) not in values:
            raise ApiError(400, f"{name} is {str(fields[name])[:80]}, which cannot be done here; leave it out", param=name)
    n = _number(fields, "n", fields.get("n"), int)
    if n is not None and not 1 <= n <= _MOST_CHOICES:
        raise ApiError(400, f"n is {n}; it must be 1 to {_MOST_CHOICES}", param="n")
    if (max_tokens := _number(fields, "max_tokens", max_tokens, int)) is not None and max_tokens < 1:
        raise ApiError(400, f"max_tokens is {max_tokens}; it must be at least 1", param="max_tokens")
    stop = fields.get("stop") or ()
    stop = (stop,) if isinstance(stop, str) else stop
    if not isinstance(stop, list | tuple) or not all(isinstance(s, str) and s for s in stop):
        raise ApiError(400, "stop must be a string or a list of strings, none of them empty", param="stop")
    options = fields.get("stream_options")
    sampling = Sampling(
        _number(fields, "temperature", fields.get("temperature"), float, least=0.0),
        _number(fields, "top_p", fields.get("top_p"), float, least=0.0, most=1.0),
        _number(fields, "top_k", fields.get("top_k"), int, least=-1),
        max_tokens,
        tuple(stop),
    )
    return Call(
        str(fields.get("model") or "default"),
        sampling,
        n=n or 1,
        stream=_flag(fields, "stream"),
        include_usage=isinstance(options, dict) and options.get("include_usage") is True,
    )


def _tools(fields: dict[str, Any]) -> list[dict[str, Any]] | None:
    tools, choice = fields.get("tools"), fields.get("tool_choice")
    if tools is not None and not (isinstance(tools, list) and all(_is_function(tool) for tool in tools)):
        raise ApiError(400, 'tools must be a list of {"type": "function", "function": {"name": ...}}', param="tools")
    if choice not in (None, "auto", "none"):
        raise ApiError(400, "tool_choice must be auto or none: a sampled answer cannot be forced to call a tool", param="tool_choice")
    return tools if tools and choice != "none" else None


def _is_function(tool: Any) -> bool:
    return isinstance(tool, dict) and isinstance(tool.get("function"), dict) and isinstance(tool["function"].get("name"), str)


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(token, int) and not isinstance(token, bool) and token >= 0 for token in value)


def _flag(fields: dict[str, Any], name: str) -> bool:
    value = fields.get(name)
    if value not in (None, True, False):
        raise ApiError(400, f"{name} must be true or false", param=name)
    return bool(value)


def _number(fields: dict[str, Any], name: str, value: Any, kind: type, least: float = -math.inf, most: float = math.inf) -> Any:
    """The value as ``kind``, None where there is none."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or (kind is int and value != int(value)):
        raise ApiError(400, f"{name} must be {'an integer' if kind is int else 'a number'}, not {str(value)[:80]}", param=name)
    if not least <= value <= most:
        raise ApiError(
            400, f"{name} is {value}; it must be {f'at least {least:g}' if most == math.inf else f'{least:g} to {most:g}'}", param=name
        )
    return kind(value)
