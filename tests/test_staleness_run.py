"""No token is trained on past its age, in whole runs: read off the dump of every consumed batch, not off the run's own statistics."""

import json
from pathlib import Path

import pytest

from tests.runs import TrainRun

pytestmark = pytest.mark.timeout(180)


@pytest.mark.parametrize(
    ("eta", "max_new_tokens", "backend"),
    [(0, 24, "embedded:d2"), (1, 4, "embedded:d1"), (2, 48, "embedded:d2"), (4, 4, "embedded:d1"), (4, 48, "embedded:d1")],
)
def test_no_token_is_older_than_eta(tmp_path: Path, eta: int, max_new_tokens: int, backend: str) -> None:
    run = TrainRun(
        tmp_path,
        f"rollout.max_head_offpolicyness={eta}",
        f"gconfig.max_new_tokens={max_new_tokens}",
        f"rollout.backend={backend}",
        "rollout.max_running_requests=4",  # answers wait for a slot, so that updates come in the middle of them
        "total_train_steps=25",
        "evaluator.n_prompts=0",
        "stats_logger.dump_trajectories=true",
    )
    summary = run.summary()
    rows = [json.loads(line) for line in (run.folder / "trajectories.jsonl").read_text().splitlines()]
    ages = [row["step"] - v for row in rows for v, m in zip(row["versions"], row["loss_mask"], strict=True) if m]
    assert len(rows) == 25 * 4 * 2
    assert min(ages) >= 0
    assert max(ages) <= eta
    assert summary["max_staleness_trained"] == max(ages)
    if eta >= 2:
        assert max(ages) > 0, "nothing was asynchronous: this run proves nothing"
        assert any(len(set(row["versions"])) > 2 for row in rows) or max_new_tokens < 8  # -1 and two versions within one answer
