"""`python -m benchmarks train_step` as it runs, on a tiny model: its rows, and that the rival trains on the same tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from areal.models.loading import create_model
from benchmarks import bench_train_step, gpu, measure
from benchmarks.bench_train_step import QWEN2_1_5B, SMALL, as_minibatch, even_lengths, lognormal_lengths, main, sequences, uniform_lengths

pytest.importorskip("accelerate", reason="the rival, Hugging Face Trainer, needs it")
pytestmark = pytest.mark.timeout(240)
TINY = {**SMALL, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64, "vocab_size": 128}


@pytest.fixture
def results(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(bench_train_step, "SMALL", TINY)
    monkeypatch.setattr(measure, "RESULTS", tmp_path)
    return tmp_path / "train_step.json"


def test_parts_in_one_process(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--quick", "--parts", "rival,packing"])
    rows = json.loads(results.read_text())["rows"]
    assert [(row["part"], row["what"]) for row in rows] == [
        ("rival", "areal"), ("rival", "hf_trainer"), ("rival", "hf_trainer_padded"),
        ("packing", "packed"), ("packing", "even"), ("packing", "padded"),
    ]  # fmt: skip
    areal, *rivals = rows[:3]
    assert all(row["model_tflops"] == areal["model_tflops"] and row["seconds"] > 0 and 0 < row["mfu"] < 1 for row in (areal, *rivals))
    packed, even, padded = rows[3:]
    assert packed["tokens"] == even["tokens"] == 2048 < padded["tokens"]
    told = capsys.readouterr()
    assert "rival: MFU " in told.err and "packing: packed takes " in told.err and "hf_trainer_padded" in told.out


def test_the_rival_learns_the_tokens_of_the_batch(tmp_path: Path) -> None:
    from benchmarks.train_rival import _padded, _row, trainer_seconds

    samples = sequences([40, 24, 16], TINY["vocab_size"])
    rows = _padded([_row(t) for t in samples])
    assert rows["input_ids"].shape == (3, 40) and rows["attention_mask"].sum(1).tolist() == [40, 24, 16]
    labels = rows["labels"]
    assert int((labels != -100).sum()) == as_minibatch(samples).denominator
    assert torch.equal(labels[labels != -100], rows["input_ids"][labels != -100])
    create_model(TINY, seed=0).save_pretrained(tmp_path / "model")
    for at_once in (1, 3):
        seconds = trainer_seconds(tmp_path, "cpu", samples, at_once, rounds=2, warmup=1)
        assert len(seconds) == 2 and min(seconds) > 0


def test_lengths_and_batches() -> None:
    for lengths in (lognormal_lengths(16384, 8192), uniform_lengths(16384, 2048, 8192)):
        assert sum(lengths) == 16384 and max(lengths) <= 8192
    lengths = lognormal_lengths(16384, 8192)
    even = even_lengths(lengths)
    assert sum(even) == 16384 and max(even) - min(even) <= 1
    assert sum(n * n for n in even) == pytest.approx(sum(n * n for n in lengths), rel=0.5)
    samples = sequences([10, 30, 20, 25], 128)
    cut: Any = as_minibatch(samples, 45)
    assert [mb.n_tokens for mb in cut.microbatches] == [40, 45]
    assert cut.denominator == sum(t.loss_mask.sum() for t in samples)
    assert all(t.loss_mask.sum() == len(t) - 1 for t in sequences([512], 128, prompt=0.0))


def test_the_shapes_are_those_of_qwen2() -> None:
    with torch.device("meta"):
        model = create_model(QWEN2_1_5B, seed=0)
    assert sum(p.numel() for p in model.parameters()) == 1_543_714_304, "that of the published model"


def test_what_does_not_run_within_bench_gpu_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    facts: dict[str, Any] = {}
    monkeypatch.setattr(gpu, "TRAIN_NEEDS", ("no_such_package",))
    assert gpu.run_train_step(facts, 10.0) and facts["train_step"] == "not run: no_such_package is not installed"
    monkeypatch.setattr(gpu, "TRAIN_NEEDS", ())
    if not torch.cuda.is_available():
        assert not gpu.run_train_step(facts, 100.0) and facts["train_step"] == "status 2"
    assert np.isfinite(facts.get("train_step_seconds", 0.0))
