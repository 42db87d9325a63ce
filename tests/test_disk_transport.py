"""Weights through files: the sender, and the embedded engine that reads them."""

from __future__ import annotations

import json
import os
import resource
import shutil
import time
import urllib.error
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from areal.ops.weights_hash import weights_hash
from areal.weight_sync.checkpoint_reader import CheckpointReader
from areal.weight_sync.disk import INDEX, DiskSender, remove_old, version_folder
from areal.weight_sync.stream import BucketPlan
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


def odd_weights() -> dict[str, Tensor]:
    return {
        "matrix": torch.randn(65, 33),
        "rounded": torch.randn(130).bfloat16(),
        "scalar": torch.tensor(0.5),
        "nothing": torch.empty(0, 7),
        "whole": torch.arange(7),
        "flags": torch.tensor([True, False, True]),
    }


def update(url: str, folder: Path, version: int | None) -> dict[str, object]:
    body: dict[str, object] = {"model_path": str(folder)}
    return post(url, "/update_weights_from_disk", body if version is None else body | {"weight_version": str(version)})


def refusal(url: str, folder: Path) -> str:
    with pytest.raises(urllib.error.HTTPError) as caught:
        update(url, folder, 99)
    assert caught.value.code == 400
    return json.loads(caught.value.read())["message"]


@pytest.mark.parametrize("bucket_bytes", [1, 300, 1 << 20])
def test_the_files_are_safetensors(tmp_path: Path, model: Path, bucket_bytes: int) -> None:
    weights = odd_weights()
    sender = DiskSender(tmp_path, model)
    (outcome,) = send(sender, weights, 7, bucket_bytes=bucket_bytes)
    folder = version_folder(tmp_path, 7)
    assert outcome.error is None and outcome.url == str(folder)
    index = json.loads((folder / INDEX).read_text())
    assert index["metadata"]["version"] == 7 and index["metadata"]["hash"] == f"{weights_hash(weights):016x}"
    read: dict[str, Tensor] = {}
    for file in set(index["weight_map"].values()):
        read |= load_file(folder / file)
    assert read.keys() == weights.keys()
    for name, tensor in weights.items():
        assert read[name].dtype == tensor.dtype and torch.equal(read[name], tensor)
    assert len(set(index["weight_map"].values())) == len(plan(weights, bucket_bytes))


def test_transformers_loads_a_version(tmp_path: Path, model: Path) -> None:
    weights = weights_of(model, seed=3)
    send(DiskSender(tmp_path, model), weights, 3)
    folder = version_folder(tmp_path, 3)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, weights[name]), name
    assert AutoTokenizer.from_pretrained(folder).encode("12+34=") == AutoTokenizer.from_pretrained(model).encode("12+34=")


def test_a_version_has_its_name_when_it_is_whole(tmp_path: Path, model: Path) -> None:
    seen: list[list[str]] = []
    sender = DiskSender(tmp_path, model)
    send(sender, weights_of(model, seed=1), 1, before=lambda bucket: seen.append(os.listdir(tmp_path)))
    assert seen[-1] == ["v000001.partial"] and all(names in ([], ["v000001.partial"]) for names in seen)
    assert os.listdir(tmp_path) == ["v000001"]


def test_a_version_is_written_again(tmp_path: Path, model: Path) -> None:
    sender = DiskSender(tmp_path, model)
    send(sender, weights_of(model, seed=1), 1, bucket_bytes=1 << 20)
    again = weights_of(model, seed=2)
    (outcome,) = send(sender, again, 1)
    assert outcome.error is None and os.listdir(tmp_path) == ["v000001"]
    reader = CheckpointReader(version_folder(tmp_path, 1))
    parameters = {name: torch.zeros_like(w) for name, w in again.items()}
    reader.read_into(parameters)
    assert weights_hash(parameters) == weights_hash(again)


def test_what_dead_runs_left_is_removed(tmp_path: Path, model: Path) -> None:
    for name in ("v000003.partial", "v000002", "v000001.removed", "results"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("x")
    DiskSender(tmp_path, model)
    assert os.listdir(tmp_path) == ["results"]


def test_old_versions_are_removed(tmp_path: Path, model: Path) -> None:
    sender = DiskSender(tmp_path, model)
    for version in (1, 2, 3):
        send(sender, odd_weights(), version)
    with CheckpointReader(version_folder(tmp_path, 1)) as late:
        assert remove_old(tmp_path, keep_from=3) == [1, 2]
        assert os.listdir(tmp_path) == ["v000003"]
        late.read_into({"matrix": (target := torch.zeros(65, 33))})  # who has it open reads on
    assert target.abs().sum() > 0


def test_a_file_that_is_cut_while_it_is_read_is_told(tmp_path: Path, model: Path) -> None:
    weights = odd_weights()
    send(DiskSender(tmp_path, model), weights, 1, bucket_bytes=1 << 20)
    with CheckpointReader(version_folder(tmp_path, 1)) as reader:
        cut = reader.tensors["rounded"].offset + 10
        os.truncate(reader.tensors["rounded"].path, cut)
        with pytest.raises(OSError, match=rf"'rounded' could not be read, and parameters before it are new already .* ends at byte {cut}"):
            reader.read_into({name: torch.zeros_like(w) for name, w in weights.items()})


def test_an_update_that_was_given_up_leaves_room_for_the_next(tmp_path: Path, model: Path) -> None:
    weights = odd_weights()
    sender = DiskSender(tmp_path, model)
    buckets = plan(weights, 300)
    sender.begin(1, buckets, [])
    sender.buffer(buckets[0])  # and then the trainer failed
    (outcome,) = send(sender, weights, 2, bucket_bytes=300)
    assert outcome.error is None
    assert version_folder(tmp_path, 2).exists() and not version_folder(tmp_path, 1).exists()


def test_a_disk_that_is_full_is_told(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sender = DiskSender(tmp_path, model)
    real = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: real(path)._replace(free=10))
    (outcome,) = send(sender, odd_weights(), 1)
    assert (
        outcome.error is not None
        and "version 1" in outcome.error
        and "MiB are free" in outcome.error
        and "weight_sync.folder" in outcome.error
    )
    assert os.listdir(tmp_path) == []
    monkeypatch.undo()
    assert send(sender, odd_weights(), 1)[0].error is None


def test_a_write_that_fails_names_the_bucket(tmp_path: Path, model: Path) -> None:
    sender = DiskSender(tmp_path, model)
    weights = {"small": torch.ones(10), "large": torch.ones(5000)}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10000, hard))
    try:
        (outcome,) = send(sender, weights, 1, bucket_bytes=300)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert outcome.error is not None and "at bucket 2 of 2 (from parameter 'large' on): File too large" in outcome.error
    assert os.listdir(tmp_path) == []


def test_a_file_system_that_hangs_costs_the_timeout(tmp_path: Path, model: Path) -> None:
    """A pipe that nobody reads: opening it hangs as a file server does that has gone."""
    sender = DiskSender(tmp_path, model, timeout=1.0)
    weights = {name: torch.ones(100) for name in "abcdef"}
    partial = tmp_path / "v000001.partial"

    def hang(bucket: BucketPlan) -> None:
        if bucket.index == 1:
            wait_until(partial.exists)
            os.mkfifo(partial / "model-00002-of-00006.safetensors")

    begin = time.monotonic()
    (outcome,) = send(sender, weights, 1, bucket_bytes=400, before=hang)
    assert 0.9 < time.monotonic() - begin < 30
    assert (
        outcome.error is not None
        and "at bucket 4 the file system had kept the trainer waiting for 1 s (weight_sync.timeout)" in outcome.error
    )
    with (partial / "model-00002-of-00006.safetensors").open("rb"):  # it goes on, and finds that nobody wants it any more
        wait_until(lambda: not partial.exists())
    assert os.listdir(tmp_path) == []
    assert send(sender, weights, 2, bucket_bytes=400)[0].error is None
    assert os.listdir(tmp_path) == ["v000002"]


def wait_until(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_targets_are_refused(tmp_path: Path, model: Path) -> None:
    with pytest.raises(ValueError, match="give no targets"):
        send(DiskSender(tmp_path, model), odd_weights(), 1, ["http://127.0.0.1:1"])


# -- the embedded engine ---------------------------------------------------------------------------------------------------------


def test_an_update_of_the_embedded_engine(server: Server, tmp_path: Path, model: Path) -> None:
    sender = DiskSender(tmp_path, model)
    for version in (11, 12):
        weights = weights_of(model, seed=version)
        send(sender, weights, version)
        answer = update(server.url, version_folder(tmp_path, version), version)
        assert answer["success"] and answer["version"] == version and answer["hash"] == f"{weights_hash(weights):016x}"
        assert_serves(server.url, model, weights, version)


def test_any_checkpoint_is_loaded(server: Server, tmp_path: Path, model: Path) -> None:
    """Without an index, with the tied head apart, in another dtype, with tensors that the model lacks."""
    weights = {name: w.bfloat16() for name, w in weights_of(model, seed=21).items()}
    save_file(
        {**weights, "lm_head.weight": weights["model.embed_tokens.weight"].clone(), "more": torch.ones(3)}, tmp_path / "a.safetensors"
    )
    shutil.copy(model / "config.json", tmp_path)
    update(server.url, tmp_path, 21)
    assert_serves(server.url, model, {name: w.float() for name, w in weights.items()}, 21)


def test_a_checkpoint_of_torch_is_loaded(server: Server, tmp_path: Path, model: Path) -> None:
    weights = weights_of(model, seed=22)
    torch.save(weights, tmp_path / "pytorch_model.bin")
    shutil.copy(model / "config.json", tmp_path)
    update(server.url, tmp_path, 22)
    assert_serves(server.url, model, weights, 22)


def test_what_does_not_fit_changes_nothing(server: Server, tmp_path: Path, model: Path) -> None:
    shutil.copy(model / "config.json", tmp_path)
    before = get(server.url, "/engine_stats")
    weights = weights_of(model, seed=23)
    name = "model.layers.1.mlp.up_proj.weight"
    for wrong, reason in (
        ({k: w for k, w in weights.items() if k != name}, f"has no tensor '{name}'"),
        (weights | {name: torch.zeros(3, 4)}, f"tensor '{name}' has shape (3, 4)"),
    ):
        save_file(wrong, tmp_path / "model.safetensors")
        assert reason in refusal(server.url, tmp_path)
    data = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(data[:-5])
    assert "has" in (reason := refusal(server.url, tmp_path)) and "ends at" in reason
    (tmp_path / "model.safetensors").write_bytes(b"nonsense" * 100)
    assert "is no safetensors file" in refusal(server.url, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    assert "cannot be loaded" in refusal(server.url, tmp_path)
    after = get(server.url, "/engine_stats")
    assert (after["version"], after["hash"]) == (before["version"], before["hash"])
