"""Servers that come and go while weights are published: a real trainer, real servers, real kill -9."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from rollout_servers import make_model

from areal.cluster import Cluster
from areal.config import GRPOConfig
from areal.weight_sync.updater import WrongWeights

pytestmark = pytest.mark.timeout(180)


def _config(tmp_path: Path, **rollout: Any) -> GRPOConfig:
    make_model(tmp_path / "model")
    return GRPOConfig.model_validate(
        {
            "actor": {"path": str(tmp_path / "model"), "device": "cpu"},
            "train_dataset": {"type": "arithmetic"},
            "rollout": {"device": "cpu", "max_context": 128, "request_timeout": 30, **rollout},
            "stats_logger": {"fileroot": str(tmp_path), "tensorboard": False},
        }
    )


def _with_cluster(config: GRPOConfig, scenario: Callable[[Cluster], Awaitable[None]]) -> None:
    async def main() -> None:
        cluster = Cluster(config)
        try:
            await cluster.open()
            await cluster.weights.publish(0, announce=False)
            await cluster.weights.push()
            async with asyncio.TaskGroup() as tasks:
                watching = tasks.create_task(cluster.watch())
                await scenario(cluster)
                watching.cancel()
        finally:
            await cluster.close()

    asyncio.run(main())


async def _until(condition: Callable[[], bool], seconds: float = 40) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.005)


def test_weights_published_while_no_server_lives_arrive_with_the_replacement(tmp_path: Path) -> None:
    async def scenario(cluster: Cluster) -> None:
        os.kill(cluster.servers[0].process.pid, signal.SIGKILL)
        await _until(lambda: not cluster.client.urls)
        await cluster.weights.publish(1)
        async with asyncio.timeout(60):  # not only when rollout.request_timeout is over
            await cluster.wait_for_version(1)
        assert cluster.client.acked_version == 1

    _with_cluster(_config(tmp_path, request_timeout=120), scenario)


def test_a_server_that_lives_but_was_given_up_is_replaced(tmp_path: Path) -> None:
    async def scenario(cluster: Cluster) -> None:
        old = cluster.servers[0]
        cluster.client.remove_server(old.url, "it failed 6 times in a row")
        await _until(lambda: bool(cluster.client.urls))
        assert old.process.poll() is not None and cluster.client.urls == [cluster.servers[0].url] != [old.url]
        assert cluster.servers[0].restarts == 1

    _with_cluster(_config(tmp_path), scenario)


def test_a_server_that_hangs_at_an_update_is_replaced_and_the_other_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario(cluster: Cluster) -> None:
        hanging, other = cluster.servers
        os.kill(hanging.process.pid, signal.SIGSTOP)
        await cluster.weights.publish(1)
        async with asyncio.timeout(60):
            await cluster.wait_for_version(1)
        assert hanging.url not in cluster.client.urls and other.url in cluster.client.urls
        await _until(lambda: len(cluster.client.urls) == 2)
        assert cluster.client.acked_version == 1

    config = _config(tmp_path, backend="embedded:d2")
    _with_cluster(config.new(weight_sync=config.weight_sync.new(timeout=2)), scenario)
    assert "the controller waited 2 s (weight_sync.timeout) for http://" in caplog.text


def test_a_replacement_that_cannot_start_is_replaced_in_its_turn(tmp_path: Path) -> None:
    config = tmp_path / "model" / "config.json"

    async def scenario(cluster: Cluster) -> None:
        config.rename(config.with_suffix(".away"))
        first = cluster.servers[0].process.pid
        os.kill(first, signal.SIGKILL)
        log = cluster.run_folder / "logs" / "rollout_0.log"
        await _until(lambda: "error:" in log.read_text())
        config.with_suffix(".away").rename(config)
        await _until(lambda: bool(cluster.client.urls))
        assert cluster.servers[0].restarts >= 2

    _with_cluster(_config(tmp_path, max_restarts=10), scenario)


def test_a_server_that_joins_while_a_number_is_used_again_has_the_newest_weights(tmp_path: Path) -> None:
    """As in the warm-up, where all weights are version 0: no false alarm, and nobody keeps older weights of that number."""

    async def scenario(cluster: Cluster) -> None:
        from areal.config import OptimizerConfig
        from areal.demonstrations import load_demonstrations, make_sft_batch

        config = cluster.config.model_validate({**cluster.config.model_dump(exclude_unset=True), "warmup": {}})
        batch = make_sft_batch(load_demonstrations(config, cluster.tokenizer).batch(4), 4096, 1)
        await cluster.trainer.set_optimizer(OptimizerConfig(lr=1e-2))
        os.kill(cluster.servers[0].process.pid, signal.SIGKILL)
        await _until(lambda: not cluster.client.urls)
        while not cluster.client.urls:
            await cluster.trainer.sft_step(batch, 1.0)
            await cluster.weights.publish(0, announce=False)
            await cluster.weights.push()
        assert cluster.weights.published is not None
        stats = await cluster.client.engine_stats()
        assert stats[cluster.servers[0].url]["hash"] == cluster.weights.published.digest

    _with_cluster(_config(tmp_path), scenario)


@pytest.mark.parametrize("transport", ["shm", "broadcast", "disk", "tensor"])
def test_a_server_that_holds_other_weights_than_were_sent_ends_the_run(tmp_path: Path, transport: str) -> None:
    async def scenario(cluster: Cluster) -> None:
        name = {"shm": "publish", "disk": "write_weights"}.get(transport, "send_weights")
        send = getattr(cluster.trainer, name)

        async def with_another_hash(*args: Any, **kwargs: Any) -> Any:
            sent = await send(*args, **kwargs)
            return (sent[0], sent[1] ^ 1) if transport == "shm" else dataclasses.replace(sent, hash=sent.hash ^ 1)

        setattr(cluster.trainer, name, with_another_hash)
        with pytest.raises(WrongWeights, match=r"version 1"):
            await cluster.weights.publish(1, announce=False)
            await cluster.weights.push()

    config = _config(tmp_path)
    _with_cluster(config.new(weight_sync=config.weight_sync.new(transport=transport)), scenario)
