"""The client on a real SGLang server with its radix cache, in abort mode: versions of tokens, no stale KV, and each quirk of the server."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from interrupted import generate_through_updates, prove, some_requests, update_from_disk
from rollout_servers import make_model
from sglang_servers import SGLangServer

import areal.inference.client as client_module
from areal.config import GenerationConfig, RolloutConfig
from areal.inference.client import RequestRejected, RolloutClient, WeightUpdateError
from areal.inference.wire import HTTPStatusError, Wire
from areal.types import ModelRequest

pytestmark = [pytest.mark.sglang, pytest.mark.timeout(400)]
CONTEXT = 192
LONG = GenerationConfig(max_new_tokens=150, ignore_eos=True)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("models")
    for seed in range(3):
        make_model(folder / str(seed), seed=seed)
    return [folder / str(seed) for seed in range(3)]


@pytest.fixture(scope="module")
def server(models: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[SGLangServer]:
    server = SGLangServer(models[0], tmp_path_factory.mktemp("logs") / "rollout_0.log", context_length=CONTEXT)
    yield server.wait(300)
    server.process.kill()


def _client(server: SGLangServer, **settings: Any) -> RolloutClient:
    return RolloutClient(RolloutConfig(**settings), [server.url], [server.process], update_mode="abort")


async def _idle(client: RolloutClient, url: str) -> None:
    async with asyncio.timeout(60):
        while (await client.control(url, "GET", "/v1/loads", timeout=30))["loads"][0]["num_running_reqs"]:
            await asyncio.sleep(0.05)


def test_every_token_of_200_generations_has_the_version_that_sampled_it(models: list[Path], server: SGLangServer) -> None:
    pauses: list[float] = []

    async def main() -> list[Any]:
        client = _client(server)
        await update_from_disk(client, server.url, models, 0)

        async def update(version: int) -> None:
            pauses.append(await update_from_disk(client, server.url, models, version))

        responses = await generate_through_updates(client, update, n_in_flight=200, n_updates=20, rest=0.3)
        await client.close()
        return responses

    proof = prove(asyncio.run(main()), models, eos=_eos(models))
    print(
        f"pause to resumed without the transfer, 200 in flight: {sorted(pauses)[len(pauses) // 2]:.3f} s median, {max(pauses):.3f} s worst; {proof}"
    )
    assert proof["n_mixed"] >= 200 and proof["wrong"] > 0.05


def _eos(models: list[Path]) -> int:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(models[0]).eos_token_id


def test_the_prefix_cache_serves_no_kv_of_old_weights(models: list[Path], server: SGLangServer) -> None:
    async def main() -> list[Any]:
        client, wire = _client(server), Wire(server.url)
        await update_from_disk(client, server.url, models, 0)
        request = ModelRequest([3 + i % 9 for i in range(100)], GenerationConfig(max_new_tokens=8, ignore_eos=True))
        body = {"input_ids": request.input_ids, "sampling_params": {"max_new_tokens": 1}}
        responses = [await client.agenerate(request)]
        assert (await wire.call("POST", "/generate", body, timeout=60))["meta_info"]["cached_tokens"] >= 90  # it is on, and works
        for version in (1, 2):
            await update_from_disk(client, server.url, models, version)
            responses.append(await client.agenerate(request))
        wire.close()
        await wire.wait_closed()
        await client.close()
        return responses

    responses = asyncio.run(main())
    prove(responses, models, _eos(models))
    assert [set(r.output_versions) for r in responses] == [{0}, {1}, {2}]


def test_aborts_while_requests_keep_coming_lose_none(server: SGLangServer) -> None:
    async def main() -> None:
        client = _client(server)
        requests = some_requests(100, seed=5)
        tasks = []
        for index, request in enumerate(requests):
            tasks.append(asyncio.ensure_future(client.agenerate(request)))
            if index % 10 == 9:
                await client.control(server.url, "POST", "/abort_request", {"abort_all": True}, timeout=30)
        for request, response in zip(requests, await asyncio.gather(*tasks), strict=True):
            assert response.input_tokens == request.input_ids
            assert response.output_len == request.gconfig.max_new_tokens or response.stop_reason == "stop"
        # One id twice: SGLang refuses that, so the client gives every submission one of its own.
        twice = [client.agenerate(ModelRequest([3], GenerationConfig(max_new_tokens=4), rid="same")) for _ in range(2)]
        assert all(response.output_len for response in await asyncio.gather(*twice))
        await client.close()

    asyncio.run(main())


def test_pause_modes(server: SGLangServer) -> None:
    async def main() -> None:
        client = _client(server)
        for mode in ("abort", "in_place"):
            tasks = [asyncio.ensure_future(client.agenerate(ModelRequest([3, 4, 5], LONG))) for _ in range(4)]
            await asyncio.sleep(0.2)
            await client.pause_all(mode)
            tasks.append(asyncio.ensure_future(client.agenerate(ModelRequest([3], LONG))))
            await asyncio.sleep(0.2)
            assert not tasks[-1].done()
            await client.resume_all()
            assert [response.output_len for response in await asyncio.gather(*tasks)] == [150] * 5
        await client.close()

    asyncio.run(main())


def test_what_no_server_would_take_is_rejected_and_costs_no_server(server: SGLangServer, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        client = _client(server)
        for prompt, gconfig in [
            ([3] * (CONTEXT + 8), GenerationConfig(max_new_tokens=8)),  # the prompt alone
            ([3] * (CONTEXT - 20), GenerationConfig(max_new_tokens=40)),  # with its answer
            ([3] * (CONTEXT - 3), GenerationConfig(max_new_tokens=1)),  # the scheduler's own limit
        ]:
            with pytest.raises(RequestRejected, match=server.url):
                await client.agenerate(ModelRequest(prompt, gconfig))
        known = client_module.sampling_params
        monkeypatch.setattr(client_module, "sampling_params", lambda gconfig: {**known(gconfig), "no_such_parameter": 1})
        with pytest.raises(RequestRejected, match="is well, failed 6 times"):  # HTTP 500
            await client.agenerate(ModelRequest([3], GenerationConfig(max_new_tokens=4)))
        assert client.urls == [server.url]
        await client.close()

    asyncio.run(main())


def test_an_answer_may_grow_to_the_context_though_it_is_interrupted_there(server: SGLangServer) -> None:
    async def main() -> None:
        client = _client(server)
        gconfig = GenerationConfig(max_new_tokens=CONTEXT - 100, ignore_eos=True)
        whole = await client.agenerate(ModelRequest([3] * 100, gconfig))
        assert whole.stop_reason == "length" and CONTEXT - 102 <= whole.output_len <= CONTEXT - 100
        tasks = [
            asyncio.ensure_future(client.agenerate(ModelRequest([3] * (100 + i), gconfig.new(max_new_tokens=92 - i)))) for i in range(20)
        ]
        pause = 0.05
        while not all(task.done() for task in tasks):  # so that some are interrupted when hardly any context is left
            await client.control(server.url, "POST", "/abort_request", {"abort_all": True}, timeout=30)
            await asyncio.sleep(pause)
            pause *= 1.2  # an abort costs each of them a token: on a slow machine they would never end
        for i, response in enumerate(task.result() for task in tasks):
            assert response.stop_reason == "length" and CONTEXT - 7 <= 100 + i + response.output_len <= CONTEXT
        await client.close()

    asyncio.run(main())


def test_stops_are_told_and_belong_to_the_answer(server: SGLangServer) -> None:
    async def main() -> None:
        client = _client(server)
        every = [await client.agenerate(ModelRequest([3, 4], GenerationConfig(max_new_tokens=60, stop_token_ids=[7]))) for _ in range(8)]
        stopped = [response for response in every if response.stop_reason == "stop" and response.output_tokens[-1] == 7]
        assert stopped
        for response in every:
            assert 7 not in response.output_tokens[:-1]
            assert response.output_len == len(response.output_logprobs) == len(response.output_versions)
        by_text = await client.agenerate(ModelRequest([3, 4], GenerationConfig(max_new_tokens=150, stop=["4", "1"], ignore_eos=True)))
        assert by_text.stop_reason == "stop" and by_text.output_len == len(by_text.output_logprobs) < 150
        await client.close()

    asyncio.run(main())


def test_a_request_that_nobody_waits_for_ends_on_the_server(server: SGLangServer) -> None:
    async def main() -> None:
        client = _client(server, request_timeout=0.3)
        begin = time.monotonic()
        answers = [client.agenerate(ModelRequest([3, 4, i], LONG)) for i in range(3, 11)]
        lost = [a for a in await asyncio.gather(*answers, return_exceptions=True) if isinstance(a, TimeoutError)]
        await client.interrupt(server.url)  # waits for what was given up as well
        await _idle(client, server.url)
        await client.resume(server.url, 1)
        assert not lost or time.monotonic() - begin < 30
        await client.close()

    asyncio.run(main())


def test_a_folder_that_cannot_be_loaded_is_told(server: SGLangServer, models: list[Path], tmp_path: Path) -> None:
    async def main() -> None:
        client = _client(server)
        await client.interrupt(server.url)
        with pytest.raises(WeightUpdateError, match=f"{server.url} .*version 9"):
            await client.update_from_disk(server.url, tmp_path, 9)
        await client.update_from_disk(server.url, models[0], 0)
        await client.resume(server.url, 0)
        assert (await client.agenerate(ModelRequest([3], GenerationConfig(max_new_tokens=4)))).output_len
        with pytest.raises(HTTPStatusError, match="404"):
            await client.control(server.url, "GET", "/nothing", timeout=10)
        await client.close()

    asyncio.run(main())


def test_counts_of_a_server_that_has_none_of_its_own(server: SGLangServer, models: list[Path]) -> None:
    async def main() -> None:
        client = _client(server)
        begin = time.time()
        responses = await asyncio.gather(*(client.agenerate(request) for request in some_requests(20)))
        await update_from_disk(client, server.url, models, 1)
        row = (await client.engine_stats())[server.url]
        assert row["tokens_generated"] == sum(response.output_len for response in responses)
        assert [kind for kind, _, _ in row["spans"]] == ["generation", "weight_sync"]
        assert 0 < row["busy_seconds"] <= time.time() - begin and (row["running"], row["version"]) == (0, 1)
        again = (await client.engine_stats())[server.url]
        assert (again["tokens_generated"], again["busy_seconds"], again["spans"]) == (row["tokens_generated"], row["busy_seconds"], [])
        await client.close()

    asyncio.run(main())
