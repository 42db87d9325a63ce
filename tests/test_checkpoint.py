"""Checkpoints are whole or not there."""

import os
import resource
import threading

import pytest
import torch
from trainer_setup import save_small_model

from areal.models.loading import load_model, meta_template
from areal.trainer import checkpoint
from areal.trainer.checkpoint import CheckpointError, CheckpointWriter, write_checkpoint

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return save_small_model(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def model(source):
    return load_model(source, dtype=torch.float32)


def weights_of(model, factor=1.0):
    return {n: p.detach() * factor for n, p in model.named_parameters()}


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def test_files_and_replacement(source, model, tmp_path):
    template = meta_template(model, torch.float32)
    for factor in (1.0, 2.0):
        write_checkpoint(tmp_path / "a" / "final", template, weights_of(model, factor), source)
        assert names(tmp_path / "a") == ["final"]
        assert names(tmp_path / "a" / "final") == names(source)
        again = load_model(tmp_path / "a" / "final", dtype=torch.float32)
        for name, parameter in again.named_parameters():
            assert torch.equal(parameter, weights_of(model, factor)[name])


@pytest.fixture
def small_files():
    """As on a full disk, writing fails in the middle of a file (the kernel's limit on a file's size)."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_full_disk_leaves_nothing(source, model, tmp_path, small_files):
    with pytest.raises(CheckpointError, match="could not be written"):
        write_checkpoint(tmp_path / "final", meta_template(model, torch.float32), weights_of(model), source)
    assert names(tmp_path) == []


def test_full_disk_keeps_the_old_one(source, model, tmp_path, request):
    template = meta_template(model, torch.float32)
    write_checkpoint(tmp_path / "final", template, weights_of(model), source)
    request.getfixturevalue("small_files")
    with pytest.raises(CheckpointError):
        write_checkpoint(tmp_path / "final", template, weights_of(model, 3.0), source)
    assert names(tmp_path) == ["final"]
    assert torch.equal(next(load_model(tmp_path / "final", dtype=torch.float32).parameters()), next(model.parameters()))


def test_too_little_space_is_seen_before_writing(source, model, tmp_path, monkeypatch):
    usage = os.statvfs(tmp_path)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000, "total": usage.f_blocks})())
    with pytest.raises(CheckpointError, match=r"MiB are free"):
        write_checkpoint(tmp_path / "final", meta_template(model, torch.float32), weights_of(model), source)
    assert names(tmp_path) == []


def test_missing_weight_is_not_a_checkpoint(source, model, tmp_path):
    weights = weights_of(model)
    weights.popitem()
    with pytest.raises(ValueError, match="lack"):
        write_checkpoint(tmp_path / "final", meta_template(model, torch.float32), weights, source)
    assert names(tmp_path) == []


def test_background_writer(source, model, tmp_path):
    results = []
    writer = CheckpointWriter(
        meta_template(model, torch.float32),
        source,
        lambda folder, error, begin, end: results.append((folder.name, error, threading.get_ident())),
    )
    (tmp_path / "file").write_text("")
    for folder in ("one", "file/two", "three"):
        writer.start(tmp_path / folder, weights_of(model))
    writer.wait()
    errors = {name: error for name, error, _ in results}
    assert errors["one"] is None
    assert errors["three"] is None
    assert "could not be written" in errors["two"]
    assert all(thread != threading.get_ident() for _, _, thread in results)
    assert names(tmp_path) == ["file", "one", "three"]
