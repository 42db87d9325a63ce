"""What stands between two answers of a conversation, with templates that behave as well-known ones do."""

from __future__ import annotations

from typing import Any

import pytest
from chat_templates import END_OF_TURN, byte_tokenizer

from areal.chat import ChatTemplateError, suffix_text, suffix_tokens

ASK = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "the abc?"}]
AGAIN = [{"role": "user", "content": "No. 12 or 11?"}]
RESULT = [{"role": "tool", "content": "48"}]


def _rendered(tokenizer: Any, messages: list[dict[str, Any]], **options: Any) -> str:
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **options)


@pytest.mark.parametrize("template", ["qwen2.5", "qwen3", "llama3"])
@pytest.mark.parametrize("more", [AGAIN, AGAIN * 2], ids=["one", "two"])
def test_prompt_answer_and_suffix_are_the_conversation(template: str, more: list[dict[str, Any]]) -> None:
    tokenizer = byte_tokenizer(template)
    suffix = suffix_text(tokenizer, more)
    prompt = _rendered(tokenizer, ASK)
    assert prompt + "forty-eight" + suffix == _rendered(tokenizer, [*ASK, {"role": "assistant", "content": "forty-eight"}, *more])
    assert suffix == suffix_text(tokenizer, more, history=ASK)


def test_options_reach_the_template() -> None:
    tokenizer = byte_tokenizer("qwen3")
    assert suffix_text(tokenizer, AGAIN, enable_thinking=False) == suffix_text(tokenizer, AGAIN) + "<think>\n\n</think>\n\n"


def test_results_of_tools() -> None:
    tokenizer = byte_tokenizer("qwen2.5")
    assert suffix_text(tokenizer, RESULT * 2) == (
        "<|im_end|>\n<|im_start|>user\n<tool_response>\n48\n</tool_response>\n<tool_response>\n48\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    with pytest.raises(ChatTemplateError, match=r"refuses messages of the roles tool .*a result without a call"):
        suffix_text(byte_tokenizer("llama3"), RESULT)


@pytest.mark.parametrize("template", ["qwen2.5", "llama3"])
def test_the_turn_is_ended_once(template: str) -> None:
    tokenizer = byte_tokenizer(template)
    end = tokenizer.convert_tokens_to_ids(END_OF_TURN[template])
    suffix = suffix_text(tokenizer, AGAIN)
    whole = tokenizer(suffix, add_special_tokens=False)["input_ids"]
    answer = tokenizer("the abc", add_special_tokens=False)["input_ids"]
    assert whole[0] == end
    assert suffix_tokens(tokenizer, [*answer, end], suffix) == whole[1:]
    assert suffix_tokens(tokenizer, answer, suffix) == whole  # cut off, or ended by a stop string: the end is put in
    assert suffix_tokens(tokenizer, [], suffix) == whole


def test_an_equal_token_that_is_no_end_of_turn() -> None:
    tokenizer = byte_tokenizer("qwen2.5")
    newline = tokenizer("\n", add_special_tokens=False)["input_ids"]
    assert suffix_tokens(tokenizer, newline, "\nUser: 1") == tokenizer("\nUser: 1", add_special_tokens=False)["input_ids"]
    assert suffix_tokens(tokenizer, newline, "\nUser: 1", stopped=True) == tokenizer("User: 1", add_special_tokens=False)["input_ids"]


def test_templates_that_cannot_go_on() -> None:
    tokenizer = byte_tokenizer("qwen2.5")
    tokenizer.chat_template = "{{ messages[0].content }}"
    with pytest.raises(ChatTemplateError, match="does not show the answer"):
        suffix_text(tokenizer, AGAIN)


def test_without_a_template() -> None:
    tokenizer = byte_tokenizer("none")
    assert suffix_text(tokenizer, AGAIN * 2) == "\nNo. 12 or 11?\nNo. 12 or 11?"
