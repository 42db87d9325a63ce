"""Going on with a conversation from the tokens that are there: what a chat template puts between an answer and the next one.

An answer is never tokenised again: decoded and encoded, its tokens need not come out as they were sampled, and then log-probs and
versions would belong to others. Only what is new is encoded: the end of the answer's turn, the new messages, the head of the next answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_ANSWER = "areal7answer9mark"
_BEFORE = ({"role": "user", "content": "?"},)


class ChatTemplateError(ValueError):
    """The template cannot show these messages behind an answer, told in one sentence."""


def suffix_text(
    tokenizer: Any, messages: Sequence[Mapping[str, Any]], *, history: Sequence[Mapping[str, Any]] = _BEFORE, **template_options: Any
) -> str:
    """What the template writes behind the text of an answer when ``messages`` follow it and the next answer is to begin.

    Without a template messages are joined by newlines.

    Args:
        history: the messages before the answer; few templates look back at them.
        template_options: of ``apply_chat_template``: ``tools``, and variables such as ``enable_thinking``.

    Raises:
        ChatTemplateError: the template refuses these messages, or leaves the answer out.
    """
    mark = _ANSWER
    while mark in str(history) or mark in str(messages):
        mark += "9"
    conversation = [*history, {"role": "assistant", "content": mark}, *messages]
    if not tokenizer.chat_template:
        return "".join(f"\n{message['content']}" for message in messages)
    try:
        text = tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True, **template_options)
    except Exception as error:  # templates raise jinja2's own, and whatever their filters raise
        roles = ", ".join(str(message.get("role")) for message in messages)
        raise ChatTemplateError(f"the chat template refuses messages of the roles {roles} behind an answer ({error})") from error
    _, found, suffix = text.partition(mark)
    if not found:
        raise ChatTemplateError("the chat template does not show the answer that messages follow")
    return suffix


def suffix_tokens(tokenizer: Any, answer_ids: Sequence[int], suffix: str, *, stopped: bool = False) -> list[int]:
    """Tokens to append behind ``answer_ids``: those of ``suffix_text``, without the end of the turn where the answer has it already.

    ``stopped``: the answer ended by itself, so an equal token at its end is the end of the turn, special or not.
    """
    ids = list(tokenizer(suffix, add_special_tokens=False)["input_ids"]) if suffix else []
    if ids and answer_ids and ids[0] == answer_ids[-1] and (stopped or ids[0] in tokenizer.all_special_ids):
        del ids[0]
    return ids
