"""From a row of the data set to the tokens an episode begins with, and from an environment's words to the tokens it goes on with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from areal.chat import suffix_text, suffix_tokens
from areal.data import MalformedRow, encode_prompt
from areal.run_folder import load_tokenizer
from areal.workflow.base import EpisodeDropped

_MAX_REMEMBERED = 4096
Reply = str | Mapping[str, Any] | Sequence[Mapping[str, Any]]
"""What an environment says to an answer: text (a user's message in a chat), or chat messages."""


class PromptError(EpisodeDropped):
    """A row of the data set that gives no prompt; counted as malformed_row."""

    def __init__(self, message: str) -> None:
        super().__init__("malformed_row", message)


@dataclass(frozen=True, slots=True)
class Prompt:
    """``ids`` are shared by the samples of a group: not to be changed."""

    ids: list[int]
    text: str
    is_chat: bool
    """It went through the chat template, and what follows an answer does so too."""


class PromptEncoder:
    """The tokenizer's part of a workflow.

    A row gives its prompt as ``input_ids`` (token ids), ``messages`` (chat, put through the tokenizer's template) or ``prompt`` (text).

    Args:
        tokenizer: Hugging Face tokenizer or the folder of one; without one only ``input_ids`` rows work, and texts are empty.
        max_prompt_len: longer prompts (tokens) are dropped, cause prompt_too_long; None = no bound here.
        template_options: handed to the chat template (``enable_thinking``, ``tools``); those that are None are left to its defaults.
    """

    def __init__(self, tokenizer: Any = None, max_prompt_len: int | None = None, **template_options: Any) -> None:
        self.tokenizer = load_tokenizer(Path(tokenizer)) if isinstance(tokenizer, str | Path) else tokenizer
        self.max_prompt_len = max_prompt_len
        self.template_options = {key: value for key, value in template_options.items() if value is not None}
        # The samples of a group have the same prompt object: (it, its encoding) by its id.
        self._known: dict[int, tuple[Any, Prompt]] = {}

    def encode(self, data: Mapping[str, Any]) -> Prompt:
        """Worked out once for the samples of a group.

        Raises:
            EpisodeDropped: no prompt in the row, or too long a one.
        """
        for key in ("input_ids", "messages", "prompt"):
            source = data.get(key)
            if source is not None:
                break
        else:
            raise PromptError(f"a row has none of the keys input_ids, messages and prompt; it has {', '.join(map(str, data)) or 'nothing'}")
        known = self._known.get(id(source))
        if known is None or known[0] is not source:
            if len(self._known) >= _MAX_REMEMBERED:
                self._known.clear()
            ids = self._ids(data)
            is_chat = key == "messages" and bool(self.tokenizer.chat_template)
            known = self._known[id(source)] = (source, Prompt(ids, self.decode(ids), is_chat))
        prompt = known[1]
        if self.max_prompt_len is not None and len(prompt.ids) > self.max_prompt_len:
            raise EpisodeDropped(
                "prompt_too_long", f"a prompt of {len(prompt.ids)} tokens is longer than max_prompt_len={self.max_prompt_len}"
            )
        return prompt

    def _ids(self, data: Mapping[str, Any]) -> list[int]:
        if self.tokenizer is None and "input_ids" not in data:
            raise PromptError("a row has a text prompt, but the workflow has no tokenizer")
        try:
            ids = encode_prompt(data, self.tokenizer, **self.template_options)
        except MalformedRow as error:
            raise PromptError(str(error)) from error
        if not ids or not all(isinstance(token, int) for token in ids):
            raise PromptError(f"{data.get('prompt_id', 'a row')}: its prompt is empty or not a list of token ids")
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Without special tokens."""
        return "" if self.tokenizer is None else self.tokenizer.decode(ids, skip_special_tokens=True)

    def reply(self, reply: Reply, answer_ids: Sequence[int], *, is_chat: bool) -> list[int]:
        """Tokens that append ``reply`` to an answer. Outside of a chat it is plain text: that of messages, one a line.

        Raises:
            ChatTemplateError: the template has no place for it.
            Exception: what the tokenizer raises at a text it cannot encode.
        """
        if not is_chat:
            text = reply if isinstance(reply, str) else "\n".join(str(message.get("content", "")) for message in _messages(reply))
            return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        return suffix_tokens(self.tokenizer, answer_ids, suffix_text(self.tokenizer, _messages(reply), **self.template_options))


def _messages(reply: Reply) -> list[Mapping[str, Any]]:
    if isinstance(reply, str):
        return [{"role": "user", "content": reply}]
    return [reply] if isinstance(reply, Mapping) else list(reply)
