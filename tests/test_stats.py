"""The files of a run: complete at every moment, readable by others."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from areal.config import GRPOConfig
from areal.config_load import build_config
from areal.evaluation import Evaluation
from areal.metrics import RunTotals
from areal.stats import StatsLogger, read_jsonl


@pytest.fixture
def config() -> GRPOConfig:
    return build_config({"actor": {"init_from_scratch": {"model_type": "qwen2"}}, "train_dataset": {"type": "arithmetic"}}, GRPOConfig)


def test_rows_are_on_disk_at_once(tmp_path: Path, config: GRPOConfig) -> None:
    stats = StatsLogger(tmp_path, config)
    row = {"step": 1, "reward": np.float32(0.5), "loss": float("nan"), "dropped": {"reward_timeout": 2}, "staleness_max": np.int64(2)}
    stats.span("rollout 0", "generation", 10.0, 11.5)
    stats.step(row)
    stats.warmup({"step": 50, "loss": 1.25})
    stats.evaluation("before", Evaluation(0.5, 17.0, 0.5, 512, pass_at_k={"1": 0.5, "4": 0.75}), step=0)
    (read,) = read_jsonl(tmp_path / "metrics.jsonl")
    assert {k: read[k] for k in ("step", "reward", "loss", "staleness_max")} == {"step": 1, "reward": 0.5, "loss": None, "staleness_max": 2}
    assert read["time"] > 1.6e9 and read["dropped"] == {"reward_timeout": 2}
    assert read_jsonl(tmp_path / "timeline.jsonl") == [{"actor": "rollout 0", "kind": "generation", "start": 10.0, "end": 11.5}]
    assert read_jsonl(tmp_path / "warmup.jsonl")[0]["loss"] == 1.25
    (evaluation,) = read_jsonl(tmp_path / "evaluations.jsonl")
    assert (evaluation["when"], evaluation["step"], evaluation["accuracy"]) == ("before", 0, 0.5)
    assert evaluation["pass_at_k"] == {"1": 0.5, "4": 0.75}
    stats.close()


def test_summary_has_exactly_the_promised_keys(tmp_path: Path, config: GRPOConfig) -> None:
    with StatsLogger(tmp_path, config) as stats:
        totals = RunTotals(dropped={"reward_error": 1})
        totals.add_evaluations(Evaluation(0.6, 17.0, 0.6, 512, pass_at_k={"1": 0.6, "4": 2 / 3}), None)
        path = stats.summary(asdict(totals))
    assert path == tmp_path / "summary.json"
    assert list(json.loads(path.read_text())) == [
        "accuracy_before",
        "accuracy_after",
        "length_before",
        "length_after",
        "seconds_total",
        "seconds_warmup",
        "seconds_rl",
        "train_steps",
        "max_staleness_trained",
        "tokens_generated",
        "tokens_trained",
        "dropped",
        "filtered",
        "filter_passed",
        "truncated_masked",
        "skipped_nonfinite",
        "mfu",
        "train_seconds",
        "peak_mb",
        "truncated_before",
        "truncated_after",
        "pass_at_k_before",
        "pass_at_k_after",
        "majority_at_k_before",
        "majority_at_k_after",
    ]
    summary = json.loads(path.read_text())
    assert (
        summary["accuracy_before"] == 0.6 and summary["pass_at_k_before"] == {"1": 0.6, "4": 0.6667} and summary["accuracy_after"] is None
    )
    assert not list(tmp_path.glob("*.part"))


def test_tensorboard_reads_the_events(tmp_path: Path, config: GRPOConfig) -> None:
    with StatsLogger(tmp_path, config) as stats:
        for step in range(1, 4):
            stats.step({"step": step, "reward": step / 10, "dropped": {"reward_error": step}, "loss": None})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, round(e.value, 6)) for e in events.Scalars("train/reward")] == [(1, 0.1), (2, 0.2), (3, 0.3)]
    assert [e.value for e in events.Scalars("train/dropped/reward_error")] == [1, 2, 3]
    assert "train/loss" not in events.Tags()["scalars"]


def test_tensorboard_can_be_left_out_and_costs_no_torch(tmp_path: Path) -> None:
    code = f"""
import sys
from pathlib import Path
from areal.config import GRPOConfig
from areal.config_load import build_config
from areal.stats import StatsLogger
for name, on in (("a", True), ("b", False)):
    tree = dict(actor=dict(init_from_scratch=dict(model_type="qwen2")), train_dataset=dict(type="arithmetic"), stats_logger=dict(tensorboard=on))
    folder = Path({str(tmp_path)!r}) / name
    folder.mkdir()
    with StatsLogger(folder, build_config(tree, GRPOConfig)) as stats:
        stats.step(dict(step=1, reward=1.0))
print("torch" in sys.modules, "tensorflow" in sys.modules)
"""
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=60)
    assert out.stdout.split() == ["False", "False"]
    assert (tmp_path / "a" / "tensorboard").is_dir() and not (tmp_path / "b" / "tensorboard").exists()


def test_a_line_cut_off_by_a_kill_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"a": 1}\n{"a": 2}\n{"a"')
    assert read_jsonl(path) == [{"a": 1}, {"a": 2}]
    path.write_text('{"a": 1}\n{"a"\n{"a": 3}\n')
    with pytest.raises(ValueError, match=r"x.jsonl, line 2: not JSON"):
        read_jsonl(path)
