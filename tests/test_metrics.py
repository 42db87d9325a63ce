import json
from pathlib import Path

import numpy as np

from areal.metrics import EngineMeter, RunTotals, StepClock, batch_row
from areal.trajectory_log import TrajectoryLog
from areal.types import Group, Trajectory


def trajectory(versions: list[int], reward: float) -> Trajectory:
    sampled = np.array([-1, *versions], np.int32)
    return Trajectory(np.arange(len(sampled)), sampled >= 0, np.zeros(len(sampled), np.float32), sampled, reward)


GROUPS = [Group(0, {}, [trajectory([3, 3, 5], 1.0), trajectory([4], -1.0)])]


def test_batch_row_counts_loss_tokens_only() -> None:
    row = batch_row(GROUPS, version=5)
    assert row["reward"] == 0.0
    assert row["accuracy"] == 0.5
    assert row["length"] == 2.0
    assert row["length_max"] == 3
    assert row["staleness_max"] == 2
    assert row["staleness_mean"] == (2 + 2 + 0 + 1) / 4
    assert row["tokens_trained"] == 4


def test_batch_row_is_of_episodes() -> None:
    turns = [trajectory([3, 3], 0.5), trajectory([3, 4, 4], 1.0), trajectory([4], 0.0)]
    turns[0].truncated = True
    row = batch_row([Group(0, {}, turns, episode_sizes=[2, 1])], version=5)
    assert (row["reward"], row["accuracy"], row["length"], row["length_max"], row["truncated"]) == (0.5, 0.5, 3.0, 5, 0.5)


def test_totals_keep_the_worst_staleness() -> None:
    totals = RunTotals()
    totals.add_step(batch_row(GROUPS, version=6))
    totals.add_step(batch_row(GROUPS, version=5))
    assert (totals.train_steps, totals.max_staleness_trained, totals.tokens_trained) == (2, 3, 8)


def test_engine_meter_survives_the_replacement_of_a_server() -> None:
    meter = EngineMeter()
    assert meter.read({"a": {"tokens_generated": 10, "busy_seconds": 1.0}}) == (10, 1.0)
    assert meter.read({"a": {"tokens_generated": 15, "busy_seconds": 1.5}}) == (5, 0.5)
    assert meter.read({"b": {"tokens_generated": 3, "busy_seconds": 0.25}}) == (3, 0.25)
    assert meter.tokens_generated == 18


def test_the_timeline_has_what_the_trainer_says_it_did() -> None:
    clock = StepClock()
    clock.start_step()
    clock.got_batch()
    clock.trained([["recompute", 1.0, 2.0], ["training", 2.0, 3.0]])
    assert [span[:2] for span in clock.spans()] == [("trainer 0", "waiting"), ("trainer 0", "recompute"), ("trainer 0", "training")]
    clock.trained()
    assert [kind for _, kind, _, _ in clock.spans()] == ["waiting", "training"]


class CharTokenizer:
    def decode(self, ids: list[int]) -> str:
        return "".join(chr(97 + i) for i in ids)


def test_trajectory_log_has_one_line_a_sample(tmp_path: Path) -> None:
    with TrajectoryLog(tmp_path / "t.jsonl", CharTokenizer()) as log:
        log.write(GROUPS, step=7)
    rows = [json.loads(line) for line in (tmp_path / "t.jsonl").read_text().splitlines()]
    assert [(r["step"], r["group_id"], r["sample"], r["prompt"], r["answer"], r["reward"]) for r in rows] == [
        (7, 0, 0, "a", "bcd", 1.0),
        (7, 0, 1, "a", "b", -1.0),
    ]
    assert rows[0]["versions"] == [-1, 3, 3, 5]
    assert len(rows[0]["logprobs"]) == len(rows[0]["input_ids"]) == 4
