"""Answers with calls in them: the exact sequence with a scripted engine, and stop strings on a real server."""

from __future__ import annotations

import asyncio
import itertools
import json
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chat_templates import byte_tokenizer
from environments import calculator, long_text
from recomputed import logprobs_of
from rollout_servers import Server, make_model
from scripted_engine import ScriptedEngine

from areal.config import ConfigError, GenerationConfig
from areal.inference.client import RolloutClient
from areal.reward import RewardService
from areal.runner import run_episode
from areal.tasks.arithmetic import build_tokenizer
from areal.types import Trajectory
from areal.workflow import EpisodeDropped, Tool, ToolCall, ToolWorkflow, to_trajectory

TOKENIZER = build_tokenizer()
EOS = TOKENIZER.eos_token_id


class InfixFormat:
    """``8*6=``, and the result behind it; an error is a sign that the tokenizer has."""

    stop = ("=",)

    def parse(self, text: str) -> list[ToolCall] | None:
        found = re.search(r"(\d+[-+*]\d+)=$", text)
        return [ToolCall("calculator", {"expression": found[1]})] if found else None

    def render(self, results: list[str]) -> str:
        return results[0] if results[0].lstrip("-").isdigit() else "#"


async def length(prompt: str, completions: str, prompt_ids: list[int], completion_ids: list[int], **row: Any) -> float:
    row.setdefault("seen", []).append((prompt, completions, prompt_ids, completion_ids))
    return float(len(completions))


def ids(text: str, *, end: bool = False) -> list[int]:
    return [*TOKENIZER.encode(text), *([EOS] if end else [])]


def flow(tokenizer: Any = TOKENIZER, max_new_tokens: int = 12, **changes: Any) -> ToolWorkflow:
    return ToolWorkflow(
        length, GenerationConfig(max_new_tokens=max_new_tokens), tokenizer, **{"tools": [calculator], "format": InfixFormat, **changes}
    )


def episode(workflow: ToolWorkflow, engine: ScriptedEngine, **row: Any) -> Trajectory:
    async def main() -> Trajectory:
        async with RewardService(timeout=60):
            return to_trajectory(await workflow.arun_episode(engine, {"prompt": "a7=", **row}))

    return asyncio.run(main())


def test_the_sequence_of_two_calls() -> None:
    engine, seen = ScriptedEngine(ids("a8*6="), ids("-1="), ids("b2-48="), ids("#3", end=True)), []
    t = episode(flow(), engine, seen=seen)
    # "-1=" ends at a stop string and is no call (48-1 is: the result is not the model's text): the answer goes on behind it.
    text = [("a7=", 0), ("a8*6=", 1), ("48", 0), ("-1=", 1), ("b2-48=", 1), ("-46", 0), ("#3", 1)]
    assert t.input_ids.tolist() == ids("".join(part for part, _ in text), end=True)
    assert t.loss_mask.tolist() == [bool(loss) for part, loss in text for _ in part] + [True]
    assert t.versions.tolist() == [-1] * 3 + [2] * 5 + [-1] * 2 + [3] * 3 + [4] * 6 + [-1] * 3 + [5] * 3
    assert t.logprobs.tolist() == [0] * 3 + [-0.25] * 5 + [0] * 2 + [-0.5] * 3 + [-0.75] * 6 + [0] * 3 + [-1] * 3
    assert not t.truncated
    assert seen == [("a7=", "a8*6=48-1=b2-48=-46#3", ids("a7="), t.input_ids[3:].tolist())]
    assert [r.gconfig.max_new_tokens for r in engine.requests] == [12, 12, 9, 12]  # what follows no result is the same answer
    assert all(r.gconfig.stop == ["="] for r in engine.requests)


def test_what_a_server_sampled_behind_the_stop_string_is_cut_off() -> None:
    """A stop string that an interruption cut in two is not seen by the server that goes on."""
    engine = ScriptedEngine(ids("8*6=99", end=True), ids("1234567890+", end=True), ids("#3", end=True))
    t = episode(flow(), engine)
    assert t.input_ids.tolist() == ids("a7=" + "8*6=" + "48" + "1234567890+", end=True) and not t.truncated
    t = episode(flow(max_new_tokens=4), ScriptedEngine(ids("8*6=99"), ids("#", end=True)))  # whole at its last token: not cut off
    assert t.input_ids.tolist() == ids("a7=8*6=48#", end=True) and not t.truncated


def test_lengths() -> None:
    t = episode(flow(max_new_tokens=4), ScriptedEngine(ids("8*6="), ids("12345", end=True)))
    assert t.truncated and t.input_ids.tolist() == ids("a7=8*6=481234")
    t = episode(flow(max_new_tokens=4), ScriptedEngine(ids("1="), ids("2=")))  # four tokens of one answer, and no call
    assert t.truncated and t.input_ids.tolist() == ids("a7=1=2=")
    for max_context, text in ((3 + 4 + 2, "a7=8*6="), (3 + 4 + 3, "a7=8*6=48#")):  # a result must leave room for a token behind it
        engine = ScriptedEngine(ids("8*6="), ids("#3", end=True))
        t = episode(flow(max_context=max_context), engine)
        assert t.input_ids.tolist() == ids(text) and t.truncated == text.endswith("#"), max_context


def test_calls_beyond_the_last_are_not_made() -> None:
    engine = ScriptedEngine(ids("8*6="), ids("9*9="), ids("#3", end=True))  # 9*9 would hang
    t = episode(flow(max_calls=1), engine)
    assert t.input_ids.tolist() == ids("a7=8*6=489*9=") and len(engine.requests) == 2 and not t.truncated


def test_stop_strings_of_the_run_end_the_answer() -> None:
    workflow = ToolWorkflow(length, GenerationConfig(max_new_tokens=12, stop=["#"]), TOKENIZER, [calculator], InfixFormat)
    engine = ScriptedEngine(ids("8*6="), ids("1#"))
    assert episode(workflow, engine).input_ids.tolist() == ids("a7=8*6=481#")
    assert engine.requests[0].gconfig.stop == ["#", "="]


def test_errors_are_told_and_deaths_are_not() -> None:
    engine = ScriptedEngine(ids("0*6="), ids("#3", end=True))  # raises: the format tells it as '#'
    assert episode(flow(), engine).input_ids.tolist() == ids("a7=0*6=##3", end=True)
    begin = time.monotonic()
    engine = ScriptedEngine(ids("9*6="), ids("#3", end=True))  # hangs, and is killed
    assert episode(flow(tool_timeout=0.3), engine).input_ids.tolist() == ids("a7=9*6=##3", end=True)
    assert time.monotonic() - begin < 45
    with pytest.raises(EpisodeDropped, match="the tool 'calculator': the function ended its process") as caught:
        episode(flow(), ScriptedEngine(ids("13*6=")))
    assert caught.value.cause == "tool_failed"


def test_results_of_all_kinds_of_tools() -> None:
    async def on_the_loop(x: int) -> dict[str, int]:
        await asyncio.sleep(0)
        return {"x": x}

    async def is_down() -> None:
        raise ConnectionError("no data base")

    async def hangs() -> None:
        await asyncio.sleep(60)

    async def circle() -> list[Any]:
        found: list[Any] = []
        found.append(found)
        return found

    async def main() -> None:
        async with RewardService(timeout=60):
            assert await Tool("a", on_the_loop).result({"x": 3}) == '{"x": 3}'
            assert await Tool("b", calculator).result({"expression": "8*6"}) == "48"
            assert "ValueError: no zeros here" in await Tool("b", calculator).result({"expression": "0*6"})
            assert "unexpected keyword argument 'y'" in await Tool("a", on_the_loop).result({"y": 3})
            assert await Tool("h", hangs, timeout=0.1).result({}) == "Error: the function did not return within 0.1 s"
            with pytest.raises(EpisodeDropped, match="the tool 'down': ConnectionError: no data base") as caught:
                await Tool("down", is_down, faults=("ConnectionError",)).result({})
            assert caught.value.cause == "tool_failed"
            assert await Tool("c", circle).result({}) == "Error: ValueError: Circular reference detected"
            assert "at most 60000 bytes" in await Tool("big", long_text).result({})

    asyncio.run(main())


QUESTION = {"messages": [{"role": "user", "content": "the abc?"}]}


def _call(name: str, **arguments: Any) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def test_hermes_through_the_template() -> None:
    tokenizer = byte_tokenizer("qwen2.5")
    end = "<|im_end|>"
    workflow = flow(tokenizer, 400, format="hermes")
    texts = ["Hm. " + _call("calculator", expression="8*6") + _call("nothing"), "<tool_call>{8*6</tool_call>", "It is 48."]
    engine = ScriptedEngine(*(tokenizer(text + end, add_special_tokens=False)["input_ids"] for text in texts))
    t = episode(workflow, engine, **QUESTION)
    prompt = tokenizer.decode(engine.requests[0].input_ids)
    assert '"name": "calculator"' in prompt and "Works out a product" in prompt and '"expression"' in prompt
    told = "<|im_start|>user\n<tool_response>\n48\n</tool_response>\n<tool_response>\nError: there is no tool 'nothing'; there are calculator\n</tool_response>"
    broken = "<|im_start|>user\n<tool_response>\nError: a tool call is a JSON object with name and arguments ("
    text = tokenizer.decode(t.input_ids)
    assert text.startswith(f"{prompt}{texts[0]}{end}\n{told}{end}\n<|im_start|>assistant\n{texts[1]}{end}\n{broken}")
    assert text.endswith(f"\n</tool_response>{end}\n<|im_start|>assistant\n{texts[2]}{end}")
    edges = np.flatnonzero(np.diff(np.concatenate([[0], t.loss_mask.astype(int), [0]]))).reshape(-1, 2)
    assert [tokenizer.decode(t.input_ids[a:b]) for a, b in edges] == [text + end for text in texts]


def test_formats_that_a_tokenizer_cannot_have() -> None:
    with pytest.raises(ConfigError, match="needs a chat template, and the tokenizer has none"):
        flow(format="hermes")
    with pytest.raises(ConfigError, match="HermesFormat cannot be used: .*a result without a call"):
        flow(byte_tokenizer("llama3"), format="hermes")
    tokenizer = byte_tokenizer("qwen2.5")
    tokenizer.chat_template = "{% for m in messages %}{{ m.role + m.content }}{% endfor %}"
    with pytest.raises(ConfigError, match="does not tell the model of the tool 'calculator'"):
        flow(tokenizer, format="hermes")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_calls": 0}, "max_calls=0"),
        ({"tools": []}, "0 tools"),
        ({"tools": [calculator, Tool("calculator", calculator)]}, "two of the name 'calculator'"),
        ({"tools": [lambda x: x]}, "cannot be sent to a worker process"),
        ({"tools": ["environments:nothing"]}, "cannot be imported"),
        ({"format": "nothing"}, "format='nothing' cannot be imported"),
        ({"format": object}, "is none"),
        ({"tools": [Tool("f", print)], "format": "hermes", "tokenizer": byte_tokenizer()}, "arguments of the tool 'f' are not known"),
    ],
)
def test_mistakes_are_told_when_it_is_made(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        flow(**changes)


def test_on_a_real_server(tmp_path: Path) -> None:
    """A model that knows only calls: stop strings end its answers, and the log-probs are those of the whole sequence."""
    tokenizer = make_model(tmp_path / "model")
    server = Server(tmp_path / "model", tmp_path / "rollout_0.log", "rollout 0", "--deterministic").wait()

    async def main() -> list[Trajectory]:
        client = RolloutClient(urls=[server.url])
        workflow = ToolWorkflow(length, GenerationConfig(max_new_tokens=40), tokenizer, [calculator], AnySign, max_calls=3, max_context=90)
        async with RewardService(timeout=60):
            row = {"prompt": "a7b*8=", "prompt_id": "x"}
            episodes = [(await run_episode(client, workflow, row, seed=1, sample=s))[0] for s in range(8)]
        await client.close()
        return episodes

    try:
        episodes = asyncio.run(main())
    finally:
        server.process.terminate()
    n_results = 0
    for t in episodes:
        texts = _stretches(tokenizer, t)
        n_results += len(texts) // 2 - 1
        for own, result in zip(texts[1:-1:2], texts[2::2], strict=True):
            assert own[-1] in "+-" and not set(own[:-1]) & set("+-") and result == "4,2"
        assert np.abs(logprobs_of(tmp_path / "model", t) - t.logprobs)[t.loss_mask].max() < 1e-5
    assert n_results >= 8


class AnySign:
    """A format for a model that can nothing: every sign is a call."""

    stop = ("+", "-")

    def parse(self, text: str) -> list[ToolCall]:
        return [ToolCall("calculator", {"expression": "6*7"})]

    def render(self, results: list[str]) -> str:
        return ",".join(results[0])


def _stretches(tokenizer: Any, t: Trajectory) -> list[str]:
    edges = [0, *(np.flatnonzero(np.diff(t.loss_mask)) + 1), len(t)]
    return [tokenizer.decode(t.input_ids[a:b]) for a, b in itertools.pairwise(edges)]
