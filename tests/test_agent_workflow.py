"""What an agent may be, what it is given, how it fails; an agent written for AReaL in a run of its own; which workflow a config builds."""

from __future__ import annotations

import asyncio
import functools
import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import aiohttp
import openai
import orjson
import psutil
import pytest
from chat_templates import byte_tokenizer

from areal.agent import AgentWorkflow
from areal.config import ConfigError, GenerationConfig
from areal.config_load import load_expr_config
from areal.generation_slots import EpisodeSlot, GenerationSlots, GroupSlot
from areal.reward import AsyncRewardWrapper, RewardFailure, RewardService
from areal.runner import run_episode
from areal.types import ModelRequest, ModelResponse
from areal.workflow.base import EpisodeDropped
from areal.workflow.build import build_workflow, for_held_out

ROOT = Path(__file__).parents[1]
TOKENIZER = byte_tokenizer()
GCONFIG = GenerationConfig()
HELLO: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}


class Engine:
    """Answers "abc"."""

    async def agenerate(self, request: ModelRequest, **of_a_client: Any) -> ModelResponse:
        tokens = TOKENIZER("abc")["input_ids"]
        return ModelResponse(request.input_ids, tokens, [-0.5] * len(tokens), [3] * len(tokens), "stop")

    def get_version(self) -> int:
        return 3


def episode(agent: Any, data: dict[str, Any] | None = None, **options: Any) -> Any:
    async def main() -> Any:
        workflow = AgentWorkflow(agent, GCONFIG, TOKENIZER, **options)
        try:
            return await run_episode(Engine(), workflow, data or {}, seed=0)  # type: ignore[arg-type]
        finally:
            await workflow.aclose()

    return asyncio.run(main())


async def ask(base_url: str, api_key: str) -> str:
    async with aiohttp.ClientSession() as http:
        headers = {"Authorization": f"Bearer {api_key}"}
        async with http.post(f"{base_url}/chat/completions", json=HELLO, headers=headers) as answer:
            return str((await answer.json())["choices"][0]["message"]["content"])


class Agent:
    def __init__(self, worth: float = 1.0) -> None:
        self.worth = worth

    async def run(self, data: dict[str, Any], **given: Any) -> float:
        assert given.keys() == {"base_url", "http_client", "api_key"}
        assert await ask(given["base_url"], given["api_key"]) == "abc"
        return self.worth * data.get("n", 1)


async def function(data: dict[str, Any], api_key: str, base_url: str) -> float:
    await ask(base_url, api_key)
    return 2.0


def in_a_thread(data: dict[str, Any], base_url: str, api_key: str, http_client: Any) -> float:
    assert threading.current_thread() is not threading.main_thread()
    answer = http_client.post(f"{base_url}/chat/completions", json=HELLO, headers={"Authorization": f"Bearer {api_key}"})
    return float(len(answer.json()["choices"][0]["message"]["content"]))


def returns_a_coroutine(data: dict[str, Any], **given: Any) -> Any:
    return Agent(5.0).run(data, **given)


class Callable:
    async def __call__(self, data: dict[str, Any], **given: Any) -> float:
        return await function(data, given["api_key"], given["base_url"])


@pytest.mark.parametrize(
    ("agent", "options", "reward"),
    [
        (Agent(0.5), {}, 0.5),
        (Agent, {}, 1.0),
        (Agent, {"agent_kwargs": {"worth": 4.0}}, 4.0),
        (f"{__name__}:Agent", {"agent_kwargs": {"worth": 3.0}}, 3.0),
        (f"{__name__}.function", {}, 2.0),
        (function, {}, 2.0),
        (functools.partial(function), {}, 2.0),
        (Callable(), {}, 2.0),
        (in_a_thread, {}, 3.0),
        (returns_a_coroutine, {}, 5.0),
    ],
)
def test_what_an_agent_may_be(agent: Any, options: dict[str, Any], reward: float) -> None:
    (trajectory,) = episode(agent, **options)
    assert trajectory.reward == reward and trajectory.loss_mask.sum() == trajectory.versions.tolist().count(3)
    assert not trajectory.truncated and trajectory.final_answer == "abc"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"agent": object()}, "has no method run"),
        ({"agent": Agent, "agent_kwargs": {"worse": 1}}, "cannot be made.*worse"),
        ({"agent": Agent(), "agent_kwargs": {"worth": 1}}, "is not a class"),
        ({"agent": "nowhere:Agent"}, "agent='nowhere:Agent' cannot be imported"),
        ({"agent": lambda data: 1.0}, r"takes \(data\), so it cannot call the model"),
        ({"agent": Agent, "export_style": "all"}, "export_style='all'"),
        ({"agent": Agent, "tokenizer": None}, "has no tokenizer"),
    ],
)
def test_mistakes_are_told_before_anything_starts(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        AgentWorkflow(**{"gconfig": GCONFIG, "tokenizer": TOKENIZER, **options})


async def raises(data: dict[str, Any], **given: Any) -> float:
    await ask(given["base_url"], given["api_key"])
    raise data["error"]


def raises_in_a_thread(data: dict[str, Any], **given: Any) -> float:
    raise data["error"]


@pytest.mark.parametrize("agent", [raises, raises_in_a_thread])
@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (ZeroDivisionError("by zero"), "workflow_raised"),
        (EpisodeDropped("mine", "why"), "mine"),
        (RewardFailure("reward_timeout", "late"), "reward_timeout"),
        (TimeoutError("a tool"), "request_timeout"),
        (SystemExit("goodbye"), "workflow_raised"),
        (StopIteration(), "workflow_raised"),
    ],
)
def test_what_an_agent_raises_is_counted_by_cause(agent: Any, error: BaseException, cause: str) -> None:
    if agent is raises and isinstance(error, SystemExit):  # on the event loop it ends the process, as it asks for
        error, cause = KeyError("x"), "workflow_raised"
    with pytest.raises(EpisodeDropped) as dropped:
        episode(agent, {"error": error})
    assert dropped.value.cause == cause


async def gives(data: dict[str, Any], **given: Any) -> Any:
    await ask(given["base_url"], given["api_key"])
    return data["reward"]


def test_rewards_that_are_none_or_no_numbers() -> None:
    for reward, cause in ((None, "workflow_none"), ("yes", "reward_bad_value"), ({"x": 1.0}, "reward_bad_value")):
        with pytest.raises(EpisodeDropped) as dropped:
            episode(gives, {"reward": reward})
        assert dropped.value.cause == cause


def test_a_thread_that_hangs_holds_up_nobody_and_loses_its_key() -> None:
    let_go, after = threading.Event(), []

    def hangs(data: dict[str, Any], base_url: str, api_key: str, http_client: Any) -> float:
        data["started"].set()
        let_go.wait(60)
        answer = http_client.post(f"{base_url}/chat/completions", json=HELLO, headers={"Authorization": f"Bearer {api_key}"})
        after.append(answer.status_code)
        return 1.0

    async def main() -> None:
        started = threading.Event()
        workflow = AgentWorkflow(hangs, GCONFIG, TOKENIZER)
        task = asyncio.ensure_future(workflow.arun_episode(Engine(), {"started": started}))
        while not started.is_set():
            await asyncio.sleep(0.01)
        task.cancel()
        begin = time.monotonic()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert time.monotonic() - begin < 5
        let_go.set()
        async with asyncio.timeout(30):
            while not after:
                await asyncio.sleep(0.01)
        assert after == [401]
        await workflow.aclose()

    asyncio.run(main())


def test_the_shared_client_survives_agents_that_close_it() -> None:
    async def run(data: dict[str, Any], base_url: str, api_key: str, http_client: Any) -> float:
        data["clients"].append(http_client)
        async with openai.AsyncOpenAI(base_url=base_url, api_key=api_key, http_client=http_client) as client:
            for _ in range(2):
                await client.chat.completions.create(**HELLO)
        await client.close()
        return 1.0

    async def main() -> None:
        clients: list[Any] = []
        workflow = AgentWorkflow(run, GCONFIG, TOKENIZER)
        await asyncio.gather(*(workflow.arun_episode(Engine(), {"clients": clients}) for _ in range(8)))
        assert len(set(map(id, clients))) == 1 and not clients[0].is_closed
        await workflow.aclose()
        assert clients[0].is_closed

    asyncio.run(main())


def one_point(prompt: str, completions: str, prompt_ids: list[int], completion_ids: list[int], **row: Any) -> float:
    return 1.0


def scores_in_its_own_loop(data: dict[str, Any], base_url: str, api_key: str, http_client: Any) -> float:
    http_client.post(f"{base_url}/chat/completions", json=HELLO, headers={"Authorization": f"Bearer {api_key}"})
    return asyncio.run(AsyncRewardWrapper(one_point)("", "", [], []))


def test_threads_score_with_the_workers_of_the_run() -> None:
    """Each ``asyncio.run`` of an agent is a loop without a reward service; and the runner's slots are not told from threads."""
    told: list[threading.Thread] = []

    class Counter:
        def wait_for_scores(self, n: int) -> None:
            told.append(threading.current_thread())

    async def main() -> None:
        before = len(psutil.Process().children(recursive=True))
        async with RewardService(timeout=60):
            workflow = AgentWorkflow(scores_in_its_own_loop, GCONFIG, TOKENIZER)
            group = GroupSlot(GenerationSlots(Counter(), lambda: None), 3)
            episodes = (run_episode(Engine(), workflow, {}, seed=0, slot=EpisodeSlot(group)) for _ in range(3))  # type: ignore[arg-type]
            assert [t.reward for (t,) in await asyncio.gather(*episodes)] == [1.0] * 3
            assert len(psutil.Process().children(recursive=True)) <= before + 1 and set(told) <= {threading.main_thread()}
            await workflow.aclose()

    asyncio.run(main())


def test_a_config_builds_a_workflow_around_an_agent(monkeypatch: pytest.MonkeyPatch) -> None:
    base = [str(ROOT / "examples" / "arithmetic.yaml"), "evaluator.gconfig.temperature=0.5", "rollout.max_context=96"]
    for words, worth in (
        ([f"workflow={__name__}:Agent", "workflow_kwargs.worth=7"], 7),
        ([f"workflow={__name__}:function"], None),
        (["workflow=areal.agent:AgentWorkflow", f"workflow_kwargs.agent={__name__}:Agent", "workflow_kwargs.export_style=individual"], 1),
    ):
        config, _ = load_expr_config([*base, *words])
        training, held_out = (build_workflow(config, TOKENIZER, evaluation=evaluation) for evaluation in (False, True))
        assert isinstance(training, AgentWorkflow) and isinstance(held_out, AgentWorkflow)
        assert training._gconfig.temperature == 1.0 and held_out._gconfig.temperature == 0.5 and training._max_context == 96
        assert worth is None or training._run.__self__.worth == worth  # type: ignore[attr-defined]
        assert isinstance(for_held_out(config, training), AgentWorkflow) and for_held_out(config, training) is not training
    with pytest.raises(ConfigError, match="no method arun_episode"):
        build_workflow(config, TOKENIZER, object())  # type: ignore[arg-type]


AREAL_AGENT = """
import os

from openai import AsyncOpenAI
from openai.types.chat import ChatCompletion

from areal import AsyncRewardWrapper


def reward_fn(completions, answer):
    return float(len(completions or "") % 3) / 2


class MultiTurnMathAgent:
    def __init__(self, max_turns: int = 8, **kwargs):
        self.max_turns = max_turns
        self.kwargs = kwargs.copy()

    async def run(self, data: dict, **extra_kwargs):
        http_client = extra_kwargs.get("http_client", None)
        base_url = extra_kwargs.get("base_url", None) or os.getenv("OPENAI_BASE_URL")
        api_key = extra_kwargs.get("api_key", None) or os.getenv("OPENAI_API_KEY")
        client = AsyncOpenAI(base_url=base_url, api_key=api_key, http_client=http_client, max_retries=0)
        messages = [{"role": "user", "content": data["prompt"]}]
        rewards = {}
        for _ in range(self.max_turns):
            response: ChatCompletion = await client.chat.completions.create(messages=messages, model="default", **self.kwargs)
            message = response.choices[0].message
            messages.append(message.model_dump(exclude_none=True))
            reward = await AsyncRewardWrapper(reward_fn)(completions=message.content, answer=data["answer"])
            rewards[response.id] = reward
            if reward == 1:
                break
            messages.append({"role": "user", "content": "Wrong. Try again: " + data["prompt"]})
        return rewards
"""
SCRIPT = """
import sys

from areal import GRPOConfig, PPOTrainer, load_expr_config
from areal.tasks.characters import PLAIN_CHAT, byte_tokenizer
from areal.models.loading import create_model

if __name__ == "__main__":
    tokenizer = byte_tokenizer(chat_template=PLAIN_CHAT)
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)
    special = dict(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None)
    create_model(dict(model_type="qwen2", max_position_embeddings=512, tie_word_embeddings=True, **sizes, **special), seed=0).save_pretrained("model")
    tokenizer.save_pretrained("model")
    config, _ = load_expr_config(sys.argv[1:], GRPOConfig)
    rows = [{"prompt": f"{i}+{i}=", "answer": str(2 * i)} for i in range(16)]
    with PPOTrainer(config, train_dataset=rows, valid_dataset=rows[:4]) as trainer:
        trainer.train(workflow="my_agent.MultiTurnMathAgent", workflow_kwargs={"max_turns": 3, "temperature": 1.0})
"""


@pytest.mark.timeout(300)
def test_an_agent_written_for_areal_trains(tmp_path: Path) -> None:
    (tmp_path / "my_agent.py").write_text(AREAL_AGENT)
    (tmp_path / "train.py").write_text(SCRIPT)
    words = [
        str(ROOT / "examples" / "arithmetic.yaml"),
        "actor.path=model",
        "actor.init_from_scratch=null",
        "warmup=null",
        "train_dataset.type=given",
        "total_train_steps=2",
        "rollout.consumer_batch_size=4",
        "rollout.max_concurrent_rollouts=8",
        "rollout.max_context=0",
        "gconfig.n_samples=4",
        "gconfig.max_new_tokens=8",
        "actor.ppo_n_minibatches=1",
        "evaluator.n_prompts=4",
        "stats_logger.tensorboard=false",
        "stats_logger.dump_trajectories=true",
        "stats_logger.fileroot=runs",
    ]
    done = subprocess.run([sys.executable, "train.py", *words], cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    folder = next((tmp_path / "runs").glob("*/*"))
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["train_steps"] == 2 and summary["tokens_trained"] > 0 and not summary.get("dropped"), summary
    rows = [orjson.loads(line) for file in folder.rglob("*.jsonl") if "traj" in file.name for line in file.read_bytes().splitlines()]
    assert any("Try again" in str(row) for row in rows), "episodes of several turns are one sequence"
