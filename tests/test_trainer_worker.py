"""The trainer's processes: real ones, real sockets, real kill -9. A start takes seconds, so a scenario does many things in one."""

import asyncio
import os
import signal
import time

import psutil
import pytest
import torch
from trainer_setup import make_batch, make_config, make_groups, save_small_model

from areal.config import OptimizerConfig
from areal.models.loading import load_model
from areal.ops.weights_hash import weights_hash
from areal.trainer.worker import CheckpointFailed, TrainerHandle, WorkerDied, WorkerFailed
from areal.weight_sync.shm import ShmReader

pytestmark = pytest.mark.timeout(180)


@pytest.fixture
def model_folder(tmp_path):
    (tmp_path / "model").mkdir()
    return save_small_model(tmp_path / "model")


def with_trainer(model_folder, tmp_path, scenario, **actor):
    async def run():
        handle = await TrainerHandle.start(make_config(model_folder, tmp_path, **actor), model_folder, tmp_path / "run")
        processes = [link.process for link in handle._links]
        try:
            await scenario(handle)
        finally:
            await handle.close()
        assert all(p.poll() is not None for p in processes)

    asyncio.run(run())


def named_parameters(folder):
    return dict(load_model(folder, dtype=torch.float32).named_parameters())


def test_a_life(model_folder, tmp_path):
    (tmp_path / "file").write_text("in the way")

    async def scenario(handle):
        version, first = await handle.publish(0)
        stats = await handle.train_step(make_batch(n_minibatches=2))
        assert (version, stats["version"]) == (0, 0)
        assert stats["grad_norm"] > 0
        version, second = await handle.publish(1)
        assert version == 1
        assert first != second

        # A checkpoint has the weights of the moment of the call, whatever happens while it is written.
        saving = asyncio.create_task(handle.save(tmp_path / "checkpoint"))
        await asyncio.sleep(0)
        await handle.set_optimizer(OptimizerConfig(type="muon"))
        await handle.sft_step(make_batch().minibatches[0], 0.5)
        assert (await saving)["spans"][0][0] == "checkpoint"
        assert weights_hash(named_parameters(tmp_path / "checkpoint")) == second
        assert (tmp_path / "checkpoint" / "tokenizer.json").read_text() == "{}"

        with ShmReader(handle.shm_name) as reader:
            target = {n: torch.empty_like(p) for n, p in named_parameters(model_folder).items()}
            assert reader.read_into(target, 1, 5.0) == (1, second)
            assert (await handle.publish(2))[1] != second

        with pytest.raises(CheckpointFailed, match="could not be written"):
            await handle.save(tmp_path / "file" / "checkpoint")
        await handle.train_step(make_batch())

        step = asyncio.create_task(handle.train_step(make_batch(make_groups(200, 8), capacity=512)))
        await asyncio.sleep(0.05)
        step.cancel()
        begin = time.monotonic()
        await handle.close()
        assert time.monotonic() - begin < 5
        with pytest.raises(RuntimeError, match="closed"):
            await handle.publish(2)

    with_trainer(model_folder, tmp_path, scenario)


def test_killed_rank_is_named_at_once_and_takes_the_others_down(model_folder, tmp_path):
    async def scenario(handle):
        processes = [link.process for link in handle._links]
        batch = make_batch(n_minibatches=2, world_size=2)
        await handle.train_step(batch)
        died = asyncio.create_task(handle.died())
        step = asyncio.create_task(handle.train_step(batch))
        await asyncio.sleep(0.01)
        os.kill(processes[1].pid, signal.SIGKILL)
        begin = time.monotonic()
        with pytest.raises(WorkerDied, match=r"trainer 1 .* was killed by SIGKILL"):
            # The step may just have been done: then the next one finds the dead rank.
            await step
            await handle.train_step(batch)
        assert "trainer 1" in str(await died)
        assert time.monotonic() - begin < 10
        with pytest.raises(WorkerDied, match="trainer 1"):
            await handle.publish(1)
        assert all(p.poll() is not None for p in processes)

    with_trainer(model_folder, tmp_path, scenario, backend="fsdp:d2")


def test_error_in_a_rank_has_its_message(model_folder, tmp_path):
    async def scenario(handle):
        batch = make_batch()
        batch.minibatches[0].ranks[0][0].input_ids[3] = 10_000
        with pytest.raises(WorkerFailed, match=r"trainer 0: .*index out of range"):
            await handle.train_step(batch)
        with pytest.raises(WorkerFailed, match="index out of range"):
            await handle.train_step(make_batch())

    with_trainer(model_folder, tmp_path, scenario)


def test_missing_model_is_named(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(WorkerFailed, match="empty"):
        with_trainer(tmp_path / "empty", tmp_path, None)


def test_training_waits_for_no_disk_and_a_state_that_cannot_be_written_is_told(model_folder, tmp_path):
    async def scenario(handle):
        batch = make_batch(world_size=2)
        for name in ("slow", "full", "whole"):
            (tmp_path / name / "models").mkdir(parents=True)
        slow = tmp_path / "slow" / "models" / "__1_0.distcp"
        os.mkfifo(slow)  # a disk that takes no byte until somebody reads
        await handle.train_step(batch)
        await handle.copy_state(tmp_path / "slow")
        writing = asyncio.create_task(handle.state_written(tmp_path / "slow"))
        for _ in range(2):
            await handle.train_step(batch)
        assert not writing.done()
        await asyncio.to_thread(slow.read_bytes)
        with pytest.raises(CheckpointFailed, match="Illegal seek"):  # it is no file after all
            await writing

        rank = psutil.Process(handle._links[1].process.pid)
        rank.rlimit(psutil.RLIMIT_FSIZE, (50_000, psutil.RLIM_INFINITY))
        await handle.copy_state(tmp_path / "full")
        with pytest.raises(CheckpointFailed, match="File too large"):
            await handle.state_written(tmp_path / "full")
        rank.rlimit(psutil.RLIMIT_FSIZE, (psutil.RLIM_INFINITY, psutil.RLIM_INFINITY))
        await handle.train_step(batch)

        await handle.copy_state(tmp_path / "whole")
        _, saved = await handle.publish(3)
        files = (await handle.state_written(tmp_path / "whole"))["files"]
        assert set(files) == {"rank_0000.json", "rank_0001.json", "models/.metadata", "models/__0_0.distcp", "models/__1_0.distcp"}
        await handle.train_step(batch)
        assert (await handle.publish(4))[1] != saved
        await handle.restore(tmp_path / "whole")
        assert (await handle.publish(5))[1] == saved

    with_trainer(model_folder, tmp_path, scenario, backend="fsdp:d2")


def test_ranks_that_share_sequences(model_folder, tmp_path):
    """One data rank of two processes: both get the same micro-batches, and only one counts and publishes."""

    async def scenario(handle):
        assert (handle.world_size, handle.n_data_ranks) == (2, 1)
        assert handle.sequence_cost[1] > 0  # attention counts
        batch = make_batch(n_minibatches=2, capacity=100)
        microbatch = batch.minibatches[0].ranks[0][0]
        _, digest = await handle.publish(0)
        assert digest == weights_hash(named_parameters(model_folder))
        logprobs = await handle.logprobs(microbatch)
        assert (logprobs != 0).tolist() == microbatch.loss_mask.tolist()
        stats = await handle.train_step(batch)
        assert stats["n_tokens"] == sum(int(mb.loss_mask.sum()) for m in batch.minibatches for mb in m.ranks[0])
        assert (await handle.sft_step(batch.minibatches[0]))["n_tokens"] == int(batch.minibatches[0].denominator)
        _, digest = await handle.publish(1)
        await handle.save(tmp_path / "checkpoint")
        assert weights_hash(named_parameters(tmp_path / "checkpoint")) == digest

    with_trainer(model_folder, tmp_path, scenario, backend="fsdp:d1c2")
