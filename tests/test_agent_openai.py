"""The real openai client, against the endpoint in front of a real rollout server."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from agent_setup import Recorder, check_recorded, closing, make_chat_model
from rollout_servers import Server
from transformers import AutoModelForCausalLM

from areal.agent import AgentWorkflow
from areal.config import GenerationConfig, RolloutConfig
from areal.inference.client import Route
from areal.runner import run_episode
from areal.types import Trajectory
from areal.workflow.base import EpisodeDropped

GCONFIG = GenerationConfig(max_new_tokens=24)
TOOLS: list[Any] = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_chat_model(folder)
    return folder


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(model, tmp_path_factory.mktemp("logs") / "rollout_0.log", "rollout 0", "--max-running-requests", "64").wait()
    yield server
    server.process.terminate()


class MultiTurn:
    """Two to five turns, some streamed, some cut or stopped early, some on an edited history; a reward for each turn."""

    async def run(self, data: dict[str, Any], **given: Any) -> dict[str, float]:
        client = openai.AsyncOpenAI(base_url=given["base_url"], api_key=given["api_key"], http_client=given["http_client"])
        rng, rewards = random.Random(data["n"]), {}
        messages: list[Any] = [{"role": "user", "content": f"Question {data['n']}: the abc?"}]
        for turn in range(rng.randint(2, 5)):
            options: dict[str, Any] = {"max_tokens": rng.choice([1, 6, 24, 1000]), "stop": rng.choice([None, ["e", "a"], "t"])}
            if rng.random() < 0.3:
                options["tools"] = TOOLS
            if rng.random() < 0.3:
                message: Any = {"role": "assistant", "content": ""}
                async for chunk in await client.chat.completions.create(model="m", messages=messages, stream=True, **options):
                    message["content"] += chunk.choices[0].delta.content or ""
                    name = chunk.id
            else:
                answer = await client.chat.completions.create(model="m", messages=messages, **options)
                message, name = answer.choices[0].message, answer.id
                if rng.random() < 0.5:
                    message = message.model_dump()
            rewards[name] = float(turn)
            messages += [message, {"role": "user", "content": f"And {turn}12?"}]
            if rng.random() < 0.15:
                messages = messages[-1:]
        return rewards


async def _episodes(client: Recorder, workflow: AgentWorkflow, rows: list[dict[str, Any]]) -> list[tuple[list[Trajectory], Route]]:
    async def one(row: dict[str, Any]) -> tuple[list[Trajectory], Route]:
        route = Route()
        return await run_episode(client, workflow, row, seed=0, route=route), route

    return list(await asyncio.gather(*map(one, rows)))


@pytest.mark.timeout(300)
def test_200_episodes_are_recorded_as_the_engine_gave_them(server: Server, model: Path) -> None:
    """64 and more at once; the log-probs of what is exported are those of the model in one forward."""

    async def main() -> list[list[Trajectory]]:
        client = Recorder(urls=[server.url], processes=[server.process])
        concat = AgentWorkflow(MultiTurn, GCONFIG, model)
        single = AgentWorkflow(MultiTurn, GCONFIG, model, export_style="individual")
        async with closing(client, concat, single):
            rows = [{"n": n, "prompt_id": n} for n in range(100)]
            chained, apart = await asyncio.gather(_episodes(client, concat, rows), _episodes(client, single, rows))
            reasons = {answer.stop_reason for answers in client.given.values() for answer in answers}
            assert reasons == {"stop", "length"} and len(client.given) == 200
            assert sum(len(given) for given in client.given.values()) > 500
            for trajectories, route in chained + apart:
                assert check_recorded(trajectories, client.given[id(route)]) > 0
            assert all(len(trajectories) == len(client.given[id(route)]) for trajectories, route in apart)
            # A chain begins anew where the history was edited, or tools came or went; otherwise it goes on.
            assert sum(len(trajectories) for trajectories, _ in chained) < 0.8 * sum(len(trajectories) for trajectories, _ in apart)
            assert max(len(client.given[id(route)]) for trajectories, route in chained if len(trajectories) == 1) >= 4
            return [trajectories for trajectories, _ in chained]

    episodes = asyncio.run(main())
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager")
    for trajectory in [trajectory for trajectories in episodes[:20] for trajectory in trajectories]:
        with torch.no_grad():
            ids = torch.from_numpy(trajectory.input_ids)
            logits = network(input_ids=ids[None]).logits[0, :-1].float()
        logprobs = torch.log_softmax(logits, -1).gather(1, ids[1:, None])[:, 0].numpy()
        mask = trajectory.loss_mask[1:]
        assert abs(logprobs[mask] - trajectory.logprobs[1:][mask]).max() < 1e-5


def test_what_the_client_gets(server: Server, model: Path) -> None:
    seen: dict[str, Any] = {}

    async def run(data: dict[str, Any], base_url: str, http_client: Any, api_key: str) -> float:
        messages: list[Any] = [{"role": "user", "content": "the abc?"}]
        async with openai.AsyncOpenAI(base_url=base_url, api_key=api_key, http_client=http_client) as client:
            seen["models"] = [m.id async for m in client.models.list()]
            seen["plain"] = await client.chat.completions.create(model="m", messages=messages, logprobs=True, seed=3, user="me")
            seen["three"] = await client.chat.completions.create(model="m", messages=messages, n=3, max_completion_tokens=5)
            options: Any = {"stream": True, "stream_options": {"include_usage": True}, "logprobs": True}
            seen["chunks"] = [c async for c in await client.chat.completions.create(model="m", messages=messages, **options)]
            seen["text"] = await client.completions.create(model="m", prompt="the abc", logprobs=1, max_tokens=4)
            seen["ids"] = await client.completions.create(model="m", prompt=[5, 6, 7])
            seen["pieces"] = [c async for c in await client.completions.create(model="m", prompt="abc", stream=True)]
        return 1.0

    async def main() -> None:
        client = Recorder(urls=[server.url], processes=[server.process])
        workflow = AgentWorkflow(run, GCONFIG, model)
        async with closing(client, workflow):
            ((trajectories, route),) = await _episodes(client, workflow, [{}])
            given = client.given[id(route)]
            check_recorded(trajectories, given)
            assert {t.reward for t in trajectories} == {1.0}
        assert seen["models"] == ["default"]
        plain, first = seen["plain"], given[0]
        assert plain.object == "chat.completion" and plain.model == "m" and plain.choices[0].message.role == "assistant"
        assert plain.choices[0].finish_reason == first.stop_reason
        assert plain.usage.prompt_tokens == first.input_len and plain.usage.completion_tokens == first.output_len
        assert [entry.logprob for entry in plain.choices[0].logprobs.content] == pytest.approx(first.output_logprobs)
        assert [choice.index for choice in seen["three"].choices] == [0, 1, 2]
        assert seen["three"].usage.completion_tokens == sum(answer.output_len for answer in given[1:4]) <= 15
        chunks = seen["chunks"]
        assert len({chunk.id for chunk in chunks}) == 1 and chunks[0].choices[0].delta.role == "assistant"
        assert chunks[-1].usage.completion_tokens == given[4].output_len and not chunks[-1].choices
        assert chunks[-2].choices[0].finish_reason == given[4].stop_reason
        assert sum(len(c.choices[0].logprobs.content) for c in chunks[:-1] if c.choices[0].logprobs) == given[4].output_len
        assert seen["text"].object == "text_completion" and len(seen["text"].choices[0].logprobs.tokens) == given[5].output_len
        assert seen["ids"].usage.prompt_tokens == 3 and given[6].input_tokens == [5, 6, 7]
        assert seen["pieces"][-1].choices[0].finish_reason == given[7].stop_reason

    asyncio.run(main())


def test_sync_client_in_a_thread(server: Server, model: Path) -> None:
    """More agents than any pool has threads, all waiting for one another."""
    import threading

    together = threading.Barrier(40)

    class Sync:
        def run(self, data: dict[str, Any], base_url: str, api_key: str, http_client: Any) -> float:
            client = openai.OpenAI(base_url=base_url, api_key=api_key, http_client=http_client)
            together.wait(60)
            answer = client.chat.completions.create(model="m", messages=[{"role": "user", "content": data["q"]}], stream=True)
            return float(len("".join(chunk.choices[0].delta.content or "" for chunk in answer)))

    async def main() -> None:
        client = Recorder(urls=[server.url], processes=[server.process])
        workflow = AgentWorkflow(Sync(), GCONFIG, model)
        async with closing(client, workflow):
            done = await _episodes(client, workflow, [{"q": f"abc {n}"} for n in range(40)])
            for trajectories, route in done:
                check_recorded(trajectories, client.given[id(route)])

    asyncio.run(main())


@pytest.mark.parametrize("max_context", [0, 4096])
def test_refusals_are_openai_errors_and_are_counted_by_cause(server: Server, model: Path, max_context: int) -> None:
    errors: list[openai.APIStatusError] = []

    async def run(data: dict[str, Any], base_url: str, http_client: Any, api_key: str) -> float:
        client = openai.AsyncOpenAI(base_url=base_url, api_key=api_key, http_client=http_client)
        try:
            await client.chat.completions.create(**{"model": "m", "messages": [{"role": "user", "content": "x"}], **data["call"]})
        except openai.APIStatusError as error:
            errors.append(error)
            raise
        return 1.0

    async def main() -> None:
        client = Recorder(urls=[server.url], processes=[server.process])
        training = AgentWorkflow(run, GCONFIG, model, max_context=max_context)
        evaluation = AgentWorkflow(run, GCONFIG, model, training=False)
        async with closing(client, training):
            for call, cause, said in (
                ({"temperature": 0.5}, "request_rejected", r"temperature=0.5, but this run trains at gconfig.temperature=1"),
                ({"top_p": 0.9}, "request_rejected", "top_p=0.9: training needs"),
                ({"extra_body": {"top_k": 5}}, "request_rejected", "top_k=5"),
                ({"logprobs": True, "top_logprobs": 2}, "request_rejected", "top_logprobs is 2"),
                ({"response_format": {"type": "json_object"}}, "request_rejected", "response_format must be text"),
                ({"tools": TOOLS, "tool_choice": "required"}, "request_rejected", "tool_choice must be auto or none"),
                ({"messages": [{"role": "user", "content": "x" * 5000}]}, "prompt_too_long", "4096"),
            ):
                with pytest.raises(EpisodeDropped, match=said) as dropped:
                    await run_episode(client, training, {"call": call}, seed=0)
                assert dropped.value.cause == cause
                error = errors.pop()
                assert isinstance(error, openai.BadRequestError) and str(error.message) and not errors, "it is not tried again"
                assert (error.code == "context_length_exceeded") == (cause == "prompt_too_long")
            for call in ({"temperature": 0.0, "top_p": 0.9, "extra_body": {"top_k": 5}}, {"temperature": 1, "frequency_penalty": 0}):
                assert await run_episode(client, evaluation, {"call": call}, seed=0)
            fits = {"messages": [{"role": "user", "content": "x" * 4000}], "max_tokens": 10**6}
            assert await run_episode(client, training, {"call": fits}, seed=0)

    asyncio.run(main())


def test_an_answer_that_never_comes_ends_the_episode(server: Server, model: Path) -> None:
    """Whatever the agent makes of the error."""
    caught: list[Exception] = []

    async def run(data: dict[str, Any], base_url: str, http_client: Any, api_key: str) -> float:
        client = openai.AsyncOpenAI(base_url=base_url, api_key=api_key, http_client=http_client)
        try:
            await client.chat.completions.create(model="m", messages=[{"role": "user", "content": "x"}])
        except openai.APIError as error:
            caught.append(error)
        return 1.0

    async def main() -> None:
        client = Recorder(RolloutConfig(request_timeout=0.2), [server.url], [server.process])
        workflow = AgentWorkflow(run, GenerationConfig(max_new_tokens=3000, ignore_eos=True), model)
        async with closing(client, workflow):
            with pytest.raises(EpisodeDropped, match=r"no answer after 0.2 s \(rollout.request_timeout\)") as dropped:
                await run_episode(client, workflow, {}, seed=0)
            assert dropped.value.cause == "request_timeout"

    asyncio.run(main())
