"""Interruption for new weights on the embedded server; tests/test_sglang_*.py do the same on SGLang."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
from interrupted import generate_through_updates, prove, update_from_disk
from rollout_servers import Server, make_model

from areal.config import GenerationConfig, RolloutConfig
from areal.inference.client import InterruptFailed, RolloutClient, WeightUpdateError
from areal.inference.generate_protocol import PartialAnswer, Submission
from areal.inference.wire import Wire
from areal.types import ModelRequest

pytestmark = pytest.mark.timeout(240)
LONG = GenerationConfig(max_new_tokens=3000, ignore_eos=True)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("models")
    for seed in range(3):
        make_model(folder / str(seed), seed=seed)
    return [folder / str(seed) for seed in range(3)]


@pytest.fixture(scope="module")
def eos(models: list[Path]) -> int:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(models[0]).eos_token_id


@pytest.fixture(scope="module")
def servers(models: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Server]]:
    """Two; the tests at the end of this file break them."""
    folder = tmp_path_factory.mktemp("logs")
    servers = [Server(models[0], folder / f"rollout_{i}.log", f"rollout {i}", "--max-running-requests", "48") for i in range(2)]
    yield [server.wait() for server in servers]
    for server in servers:
        server.process.kill()


@pytest.fixture
def server(servers: list[Server]) -> Server:
    return servers[0]


@pytest.fixture
def other(servers: list[Server]) -> Server:
    return servers[1]


@pytest.mark.parametrize("mode", ["abort", "retract"])
def test_every_token_has_the_version_that_sampled_it(
    models: list[Path], server: Server, eos: int, mode: Literal["abort", "retract"]
) -> None:
    async def main() -> list[Any]:
        client = RolloutClient(RolloutConfig(), [server.url], [server.process], update_mode=mode)

        await update_from_disk(client, server.url, models, 0)

        async def update(version: int) -> None:
            await update_from_disk(client, server.url, models, version)
            assert client.acked_version == version

        responses = await generate_through_updates(client, update, n_in_flight=64, n_updates=8, rest=0.15)
        await client.close()
        return responses

    proof = prove(asyncio.run(main()), models, eos)
    assert proof["n_mixed"] >= 64 and proof["wrong"] > 0.05


def test_a_drained_server_gets_nothing_new_and_what_it_holds_goes_on_elsewhere(server: Server, other: Server) -> None:
    async def main() -> None:
        client = RolloutClient(RolloutConfig(), [server.url], [server.process])
        gconfig = GenerationConfig(max_new_tokens=1500, ignore_eos=True)
        before = (await client.engine_stats())[server.url]["tokens_generated"]
        tasks = [asyncio.ensure_future(client.agenerate(ModelRequest([3, 4], gconfig))) for _ in range(8)]
        await asyncio.sleep(0.3)
        client.add_server(other.url, other.process)
        generated = (await client.engine_stats())[server.url]["tokens_generated"] - before
        await client.drain(server.url, timeout=0.1)
        assert client.urls == [other.url] and not client.is_known(server.url)
        answers = await asyncio.gather(*tasks)
        assert [answer.output_len for answer in answers] == [1500] * 8
        done_there = (await client.engine_stats())[other.url]["tokens_generated"]
        assert generated > 0 and done_there <= 8 * 1500 - generated  # they went on, and did not start again
        await client.close()

    asyncio.run(main())


def test_requests_go_where_the_fewest_tokens_are_outstanding(server: Server, other: Server) -> None:
    async def main() -> None:
        client = RolloutClient(urls=[server.url, other.url])
        long = asyncio.ensure_future(client.agenerate(ModelRequest([3, 4], LONG)))
        await asyncio.sleep(0.2)
        short = [
            asyncio.ensure_future(client.agenerate(ModelRequest([3], GenerationConfig(max_new_tokens=900, ignore_eos=True))))
            for _ in range(3)
        ]
        await asyncio.sleep(0.2)
        stats = await client.engine_stats()
        assert (stats[server.url]["running"], stats[other.url]["running"]) == (1, 3)
        for task in [long, *short]:
            task.cancel()
        await asyncio.gather(long, *short, return_exceptions=True)
        await client.close()

    asyncio.run(main())


def test_a_streamed_answer_is_the_same_as_a_whole_one(server: Server) -> None:
    async def main() -> None:
        wire = Wire(server.url)
        body = {
            "input_ids": [3, 4],
            "sampling_params": {"max_new_tokens": 20, "sampling_seed": 5, "ignore_eos": True},
            "return_logprob": True,
        }
        whole, streamed = (Submission(rid, 22, PartialAnswer()) for rid in "ws")
        whole.take(await wire.call("POST", "/generate", body, timeout=30), server.url)
        streamed.streamed = True
        seen = []
        await wire.events(
            "/generate", {**body, "stream": True}, lambda chunk: (streamed.take(chunk, server.url), seen.append(streamed.n_new))
        )
        assert (streamed.done, streamed.reason, seen[-1]) == (whole.done, "length", 20)
        assert len(seen) > 10 and seen == sorted(set(seen))
        wire.close()
        await wire.wait_closed()

    asyncio.run(main())


# -- what SGLang streams, without a server: the order of things that a test cannot force on a real one ----------------------------------------


def _chunk(n_tokens: int, retractions: int, reason: str | None = None) -> dict[str, Any]:
    meta = {
        "completion_tokens": n_tokens,
        "num_retractions": retractions,
        "output_token_logprobs": [[-0.5, 100 + i, None] for i in range(n_tokens)],
        "finish_reason": reason and {"type": reason},
    }
    return {"output_ids": [100 + i for i in range(n_tokens)], "meta_info": meta}


def _submission(version: int) -> Submission:
    return Submission("r", 10, PartialAnswer(), version=version, streamed=True)


def test_streamed_tokens_have_the_right_version_however_late_they_come() -> None:
    late = _submission(7)
    for chunk in (_chunk(1, 0), _chunk(2, 0)):
        late.take(chunk, "url")
    assert late.is_clear
    late.resumed_with(8)
    late.take(_chunk(3, 0), "url")  # sampled before the pause
    assert not late.is_clear
    for chunk in (_chunk(4, 1), _chunk(5, 2), _chunk(6, 2)):  # the second retraction is for want of memory
        late.take(chunk, "url")
    assert late.done.versions == [7, 7, 7, 8, 8, 8] and late.is_clear
    late.resumed_with(10)
    late.take(_chunk(7, 3, "stop"), "url")
    assert late.done.versions == [7, 7, 7, 8, 8, 8, 10] and late.reason == "stop"


@pytest.mark.parametrize("reason", [None, "stop"])
@pytest.mark.parametrize("n_shown", [0, 2])
def test_what_went_unclear_through_an_update_is_not_taken_over(n_shown: int, reason: str | None) -> None:
    """It may have waited, or have been over with its last tokens on their way: shown nothing yet, or nothing since the last update."""
    doubtful = _submission(7)
    if n_shown:
        doubtful.take(_chunk(n_shown, 0), "url")
        doubtful.resumed_with(8)
    assert not doubtful.is_clear
    doubtful.resumed_with(9)
    doubtful.take(_chunk(n_shown + 1, 0, reason), "url")
    assert doubtful.is_lost and doubtful.reason == (reason and "abort")
    assert doubtful.done.versions == [7] * n_shown


def test_chunks_put_together_over_an_update_are_not_taken_over() -> None:
    merged = _submission(7)
    merged.take(_chunk(2, 0), "url")
    merged.resumed_with(8)
    merged.take(_chunk(4, 1), "url")
    assert merged.is_lost and merged.reason is None
    merged.take(_chunk(5, 1, "stop"), "url")
    assert merged.done.versions == [7, 7] and merged.reason == "abort"


def test_an_aborted_stream_keeps_what_it_had_shown() -> None:
    aborted = _submission(7)
    aborted.take(_chunk(2, 0), "url")
    last = _chunk(4, 0, "abort")
    last["output_ids"] = last["output_ids"][-1:]  # SGLang's last chunk of an aborted request
    aborted.take(last, "url")
    assert aborted.done.tokens == [100, 101] and aborted.reason == "abort"


def test_incremental_chunks() -> None:
    request = _submission(3)
    for n in range(1, 4):
        chunk = _chunk(n, 0)
        chunk["output_ids"] = chunk["output_ids"][-1:]
        chunk["meta_info"]["output_token_logprobs"] = chunk["meta_info"]["output_token_logprobs"][-1:]
        request.take(chunk, "url")
    assert request.done.tokens == [100, 101, 102]


# -- the last tests: they end the servers ----


def test_a_closed_gate_holds_new_requests_and_a_dead_server_releases_them(models: list[Path], server: Server, other: Server) -> None:
    async def main() -> None:
        client = RolloutClient(RolloutConfig(), [server.url], [server.process], update_mode="abort", interrupt_timeout=20)
        await update_from_disk(client, server.url, models, 3)  # the weights of the other one, under another version
        tasks = [
            asyncio.ensure_future(client.agenerate(ModelRequest([3, 4], GenerationConfig(max_new_tokens=2000, ignore_eos=True))))
            for _ in range(8)
        ]
        async with asyncio.timeout(10):
            while (await client.engine_stats())[server.url]["running"] < len(tasks):
                await asyncio.sleep(0.01)
        await client.interrupt(server.url)
        tasks.append(asyncio.ensure_future(client.agenerate(ModelRequest([3, 5], GenerationConfig(max_new_tokens=8)))))
        await asyncio.sleep(0.5)
        assert not any(task.done() for task in tasks)  # all of them wait at the gate
        stats = (await client.engine_stats())[server.url]
        assert stats["running"] == stats["waiting"] == 0
        os.kill(server.process.pid, signal.SIGKILL)
        with pytest.raises(WeightUpdateError, match=server.url):
            await client.update_from_disk(server.url, models[1], 1)
        client.remove_server(server.url, "killed")
        client.add_server(other.url, other.process)
        answers = await asyncio.gather(*tasks)
        assert [answer.output_len for answer in answers[:8]] == [2000] * 8
        # They went on from the tokens they had, each with the version that its server stamped.
        assert all((answer.output_versions[0], answer.output_versions[-1]) == (3, 0) for answer in answers[:8])
        assert set(answers[8].output_versions) == {0}
        with pytest.raises(InterruptFailed, match="is gone"):
            await client.resume(server.url, 1)
        await client.close()

    asyncio.run(main())


def test_a_server_that_does_not_stop_is_named_with_what_it_holds(other: Server) -> None:
    async def main() -> None:
        client = RolloutClient(RolloutConfig(max_restarts=0), [other.url], [other.process], update_mode="abort", interrupt_timeout=1.0)
        tasks = [asyncio.ensure_future(client.agenerate(ModelRequest([3, 4], LONG))) for _ in range(3)]
        await asyncio.sleep(0.3)
        os.kill(other.process.pid, signal.SIGSTOP)
        with pytest.raises(
            InterruptFailed, match=rf"waited 1 s \(weight_sync.timeout\) for {other.url} .* 3 requests were still in flight"
        ):
            await client.interrupt(other.url)
        client.remove_server(other.url, "it hung")
        assert all("it hung" in str(error) for error in await asyncio.gather(*tasks, return_exceptions=True))
        await client.close()

    asyncio.run(main())
