"""Weights to a real SGLang server by files and by reference."""

from __future__ import annotations

import os
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from areal.weight_sync.disk import DiskSender, version_folder
from areal.weight_sync.stream import BucketPlan
from areal.weight_sync.tensor import TensorSender
from tests.rollout_servers import Server, make_model
from tests.sglang_servers import SGLangServer
from tests.weight_transports import assert_serves, post, send, weights_of

pytestmark = [pytest.mark.sglang, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_model(folder)
    return folder


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SGLangServer]:
    server = SGLangServer(model, tmp_path_factory.mktemp("log") / "server.log")
    yield server.wait()
    server.process.kill()


def test_by_reference(server: SGLangServer, model: Path) -> None:
    sender = TensorSender("cpu", timeout=60)
    for version in (1, 2):  # the second time with buffers that the server has mapped before
        weights = weights_of(model, seed=version)
        (outcome,) = send(sender, weights, version, [server.url])
        assert outcome.error is None
        assert_serves(server.url, model, weights, version)
    sender.close()
    assert not [name for name in os.listdir("/dev/shm") if str(os.getpid()) in name]


def test_by_files(server: SGLangServer, model: Path, tmp_path: Path) -> None:
    sender = DiskSender(tmp_path, model)
    for version in (3, 4):
        weights = weights_of(model, seed=version)
        (outcome,) = send(sender, weights, version)
        assert outcome.error is None
        body = {"model_path": str(version_folder(tmp_path, version)), "weight_version": str(version), "flush_cache": True}
        assert post(server.url, "/update_weights_from_disk", body)["success"]
        assert_serves(server.url, model, weights, version)
    sender.close()


def test_a_path_that_is_wrong_is_refused(server: SGLangServer, model: Path, tmp_path: Path) -> None:
    weights = weights_of(model, seed=5)
    sender = TensorSender("cpu", timeout=60)
    assert send(sender, weights, 5, [server.url])[0].error is None
    with pytest.raises(urllib.error.HTTPError) as caught:
        post(server.url, "/update_weights_from_disk", {"model_path": str(tmp_path / "v000009"), "weight_version": "9"})
    assert caught.value.code == 400
    assert_serves(server.url, model, weights, 5)
    sender.close()


def test_in_the_middle_of_a_generation(server: SGLangServer, model: Path) -> None:
    """Requests wait inside of the server: it must not flush its cache, of which it dies; what is sampled afterwards is of the new weights."""
    weights = weights_of(model, seed=6)
    sender = TensorSender("cpu", timeout=60, flush_cache=False)
    sampling = {"temperature": 0.0, "max_new_tokens": 1000, "ignore_eos": True}
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(post, server.url, "/generate", {"input_ids": [9, 8, 7], "sampling_params": sampling}, 120)
        time.sleep(0.5)
        post(server.url, "/pause_generation", {"mode": "retract"})
        assert send(sender, weights, 6, [server.url])[0].error is None
        assert not answer.done()
        post(server.url, "/continue_generation", {})
        assert len(answer.result(120)["output_ids"]) == 1000
    # The prompts' old keys and values; the answer came a step before the scheduler is idle, as this must find it.
    urllib.request.urlopen(f"{server.url}/flush_cache?timeout=30", data=b"", timeout=60).close()
    assert_serves(server.url, model, weights, 6)
    sender.close()


def test_a_server_that_is_killed_takes_nobody_with_it(server: SGLangServer, model: Path, tmp_path: Path) -> None:
    """The last test of this file: it ends the server."""
    other = Server(model, tmp_path / "other.log").wait()
    sender = TensorSender("cpu", timeout=60)
    weights = weights_of(model, seed=7)

    def kill(bucket: BucketPlan) -> None:
        if bucket.index == 2:
            server.process.kill()

    try:
        outcomes = send(sender, weights, 7, [server.url, other.url], before=kill)
        error = outcomes[0].error
        assert (
            error is not None and server.url in error and "did not get weights 7 at bucket" in error and "(from parameter 'model." in error
        )
        assert outcomes[1].error is None
        assert_serves(other.url, model, weights, 7)
    finally:
        other.process.kill()
        sender.close()
