"""Weights to a real SGLang server by files and by reference."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from areal.weight_sync.disk import DiskSender, version_folder
from areal.weight_sync.tensor import TensorSender
from tests.rollout_servers import make_model
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
