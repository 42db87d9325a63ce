"""Weights by reference: the sender, what goes over the wire, and embedded engines that are killed and stopped."""

from __future__ import annotations

import base64
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import time
import urllib.error
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from areal.ops.weights_hash import weights_hash
from areal.weight_sync.stream import BucketPlan, TensorSpec
from areal.weight_sync.tensor import PATH, TensorSender, deserialize
from tests.rollout_servers import Server, make_model
from tests.weight_transports import assert_serves, get, plan, post, send, weights_of


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


@pytest.fixture
def sender() -> Iterator[TensorSender]:
    sender = TensorSender("cpu", timeout=60)
    yield sender
    sender.close()


@pytest.fixture
def start(model: Path, tmp_path: Path) -> Iterator[Callable[[], Server]]:
    servers: list[Server] = []

    def start() -> Server:
        servers.append(Server(model, tmp_path / f"server{len(servers)}.log", f"rollout {len(servers)}"))
        return servers[-1]

    yield start
    for server in servers:
        server.process.kill()


def test_updates_of_an_embedded_engine(server: Server, model: Path, sender: TensorSender) -> None:
    for version, bucket_bytes in ((1, 16384), (2, 1), (3, 1 << 20), (4, 16384)):
        weights = weights_of(model, seed=version)
        (outcome,) = send(sender, weights, version, [server.url], bucket_bytes)
        assert outcome.error is None
        assert get(server.url, "/engine_stats")["hash"] == f"{weights_hash(weights):016x}"
        assert_serves(server.url, model, weights, version)


def test_a_bucket_waits_for_requests_unless_paused(server: Server, model: Path, sender: TensorSender) -> None:
    weights = weights_of(model, seed=31)
    post(server.url, "/pause_generation", {"mode": "retract"})
    assert send(sender, weights, 31, [server.url])[0].error is None
    post(server.url, "/continue_generation", {})
    assert_serves(server.url, model, weights, 31)


def test_what_does_not_fit_is_the_servers_error(server: Server, model: Path, sender: TensorSender) -> None:
    weights = weights_of(model, seed=41)
    name = "model.layers.1.mlp.up_proj.weight"
    (outcome,) = send(sender, {**weights, name: torch.zeros(3, 4)}, 41, [server.url])
    assert outcome.error is not None
    for part in (server.url, "weights 41", "bucket", name, "(3, 4)"):
        assert part in outcome.error
    assert send(sender, weights, 42, [server.url])[0].error is None
    assert_serves(server.url, model, weights, 42)


@pytest.mark.timeout(240)
def test_a_server_that_dies_takes_nobody_with_it(start: Callable[[], Server], server: Server, model: Path, sender: TensorSender) -> None:
    doomed = start().wait()
    weights = weights_of(model, seed=51)
    buckets = plan(weights, 16384)

    def kill(bucket: BucketPlan) -> None:
        if bucket.index == 2:
            doomed.process.kill()

    outcomes = send(sender, weights, 51, [doomed.url, server.url], before=kill)
    error = outcomes[0].error
    found = error and re.match(rf"{doomed.url} did not get weights 51 at bucket (\d) of 6 \(from parameter '(.*)' on\): ", error)
    assert found, error
    assert found[1] in "23"  # the second one may still be on its way
    assert found[2] == buckets[int(found[1]) - 1].tensors[0].name
    assert outcomes[1].error is None
    assert_serves(server.url, model, weights, 51)
    again = start().wait()
    weights = weights_of(model, seed=52)
    assert [outcome.error for outcome in send(sender, weights, 52, [again.url, server.url])] == [None, None]
    for url in (again.url, server.url):
        assert_serves(url, model, weights, 52)


def test_a_server_that_hangs_costs_its_timeout(start: Callable[[], Server], server: Server, model: Path) -> None:
    hanging = start().wait()
    sender = TensorSender("cpu", timeout=2)
    weights = weights_of(model, seed=61)
    os.kill(hanging.process.pid, signal.SIGSTOP)
    begin = time.monotonic()
    outcomes = send(sender, weights, 61, [hanging.url, server.url])
    assert 1.9 < time.monotonic() - begin < 30
    error = outcomes[0].error
    assert error is not None and hanging.url in error and "weight_sync.timeout" in error and "bucket 1 of" in error
    assert outcomes[1].error is None
    assert_serves(server.url, model, weights, 61)
    sender.close()


def test_a_server_elsewhere_is_refused(sender: TensorSender, model: Path) -> None:
    (outcome,) = send(sender, weights_of(model, seed=1), 1, ["http://192.0.2.1:30000"])
    assert outcome.error is not None and "another machine" in outcome.error and "weight_sync.transport" in outcome.error


def test_by_every_address_of_this_machine(server: Server, model: Path, sender: TensorSender) -> None:
    url = server.url.replace("127.0.0.1", "localhost")
    assert send(sender, weights_of(model, seed=1), 1, [url])[0].error is None


def test_a_view_that_cannot_be_is_refused(sender: TensorSender) -> None:
    bucket = BucketPlan(0, (TensorSpec("a", (3,), torch.bfloat16, 0), TensorSpec("b", (2,), torch.float32, 6)))
    with pytest.raises(ValueError, match=r"bucket 0: 'b' \(torch.float32\) begins at byte 6"):
        sender.begin(1, [bucket], [])


def test_an_update_that_was_given_up_leaves_room_for_the_next(server: Server, model: Path, sender: TensorSender) -> None:
    weights = weights_of(model, seed=71)
    buckets = plan(weights, 16384)
    sender.begin(70, buckets, [])
    sender.buffer(buckets[0]), sender.buffer(buckets[1])  # and then the trainer failed
    assert send(sender, weights, 71, [server.url])[0].error is None
    assert_serves(server.url, model, weights, 71)


@pytest.mark.gpu
def test_on_one_gpu(model: Path, tmp_path: Path) -> None:
    server = Server(model, tmp_path / "server.log", "rollout 0", "--device", "cuda:0")
    sender = TensorSender("cuda:0", timeout=60)
    try:
        server.wait()
        for version in (1, 2):
            weights = weights_of(model, seed=version)
            assert send(sender, weights, version, [server.url])[0].error is None
            assert get(server.url, "/engine_stats")["hash"] == f"{weights_hash(weights):016x}"
    finally:
        sender.close()
        server.process.kill()


# -- bodies ----------------------------------------------------------------------------------------------------------------------


class _Call:
    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self._function, self._arguments = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self._function, self._arguments


@pytest.mark.parametrize(
    "content",
    [
        _Call(os.system, "true"),
        _Call(eval, "1"),
        _Call(getattr, "text", "format"),
        _Call(torch.from_file, "/etc/passwd", False, 10),
        {"flattened_tensor": [1], "metadata": []},
        [1, 2],
    ],
    ids=["system", "eval", "getattr", "from_file", "no tensor", "a list"],  # the same in every process
)
def test_bodies_make_nothing_but_views(server: Server, content: Any) -> None:
    text = base64.b64encode(pickle.dumps(content)).decode()
    with pytest.raises(ValueError, match="no bucket of shared memory"):
        deserialize(text)
    with pytest.raises(urllib.error.HTTPError) as caught:
        post(server.url, PATH, {"serialized_named_tensors": [text], "load_format": "flattened_bucket"})
    assert caught.value.code == 400 and "no bucket of shared memory" in json.loads(caught.value.read())["message"]


def test_memory_that_is_no_buckets_is_not_opened() -> None:
    descriptor = os.memfd_create("other")
    os.ftruncate(descriptor, 4096)
    for path in (f"/proc/{os.getpid()}/fd/{descriptor}", "/etc/passwd", "/proc/self/mem"):
        from functools import partial

        opened = _Call(partial(torch.from_file, shared=False, size=10, dtype=torch.uint8), path)
        text = base64.b64encode(pickle.dumps({"flattened_tensor": opened, "metadata": []})).decode()
        with pytest.raises(ValueError, match="no bucket of shared memory"):
            deserialize(text)
    os.close(descriptor)


# -- memory ----------------------------------------------------------------------------------------------------------------------

_HOLDER = """
import sys, time, torch
sys.path[:0] = sys.argv[1].split(":")
from areal.weight_sync.tensor import TensorSender
from areal.weight_sync.stream import plan_buckets
sender = TensorSender("cpu", timeout=60)
(bucket,) = plan_buckets([("a", (1 << 20,), torch.uint8)], 1 << 20)
sender.begin(1, [bucket], [])
sender.buffer(bucket).fill_(3)
print("ready", flush=True)
time.sleep(600)
"""


def test_nothing_is_left_when_the_sender_is_killed() -> None:
    process = subprocess.Popen([sys.executable, "-c", _HOLDER, ":".join(sys.path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    assert sum("memfd:areal-bucket" in line for line in Path(f"/proc/{process.pid}/maps").read_text().splitlines()) == 2
    descriptors = [os.readlink(fd) for fd in Path(f"/proc/{process.pid}/fd").iterdir()]
    assert not [path for path in descriptors if path.startswith("/dev/shm")]  # a name that would outlive it
    process.kill()
    process.wait()
    assert not [name for name in os.listdir("/dev/shm") if str(process.pid) in name]


def test_close_gives_the_memory_back(server: Server, model: Path) -> None:
    def mapped(pid: int | str) -> int:
        return sum("memfd:areal-bucket" in line for line in Path(f"/proc/{pid}/maps").read_text().splitlines())

    sender = TensorSender("cpu", timeout=60)
    weights = weights_of(model, seed=1)
    send(sender, weights, 1, [server.url])
    assert mapped("self") == 2
    sender.close()
    assert mapped("self") == 0
    assert mapped(server.process.pid) == 0
    assert not [fd for fd in os.listdir("/proc/self/fd") if "areal-bucket" in _link(fd)]


def _link(fd: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except FileNotFoundError:
        return ""
