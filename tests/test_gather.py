"""Weights gathered bucket by bucket from FSDP2 shards: three real ranks over gloo, shapes that three does not divide."""

from __future__ import annotations

import multiprocessing
import os
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from areal.models.checkpoint_names import CheckpointNames
from areal.models.loading import create_model
from areal.ops.weights_hash import weights_hash
from areal.trainer.gather import WeightGatherer
from areal.weight_sync.shm import ShmPublisher
from areal.weight_sync.stream import Outcome, plan_buckets, stream_weights

pytestmark = pytest.mark.timeout(240)

SHAPES = [(1, 5), (2, 3), (3, 32), (4, 16), (7,), (1,), (96, 33), (65, 64), (2,), (31, 2, 4)]
BIG = 16 << 20
MIXTRAL = {
    "model_type": "mixtral", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "vocab_size": 64, "num_local_experts": 3, "num_experts_per_tok": 2, "pad_token_id": 0,
}  # fmt: skip


class Weights(nn.Module):
    """Parameters of many shapes, one of them under two names."""

    def __init__(self, shapes: list[tuple[int, ...]]) -> None:
        super().__init__()
        torch.manual_seed(0)
        for i, shape in enumerate(shapes):
            self.register_parameter(f"w{i}", nn.Parameter(torch.randn(shape)))
        self.tied = self.w0


class KeepingSender:
    """Rank 0's end of no transport: keeps copies of what it is given, as a server would hold them."""

    def __init__(self) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self.memory = [torch.empty(1 << 20, dtype=torch.uint8) for _ in range(2)]

    def begin(self, version, buckets, targets):
        self.order = []

    def buffer(self, bucket):
        return self.memory[bucket.index % 2][: bucket.nbytes].fill_(0xFF)

    def send(self, bucket, data):
        self.order.append(bucket.index)
        self.tensors |= {spec.name: spec.view(data).clone() for spec in bucket.tensors}

    def finish(self, digest=None):
        return [Outcome("here")]

    def close(self):
        pass


def expected(shapes, dtype):
    return {name: p.detach().to(dtype) for name, p in Weights(shapes).named_parameters()}


def gather_all(rank: int, world_size: int, dtype: torch.dtype, bucket_bytes: int):
    model = Weights(SHAPES)
    if world_size > 1:
        fully_shard(model, mesh=init_device_mesh("cpu", (world_size,)))
    gatherer = WeightGatherer(model, dtype, rank, world_size)
    sender = KeepingSender() if rank == 0 else None
    buckets = gatherer.bucket_plan(bucket_bytes)
    result = stream_weights(gatherer.gather, buckets, sender, 1, want_hash=True)
    for part in gatherer.parts(bucket_bytes):
        assert bool(part) == (rank == 0)
    if sender is None:
        assert result is None
        return None
    assert sender.order == list(range(len(buckets)))
    return sender.tensors, result.hash


def peak_of_streaming(rank: int, world_size: int) -> int:
    """Bytes that this rank's memory grew by, at most, while 64 MiB of weights went through 2 MiB buckets."""
    model = Weights([(1024, 1024)] * (BIG >> 20))
    fully_shard(model, mesh=init_device_mesh("cpu", (world_size,)))
    gatherer = WeightGatherer(model, torch.bfloat16, rank, world_size)
    buckets = gatherer.bucket_plan(2 << 20)
    memory = [torch.ones(2 << 20, dtype=torch.uint8) for _ in range(2)]
    for bucket in buckets[:2]:  # gloo's own buffers, and torch's code
        gatherer.gather(bucket, memory[bucket.index % 2] if rank == 0 else None)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again
    before = resident("VmRSS")
    for bucket in buckets:
        gatherer.gather(bucket, memory[bucket.index % 2] if rank == 0 else None)
    return resident("VmHWM") - before


def resident(key: str) -> int:
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key)]
    return int(line.split()[1]) << 10


def run_rank(folder: str, rank: int, world_size: int) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size, timeout=timedelta(seconds=60))
    results = {
        (dtype, size): gather_all(rank, world_size, getattr(torch, dtype), size)
        for dtype in ("float32", "bfloat16")
        for size in (1, 600, 1 << 20)
    }
    peak = peak_of_streaming(rank, world_size)
    torch.save((results, peak), f"{folder}/rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gather")
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=run_rank, args=(str(folder), rank, 3)) for rank in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(200)
        if process.is_alive():
            process.kill()
    assert [p.exitcode for p in processes] == [0, 0, 0]
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(3)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("size", [1, 600, 1 << 20])
def test_shards_of_three_ranks_are_the_whole_weights(ranks, dtype: str, size: int) -> None:
    tensors, digest = ranks[0][0][dtype, size]
    whole = expected(SHAPES, getattr(torch, dtype))
    assert tensors.keys() == whole.keys()  # the tied one once
    for name, tensor in whole.items():
        assert torch.equal(tensors[name], tensor), name
    assert digest == weights_hash(whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 600, 1 << 20])
def test_one_rank(dtype: torch.dtype, size: int) -> None:
    tensors, digest = gather_all(0, 1, dtype, size)
    whole = expected(SHAPES, dtype)
    assert all(torch.equal(tensors[name], tensor) for name, tensor in whole.items())
    assert digest == weights_hash(whole)


def test_no_rank_holds_a_second_model(ranks) -> None:
    for rank, (_, peak) in enumerate(ranks):
        assert peak < 6 << 20, f"rank {rank} grew by {peak >> 20} MiB for {BIG >> 19} MiB of weights"


def test_plan_has_no_gaps_and_views_are_aligned() -> None:
    gatherer = WeightGatherer(Weights(SHAPES), torch.bfloat16, 0, 1)
    for bucket_bytes in (1, 600, 1 << 20):
        buckets = gatherer.bucket_plan(bucket_bytes)
        assert sorted(spec.name for b in buckets for spec in b.tensors) == sorted(f"w{i}" for i in range(len(SHAPES)))
        for index, bucket in enumerate(buckets):
            assert bucket.index == index
            assert bucket.nbytes <= bucket_bytes or len(bucket.tensors) == 1
            end = 0
            for spec in bucket.tensors:
                assert spec.offset == end and spec.offset % 2 == 0
                end += spec.nbytes
            assert end == bucket.nbytes
    assert plan_buckets([], 5) == []


def test_shared_memory_takes_weights_in_parts(tmp_path: Path) -> None:
    whole = expected(SHAPES, torch.float32)
    publisher = ShmPublisher(f"parts-{os.getpid()}", [(n, tuple(t.shape), torch.bfloat16) for n, t in whole.items()])
    try:
        parts = [{name: tensor} for name, tensor in whole.items()]
        assert publisher.publish(parts, 1) == publisher.publish(whole, 2) == weights_hash(expected(SHAPES, torch.bfloat16))
        with pytest.raises(ValueError, match=r"lacks 'w9'"):
            publisher.publish(parts[:-1], 3)
        with pytest.raises(ValueError, match=r"has the unknown tensor 'w0'"):
            publisher.publish([parts[0], parts[0]], 3)
        assert publisher.publish(parts, 3) == weights_hash(expected(SHAPES, torch.bfloat16))
    finally:
        publisher.close()


def test_experts_go_out_by_the_names_of_their_checkpoint(tmp_path: Path) -> None:
    model = create_model(MIXTRAL, seed=0)
    names = CheckpointNames(model)
    assert not names.is_identity
    gatherer = WeightGatherer(model, torch.bfloat16, 0, 1, names)
    sender = KeepingSender()
    result = stream_weights(gatherer.gather, gatherer.bucket_plan(20_000), sender, 1, want_hash=True)
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert any(".experts.1." in name for name in saved)
    assert sender.tensors.keys() == saved.keys()
    assert all(torch.equal(sender.tensors[name], tensor) for name, tensor in saved.items())
    assert result is not None and result.hash == weights_hash(saved)
