"""Several attempts at one prompt: the exact sequence with a scripted engine, and log-probs on a real server."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chat_templates import byte_tokenizer
from environments import again, fails
from hypothesis import given
from hypothesis import strategies as st
from recomputed import logprobs_of
from rollout_servers import Server, make_model
from scripted_engine import ScriptedEngine

from areal.config import ConfigError, GenerationConfig
from areal.inference.client import RolloutClient
from areal.reward import RewardService
from areal.runner import run_episode
from areal.tasks.arithmetic import build_tokenizer
from areal.types import Trajectory
from areal.workflow import EpisodeDropped, MultiTurnWorkflow, to_trajectory

TOKENIZER = build_tokenizer()
EOS = TOKENIZER.eos_token_id
PROMPT = "a7b*8="


async def three_is_right(prompt: str, completions: str, prompt_ids: list[int], completion_ids: list[int], **row: Any) -> float:
    row.setdefault("seen", []).append((prompt, completions, prompt_ids, completion_ids))
    return float(completions == "#3")


def ids(text: str, *, end: bool = False) -> list[int]:
    return [*TOKENIZER.encode(text), *([EOS] if end else [])]


def episode(workflow: MultiTurnWorkflow, engine: ScriptedEngine, **row: Any) -> Trajectory:
    async def main() -> Trajectory:
        async with RewardService(timeout=60):
            return to_trajectory(await workflow.arun_episode(engine, {"prompt": PROMPT, "answer": "3", **row}))

    return asyncio.run(main())


def flow(**changes: Any) -> MultiTurnWorkflow:
    return MultiTurnWorkflow(three_is_right, GenerationConfig(max_new_tokens=8), TOKENIZER, **{"feedback": "=,", **changes})


def test_the_sequence_of_three_turns() -> None:
    engine, seen = ScriptedEngine(ids("#4", end=True), ids("#5", end=True), ids("#3", end=True)), []
    t = episode(flow(turn_discount=0.5), engine, seen=seen)
    first, second = ids(PROMPT) + ids("#4", end=True) + ids("=,"), ids("#5", end=True) + ids("=,")
    assert t.input_ids.tolist() == first + second + ids("#3", end=True)
    assert t.loss_mask.tolist() == [False] * 6 + [True] * 3 + [False] * 2 + [True] * 3 + [False] * 2 + [True] * 3
    assert t.versions.tolist() == [-1] * 6 + [2] * 3 + [-1] * 2 + [3] * 3 + [-1] * 2 + [4] * 3
    assert t.logprobs.tolist() == [0] * 6 + [-0.25] * 3 + [0] * 2 + [-0.5] * 3 + [0] * 2 + [-0.75] * 3
    assert t.reward == 0.25 and not t.truncated
    # Each request goes on from the very tokens of the one before.
    assert [request.input_ids for request in engine.requests] == [ids(PROMPT), first, first + second]
    assert [(prompt, answer) for prompt, answer, *_ in seen] == [(PROMPT, "#4"), (PROMPT + "#4=,", "#5"), (PROMPT + "#4=,#5=,", "#3")]
    assert [(len(p), len(c)) for _, _, p, c in seen] == [(6, 3), (11, 3), (16, 3)]


@pytest.mark.parametrize(("answers", "turns", "reward"), [(["#3"], 1, 1.0), (["#4", "#3"], 2, 0.9), (["#4"] * 3, 3, 0.0)])
def test_it_ends_with_success_or_the_last_turn(answers: list[str], turns: int, reward: float) -> None:
    engine = ScriptedEngine(*(ids(answer, end=True) for answer in answers))
    t = episode(flow(), engine)
    assert t.reward == pytest.approx(reward) and len(engine.requests) == turns
    assert t.loss_mask[-1] and not t.truncated


def test_a_cut_off_answer_ends_it() -> None:
    engine = ScriptedEngine(ids("#4", end=True), ids("12345678901", end=True), ids("#3"))
    t = episode(flow(), engine)
    assert t.truncated and len(engine.requests) == 2 and t.input_ids.tolist()[-8:] == ids("12345678")
    whole = ScriptedEngine(ids("1234567", end=True), ids("#3", end=True))  # as long, and ended by itself
    t = episode(flow(), whole)
    assert not t.truncated and len(whole.requests) == 2


def test_the_context_bounds_the_sequence() -> None:
    room_for = {6 + 3 + 2 + 3: 2, 6 + 3 + 2 + 1: 2, 6 + 3 + 2: 1, 6 + 3: 1, 7: 1}
    for max_context, turns in room_for.items():
        engine = ScriptedEngine(ids("#4", end=True), ids("#3", end=True))
        t = episode(flow(max_context=max_context), engine)
        assert len(engine.requests) == turns and len(t) <= max_context, max_context
        assert engine.requests[-1].gconfig.max_new_tokens == min(8, max_context - len(engine.requests[-1].input_ids))
        assert t.truncated == (max_context in (7, 12)) and t.loss_mask[-1]
    with pytest.raises(EpisodeDropped, match="leaves no room") as caught:
        episode(flow(max_context=6), ScriptedEngine())
    assert caught.value.cause == "prompt_too_long"


def test_feedback_functions() -> None:
    engine = ScriptedEngine(ids("#4", end=True), ids("#9", end=True))
    t = episode(flow(feedback=again), engine)  # the second feedback is None
    assert t.input_ids.tolist() == ids(PROMPT) + ids("#4", end=True) + ids("+1-4=3") + ids("#9", end=True)
    engine = ScriptedEngine(ids("#4", end=True), ids("#9", end=True))
    assert episode(flow(feedback="environments:again"), engine).input_ids.tolist() == t.input_ids.tolist()

    async def on_the_loop(prompt: str, completion: str, reward: float, turn: int, **row: Any) -> str:
        await asyncio.sleep(0)
        return "=" * turn

    engine = ScriptedEngine(*[ids("#4", end=True)] * 3)
    assert episode(flow(feedback=on_the_loop), engine).loss_mask.tolist().count(False) == 6 + 1 + 2

    async def hangs(*_: Any, **__: Any) -> str:
        await asyncio.sleep(60)
        return ""

    for function, message in ((fails, "ZeroDivisionError: hm"), (hangs, "did not return within 0.1 s")):
        with pytest.raises(EpisodeDropped, match=message) as caught:
            episode(flow(feedback=function, feedback_timeout=0.1 if function is hangs else None), ScriptedEngine(ids("#4", end=True)))
        assert caught.value.cause == "feedback_failed"


def test_feedback_in_a_chat_goes_through_the_template() -> None:
    tokenizer = byte_tokenizer("qwen2.5")
    end = tokenizer.eos_token_id
    workflow = MultiTurnWorkflow(three_is_right, GenerationConfig(max_new_tokens=30), tokenizer, max_turns=3, feedback="No, abc.")
    messages = [{"role": "user", "content": "the abc?"}]
    # Tokens that encoding their text would not give ("abc" is one token): they must stay as they were sampled.
    odd = [*(tokenizer.convert_tokens_to_ids(c) for c in "abc"), end]
    assert len(tokenizer("abc")["input_ids"]) == 1

    async def main() -> Trajectory:
        async with RewardService(timeout=60):
            return to_trajectory(await workflow.arun_episode(engine, {"messages": messages}))

    engine = ScriptedEngine(odd, odd[:-1], [*tokenizer("#3")["input_ids"], end])
    t = asyncio.run(main())
    assert tokenizer.decode(t.input_ids) == (
        "<|im_start|>system\nYou are helpful.<|im_end|>\n<|im_start|>user\nthe abc?<|im_end|>\n<|im_start|>assistant\n"
        + "abc<|im_end|>\n<|im_start|>user\nNo, abc.<|im_end|>\n<|im_start|>assistant\n" * 2
        + "#3<|im_end|>"
    )
    assert [tokenizer.decode(part) for part in _runs(t)] == ["abc<|im_end|>", "abc", "#3<|im_end|>"]
    assert engine.requests[1].input_ids[: len(engine.requests[0].input_ids) + 4] == engine.requests[0].input_ids + odd


def _runs(t: Trajectory) -> list[list[int]]:
    """The stretches of loss tokens."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], t.loss_mask.astype(int), [0]])))
    return [t.input_ids[a:b].tolist() for a, b in edges.reshape(-1, 2)]


@given(
    answers=st.lists(st.tuples(st.text("0123456789#", max_size=12), st.booleans()), min_size=4, max_size=4),
    max_turns=st.integers(1, 4),
    max_context=st.just(0) | st.integers(8, 60),
)
def test_what_holds_for_every_episode(answers: list[tuple[str, bool]], max_turns: int, max_context: int) -> None:
    engine = ScriptedEngine(*(ids(text, end=end) or [EOS] for text, end in answers))
    workflow, given_ = flow(max_turns=max_turns, max_context=max_context), list(engine.answers)

    async def main() -> Trajectory:  # nothing here needs a worker
        return to_trajectory(await workflow.arun_episode(engine, {"prompt": PROMPT}))

    t = asyncio.run(main())
    n_turns = len(engine.requests)
    assert 1 <= n_turns <= max_turns and (not max_context or len(t) <= max_context)
    sampled = [answer[: request.gconfig.max_new_tokens] for answer, request in zip(given_, engine.requests, strict=False)]
    assert _runs(t) == sampled
    assert t.truncated == (len(given_[n_turns - 1]) > engine.requests[-1].gconfig.max_new_tokens)
    assert (t.versions >= 0).tolist() == t.loss_mask.tolist()
    right = [TOKENIZER.decode(answer, skip_special_tokens=True) == "#3" for answer in sampled]
    assert not any(right[:-1]) and t.reward == pytest.approx(right[-1] * 0.9 ** (n_turns - 1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_turns": 0}, "max_turns=0"),
        ({"turn_discount": 0.0}, "turn_discount=0.0"),
        ({"feedback": "Wrong!"}, "cannot be tokenized"),
        ({"feedback": ""}, "feedback of MultiTurnWorkflow is empty"),
        ({"feedback": lambda *a, **k: "="}, "cannot be sent to a worker process"),
        ({"feedback": "environments:nothing"}, "feedback='environments:nothing' cannot be imported"),
    ],
)
def test_mistakes_are_told_when_it_is_made(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        flow(**changes)
    with pytest.raises(ConfigError, match="no tokenizer"):
        MultiTurnWorkflow(three_is_right, GenerationConfig())


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_model(folder)
    return folder


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(model, tmp_path_factory.mktemp("logs") / "rollout_0.log", "rollout 0", "--deterministic").wait()
    yield server
    server.process.terminate()


def test_on_a_real_server(server: Server, model: Path) -> None:
    """Log-probs of later turns are those of the sequence as it stands, feedback included."""

    async def main() -> None:
        client = RolloutClient(urls=[server.url])
        gconfig = GenerationConfig(max_new_tokens=12, stop_token_ids=list(range(2, 12)))  # a digit ends an answer, early mostly
        workflow = MultiTurnWorkflow(three_is_right, gconfig, TOKENIZER, max_turns=4, feedback="=,=", max_context=60)
        async with RewardService():
            row = {"prompt": PROMPT, "prompt_id": "x"}
            episodes = [(await run_episode(client, workflow, row, seed=1, sample=s))[0] for s in range(6)]
            (again,) = await run_episode(client, workflow, row, seed=1, sample=2)
        assert again.input_ids.tolist() == episodes[2].input_ids.tolist()
        assert max(len(_runs(t)) for t in episodes) >= 3
        t = max(episodes, key=lambda t: len(_runs(t)))
        await client.close()
        assert np.abs(logprobs_of(model, t) - t.logprobs)[t.loss_mask].max() < 1e-5

    asyncio.run(main())
