"""The comparison of both sides' log-probs in a real run, and that it would see a difference."""

from pathlib import Path

import pytest

import areal.drift
from areal.config_load import load_expr_config
from areal.controller import PPOTrainer
from tests.runs import ROOT, TINY


@pytest.mark.timeout(120)
def test_probe_compares_both_sides_during_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(areal.drift, "PROBE_EVERY", 2)
    monkeypatch.setattr(areal.drift, "ENOUGH_TOKENS", 10**9)  # every second step has a probe
    monkeypatch.setattr(areal.drift, "_N_PROMPTS", 3)
    words = [f"stats_logger.fileroot={tmp_path}", "stats_logger.tensorboard=false", "evaluator.n_prompts=0"]
    config, _ = load_expr_config(["--config", str(ROOT / "examples/arithmetic.yaml"), *TINY, *words])
    rows = []
    with PPOTrainer(config) as trainer:
        log_step = trainer._cluster.log_step
        monkeypatch.setattr(trainer._cluster, "log_step", lambda row, *rest: (rows.append(dict(row)), log_step(row, *rest)))
        trainer.train()
    probed = rows[1::2]
    assert len(probed) == 3
    for row in probed:
        assert 3 <= row["logprob_drift_tokens"] <= 3 * 24  # answers of the probe, not the batch's hundreds of tokens
        assert 0 <= row["logprob_drift_mean"] <= row["logprob_drift_max"] < 1e-5
