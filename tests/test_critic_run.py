"""Whole runs with a critic and a reference model: real processes, the arithmetic task."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from runs import TrainRun

pytestmark = pytest.mark.timeout(240)

CRITIC = ["actor.reward_norm=null", "actor.adv_norm={mean_level: batch, std_level: batch}"]
SMALL = ["total_train_steps=3", "evaluator.n_prompts=0"]


def test_own_critic_and_reference_after_a_warm_up(tmp_path: Path) -> None:
    """Two ranks; PPO with GAE and the KL in the reward. The reference is the actor after the warm-up: there is no KL at first."""
    warm_up = ["warmup={total_steps: 5, batch_size: 8, stop_at_accuracy: null}", "actor.backend=fsdp:d2"]
    critic = ["critic={ppo_n_minibatches: 4, optimizer: {lr: 1e-3}}", "actor.gae_lambda=0.95", "actor.discount=0.99"]
    kl = ["actor.kl_ctl=0.1", "actor.kl_in=reward", "actor.kl_estimator=k1", "actor.optimizer.lr=1e-3"]
    run = TrainRun(tmp_path, *SMALL, *CRITIC, *warm_up, *critic, *kl, "rollout.max_head_offpolicyness=0")
    assert run.summary()["train_steps"] == 3
    rows = run.metrics()
    assert rows[0]["kl_reward"] == pytest.approx(0, abs=1e-5) and abs(rows[-1]["kl_reward"]) > 1e-5
    assert rows[0]["value_mean"] == 0 and rows[-1]["value_mean"] != 0, "the head starts from zeros and learns"
    for row in rows:
        assert row["value_loss"] >= 0 and row["critic_grad_norm"] >= 0 and row["critic_skipped_nonfinite"] == 0
        assert 0 <= row["value_clip_fraction"] <= 1 and "explained_variance" in row
    kinds = {
        row["kind"] for row in map(json.loads, (run.folder / "timeline.jsonl").read_text().splitlines()) if row["actor"] == "trainer 0"
    }
    assert {"scoring", "training"} <= kinds


def test_shared_critic_and_a_reference_in_the_loss(tmp_path: Path) -> None:
    run = TrainRun(tmp_path, *SMALL, *CRITIC, "critic.shared=true", "actor.kl_ctl=0.01")
    assert run.summary()["train_steps"] == 3
    for row in run.metrics():
        assert row["value_loss"] >= 0 and "critic_grad_norm" not in row and "kl_reward" not in row
