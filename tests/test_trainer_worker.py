"""The trainer's processes: real ones, real sockets, real kill -9."""

import asyncio
import os
import signal
import time

import pytest
from trainer_setup import make_batch, make_config, make_groups, save_small_model

from areal.config import OptimizerConfig
from areal.models.loading import load_model
from areal.ops.weights_hash import weights_hash
from areal.trainer.worker import CheckpointFailed, TrainerHandle, WorkerDied, WorkerFailed

pytestmark = pytest.mark.timeout(180)


@pytest.fixture
def model_folder(tmp_path):
    (tmp_path / "model").mkdir()
    return save_small_model(tmp_path / "model")


def with_trainer(model_folder, tmp_path, scenario, **actor):
    async def run():
        handle = await TrainerHandle.start(make_config(model_folder, tmp_path, **actor), model_folder, tmp_path / "run")
        try:
            return await scenario(handle)
        finally:
            await handle.close()

    return asyncio.run(run())


def gone(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def test_train_publish_save(model_folder, tmp_path):
    from areal.weight_sync.shm import ShmReader

    async def scenario(handle):
        import torch

        version, first = await handle.publish(0)
        stats = await handle.train_step(make_batch(n_minibatches=2))
        assert stats["version"] == 0
        assert stats["grad_norm"] > 0
        _, second = await handle.publish(1)
        assert version == 0
        assert first != second
        saving = asyncio.create_task(handle.save(tmp_path / "checkpoint"))
        await handle.set_optimizer(OptimizerConfig(type="muon"))
        await handle.sft_step(make_batch().minibatches[0], 0.5)
        assert (await saving)["spans"][0][0] == "checkpoint"

        with ShmReader(handle.shm_name) as reader:
            target = {n: torch.empty_like(p) for n, p in load_model(model_folder, dtype=torch.float32).named_parameters()}
            assert reader.read_into(target, 1, 5.0) == (1, second)
        assert weights_hash(dict(load_model(tmp_path / "checkpoint", dtype=torch.float32).named_parameters())) == second
        assert (tmp_path / "checkpoint" / "tokenizer.json").read_text() == "{}"
        return [link.process.pid for link in handle._links]

    pids = with_trainer(model_folder, tmp_path, scenario)
    assert all(gone(pid) for pid in pids)


def test_killed_rank_is_named_at_once_and_takes_the_others_down(model_folder, tmp_path):
    async def scenario(handle):
        processes = [link.process for link in handle._links]
        batch = make_batch(n_minibatches=2, world_size=2)
        await handle.train_step(batch)
        step = asyncio.create_task(handle.train_step(batch))
        await asyncio.sleep(0.01)
        os.kill(processes[1].pid, signal.SIGKILL)
        begin = time.monotonic()
        with pytest.raises(WorkerDied, match=r"trainer 1 .* was killed by SIGKILL"):
            # The step may just have been done: then the next one finds the dead rank.
            await step
            await handle.train_step(batch)
        assert time.monotonic() - begin < 10
        with pytest.raises(WorkerDied):
            await handle.publish(1)
        assert all(p.poll() is not None for p in processes)

    with_trainer(model_folder, tmp_path, scenario, backend="fsdp:d2")


def test_death_between_calls_is_noticed(model_folder, tmp_path):
    async def scenario(handle):
        os.kill(handle._links[0].process.pid, signal.SIGKILL)
        async with asyncio.timeout(10):
            assert "SIGKILL" in str(await handle.died())

    with_trainer(model_folder, tmp_path, scenario)


def test_error_in_a_rank_has_its_message(model_folder, tmp_path):
    async def scenario(handle):
        batch = make_batch()
        batch.minibatches[0].ranks[0][0].input_ids[3] = 10_000
        with pytest.raises(WorkerFailed, match="trainer 0"):
            await handle.train_step(batch)

    with_trainer(model_folder, tmp_path, scenario)


def test_missing_model_is_an_error_with_log_lines(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(WorkerFailed, match="empty"):
        with_trainer(tmp_path / "empty", tmp_path, None)


def test_unwritable_checkpoint_does_not_end_training(model_folder, tmp_path):
    (tmp_path / "file").write_text("in the way")

    async def scenario(handle):
        with pytest.raises(CheckpointFailed, match="could not be written"):
            await handle.save(tmp_path / "file" / "checkpoint")
        await handle.train_step(make_batch())

    with_trainer(model_folder, tmp_path, scenario)


def test_cancelled_call_leaves_a_trainer_that_closes_at_once(model_folder, tmp_path):
    async def scenario(handle):
        step = asyncio.create_task(handle.train_step(make_batch(make_groups(200, 8), capacity=512)))
        await asyncio.sleep(0.05)
        step.cancel()
        begin = time.monotonic()
        await handle.close()
        assert time.monotonic() - begin < 5

    with_trainer(model_folder, tmp_path, scenario)
