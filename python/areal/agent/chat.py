"""Between messages and tokens: the chat template, once a conversation, and the tokens of earlier turns behind it.

The prompt of a turn that extends an earlier one is that turn's prompt and output, token by token as they were, and the rest. What "the
rest" is says the template: the conversation is rendered from scratch as well, and must begin with what the earlier prompt was rendered
to, then hold the answer, at most with other white space (or, for tool calls, other JSON). What comes behind the answer is the rest:
the end of the turn and the new messages. Where a template writes an earlier part of the conversation otherwise now (Qwen3 strips the
thinking of earlier turns), nothing is taken over: the model is to see what it would see anywhere else, so the turn starts a branch of
its own from the rendering.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from areal.agent.openai_protocol import ApiError
from areal.chat import ChatTemplateError, suffix_text, suffix_tokens
from areal.tool_calls import ToolCall, hermes
from areal.types import ModelResponse

_MARK = f"ANSWER{secrets.token_hex(8)}"


@dataclass(slots=True)
class Reply:
    """What the text of an output says."""

    text: str
    """Without stop string and tool calls: what the client gets as the content."""
    tool_calls: list[ToolCall]

    def message(self) -> dict[str, Any]:
        """As the client will send it back, in the form of ``messages.normalise``."""
        message: dict[str, Any] = {"role": "assistant", "content": self.text}
        if self.tool_calls:
            functions = [{"name": call.name, "arguments": call.arguments} for call in self.tool_calls]
            message["tool_calls"] = [{"type": "function", "function": function} for function in functions]
        return message


@dataclass(slots=True)
class Said:
    """An earlier turn, as far as a later one is built on it."""

    text: str
    """Its prompt, rendered from scratch."""
    n_messages: int
    ids: list[int]
    """Its prompt and output."""
    stopped: bool
    """The output ended by itself, not by a limit."""


class Chat:
    """A tokenizer and its chat template; without a template messages are joined by newlines.

    Args:
        tokenizer: Hugging Face tokenizer.
        options: variables for the template (``enable_thinking``).
        tool_parser: the text of an answer to the text before its tool calls, and them.
    """

    def __init__(
        self,
        tokenizer: Any,
        options: dict[str, Any] | None = None,
        tool_parser: Callable[[str], tuple[str, list[ToolCall]]] = hermes,
    ) -> None:
        self.tokenizer = tokenizer
        self._options = options or {}
        self._tool_parser = tool_parser
        self._has_template = bool(tokenizer.chat_template)
        self._special = frozenset(tokenizer.all_special_ids)

    def render(
        self, messages: Sequence[dict[str, Any]], tools: list[dict[str, Any]] | None, options: dict[str, Any], *, generate: bool = True
    ) -> str:
        """The text of a prompt; with ``generate`` up to where the answer begins. Raises ApiError where the template refuses it."""
        if not self._has_template:
            return "\n".join(message["content"] for message in messages)
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    messages, tools=tools, tokenize=False, add_generation_prompt=generate, **(self._options | options)
                )
            )
        except Exception as error:  # templates raise jinja2's own errors and whatever their expressions raise: the messages are at fault
            raise ApiError(400, f"the chat template refuses these messages: {error}", param="messages") from error

    def encode_all(self, text: str) -> list[int]:
        """A rendered prompt. A template writes special tokens itself; without one the tokenizer adds its own."""
        return self._encode(text, not self._has_template)

    def encode_text(self, text: str) -> list[int]:
        """The prompt of a plain completion."""
        return self._encode(text, True)

    def encode_rest(self, text: str) -> list[int]:
        """What stands behind other tokens."""
        return self._encode(text, False) if text else []

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        try:
            return list(self.tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"])
        except Exception as error:  # tokenizers raises bare Exception where a text cannot be written in its vocabulary
            raise ApiError(400, f"the prompt cannot be tokenized: {error}") from error

    def decode(self, ids: list[int], skip_special: bool = True) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=skip_special, clean_up_tokenization_spaces=False))

    def read(self, response: ModelResponse, stop: Sequence[str], *, tools: bool) -> Reply:
        """The text of an output as the client gets it."""
        if tools:  # in some vocabularies the tags of tool calls are special tokens
            end = len(response.output_tokens)
            while end and response.output_tokens[end - 1] in self._special:
                end -= 1
            text = self.decode(response.output_tokens[:end], skip_special=False)
        else:
            text = self.decode(response.output_tokens)
        if stop and response.stop_reason == "stop":
            text = text[: min((at for s in stop if (at := text.find(s)) >= 0), default=len(text))]
        return Reply(*self._tool_parser(text)) if tools else Reply(text, [])

    def logprobs(self, response: ModelResponse) -> list[tuple[str, float]]:
        """Text and log-prob of every sampled token."""
        texts = (self.decode([token], skip_special=False) for token in response.output_tokens)
        return list(zip(texts, response.output_logprobs, strict=True))

    def extend(
        self,
        said: Said,
        text: str,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None,
        options: dict[str, Any],
    ) -> list[int] | None:
        """Token ids of a prompt that takes over an earlier turn; None where the template does not let it.

        Args:
            text: ``messages``, rendered.
            messages: those of the earlier turn, its answer, at least one more.
        """
        if not text.startswith(said.text):
            return None
        shown_and_rest = self._around(text[len(said.text) :], messages, said, tools, options)
        if shown_and_rest is None:
            return None
        shown, rest = shown_and_rest
        answer = messages[said.n_messages]
        shown, content = _squash(shown), _squash(answer["content"])
        if not shown.startswith(content) or (shown != content and not answer.get("tool_calls")):
            return None
        return said.ids + suffix_tokens(self.tokenizer, said.ids, rest, stopped=said.stopped)

    def _around(
        self, after: str, messages: list[dict[str, Any]], said: Said, tools: list[dict[str, Any]] | None, options: dict[str, Any]
    ) -> tuple[str, str] | None:
        """What the template writes behind the earlier prompt (``after``), cut where the answer ends; None = that cannot be told."""
        at = said.n_messages
        answer: str = messages[at]["content"]
        if answer and not messages[at].get("tool_calls") and after.startswith(answer):
            return answer, after[len(answer) :]
        before = messages[:at]
        try:
            rest = suffix_text(self.tokenizer, messages[at + 1 :], history=before, tools=tools, **(self._options | options))
            return (after[: len(after) - len(rest)], rest) if after.endswith(rest) else None
        except ChatTemplateError:
            pass  # a template may insist that a tool's result follows a call
        marked = {"role": "assistant", "content": _MARK}
        try:
            until = self.render([*before, messages[at]], tools, options, generate=False)
            _, mark, end = self.render([*before, marked], tools, options, generate=False).rpartition(_MARK)
        except ApiError:
            return None
        until = until[len(said.text) :]
        return (until.removesuffix(end), end + after[len(until) :]) if mark and until.endswith(end) and after.startswith(until) else None


def _squash(text: str) -> str:
    return "".join(text.split())
