"""Weights by broadcast from trainer ranks to embedded servers, all of them real processes."""

from __future__ import annotations

import asyncio
import json
import urllib.request
from pathlib import Path

import pytest
import torch
from rollout_servers import Server, make_model
from trainer_setup import make_batch, make_config

from areal.models.loading import load_model
from areal.ops.weights_hash import weights_hash
from areal.trainer.worker import TrainerHandle
from areal.weight_sync.stream import Target

pytestmark = pytest.mark.timeout(240)


def engine_stats(url: str) -> dict:
    with urllib.request.urlopen(f"{url}/engine_stats", timeout=10) as answer:
        return json.load(answer)


def saved_hash(folder: Path) -> int:
    return weights_hash(dict(load_model(folder, dtype=torch.float32).named_parameters()))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    make_model(folder)
    return folder


def broadcast_config(model: Path, folder: Path, n_ranks: int):
    return make_config(model, folder, backend=f"fsdp:d{n_ranks}").new(weight_sync={"transport": "broadcast", "bucket_mb": 1})


@pytest.mark.parametrize("n_ranks", [1, 2])
def test_two_servers_have_the_trainers_weights(model: Path, tmp_path: Path, n_ranks: int) -> None:
    servers = [Server(model, tmp_path / f"{i}.log", f"rollout {i}") for i in range(2)]

    async def scenario() -> None:
        trainer = await TrainerHandle.start(broadcast_config(model, tmp_path, n_ranks), model, tmp_path)
        try:
            urls = [server.wait().url for server in servers]
            for version in (1, 2):
                await trainer.train_step(make_batch(world_size=n_ranks, seed=version))
                result = await trainer.send_weights(version, [Target(url) for url in urls], want_hash=True)
                assert [o.error for o in result.outcomes] == [None, None]
                assert result.hash is not None
                for url in urls:
                    stats = engine_stats(url)
                    assert (stats["version"], stats["hash"]) == (version, f"{result.hash:016x}")
            await trainer.save(tmp_path / "saved")
            assert saved_hash(tmp_path / "saved") == result.hash != saved_hash(model)
        finally:
            await trainer.close()

    try:
        asyncio.run(scenario())
    finally:
        for server in servers:
            server.process.terminate()
