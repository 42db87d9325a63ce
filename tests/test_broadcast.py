"""Weights by broadcast to rollout servers, embedded ones and SGLang's, all of them real processes; and when one fails."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import time
from pathlib import Path

import pytest
import torch
from rollout_servers import TINY, make_model
from sglang_servers import SGLangServer
from trainer_setup import make_batch, make_config
from weight_servers import Weights, call, freeze, start_server

from areal.trainer.worker import TrainerHandle
from areal.weight_sync import broadcast
from areal.weight_sync.broadcast import BroadcastSender
from areal.weight_sync.calls import CallFailed, post
from areal.weight_sync.groups import UpdateGroup
from areal.weight_sync.stream import Target

pytestmark = pytest.mark.timeout(600)
BOTH_KINDS = pytest.mark.parametrize("kind", ["embedded", pytest.param("sglang", marks=pytest.mark.sglang)])
SMALL_BUCKETS = 8192
START_SECONDS = 240.0


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_model(folder)
    return folder


class Servers:
    """Servers that tests share as long as they live, since one of SGLang takes its time to start."""

    def __init__(self, model: Path, folder: Path) -> None:
        self._model, self._folder = model, folder
        self._live: dict[str, list] = {}
        self._started: list = []

    def __call__(self, *kinds: str) -> list:
        """One of each kind, ready: one that is there already, or a new one."""
        taken: list = []
        for kind in kinds:
            idle = [server for server in self._live.get(kind, []) if server.process.poll() is None and server not in taken]
            taken.append(idle[0] if idle else self._start(kind))
        return [server.wait(START_SECONDS) for server in taken]

    def _start(self, kind: str):
        server = start_server(kind, self._model, self._folder / f"server{len(self._started)}.log")
        self._started.append(server)
        self._live.setdefault(kind, []).append(server)
        return server

    def end(self) -> None:
        for server in self._started:
            server.process.kill()


@pytest.fixture(scope="module")
def servers(model: Path, tmp_path_factory):
    shared = Servers(model, tmp_path_factory.mktemp("servers"))
    yield shared
    shared.end()


@contextlib.contextmanager
def broadcast_sender(timeout: float = 60.0):
    sender = BroadcastSender("cpu", timeout=timeout)
    try:
        yield sender
    finally:
        sender.close()


@pytest.mark.parametrize("n_ranks", [1, 2])
def test_two_servers_get_what_the_ranks_have(model: Path, tmp_path: Path, servers, n_ranks: int) -> None:
    config = make_config(model, tmp_path, backend=f"fsdp:d{n_ranks}").new(weight_sync={"transport": "broadcast", "bucket_mb": 1})
    urls = [server.url for server in servers("embedded", "embedded")]

    async def scenario() -> None:
        trainer = await TrainerHandle.start(config, model, tmp_path)
        try:
            for version in (1, 2):
                await trainer.train_step(make_batch(world_size=n_ranks, seed=version))
                result = await trainer.send_weights(version, [Target(url) for url in urls], want_hash=True)
                assert [o.error for o in result.outcomes] == [None, None]
                assert result.hash is not None
                for url in urls:
                    stats = call(url, "/engine_stats")
                    assert (stats["version"], stats["hash"]) == (version, f"{result.hash:016x}")
            await trainer.save(tmp_path / "saved")
        finally:
            await trainer.close()

    asyncio.run(scenario())
    saved = Weights(tmp_path / "saved", SMALL_BUCKETS)
    for url in urls:
        saved.assert_held_by(url, 2)


@BOTH_KINDS
def test_a_server_generates_with_the_new_weights(model: Path, servers, kind: str) -> None:
    (server,) = servers(kind)
    weights = Weights(model, SMALL_BUCKETS)
    assert len(weights.buckets) > 4
    with broadcast_sender() as sender:
        for version in (1, 2):
            weights.change(seed=version)
            assert weights.send(sender, version, [server.url]).outcomes[0].error is None
            weights.assert_held_by(server.url, version)


@BOTH_KINDS
@pytest.mark.parametrize("how", ["killed", "stopped"])
def test_a_server_that_fails_takes_nobody_with_it(model: Path, servers, kind: str, how: str) -> None:
    victim, survivor = servers(kind, "embedded")
    weights = Weights(model, SMALL_BUCKETS)
    timeout = 60.0 if how == "killed" else 5.0
    with broadcast_sender(timeout) as sender:
        assert [o.error for o in weights.send(sender, 1, [victim.url, survivor.url]).outcomes] == [None, None]

        def fail(bucket) -> None:
            if bucket.index == 2:
                freeze(victim)  # so that what comes next is in the middle of a bucket
                if how == "killed":
                    threading.Timer(1.0, victim.process.kill).start()

        weights.before = fail
        weights.change(seed=2)
        start = time.monotonic()
        dead, alive = weights.send(sender, 2, [victim.url, survivor.url]).outcomes
        seconds = time.monotonic() - start
        assert dead.error is not None and dead.error.startswith(f"{victim.url} did not get weights 2 at bucket ")
        assert f" of {len(weights.buckets)} (from parameter 'model." in dead.error
        if how == "stopped":
            assert "weight_sync.timeout" in dead.error
            assert 4.0 < seconds < 25.0
        else:
            assert "broke" in dead.error
            assert seconds < 20.0  # not the timeout
        assert alive.error is None
        weights.assert_held_by(survivor.url, 2)

        weights.before = lambda bucket: None
        victim.process.kill()
        urls = [survivor.url]
        if how == "killed":
            urls.append(next(server.url for server in servers("embedded", kind) if server is not survivor))
        weights.change(seed=3)
        sender.timeout = 60.0
        assert [o.error for o in weights.send(sender, 3, urls).outcomes] == [None] * len(urls)
        for url in urls:
            weights.assert_held_by(url, 3)


@pytest.mark.sglang
@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="two ranks want two cores")
def test_both_ranks_of_a_server_get_their_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_CPU_OMP_THREADS_BIND", "0|1")  # SGLang wants a NUMA node a rank otherwise
    for key, heads in (("num_attention_heads", 4), ("num_key_value_heads", 2)):
        monkeypatch.setitem(TINY, key, heads)
    make_model(tmp_path)
    server = SGLangServer(tmp_path, tmp_path / "log", n_ranks=2)
    try:
        server.wait(START_SECONDS)
        weights = Weights(tmp_path, SMALL_BUCKETS)
        weights.change(seed=1)
        with broadcast_sender() as sender:
            assert weights.send(sender, 1, [server.url], n_ranks=2).outcomes[0].error is None
        weights.assert_held_by(server.url, 1)
    finally:
        server.process.kill()


def test_what_a_server_refuses_is_told_in_its_words(model: Path, servers) -> None:
    victim, survivor = servers("embedded", "embedded")
    weights = Weights(model, SMALL_BUCKETS)
    with broadcast_sender() as sender:
        assert weights.send(sender, 1, [victim.url, survivor.url]).outcomes[0].error is None
        start = time.monotonic()
        (outcome,) = weights.send(sender, 2, ["http://127.0.0.1:9"]).outcomes
        assert outcome.error is not None
        assert "127.0.0.1:9 did not get weights 2 while it was being connected: the connection broke" in outcome.error
        assert time.monotonic() - start < 10


def test_an_update_waits_for_requests_that_run(model: Path, servers) -> None:
    (server,) = servers("embedded")
    weights = Weights(model, SMALL_BUCKETS)
    old = weights.greedy(400)
    with broadcast_sender() as sender:
        weights.send(sender, 1, [server.url])
        params = {"temperature": 0, "max_new_tokens": 400, "ignore_eos": True}
        body = {"input_ids": [5, 6, 7, 8, 9, 10], "return_logprob": True, "sampling_params": params}
        answers: list[dict] = []
        asking = threading.Thread(target=lambda: answers.append(call(server.url, "/generate", body)))
        asking.start()
        while not call(server.url, "/engine_stats")["running"]:
            assert asking.is_alive()
        weights.change(seed=5)
        assert weights.send(sender, 2, [server.url]).outcomes[0].error is None
        asking.join(60)
        assert [row[1] for row in answers[0]["meta_info"]["output_token_logprobs"]] == old[0]
        assert set(answers[0]["meta_info"]["output_token_versions"]) == {1}
        weights.assert_held_by(server.url, 2)


def test_groups_end_with_the_servers_consent(model: Path, servers) -> None:
    (server,) = servers("embedded")
    with pytest.raises(CallFailed, match="the process group 'nobody' does not exist"):
        post(server.url, "/destroy_weights_update_group", {"group_name": "nobody"}, 10)
    with pytest.raises(CallFailed, match="was not joined"):
        post(server.url, "/update_weights_from_distributed", {"group_name": "nobody", "names": []}, 10)
    with pytest.raises(CallFailed, match="give master_address"):
        post(server.url, "/init_weights_update_group", {}, 10)


def test_a_first_broadcast_that_waits_for_the_server_does_not_keep_it_from_being_called(model: Path, servers, monkeypatch) -> None:
    """As with NCCL, whose communicator is made by the first broadcast, of both sides together."""
    was_called = threading.Event()

    class ConnectsLate(UpdateGroup):
        def broadcast(self, tensors, timeout):
            if not was_called.wait(20):
                raise RuntimeError("the server was never told to receive")
            return super().broadcast(tensors, timeout)

    def noted_post(url, path, body, timeout):
        if path == "/update_weights_from_distributed":
            was_called.set()
        return post(url, path, body, timeout)

    monkeypatch.setattr(broadcast, "UpdateGroup", ConnectsLate)
    monkeypatch.setattr(broadcast, "post", noted_post)
    (server,) = servers("embedded")
    weights = Weights(model, SMALL_BUCKETS)
    with broadcast_sender() as sender:
        assert [o.error for o in weights.send(sender, 1, [server.url]).outcomes] == [None]
    weights.assert_held_by(server.url, 1)


def test_a_group_of_nccl_does_not_end_the_process_with_its_server(monkeypatch) -> None:
    class FakeNCCL:
        class Options:
            _timeout = None

        def __init__(self, *_: object) -> None:
            self.errors = os.environ.get("TORCH_NCCL_ASYNC_ERROR_HANDLING")

    monkeypatch.setattr(torch.distributed, "ProcessGroupNCCL", FakeNCCL, raising=False)
    monkeypatch.delenv("TORCH_NCCL_ASYNC_ERROR_HANDLING", raising=False)
    store = torch.distributed.HashStore()
    group = UpdateGroup(store, "name", 0, 2, torch.device("cuda", 0), "127.0.0.1", 1.0)
    assert group._backend.errors == "2", "CleanUpOnly"
    assert "TORCH_NCCL_ASYNC_ERROR_HANDLING" not in os.environ, "the trainer's own groups keep theirs"
