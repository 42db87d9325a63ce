"""The client against real embedded servers (real kill -9), and its wire against small real servers that misbehave."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from aiohttp import web
from rollout_servers import Server, aiohttp_server, make_model

from areal.config import GenerationConfig, RolloutConfig
from areal.inference import exchange
from areal.inference.client import ProtocolError, RequestRejected, RolloutClient, Route, ServerDied, WeightUpdateError
from areal.launcher.local import free_port
from areal.models.loading import load_model
from areal.types import ModelRequest
from areal.weight_sync.shm import ShmPublisher

SHORT = GenerationConfig(max_new_tokens=8)
LONG = GenerationConfig(max_new_tokens=3000, ignore_eos=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_model(folder)
    return folder


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(model, tmp_path_factory.mktemp("logs") / "rollout_0.log", "rollout 0", "--max-running-requests", "16").wait()
    yield server
    server.process.terminate()


# -- against the embedded engine ----------------------------------------------------------------------------------------------------


def test_answers_seeds_and_refusals(server: Server) -> None:
    async def main() -> None:
        client = RolloutClient(urls=[server.url], processes=[server.process])
        first = await client.agenerate(ModelRequest([3, 4, 5], SHORT), sampling_seed=11)
        again, other, free = await asyncio.gather(
            client.agenerate(ModelRequest([3, 4, 5], SHORT), sampling_seed=11),
            client.agenerate(ModelRequest([3, 4, 5], SHORT), sampling_seed=12),
            client.agenerate(ModelRequest([3, 4, 5], SHORT)),
        )
        assert first.output_tokens == again.output_tokens != other.output_tokens
        assert first.input_tokens == [3, 4, 5] and first.input_len == 3
        assert free.output_len == len(free.output_logprobs) == len(free.output_versions) <= 8
        assert all(lp < 0 for lp in first.output_logprobs) and set(first.output_versions) == {0}
        assert first.stop_reason in ("stop", "length") and first.latency > 0
        with pytest.raises(RequestRejected, match="4096"):
            await client.agenerate(ModelRequest([3] * 5000, SHORT))
        with pytest.raises(RequestRejected, match="vocabulary"):
            await client.agenerate(ModelRequest([10**6], SHORT))
        stats = await client.engine_stats()
        assert stats[server.url]["tokens_generated"] >= first.output_len
        await client.close()
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(main())


def test_cancelled_request_is_aborted_on_the_server(server: Server) -> None:
    async def main() -> None:
        client = RolloutClient(urls=[server.url], processes=[server.process])
        task = asyncio.ensure_future(client.agenerate(ModelRequest([3, 4], LONG)))
        await _until(client, server.url, lambda row: row["running"] == 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await _until(client, server.url, lambda row: row["running"] == 0)
        await client.close()

    asyncio.run(main())


def test_deadline_names_who_waited(server: Server) -> None:
    async def main() -> None:
        client = RolloutClient(RolloutConfig(request_timeout=0.2), [server.url], [server.process])
        route = Route()
        with pytest.raises(TimeoutError, match=rf"{server.url} had no answer after 0.2 s \(rollout.request_timeout\)"):
            await client.agenerate(ModelRequest([3, 4], LONG), route=route)
        await client.close()

    asyncio.run(main())


def test_a_server_that_hangs_is_given_up(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its process lives and its socket is open; no update comes that would find out."""
    monkeypatch.setattr(exchange, "_CONTROL_TIMEOUT", 0.2)
    monkeypatch.setattr(exchange, "_HANGS_AFTER", 1.0)
    server = Server(model, tmp_path / "log").wait()

    async def main() -> None:
        client = RolloutClient(RolloutConfig(request_timeout=0.5, max_restarts=0), [server.url], [server.process])
        os.kill(server.process.pid, signal.SIGSTOP)
        with pytest.raises(TimeoutError, match=r"rollout\.request_timeout"):
            await client.agenerate(ModelRequest([3, 4], LONG))
        assert client.is_known(server.url), "it may only be slow"
        async with asyncio.timeout(30):
            while client.is_known(server.url):
                await asyncio.sleep(0.05)
        with pytest.raises(ServerDied, match="hangs: 1 s after it was told to end request"):
            await client.agenerate(ModelRequest([3, 4], SHORT))
        await client.close()

    try:
        asyncio.run(main())
    finally:
        server.process.kill()


def test_interrupted_generation_goes_on_from_its_tokens(server: Server) -> None:
    async def main() -> None:
        client = RolloutClient(urls=[server.url], processes=[server.process])
        gconfig = GenerationConfig(max_new_tokens=1200, min_new_tokens=1200)
        task = asyncio.ensure_future(client.agenerate(ModelRequest([3, 4], gconfig), sampling_seed=5))
        for _ in range(3):
            await _until(client, server.url, lambda row: row["running"] == 1)
            await client.pause_all("abort")
            await client.resume_all()
        response = await task
        assert response.output_len == 1200 == len(response.output_logprobs) == len(response.output_versions)
        assert response.input_tokens == [3, 4] and response.stop_reason == "length"
        # Every token was sampled given exactly those before it: the log-probs of one forward pass say so.
        tokens = torch.tensor([response.input_tokens + response.output_tokens])
        with torch.no_grad():
            logits = _plain_model(server)(tokens).logits[0]
        expected = torch.log_softmax(logits, -1)[1:-1].gather(1, tokens[0, 2:, None])[:, 0]
        assert torch.allclose(torch.tensor(response.output_logprobs), expected, atol=2e-5)
        await client.close()

    asyncio.run(main())


def _plain_model(server: Server) -> Any:
    from transformers import AutoModelForCausalLM

    path = server.process._process.args[4]  # type: ignore[index]
    return AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager").eval()


async def _until(client: RolloutClient, url: str, holds: Callable[[dict[str, Any]], bool]) -> None:
    async with asyncio.timeout(20):
        while not holds((await client.engine_stats())[url]):
            await asyncio.sleep(0.01)


def test_weight_updates_and_acknowledged_version(model: Path, server: Server, tmp_path: Path) -> None:
    second = Server(model, tmp_path / "rollout_1.log", "rollout 1").wait()
    weights = dict(load_model(model, dtype=torch.float32).named_parameters())
    publisher = ShmPublisher(f"test-client-{os.getpid()}", [(name, w.shape, w.dtype) for name, w in weights.items()])
    try:
        asyncio.run(_update_versions(server, second, publisher, {name: w.detach() for name, w in weights.items()}))
    finally:
        publisher.close()
        second.process.terminate()


async def _update_versions(first: Server, second: Server, publisher: ShmPublisher, weights: dict[str, torch.Tensor]) -> None:
    client = RolloutClient(RolloutConfig(request_timeout=20.0), [first.url], [first.process])
    changes: list[int] = []
    client.on_change(lambda: changes.append(client.acked_version))
    assert client.acked_version == 0
    running = asyncio.ensure_future(client.agenerate(ModelRequest([3, 4], GenerationConfig(max_new_tokens=1500, ignore_eos=True))))
    await _until(client, first.url, lambda row: row["running"] == 1)
    digest = publisher.publish(weights, 1)
    ack = await client.update_server(first.url, publisher.name, 1, first.process)
    assert (ack.version, ack.hash) == (1, f"{digest:016x}")
    assert client.get_version() == 1 and changes[-1] == 1
    response = await running
    assert response.output_versions == sorted(response.output_versions) and set(response.output_versions) == {0, 1}
    # A newcomer joins with the newest weights and never takes the acknowledged version back.
    publisher.publish(weights, 2)
    update = asyncio.ensure_future(client.update_server(first.url, publisher.name, 2, first.process))
    await client.update_server(second.url, publisher.name, 1)
    client.add_server(second.url, second.process)
    await update
    assert client.acked_version == 2 and changes == sorted(changes)
    routes = [Route() for _ in range(4)]
    await asyncio.gather(*(client.agenerate(ModelRequest([3], SHORT), route=route) for route in routes for _ in range(3)))
    assert [route.server.url for route in routes if route.server].count(first.url) == 2  # fewest outstanding, a prompt stays on one
    with pytest.raises(WeightUpdateError, match="no-such"):
        await client.update_server(first.url, "no-such", 3, first.process)
    await client.close()


def test_killed_server_others_go_on_then_a_replacement_comes(model: Path, tmp_path: Path) -> None:
    servers = [Server(model, tmp_path / f"rollout_{i}.log", f"rollout {i}") for i in range(2)]
    try:
        asyncio.run(_kill_servers([server.wait() for server in servers], model, tmp_path))
    finally:
        for server in servers:
            server.process.terminate()


async def _kill_servers(servers: list[Server], model: Path, tmp_path: Path) -> None:
    config = RolloutConfig(startup_timeout=60.0)
    client = RolloutClient(config, [s.url for s in servers], [s.process for s in servers])
    gconfig = GenerationConfig(max_new_tokens=600, ignore_eos=True)
    tasks = [asyncio.ensure_future(client.agenerate(ModelRequest([3, 4], gconfig), sampling_seed=i)) for i in range(8)]
    await _until(client, servers[0].url, lambda row: row["running"] == 4)
    os.kill(servers[0].process.pid, signal.SIGKILL)
    answers = await asyncio.gather(*tasks)
    assert [answer.output_len for answer in answers] == [600] * 8  # nothing lost
    assert client.urls == [servers[1].url]
    # The last one dies too: requests wait for the replacement, which another task starts.
    tasks = [asyncio.ensure_future(client.agenerate(ModelRequest([3, 4], gconfig), sampling_seed=i)) for i in range(4)]
    await _until(client, servers[1].url, lambda row: row["running"] == 4)
    os.kill(servers[1].process.pid, signal.SIGKILL)
    replacement = Server(model, tmp_path / "rollout_2.log", "rollout 2")
    try:
        await asyncio.to_thread(replacement.wait)
        assert client.urls == [] and client.acked_version == -1
        client.add_server(replacement.url, replacement.process)
        again = await asyncio.gather(*tasks)
        assert [a.output_tokens for a in again] == [a.output_tokens for a in answers[:4]]  # same seeds, same answers
        await client.close()
    finally:
        replacement.process.terminate()


def test_death_of_the_only_server_is_told_with_its_log(model: Path, tmp_path: Path) -> None:
    server = Server(model, tmp_path / "rollout_0.log").wait()

    async def main() -> None:
        client = RolloutClient(RolloutConfig(max_restarts=0), [server.url], [server.process])
        tasks = [asyncio.ensure_future(client.agenerate(ModelRequest([3, 4], LONG))) for _ in range(3)]
        await _until(client, server.url, lambda row: row["running"] == 3)
        begin = time.monotonic()
        os.kill(server.process.pid, signal.SIGKILL)
        for error in await asyncio.gather(*tasks, return_exceptions=True):
            assert isinstance(error, ServerDied)
            assert "SIGKILL" in str(error) and "serving" in str(error)  # its name, its end, its last log lines
        assert time.monotonic() - begin < 5
        await client.close()

    try:
        asyncio.run(main())
    finally:
        server.process.terminate()


# -- odd servers ----------------------------------------------------------------------------------------------------------------------


def _answer(tokens: list[int], reason: str = "stop", **finish: Any) -> dict[str, Any]:
    meta = {"finish_reason": {"type": reason, **finish}, "output_token_logprobs": [[-0.5, t, None] for t in tokens]}
    return {"output_ids": tokens, "meta_info": meta}


def test_client_retries_what_is_safe_and_reads_sglang() -> None:
    """An SGLang server: no output_token_versions, aborts with partial answers, 503 while it is busy."""
    bodies: list[dict[str, Any]] = []
    script = [
        (503, {"error": {"message": "busy"}}),
        (200, _answer([10, 11], "abort", message="Abort before prefill")),
        (200, _answer([], "abort")),
        (200, _answer([12], "stop", matched=12)),
    ]

    async def handler(request: web.Request) -> web.StreamResponse:
        bodies.append(await request.json())
        status, answer = script[len(bodies) - 1]
        return web.json_response(answer, status=status)

    async def main() -> None:
        async with aiohttp_server(handler) as url:
            client = RolloutClient(urls=[url])
            gconfig = GenerationConfig(max_new_tokens=6, min_new_tokens=3, temperature=0.5, stop_token_ids=[12])
            response = await client.agenerate(ModelRequest([1, 2], gconfig, rid="r"), sampling_seed=7)
            assert (response.output_tokens, response.output_versions, response.stop_reason) == ([10, 12], [0, 0], "stop")
            await client.close()
        # The last token of an aborted answer is sampled again: SGLang did not look whether it ends the answer.
        assert [b["input_ids"] for b in bodies] == [[1, 2], [1, 2], [1, 2, 10], [1, 2, 10]]
        params = [b["sampling_params"] for b in bodies]
        expected = {"max_new_tokens": 6, "min_new_tokens": 3, "temperature": 0.5, "stop_token_ids": [12], "sampling_seed": 7}
        assert params[0] == params[1] == expected
        assert params[2]["max_new_tokens"] == 5 and params[2]["min_new_tokens"] == 2 and params[2]["sampling_seed"] not in (7, None)
        assert all(b["return_logprob"] and b["rid"].endswith("-r") for b in bodies)
        assert len({b["rid"] for b in bodies}) == 4  # SGLang refuses an id that it still knows

    asyncio.run(main())


def test_a_request_that_makes_a_healthy_server_fail_does_not_cost_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("areal.inference.client._RETRY_LAST", 0.01)

    async def handler(request: web.Request) -> web.StreamResponse:
        if request.path == "/generate" and (await request.json())["input_ids"] == [13]:
            return web.json_response({"error": {"message": "KeyError: 13"}}, status=500)
        return web.json_response(_answer([1]))

    async def main() -> None:
        async with aiohttp_server(handler) as one, aiohttp_server(handler) as two:
            client = RolloutClient(urls=[one, two])
            with pytest.raises(RequestRejected, match="KeyError: 13"):
                await client.agenerate(ModelRequest([13], SHORT))
            assert client.urls == [one, two]
            assert (await client.agenerate(ModelRequest([1], SHORT))).output_tokens == [1]
            await client.close()

    asyncio.run(main())


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        ({"text": "hm"}, ProtocolError),
        ("fine", ProtocolError),
        ({"output_ids": [1], "meta_info": {"finish_reason": {"type": "stop"}}}, ProtocolError),  # no log-probs
        (_answer([1], "exploded"), ProtocolError),
        (_answer([], "abort", status_code=400, message="too long"), RequestRejected),
    ],
)
def test_client_tells_a_wrong_protocol(answer: Any, error: type[Exception]) -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        return web.json_response(answer)

    async def main() -> None:
        async with aiohttp_server(handler) as url:
            client = RolloutClient(urls=[url])
            with pytest.raises(error):
                await client.agenerate(ModelRequest([1], SHORT))
            await client.close()

    asyncio.run(main())


def test_a_streamed_request_that_the_server_forgot_is_sent_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("areal.inference.exchange._ABORT_TIMEOUT", 0.1)
    said: list[tuple[str, Any]] = []

    async def handler(request: web.Request) -> web.StreamResponse:
        if request.path == "/model_info":
            return web.json_response({"weight_version": "default"})
        body = await request.json()
        said.append((request.path, body["rid"]))
        if request.path == "/abort_request":
            return web.Response()
        response = web.StreamResponse()
        await response.prepare(request)
        for n in range(1, 3):
            await response.write(b"data: " + json.dumps(_answer([10] * n, "stop") | ({} if n == 2 else _unfinished())).encode() + b"\n\n")
            if len(said) == 1:
                await asyncio.sleep(60)  # after its first token
        await response.write(b"data: [DONE]\n\n")
        return response

    async def main() -> None:
        async with aiohttp_server(handler) as url:
            client = RolloutClient(RolloutConfig(request_timeout=4.0), [url], update_mode="retract")
            response = await client.agenerate(ModelRequest([1, 2], GenerationConfig(max_new_tokens=6)))
            assert (response.output_tokens, response.stop_reason) == ([10, 10, 10], "stop")  # the first one was kept
            assert client.urls == [url]
            await client.close()

    asyncio.run(main())
    (_, lost), *others = said
    assert ("/abort_request", lost) in others and others[-1][0] == "/generate" and others[-1][1] != lost


def _unfinished() -> dict[str, Any]:
    return {"meta_info": {"finish_reason": None, "output_token_logprobs": [[-0.5, 10, None]]}}


def test_address_where_nobody_listens_is_given_up() -> None:
    async def main() -> None:
        client = RolloutClient(RolloutConfig(max_restarts=0), [f"http://127.0.0.1:{free_port()}"])
        with pytest.raises(ServerDied, match="Cannot connect"):
            await client.agenerate(ModelRequest([1], SHORT))
        assert client.urls == []
        with pytest.raises(ServerDied, match="no rollout server is alive"):
            await client.agenerate(ModelRequest([1], SHORT))
        await client.close()

    asyncio.run(main())
