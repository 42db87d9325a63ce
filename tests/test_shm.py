"""Weights through shared memory, with real processes that hammer, stop and die."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import time
import uuid
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from areal.ops.weights_hash import weights_hash
from areal.weight_sync.shm import PublisherGone, ShmPublisher, ShmReader, WeightSyncError, unlink_stale

SPAWN = multiprocessing.get_context("spawn")
WORDS = 1_000_000  # of the hammered tensor: 4 MB, so that a copy takes long enough to be overtaken
SHM = Path("/dev/shm")


@pytest.fixture
def name() -> Iterator[str]:
    name = f"test-{uuid.uuid4().hex}"
    yield name
    unlink_stale(name)
    assert not (SHM / f"areal-{name}").exists(), "a segment was left behind"


def some_weights() -> dict[str, Tensor]:
    return {
        "layers.0.weight": torch.randn(65, 33),
        "layers.0.bias": torch.randn(33).bfloat16(),
        "scale": torch.tensor(0.5),
        "nothing": torch.empty(0, 7),
        "transposed": torch.randn(12, 9).t(),
    }


def manifest_of(weights: dict[str, Tensor]) -> list[tuple[str, tuple[int, ...], torch.dtype]]:
    return [(key, tuple(w.shape), w.dtype) for key, w in weights.items()]


def zeros_like(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: torch.zeros_like(w) for key, w in weights.items()}


def start(target: Any, *arguments: Any, count: int = 1) -> list[tuple[Any, Connection]]:
    """``count`` processes that run ``target(pipe, *arguments)``, all of them ready."""
    started = []
    for _ in range(count):
        here, there = SPAWN.Pipe()
        process = SPAWN.Process(target=target, args=(there, *arguments), daemon=True)
        process.start()
        there.close()
        started.append((process, here))
    for _, here in started:
        assert here.poll(60), f"{target.__name__} did not start within 60 s"
        assert here.recv() == "ready"
    return started


def hammered(version: int) -> dict[str, Tensor]:
    """Weights that say their version at both ends of the buffer."""
    return {"a": torch.full((WORDS,), version, dtype=torch.int32), "b": torch.full((3,), version)}


def publish_without_pause(pipe: Connection, name: str) -> None:
    torch.set_num_threads(1)
    with ShmPublisher(name, manifest_of(hammered(0))) as publisher:
        publisher.publish(hammered(0), 0)
        pipe.send("ready")
        version = 0
        while not pipe.poll():
            version += 1
            publisher.publish(hammered(version), version)


def read_without_pause(pipe: Connection, name: str) -> None:
    torch.set_num_threads(1)
    params = hammered(-1)
    reads, last = 0, -1
    with ShmReader(name) as reader:
        pipe.send("ready")
        while not pipe.poll():
            version, digest = reader.read_into(params, max(last, 0), timeout=30)
            assert version >= last, f"went back from {last} to {version}"
            assert all(bool((p == version).all()) for p in params.values()), f"version {version} is torn"
            assert weights_hash(params) == digest
            reads, last = reads + 1, version
        pipe.send((reads, last, reader.torn_reads))


@pytest.mark.parametrize("backend", ["", "torch"])
def test_round_trip_with_equal_hashes(name: str, backend: str, areal_ops: Callable[[str], None]) -> None:
    areal_ops(backend)
    weights = some_weights()
    with ShmPublisher(name, manifest_of(weights)) as publisher, ShmReader(name) as reader:
        assert reader.latest_version() == -1
        assert reader.manifest == manifest_of(weights)
        for version in (0, 1, 2, 2, 7):
            weights["scale"] += 1
            digest = publisher.publish(weights, version)
            params = zeros_like(weights)
            assert reader.read_into(params, version, timeout=1) == (version, digest)
            assert all(torch.equal(params[key], weights[key]) for key in weights)
            assert digest == weights_hash(weights) == weights_hash(params)
        assert reader.latest_version() == 7
        with pytest.raises(ValueError, match="has published version 7; 6 would go back"):
            publisher.publish(weights, 6)


def test_publishing_casts_to_the_manifest(name: str) -> None:
    master = {"w": torch.randn(100)}
    with ShmPublisher(name, [("w", (100,), torch.bfloat16)]) as publisher, ShmReader(name) as reader:
        digest = publisher.publish(master, 1)
        params = {"w": torch.zeros(100, dtype=torch.bfloat16)}
        assert reader.read_into(params, 1, timeout=1) == (1, digest)
        assert torch.equal(params["w"], master["w"].bfloat16()) and weights_hash(params) == digest


def test_no_read_is_torn_while_the_publisher_hammers(name: str) -> None:
    with ShmPublisher(name, manifest_of(hammered(0))) as publisher:
        publisher.publish(hammered(0), 0)
        readers = start(read_without_pause, name, count=2)
        version, end = 0, time.monotonic() + 1.5
        while time.monotonic() < end:
            version += 1
            publisher.publish(hammered(version), version)
        for process, pipe in readers:
            pipe.send("stop")
            assert pipe.poll(40), "a reader never ended"
            reads, last, _ = pipe.recv()  # EOFError: one of its assertions failed
            assert reads > 1 and last > 0
            process.join(10)


def test_a_copy_overtaken_by_the_publisher_is_thrown_away(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from areal.weight_sync import shm

    old, new = {"w": torch.full((1000,), 1.0)}, {"w": torch.full((1000,), 2.0)}
    with ShmPublisher(name, manifest_of(old)) as publisher, ShmReader(name) as reader:
        publisher.publish(old, 1)
        real = shm.copy_and_hash

        def overtake(copies: Any) -> int:
            """Between the reader's look at the header and its copy, the publisher comes round to the same buffer."""
            monkeypatch.setattr(shm, "copy_and_hash", real)
            publisher.publish(old, 2)
            publisher.publish(new, 3)
            return real(copies)

        monkeypatch.setattr(shm, "copy_and_hash", overtake)
        params = zeros_like(old)
        version, digest = reader.read_into(params, 1, timeout=5)
        assert (version, reader.torn_reads) == (3, 1)
        assert torch.equal(params["w"], new["w"]) and digest == weights_hash(new)


def test_damaged_bytes_are_never_used(name: str) -> None:
    weights = some_weights()
    with ShmPublisher(name, manifest_of(weights)) as publisher, ShmReader(name) as reader:
        publisher.publish(weights, 1)
        publisher._buffers[0][5] ^= 1
        params = zeros_like(weights)
        with pytest.raises(WeightSyncError, match=r"version 1 .* does not have its hash"):
            reader.read_into(params, 1, timeout=5)
        assert all(not p.any() for p in params.values())


def test_stopped_and_killed_readers_do_not_hold_up_the_publisher(name: str) -> None:
    with ShmPublisher(name, manifest_of(hammered(0))) as publisher:
        publisher.publish(hammered(0), 0)
        (stopped, to_stopped), (killed, _) = start(read_without_pause, name, count=2)
        for version in range(1, 51):
            publisher.publish(hammered(version), version)
        os.kill(stopped.pid, signal.SIGSTOP)
        os.kill(killed.pid, signal.SIGKILL)
        for version in range(51, 101):
            begin = time.monotonic()
            publisher.publish(hammered(version), version)
            assert time.monotonic() - begin < 5, "the publisher waited for a reader"
        os.kill(stopped.pid, signal.SIGCONT)
        to_stopped.send("stop")
        assert to_stopped.poll(40)
        assert to_stopped.recv()[0] > 0
        params = hammered(-1)
        with ShmReader(name) as reader:
            assert reader.read_into(params, 100, timeout=5)[0] == 100
        for process in (stopped, killed):
            process.join(10)
            assert process.exitcode is not None


def test_a_killed_publisher_is_noticed_and_its_segment_can_be_taken_over(name: str) -> None:
    ((process, _),) = start(publish_without_pause, name)
    with ShmReader(name) as reader:
        assert unlink_stale(name) == [], "a live publisher's segment was removed"
        with pytest.raises(FileExistsError, match="belongs to a live publisher"):
            ShmPublisher(name, [("w", (1,), torch.float32)])
        reader.fetch(1, timeout=30)
        os.kill(process.pid, signal.SIGKILL)
        process.join(10)
        params = hammered(-1)
        version, digest = reader.read_into(params, 0, timeout=5)  # the last complete version survives
        assert bool((params["a"] == version).all()) and weights_hash(params) == digest
        start_time = time.monotonic()
        with pytest.raises(
            PublisherGone,
            match=rf"'{name}' waited on publisher {process.pid} for version 1000000000 \(newest is {version}\), which has ended",
        ):
            reader.fetch(10**9, timeout=60)
        assert time.monotonic() - start_time < 5
    with ShmPublisher(name, [("w", (1,), torch.float32)]) as publisher:
        assert (SHM / f"areal-{name}").exists()
        publisher.publish({"w": torch.ones(1)}, 0)
    assert not (SHM / f"areal-{name}").exists()


def test_stale_segments_are_swept_by_the_next_publisher(name: str) -> None:
    ((process, _),) = start(publish_without_pause, name)
    os.kill(process.pid, signal.SIGKILL)
    process.join(10)
    assert (SHM / f"areal-{name}").exists(), "nothing to sweep"
    with ShmPublisher(f"{name}-next", [("w", (1,), torch.float32)]):
        assert not (SHM / f"areal-{name}").exists()


def test_a_forked_child_does_not_remove_the_segment(name: str) -> None:
    with ShmPublisher(name, [("w", (1,), torch.float32)]) as publisher:
        pid = os.fork()
        if pid == 0:
            publisher.close()
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0
        publisher.publish({"w": torch.ones(1)}, 1)
        with ShmReader(name) as reader:
            assert reader.latest_version() == 1


def test_waiting_ends_with_who_waited_on_whom(name: str) -> None:
    with pytest.raises(FileNotFoundError, match="its publisher has not started, or has ended"):
        ShmReader(name)
    with ShmPublisher(name, [("w", (1,), torch.float32)]) as publisher, ShmReader(name) as reader:
        publisher.publish({"w": torch.ones(1)}, 3)
        with pytest.raises(TimeoutError, match=rf"waited on publisher {os.getpid()} for version 4 \(newest is 3\) for 0.2 s"):
            reader.fetch(4, timeout=0.2)


def test_mismatched_tensors_are_named_and_nothing_changes(name: str) -> None:
    with ShmPublisher(name, [("a", (2,), torch.float32), ("b", (2,), torch.float32)]) as publisher, ShmReader(name) as reader:
        good = {"a": torch.ones(2), "b": torch.ones(2)}
        publisher.publish(good, 1)
        with pytest.raises(ValueError, match=r"lacks 'a' and 1 more"):
            publisher.publish({}, 2)
        with pytest.raises(ValueError, match="has the unknown tensor 'c'"):
            publisher.publish({**good, "c": torch.ones(2)}, 2)
        with pytest.raises(ValueError, match=r"'b' is torch.float32 \[3\], the manifest says torch.float32 \[2\]"):
            publisher.publish({"a": torch.ones(2), "b": torch.ones(3)}, 2)
        params = {"a": torch.zeros(2), "b": torch.zeros(2, dtype=torch.bfloat16)}
        with pytest.raises(ValueError, match=r"'b' is torch.bfloat16 \[2\], the manifest says torch.float32 \[2\]"):
            reader.read_into(params, 1, timeout=1)
        assert not params["a"].any() and reader.latest_version() == 1
    with pytest.raises(ValueError, match="is closed"):
        publisher.publish(good, 2)
    with pytest.raises(ValueError, match="names a tensor twice"):
        ShmPublisher(name, [("a", (2,), torch.float32), ("a", (2,), torch.float32)])
    with pytest.raises(ValueError, match="cannot name a shared memory segment"):
        ShmPublisher("../escape", [("a", (2,), torch.float32)])


def test_a_full_shared_memory_is_an_error_before_anything_is_written(name: str) -> None:
    with pytest.raises(OSError, match=r"/dev/shm has \d+ MiB free, two copies of the weights need \d+ MiB") as caught:
        ShmPublisher(name, [("w", (1 << 44,), torch.float32)])
    assert caught.value.errno in (errno.ENOSPC, errno.EFBIG, errno.ENOMEM)
    assert not (SHM / f"areal-{name}").exists()
