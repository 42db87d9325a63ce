"""Conversations as tokens: what a later turn takes over from an earlier one, with templates that behave as well-known ones do."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from typing import Any

import orjson
import pytest
from chat_templates import END_OF_TURN, byte_tokenizer

from areal.agent.chat import Chat
from areal.agent.export import export
from areal.agent.openai_answers import Answer
from areal.agent.openai_protocol import parse_chat, parse_completion
from areal.agent.sampling import SamplingRules
from areal.agent.session import Session
from areal.config import GenerationConfig
from areal.tool_calls import hermes
from areal.types import ModelRequest, ModelResponse

ASK = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "the abc?"}]
MORE = [{"role": "user", "content": "And 12?"}]
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
RESULT = [{"role": "tool", "tool_call_id": "c", "content": "12"}]
CUT, ENDED = "length", "stop"


class Scripted:
    """Answers texts, byte by byte so that no tokenizer would cut them like that; ended ones with the end-of-turn token."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.texts: list[tuple[str, str]] = []

    async def agenerate(self, request: ModelRequest) -> ModelResponse:
        text, reason = self.texts.pop(0)
        parts = re.findall(r"<\|\w+\|>|.", text, re.DOTALL)
        tokens = [token for part in parts for token in self.tokenizer(part, add_special_tokens=False)["input_ids"]]
        tokens += [self.tokenizer.eos_token_id] if reason == ENDED else []
        return ModelResponse(request.input_ids, tokens, [-0.5] * len(tokens), [7] * len(tokens), reason)  # type: ignore[arg-type]

    def get_version(self) -> int:
        return 7


class Talk:
    def __init__(self, template: str, **options: Any) -> None:
        self.tokenizer = byte_tokenizer(template)
        self.engine = Scripted(self.tokenizer)
        self.session = Session(self.engine, Chat(self.tokenizer, options), SamplingRules(GenerationConfig()))

    async def say(self, messages: list[dict[str, Any]], text: str, reason: str = ENDED, **fields: Any) -> dict[str, Any]:
        """The assistant's message, as a client gets it."""
        self.engine.texts.append((text, reason))
        answer: Answer = await self.session.answer(parse_chat(orjson.dumps({"messages": messages, **fields})))
        return answer.choices[0].message()

    @property
    def prompts(self) -> list[list[int]]:
        return [turn.response.input_tokens for turn in self.session.turns]

    @property
    def outputs(self) -> list[list[int]]:
        return [turn.response.output_tokens for turn in self.session.turns]

    def shown(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=False))

    def scratch(self, messages: list[dict[str, Any]], **options: Any) -> str:
        return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **options))


def talk(main: Callable[[Talk], Any], template: str, **options: Any) -> None:
    async def run() -> None:
        await main(Talk(template, **options))

    asyncio.run(run())


@pytest.mark.parametrize("reason", [ENDED, CUT])
@pytest.mark.parametrize("text", ["yes", "\nthe abc", "the \n ", "", "a<|im_start|>b"])
@pytest.mark.parametrize("template", ["qwen2.5", "qwen3", "llama3"])
def test_a_later_turn_takes_over_tokens_and_reads_as_from_scratch(template: str, text: str, reason: str) -> None:
    async def main(t: Talk) -> None:
        answer = await t.say(ASK, text, reason)
        messages = [*ASK, answer, *MORE]
        again = await t.say(messages, "ok")
        await t.say([*messages, again, *MORE], "ok")
        first, second, third = t.session.turns
        assert second.parent is first and third.parent is second
        for earlier, later in ((first, second), (second, third)):
            assert later.response.input_tokens[: len(earlier.ids)] == earlier.ids
        end = END_OF_TURN[template]
        rest = t.shown(t.prompts[1][len(first.ids) :])
        assert rest.count(end) == (1 if reason == ENDED else 2), "an answer that was cut gets its end, another one does not get two"
        # A special token in the middle of an answer stays, though the client is not shown it.
        shown, scratch = t.shown(t.prompts[1]).replace("a<|im_start|>b", "ab"), t.scratch(messages)
        assert shown == scratch or (template == "llama3" and text != text.strip())
        assert "".join(shown.split()) == "".join(scratch.split())
        if text == "\nthe abc":
            assert t.prompts[1] != t.tokenizer(scratch, add_special_tokens=False)["input_ids"], "the test shows no drift otherwise"
        (sequence,) = export(t.session.turns, 1.0)
        trained = [int(token) for token, loss in zip(sequence["input_ids"], sequence["loss_mask"], strict=True) if loss]
        assert trained == [token for output in t.outputs for token in output], (
            "neither the end that was put in nor a question is trained on"
        )
        assert sequence["truncated"] is (reason == CUT)

    talk(main, template)


def test_without_a_template_messages_are_joined() -> None:
    async def main(t: Talk) -> None:
        answer = await t.say(ASK, "yes", CUT)
        await t.say([*ASK, answer, *MORE], "ok")
        assert [t.shown(ids) for ids in t.prompts] == ["Be brief.\nthe abc?", "Be brief.\nthe abc?yes\nAnd 12?"]
        assert t.session.turns[1].parent is t.session.turns[0]

    talk(main, "none")


THOUGHT = "<think>\nhm\n</think>\n\nabc"


def test_where_the_template_drops_thinking_a_branch_begins() -> None:
    async def main(t: Talk) -> None:
        answer = await t.say(ASK, THOUGHT)
        messages = [*ASK, answer, *MORE]
        await t.say(messages, "ok")
        assert answer["content"] == THOUGHT and "hm" not in t.scratch(messages)
        assert t.session.turns[1].parent is None
        assert t.prompts[1] == t.tokenizer(t.scratch(messages), add_special_tokens=False)["input_ids"]
        sequences = export(t.session.turns, 1.0)
        assert [int(s["loss_mask"].sum()) for s in sequences] == [len(output) for output in t.outputs]

    talk(main, "qwen3")


@pytest.mark.parametrize("thought", [THOUGHT, "<think>hm</think>"])
def test_thinking_is_kept_while_the_template_keeps_it(thought: str) -> None:
    """Between the calls of tools, and however many newlines the model puts around its thought."""

    async def main(t: Talk) -> None:
        call = thought + '<tool_call>{"name":"add","arguments":{"b":2,"a":1}}</tool_call>'
        answer = await t.say(ASK, call, tools=TOOLS)
        assert answer["tool_calls"][0]["function"] == {"name": "add", "arguments": '{"b":2,"a":1}'}
        await t.say([*ASK, answer, *RESULT], "ok", tools=TOOLS)
        first, second = t.session.turns
        assert second.parent is first and t.shown(second.response.input_tokens).count("hm") == 1
        await t.say([*ASK, answer, *RESULT, {"role": "assistant", "content": "ok"}, *MORE], "ok", tools=TOOLS)
        assert t.session.turns[2].parent is None, "a new question drops it"

    talk(main, "qwen3")


def test_an_empty_thought_that_the_template_puts_in_begins_a_branch() -> None:
    async def main(t: Talk) -> None:
        answer = await t.say(ASK, "abc")
        await t.say([*ASK, answer, *MORE], "ok")
        assert t.shown(t.prompts[0]).endswith("</think>\n\n") and t.session.turns[1].parent is None
        assert t.shown(t.prompts[1]) == t.scratch([*ASK, answer, *MORE], enable_thinking=False)

    talk(main, "qwen3", enable_thinking=False)


@pytest.mark.parametrize("template", ["qwen2.5", "llama3"])
@pytest.mark.parametrize("before", ["", "Let me see. "])
def test_a_tool_call_stays_as_it_was_sampled(template: str, before: str) -> None:
    async def main(t: Talk) -> None:
        text = before + '<tool_call> {"arguments": {"b": 2, "a": 1},"name":"add"}\n</tool_call>'
        answer = await t.say(ASK, text, tools=TOOLS)
        assert answer["content"] == (before.strip() or None)
        # As the SDK's model_dump gives it, with the ids of some framework of its own.
        call = {"id": "other", "type": "function", "function": {"name": "add", "arguments": '{"a": 1, "b": 2}'}}
        sent = {**answer, "refusal": None, "annotations": [], "function_call": None, "tool_calls": [call]}
        await t.say([*ASK, sent, *RESULT], "ok", tools=TOOLS)
        first, second = t.session.turns
        if template == "llama3" and before:
            assert second.parent is None, "its template does not show the text before a call"
            return
        assert second.parent is first and t.shown(second.response.input_tokens).count(text) == 1
        rest = t.shown(second.response.input_tokens[len(first.ids) :])
        assert rest.count("12") == 1 and END_OF_TURN[template] not in rest[:5]

    talk(main, template)


def test_what_extends_an_earlier_turn_is_compared_by_value() -> None:
    async def main(t: Talk) -> None:
        answer = await t.say(ASK, "yes")
        parts = [{"role": m["role"], "content": [{"type": "text", "text": m["content"]}], "name": None} for m in [*ASK, answer]]
        await t.say([*parts, *MORE], "one")
        await t.say([*ASK, {**answer, "content": "yes "}, *MORE], "edited")
        await t.say([ASK[0], {"role": "user", "content": "other"}, answer, *MORE], "other")
        await t.say([*ASK, answer, {"role": "user", "content": "again"}], "a branch")
        await t.say(ASK, "the same question")
        await t.say([*ASK, answer, *MORE], "with tools", tools=TOOLS)
        parents = [turn.parent for turn in t.session.turns]
        first = t.session.turns[0]
        assert parents == [None, first, None, None, first, None, None]
        sequences = export(t.session.turns, 0.5)
        assert len(sequences) == 6 and sequences[-1]["rewards"] == 0.5
        assert sum(int(s["loss_mask"].sum()) for s in sequences) == sum(map(len, t.outputs)), "what two branches share is trained once"
        assert sequences[3]["loss_mask"].sum() == len(t.outputs[4]) and sequences[0]["loss_mask"].sum() == len(t.outputs[0] + t.outputs[1])
        assert (sequences[3]["versions"] == 7).sum() == len(t.outputs[0] + t.outputs[4]), "sampled tokens keep their versions as context"

    talk(main, "qwen2.5")


@pytest.mark.parametrize("text", ["yes", "\nthe e"])
def test_plain_completions_that_go_on_take_over_tokens(text: str) -> None:
    async def main(t: Talk) -> None:
        async def complete(prompt: str | list[int], reason: str = CUT) -> None:
            t.engine.texts.append((text, reason))
            await t.session.answer(parse_completion(orjson.dumps({"prompt": prompt, "stop": ["?"]})))

        await complete("the abc")
        first = t.session.turns[0]
        await complete("the abc" + text + "abc12")
        await complete([*first.ids, 5])
        await complete([*first.ids[:-1], 5])
        await complete("another", ENDED)
        await complete("another" + text + "abc")
        parents = [turn.parent for turn in t.session.turns]
        assert parents == [None, first, first, None, None, None], "an end that the text does not show is not taken over"
        assert t.prompts[1] == first.ids + t.tokenizer("abc12")["input_ids"]
        assert t.shown(t.prompts[5]) == "another" + text + "abc"

    talk(main, "none")


def test_what_was_sampled_behind_a_stop_string_is_no_part_of_the_turn() -> None:
    """A server that goes on with an answer sees only what it sampled itself, and not a stop string that an interruption cut in two."""

    async def main(t: Talk) -> None:
        for reason in (ENDED, CUT):
            answer = await t.say(ASK, "3*4=]] and on", reason, stop=["=]", "?"])
            turn = t.session.turns[-1]
            assert answer["content"] == "3*4" and t.shown(turn.response.output_tokens) == "3*4=]" and turn.response.stop_reason == "stop"
            assert len(turn.response.output_logprobs) == len(turn.response.output_versions) == len("3*4=]")
        await t.say([*ASK, answer, *MORE], "all of it", stop=["?"])
        assert t.session.turns[-1].parent is t.session.turns[-2] and t.shown(t.session.turns[-1].response.output_tokens).startswith(
            "all of it"
        )

    talk(main, "qwen2.5")


def test_large_integers_of_tool_calls_are_exact() -> None:
    async def main(t: Talk) -> None:
        call = '<tool_call>{"name":"add","arguments":{"b":123456789012345678901234567890,"a":"é"}}</tool_call>'
        answer = await t.say(ASK, call, tools=TOOLS)
        assert orjson.loads(answer["tool_calls"][0]["function"]["arguments"])["a"] == "é"
        assert '"b":123456789012345678901234567890' in answer["tool_calls"][0]["function"]["arguments"]
        await t.say([*ASK, answer, *RESULT], "ok", tools=TOOLS)
        assert t.session.turns[1].parent is t.session.turns[0]

    talk(main, "qwen2.5")


def test_hermes_tool_calls() -> None:
    text, calls = hermes('So:\n<tool_call>{"name": "f", "arguments": {"x": [1, "}"]}}</tool_call>\n<tool_call>\n{"name": "g"}')
    assert text == "So:" and [(call.name, call.arguments) for call in calls] == [("f", {"x": [1, "}"]}), ("g", {})]
    assert len({call.id for call in calls}) == 2
    deep, half, none = "[" * 100_000, '"\\ud800"', "NaN"
    for bad in ("{no json}", "[1]", '{"name": "f"', *(f'{{"name": "f", "arguments": {{"x": {x}}}}}' for x in (deep, half, none))):
        assert hermes(f"<tool_call>{bad}</tool_call>") == (f"<tool_call>{bad}</tool_call>", [])
    for bad in ("plain", ""):
        assert hermes(bad) == (bad, [])
