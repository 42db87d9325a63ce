"""The endpoint over real sockets: keys, refusals, calls that end early, and what becomes of an engine's failures."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from agent_setup import make_chat_model
from chat_templates import byte_tokenizer
from rollout_servers import Server

from areal.agent import AgentEndpoint, AgentWorkflow
from areal.agent.chat import Chat
from areal.agent.sampling import SamplingRules
from areal.agent.session import Session
from areal.config import ConfigError, GenerationConfig, RolloutConfig
from areal.inference.client import RolloutClient, ServerDied
from areal.runner import run_episode
from areal.types import ModelRequest, ModelResponse
from areal.workflow.base import EpisodeDropped

HELLO = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}
TOKENIZER = byte_tokenizer()


class Held:
    """An engine whose answers wait for ``go``."""

    def __init__(self, name: str = "x", error: Exception | None = None) -> None:
        self.token = TOKENIZER.convert_tokens_to_ids(name)
        self.error = error
        self.go = asyncio.Event()
        self.running = self.cancelled = 0

    async def agenerate(self, request: ModelRequest) -> ModelResponse:
        self.running += 1
        try:
            await self.go.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.running -= 1
        if self.error is not None:
            raise self.error
        return ModelResponse(request.input_ids, [self.token], [-0.5], [0], "stop")

    def get_version(self) -> int:
        return 0


@contextlib.asynccontextmanager
async def endpoint() -> AsyncIterator[tuple[AgentEndpoint, str, aiohttp.ClientSession]]:
    served = AgentEndpoint()
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=30)) as http:
        try:
            yield served, await served.url(), http
        finally:
            await served.close()


def session(engine: Held) -> Session:
    return Session(engine, Chat(TOKENIZER), SamplingRules(GenerationConfig()))


async def call(
    http: aiohttp.ClientSession, url: str, key: str | None, body: Any = HELLO, path: str = "/chat/completions"
) -> tuple[int, Any]:
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    sent: dict[str, Any] = {"data": body} if isinstance(body, bytes) else {"json": body}
    async with http.post(url + path, headers=headers, **sent) as answer:
        assert answer.status == 200 or answer.headers["x-should-retry"] == "false"
        return answer.status, await answer.json()


async def until(condition: Any) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.005)


def test_a_key_opens_its_own_session_and_nothing_else() -> None:
    async def main() -> None:
        async with endpoint() as (served, url, http):
            assert url.startswith("http://127.0.0.1:")
            mine, other = Held("x"), Held("y")
            for engine in (mine, other):
                engine.go.set()
            with served.open(one := session(mine)) as key:
                with served.open(two := session(other)) as another:
                    answers = await asyncio.gather(*(call(http, url, k) for k in [key, another] * 32))
                    texts = [answer["choices"][0]["message"]["content"] for _, answer in answers]
                    assert texts == ["x", "y"] * 32 and len(one.turns) == len(two.turns) == 32
                    assert {turn.response.output_tokens[0] for turn in one.turns} == {mine.token}
                    ids = {answer["id"] for _, answer in answers}
                    assert len(ids) == 64 and {turn.id for turn in one.turns} == {a["id"] for _, a in answers[::2]}
                assert (await call(http, url, another))[0] == 401, "its episode has ended"
                for wrong in (None, "", "EMPTY", key[:-1], key + "x", f"{key} {another}"):
                    status, answer = await call(http, url, wrong)
                    assert status == 401 and answer["error"]["code"] == "invalid_api_key" and answer["error"]["message"]
                async with http.get(f"{url}/models") as models:
                    assert models.status == 401
                async with http.get(f"{url}/models", headers={"Authorization": f"Bearer {key}"}) as models:
                    assert (await models.json())["data"][0]["id"] == "default"
                assert (await call(http, url.removesuffix("/v1"), key))[0] == 200, "AReaL's base URL has no /v1"
            assert (await call(http, url, key))[0] == 401 and len(one.turns) == 33

    asyncio.run(main())


def test_refusals_name_the_field() -> None:
    async def main() -> None:
        async with endpoint() as (served, url, http):
            with served.open(session(Held())) as key:
                for change, param in (
                    ({"messages": []}, "messages"),
                    ({"messages": [{"content": "x"}]}, "messages"),
                    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages"),
                    ({"messages": [{"role": "assistant", "tool_calls": [{"id": "x"}]}]}, "messages"),
                    ({"temperature": "hot"}, "temperature"),
                    ({"temperature": -1}, "temperature"),
                    ({"top_p": 2}, "top_p"),
                    ({"n": 0}, "n"),
                    ({"n": 1.5}, "n"),
                    ({"max_tokens": 0}, "max_tokens"),
                    ({"stop": [""]}, "stop"),
                    ({"stream": "yes"}, "stream"),
                    ({"tools": [{"name": "f"}]}, "tools"),
                    ({"tool_choice": {"type": "function"}}, "tool_choice"),
                    ({"logit_bias": {"5": 1}}, "logit_bias"),
                    ({"presence_penalty": 0.5}, "presence_penalty"),
                    ({"chat_template_kwargs": 1}, "chat_template_kwargs"),
                    ({"modalities": 3}, "modalities"),
                    ({"modalities": ["audio"]}, "modalities"),
                    ({"min_tokens": 4}, "min_tokens"),
                    ({"guided_json": {}}, "guided_json"),
                    ({"max_completion_tokens": None, "max_tokens": 0}, "max_tokens"),
                ):
                    status, answer = await call(http, url, key, HELLO | change)
                    assert (status, answer["error"]["param"], answer["error"]["type"]) == (400, param, "invalid_request_error"), change
                for body in (b"{", b"[]", b""):
                    assert (await call(http, url, key, body))[0] == 400
                for prompt in (None, "", [], ["a", "b"], [1, -1], {"a": 1}):
                    status, answer = await call(http, url, key, {"prompt": prompt}, "/completions")
                    assert (status, answer["error"]["param"]) == (400, "prompt"), prompt
                assert (await call(http, url, key, {"prompt": "a", "logprobs": 5}, "/completions"))[1]["error"]["param"] == "logprobs"
                status, answer = await call(http, url, key, HELLO, "/responses")
                assert status == 404 and "POST /v1/chat/completions" in answer["error"]["message"]

    asyncio.run(main())


def test_unknown_fields_are_ignored() -> None:
    async def main() -> None:
        async with endpoint() as (served, url, http):
            engine = Held()
            engine.go.set()
            with served.open(session(engine)) as key:
                fields = {
                    "seed": 1,
                    "user": "me",
                    "store": True,
                    "frequency_penalty": 0,
                    "logit_bias": {},
                    "whatever": [1],
                    "top_logprobs": 0,
                    "modalities": ["text"],
                }
                assert (await call(http, url, key, HELLO | fields))[0] == 200

    asyncio.run(main())


def test_calls_end_with_their_episode_and_with_their_client() -> None:
    async def main() -> None:
        async with endpoint() as (served, url, http):
            engine, one = Held(), None
            with served.open(one := session(engine)) as key:
                impatient = asyncio.ensure_future(call(http, url, key))
                await until(lambda: engine.running == 1)
                impatient.cancel()
                await until(lambda: engine.cancelled == 1)
                calls = [asyncio.ensure_future(call(http, url, key, HELLO | {"n": n})) for n in (1, 3)]
                await until(lambda: engine.running == 4)
            for status, answer in await asyncio.gather(*calls):
                assert status == 401 and "ended" in answer["error"]["message"]
            assert engine.cancelled == 5 and not engine.running and not one.turns and not one.failure.done()

    asyncio.run(main())


def test_closing_ends_calls_and_frees_the_port() -> None:
    async def main() -> None:
        served, engine = AgentEndpoint(), Held()
        url = await served.url()
        async with aiohttp.ClientSession() as http:
            with served.open(session(engine)) as key:
                waiting = asyncio.ensure_future(call(http, url, key))
                await until(lambda: engine.running == 1)
                await served.close()
                with contextlib.suppress(aiohttp.ClientError):
                    assert (await waiting)[0] == 401
                assert engine.cancelled == 1
                with pytest.raises(aiohttp.ClientConnectionError):
                    await call(http, url, key)
        port = int(url.split(":")[2].split("/")[0])
        again = AgentEndpoint("127.0.0.1", port)
        assert await again.url() == url
        with pytest.raises(ConfigError, match=rf"cannot listen on 127.0.0.1:{port}"):
            await AgentEndpoint("127.0.0.1", port).url()
        everywhere = AgentEndpoint("0.0.0.0")
        assert (await everywhere.url()).startswith("http://127.0.0.1:")
        await everywhere.close()
        await again.close()
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(main())


def test_an_event_loop_that_ends_closes_its_endpoint() -> None:
    async def main() -> str:
        return await AgentEndpoint().url()

    url = asyncio.run(main())
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", int(url.split(":")[2].split("/")[0]))) != 0


def test_an_engines_failure_comes_before_what_the_agent_makes_of_it() -> None:
    async def run(data: dict[str, Any], base_url: str, api_key: str) -> float:
        async with aiohttp.ClientSession() as http:
            status, answer = await call(http, base_url, api_key)
            data["said"].append((status, answer["error"]["message"]))
        return 0.0

    async def main() -> None:
        workflow = AgentWorkflow(run, GenerationConfig(), TOKENIZER)
        for error, status in ((ServerDied("no server"), 503), (TimeoutError("too late"), 504), (ZeroDivisionError("a bug"), 500)):
            engine, said = Held(error=error), []
            engine.go.set()
            with pytest.raises(type(error), match=str(error)):
                await workflow.arun_episode(engine, {"said": said})
            assert said == [] or (said[0][0] == status and str(error) in said[0][1])
        await workflow.aclose()

    asyncio.run(main())


@pytest.mark.timeout(180)
def test_a_server_that_is_killed_ends_the_run_not_the_agent_alone(tmp_path: Path) -> None:
    make_chat_model(tmp_path / "model")
    server = Server(tmp_path / "model", tmp_path / "log").wait()

    async def run(data: dict[str, Any], base_url: str, api_key: str) -> float:
        async with aiohttp.ClientSession() as http:
            await asyncio.gather(*(call(http, base_url, api_key) for _ in range(4)), return_exceptions=True)
            await asyncio.sleep(3600)  # an agent that waits for something else now
        return 0.0

    async def main() -> None:
        client = RolloutClient(RolloutConfig(max_restarts=0), [server.url], [server.process])
        workflow = AgentWorkflow(run, GenerationConfig(max_new_tokens=3000, ignore_eos=True), TOKENIZER)
        episodes = [asyncio.ensure_future(run_episode(client, workflow, {}, seed=0, sample=i)) for i in range(4)]
        async with asyncio.timeout(60):
            while (await client.engine_stats())[server.url]["running"] < 16:
                await asyncio.sleep(0.02)
        os.kill(server.process.pid, signal.SIGKILL)
        async with asyncio.timeout(60):
            results = await asyncio.gather(*episodes, return_exceptions=True)
        assert [type(result) for result in results] == [ServerDied] * 4
        await workflow.aclose()
        await client.close()

    asyncio.run(main())


def test_an_episode_that_is_cancelled_takes_its_agent_and_calls_along() -> None:
    ended: list[str] = []

    async def run(data: dict[str, Any], base_url: str, api_key: str) -> float:
        try:
            async with aiohttp.ClientSession() as http:
                await call(http, base_url, api_key)
        finally:
            ended.append("agent")
        return 0.0

    async def main() -> None:
        engine = Held()
        workflow = AgentWorkflow(run, GenerationConfig(), TOKENIZER)
        episode = asyncio.ensure_future(workflow.arun_episode(engine, {}))
        await until(lambda: engine.running == 1)
        episode.cancel()
        with pytest.raises(asyncio.CancelledError):
            await episode
        assert ended == ["agent"]
        await until(lambda: engine.cancelled == 1)
        await workflow.aclose()

    asyncio.run(main())


def test_an_agent_without_calls_is_no_sample() -> None:
    async def run(data: dict[str, Any], **given: Any) -> float:
        return 1.0

    async def main() -> None:
        workflow = AgentWorkflow(run, GenerationConfig(), TOKENIZER)
        with pytest.raises(EpisodeDropped) as dropped:
            await workflow.arun_episode(Held(), {})
        assert dropped.value.cause == "agent_made_no_call"
        await workflow.aclose()

    asyncio.run(main())
