"""The whole loop on real SGLang servers: updates under load with every token recomputed, and training runs."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.ordeal import TOLERANCE, Ordeal, ordeal_config
from tests.runs import TrainRun
from tests.sglang_python import sglang_python

pytestmark = [pytest.mark.sglang, pytest.mark.timeout(600)]
SGLANG = ["rollout.startup_timeout=300", f"sglang.python={sglang_python()}"]


def test_every_token_of_200_generations_over_20_updates_has_the_trainers_logprob(tmp_path: Path) -> None:
    async def main() -> None:
        config = ordeal_config(tmp_path, "sglang:d1", sglang_python() or "")
        config = config.new(rollout=config.rollout.new(max_running_requests=200))
        async with Ordeal(config) as ordeal:
            await ordeal.update_under_load(200, 20)
            assert len(ordeal.cluster.weights.times) == 21 and ordeal.version == 20
            n_tokens, worst = ordeal.check_tokens()
            assert n_tokens > 200 * 60 and worst < TOLERANCE
            assert ordeal.n_mixed > 150 and ordeal.n_versions > 5, "the updates must come in the middle of generations"

    asyncio.run(main())


@pytest.mark.parametrize(
    ("backend", "transport", "mode"),
    [("sglang:d1", "broadcast", "abort"), ("sglang:d1", "broadcast", "retract"), ("sglang:d2", "disk", "abort")],
)
def test_a_training_run(tmp_path: Path, backend: str, transport: str, mode: str) -> None:
    overrides = [f"rollout.backend={backend}", f"weight_sync.transport={transport}", f"rollout.update_mode={mode}"]
    run = TrainRun(tmp_path, *overrides, *SGLANG, "gconfig.max_new_tokens=56", "rollout.max_head_offpolicyness=1")
    run.finish(500)
    summary = run.summary()
    assert summary["train_steps"] == 6 and summary["max_staleness_trained"] <= 1 and summary["dropped"] == {}
    drifts = [row["logprob_drift_max"] for row in run.metrics() if row["logprob_drift_tokens"]]
    assert drifts and max(drifts) < 1e-4
    assert summary["accuracy_after"] is not None
    assert not list((run.folder / "weights").glob("v*.partial"))
    assert len(list((run.folder / "weights").glob("v*"))) <= 1, "weights that every server has moved on from are removed"
