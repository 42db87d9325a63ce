"""Weights from trainer ranks to embedded servers by reference and by files, all of them real processes."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from trainer_setup import make_batch, make_config

from areal.models.loading import load_model
from areal.ops.weights_hash import weights_hash
from areal.trainer.worker import TrainerHandle
from areal.weight_sync.disk import version_folder
from areal.weight_sync.stream import Target
from tests.rollout_servers import Server, make_model
from tests.weight_transports import get, post

pytestmark = pytest.mark.timeout(240)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_model(folder)
    return folder


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(model, tmp_path_factory.mktemp("log") / "server.log")
    yield server.wait()
    server.process.kill()


def hash_of(folder: Path) -> str:
    return f"{weights_hash(dict(load_model(folder, dtype=torch.float32).named_parameters())):016x}"


def test_two_ranks_by_reference(server: Server, model: Path, tmp_path: Path) -> None:
    async def scenario() -> str:
        config = make_config(model, tmp_path, backend="fsdp:d2").new(weight_sync={"transport": "tensor", "bucket_mb": 1})
        trainer = await TrainerHandle.start(config, model, tmp_path)
        try:
            await trainer.train_step(make_batch(world_size=2))
            result = await trainer.send_weights(1, [Target(server.url)], want_hash=True)
            assert [outcome.error for outcome in result.outcomes] == [None]
            await trainer.save(tmp_path / "saved")
            return f"{result.hash:016x}"
        finally:
            await trainer.close()

    sent = asyncio.run(scenario())
    stats = get(server.url, "/engine_stats")
    assert (stats["version"], stats["hash"]) == (1, sent)
    assert sent == hash_of(tmp_path / "saved") != hash_of(model)


def test_two_ranks_by_files_and_a_disk_that_is_gone(server: Server, model: Path, tmp_path: Path) -> None:
    shared = tmp_path / "shared"

    async def scenario() -> str:
        sync = {"transport": "disk", "bucket_mb": 1, "folder": str(shared)}
        config = make_config(model, tmp_path, backend="fsdp:d2").new(weight_sync=sync)
        folder = shared / config.experiment_name / config.trial_name
        trainer = await TrainerHandle.start(config, model, tmp_path)
        try:
            await trainer.train_step(make_batch(world_size=2))
            result = await trainer.write_weights(2, want_hash=True)
            (outcome,) = result.outcomes
            assert outcome.error is None and outcome.url == str(version_folder(folder, 2))
            post(server.url, "/update_weights_from_disk", {"model_path": outcome.url, "weight_version": "2"})
            shutil.rmtree(shared)
            shared.write_text("a file in the way")
            (outcome,) = (await trainer.write_weights(3)).outcomes
            assert outcome.error is not None and "version 3 was not written" in outcome.error
            await trainer.train_step(make_batch(world_size=2, seed=2))  # the trainer goes on
            return f"{result.hash:016x}"
        finally:
            await trainer.close()

    sent = asyncio.run(scenario())
    stats = get(server.url, "/engine_stats")
    assert (stats["version"], stats["hash"]) == (2, sent)


def test_the_hash_of_files_is_by_the_names_of_the_engine_that_reads_them(tmp_path: Path) -> None:
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    make_model(
        tmp_path / "model", model_type="qwen3_moe", **experts
    )  # a checkpoint of it has a tensor for each expert, the engine one for all
    server = Server(tmp_path / "model", tmp_path / "server.log")

    async def scenario() -> str:
        config = make_config(tmp_path / "model", tmp_path).new(weight_sync={"transport": "disk"})
        trainer = await TrainerHandle.start(config, tmp_path / "model", tmp_path / "run")
        try:
            await trainer.train_step(make_batch())
            result = await trainer.write_weights(1, want_hash=True)
            post(server.wait().url, "/update_weights_from_disk", {"model_path": result.outcomes[0].url, "weight_version": "1"})
            return f"{result.hash:016x}"
        finally:
            await trainer.close()

    try:
        sent = asyncio.run(scenario())
        assert get(server.url, "/engine_stats")["hash"] == sent != hash_of(tmp_path / "model")
    finally:
        server.process.kill()
