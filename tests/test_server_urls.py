"""Servers that somebody else starts (``rollout.urls``): waited for, left out while they are gone, taken back with current weights."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from rollout_servers import Server, make_model

from areal.cluster import Cluster
from areal.config import ConfigError, GenerationConfig, GRPOConfig
from areal.config_check import check_machine
from areal.config_load import dump_yaml, load_expr_config
from areal.inference.servers import ServerStartError, start_server
from areal.launcher.local import ChildProcess, free_port
from areal.types import ModelRequest

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_model(folder)
    return folder


def config(model: Path, fileroot: Path, urls: list[str], **rollout: Any) -> GRPOConfig:
    return GRPOConfig.model_validate(
        {
            "actor": {"path": str(model), "device": "cpu"},
            "train_dataset": {"type": "arithmetic"},
            "rollout": {"backend": f"embedded:d{len(urls)}", "urls": urls, "device": "cpu", **rollout},
            "stats_logger": {"fileroot": str(fileroot), "tensorboard": False},
        }
    )


def again(model: Path, url: str, log: Path) -> ChildProcess:
    """Another server at an address that is free again."""
    argv = ["-m", "areal.inference.embedded.server", "--model", str(model), "--port", url.rpartition(":")[2]]
    return ChildProcess("second life", argv, log)


async def until(condition: Any, seconds: float = 90) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.01)


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["rollout.backend=sglang:d2", "rollout.urls=[http://h:1, http://h:1/]"], "rollout.urls names http://h:1 twice"),
        (["rollout.urls=[http://h:1]", "sglang.options={tp_size: 2}"], "sglang.* is set, but the servers of rollout.urls run already"),
        (["weight_sync.folder=/weights"], "weight_sync.folder is set, but the transport is broadcast"),
        (
            ["rollout.update_mode=retract", "gconfig.stop=['x']"],
            "rollout.update_mode=retract with gconfig.stop would change what is sampled: SGLang holds back what may begin a stop string",
        ),
    ],
)
def test_keys_that_cannot_be_together_are_refused(model: Path, tmp_path: Path, words: list[str], error: str) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(dump_yaml(config(model, tmp_path, [])))
    with pytest.raises(ConfigError) as caught:
        load_expr_config([str(file), "rollout.backend=sglang:d1", *words], GRPOConfig)
    assert caught.value.message == error and caught.value.hint


def test_what_reaches_one_machine_only_is_refused_for_servers_elsewhere(model: Path, tmp_path: Path) -> None:
    elsewhere, here = (config(model, tmp_path, [url]) for url in ("http://192.0.2.1:30000", "http://127.0.0.1:30000"))
    for transport in ("shm", "tensor"):
        with pytest.raises(ConfigError, match=rf"transport={transport} works on one machine only, and http://192\.0\.2\.1:30000"):
            check_machine(elsewhere.new(weight_sync={"transport": transport}))
        check_machine(here.new(weight_sync={"transport": transport}))
    check_machine(elsewhere)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"weight_sync.folder: '.*' cannot be made: Not a directory"):
        check_machine(elsewhere.new(weight_sync={"transport": "disk", "folder": str(tmp_path / "file" / "weights")}))


def test_a_server_that_nobody_started_is_waited_for_and_then_told(model: Path, tmp_path: Path) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(ServerStartError, match=r"did not answer within 1 s \(rollout.startup_timeout\); start it there with `areal serve`"):
        asyncio.run(start_server(config(model, tmp_path, [url], startup_timeout=1), model, tmp_path, 0))


def test_a_server_that_goes_away_comes_back_with_the_current_weights(model: Path, tmp_path: Path) -> None:
    first, second = (Server(model, tmp_path / f"log{i}") for i in range(2))
    processes = [first.process, second.process]
    try:
        asyncio.run(_go_and_come_back(model, tmp_path, first.wait(), second.wait(), processes))
        assert processes[1].poll() is None and processes[2].poll() is None, "a run does not end what it did not start"
    finally:
        for process in processes:
            process.terminate()


async def _go_and_come_back(model: Path, tmp_path: Path, first: Server, second: Server, processes: list[ChildProcess]) -> None:
    cluster = Cluster(config(model, tmp_path, [first.url, second.url], max_restarts=0))
    try:
        await cluster.open()
        await cluster.weights.publish(0, announce=False)
        await cluster.weights.push()
        async with asyncio.TaskGroup() as tasks:
            watching = tasks.create_task(cluster.watch())
            assert sorted(cluster.client.urls) == sorted([first.url, second.url])
            first.process.kill()
            await cluster.client.agenerate(ModelRequest([3], GenerationConfig(max_new_tokens=4)))
            await asyncio.gather(*(cluster.client.agenerate(ModelRequest([3], GenerationConfig(max_new_tokens=4))) for _ in range(8)))
            await until(lambda: cluster.client.urls == [second.url])
            await cluster.weights.publish(1)
            await cluster.wait_for_version(1)

            processes.append(again(model, first.url, tmp_path / "log2"))
            await until(lambda: len(cluster.client.urls) == 2)
            assert cluster.client.acked_version == 1, "it joined with the weights that are current"
            stats = await cluster.client.engine_stats()
            assert stats[first.url]["hash"] == stats[second.url]["hash"] and stats[first.url]["version"] == 1
            watching.cancel()
    finally:
        await cluster.close()
