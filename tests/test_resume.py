"""Whole runs killed with -9 and started again: real processes, real files, bit-for-bit the same weights."""

from __future__ import annotations

import hashlib
import json
import random
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from areal.recover_files import what_is_wrong
from areal.report import draw_report
from areal.stats import read_jsonl
from tests.runs import TrainRun, assert_all_gone

pytestmark = pytest.mark.timeout(400)

N_STEPS = 10
SAME_BITS = [
    "deterministic=true",
    f"total_train_steps={N_STEPS}",
    "warmup={total_steps: 4, batch_size: 8, stop_at_accuracy: null}",
    "rollout.max_head_offpolicyness=0",
    "rollout.consumer_batch_size=6",
    "gconfig.n_samples=4",
    "actor.optimizer.muon_lr=0.01",
    "actor.optimizer.warmup_steps=6",
    "actor.kl_ctl=0.05",  # to the actor as the warm-up left it
    "critic={optimizer: {lr: 1.0e-3}}",
    "actor.reward_norm=null",
    "actor.adv_norm={mean_level: batch, std_level: batch}",
    "reward_fn=tests.rewards:share_of_even_ids",
    "stats_logger.dump_trajectories=true",
]
SAME = ("step", "version", "reward", "length", "tokens_trained", "staleness_max", "loss", "grad_norm", "entropy", "kl_ref", "value_loss")


def digest(run: TrainRun) -> str:
    return hashlib.sha256((run.folder / "checkpoints" / "final" / "model.safetensors").read_bytes()).hexdigest()


def rows(run: TrainRun, name: str) -> list[dict[str, Any]]:
    return read_jsonl(run.folder / f"{name}.jsonl")


def kill(run: TrainRun) -> None:
    """-9 to the controller; all that it started ends by itself."""
    family = run.family()
    run.process.kill()
    assert_all_gone(family)


def checkpoints(run: TrainRun) -> list[str]:
    return sorted(p.name for p in (run.folder / "recover").glob("*"))


def wait_for_write(run: TrainRun, step: int) -> None:
    """Returns in the middle of writing a checkpoint, of ``step`` or a later one."""
    deadline = time.monotonic() + 120
    while not any(".partial-" in name and name >= f"step_{step:06d}" for name in checkpoints(run)):
        assert run.process.poll() is None and time.monotonic() < deadline, run.stderr[-3000:]
        time.sleep(0.0005)


def test_a_run_killed_at_any_moment_ends_with_the_weights_of_an_undisturbed_one(tmp_path: Path) -> None:
    (tmp_path / "calm").mkdir()
    (tmp_path / "killed").mkdir()
    calm = TrainRun(tmp_path / "calm", *SAME_BITS)
    often = [*SAME_BITS, "recover.every_steps=1", "recover.keep=2"]

    run = TrainRun(tmp_path / "killed", *often)
    run.wait_until(lambda: "step_000000" in checkpoints(run), 120)  # behind the warm-up
    kill(run)
    run = TrainRun(tmp_path / "killed", *often)
    wait_for_write(run, 2)
    kill(run)
    left = checkpoints(run)
    assert any(".partial-" in name for name in left), left

    run = TrainRun(tmp_path / "killed", *often)
    run.wait_until(lambda: len(run.family()) > 2, 60)  # its processes are starting
    kill(run)
    run = TrainRun(tmp_path / "killed", *often)
    run.wait_for_step(3)
    # A write that fails in the middle, as on a full disk: it is told, and the run goes on.
    run.child("areal.trainer.rank").rlimit(psutil.RLIMIT_FSIZE, (1 << 20, psutil.RLIM_INFINITY))
    run.wait_until(lambda: "could not be written to" in run.stderr, 60)
    time.sleep(random.random())
    if run.process.poll() is None:
        kill(run)
    assert f"could not be written to {run.folder}: File too large" in run.stderr.replace("\n", " ")
    run = TrainRun(tmp_path / "killed", *often)
    summary, undisturbed = run.summary(), calm.summary()

    assert digest(run) == digest(calm)
    assert len(checkpoints(run)) == 2 and all(what_is_wrong(run.folder / "recover" / name) == "" for name in checkpoints(run))
    assert [row["step"] for row in rows(run, "metrics")] == list(range(1, N_STEPS + 1))
    for row, want in zip(rows(run, "metrics"), rows(calm, "metrics"), strict=True):
        assert {key: row[key] for key in SAME} == {key: want[key] for key in SAME}
    assert len(rows(run, "warmup")) == 4
    assert [row["when"] for row in rows(run, "evaluations")] == ["before", "after"]
    assert len(rows(run, "trajectories")) == 24 * N_STEPS
    assert rows(run, "trajectories") == rows(calm, "trajectories"), "tokens, versions, log-probs and group numbers"
    for key in ("accuracy_before", "accuracy_after", "length_after", "train_steps", "tokens_trained", "max_staleness_trained"):
        assert summary[key] == undisturbed[key], key
    assert set(summary["dropped"]) <= {"recover_skipped"}, "where writing takes longer than a step"
    board = EventAccumulator(str(run.folder / "tensorboard"))
    board.Reload()
    assert [event.step for event in board.Scalars("train/reward")] == list(range(1, N_STEPS + 1))
    assert draw_report(run.folder)[0].is_file()


def test_a_run_goes_on_with_another_number_of_ranks_and_past_its_end(tmp_path: Path) -> None:
    """From a checkpoint with a flipped byte to the one before it; then longer than was planned, on two ranks, which then share sequences."""
    options = ["recover.every_steps=2", "recover.keep=2", "saver.every_steps=2", "rollout.max_head_offpolicyness=2"]
    first = TrainRun(tmp_path, *options, "total_train_steps=6").summary()
    folder = tmp_path / "arithmetic" / "run"
    file = folder / "recover" / "step_000006" / "models" / "__0_0.distcp"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)

    run = TrainRun(tmp_path, *options, "total_train_steps=9", "actor.backend=fsdp:d2")
    summary = run.summary()
    assert "step_000006 is damaged: models/__0_0.distcp has other bytes than were written" in run.stderr
    assert "the run goes on after step 4" in run.stderr
    assert checkpoints(run) == ["step_000006", "step_000006.damaged", "step_000008"]
    assert [row["step"] for row in rows(run, "metrics")] == list(range(1, 10))
    assert [row["version"] for row in rows(run, "metrics")] == list(range(9))
    assert summary["train_steps"] == 9 and summary["max_staleness_trained"] <= 2
    assert summary["accuracy_before"] == first["accuracy_before"]
    assert summary["seconds_rl"] > 0 and summary["tokens_trained"] > first["tokens_trained"] * 1.2
    assert json.loads((folder / "recover" / "step_000008" / "rank_0001.json").read_text())["world_size"] == 2

    sharing = TrainRun(tmp_path, *options, "total_train_steps=10", "actor.backend=fsdp:d1c2")
    assert sharing.summary()["train_steps"] == 10
    assert "the run goes on after step 8" in sharing.stderr
    assert [row["step"] for row in rows(sharing, "metrics")] == list(range(1, 11))
    assert json.loads((folder / "recover" / "step_000010" / "rank_0001.json").read_text())["world_size"] == 2

    again = TrainRun(tmp_path, *options, "total_train_steps=10", "seed=1", "recover.mode=required")
    assert again.finish() == 2
    assert "recover.mode=required, but the run in" in again.stderr and "has finished" in again.stderr
