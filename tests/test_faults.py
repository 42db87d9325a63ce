"""Bad luck in the middle of a run: real processes, real signals, a really full disk. No hang, no orphan, no half-written checkpoint."""

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.runs import TrainRun, assert_all_gone

pytestmark = pytest.mark.timeout(180)
LONG = "total_train_steps=100000"


def assert_no_shared_memory(run: TrainRun) -> None:
    """A segment is named after the controller, which starts with its pid. Other tests have theirs on this machine."""
    left = [path.name for path in Path("/dev/shm").glob(f"areal-{run.process.pid}-*")]
    assert not left


@pytest.mark.parametrize("n_servers", [1, 2])
def test_killed_rollout_server_is_replaced_and_the_run_goes_on(tmp_path: Path, n_servers: int) -> None:
    run = TrainRun(tmp_path, "total_train_steps=40", "rollout.max_head_offpolicyness=2", f"rollout.backend=embedded:d{n_servers}")
    run.wait_for_step(3)
    run.child("embedded.server").kill()
    summary = run.summary()
    assert summary["train_steps"] == 40
    assert summary["max_staleness_trained"] <= 2
    assert "died and is being replaced" in run.stderr
    assert summary["dropped"] == {}
    assert_no_shared_memory(run)


def test_rollout_server_that_may_not_be_replaced_ends_the_run_with_its_name(tmp_path: Path) -> None:
    run = TrainRun(tmp_path, LONG, "rollout.max_restarts=0")
    run.wait_for_step(2)
    family = run.family()
    run.child("embedded.server").kill()
    assert run.finish(30) == 1
    assert "rollout 0" in run.stderr and "SIGKILL" in run.stderr
    assert_all_gone(family)
    assert_no_shared_memory(run)


@pytest.mark.parametrize("backend", ["fsdp:d1", "fsdp:d2"])
def test_killed_trainer_rank_ends_the_run_with_its_name(tmp_path: Path, backend: str) -> None:
    run = TrainRun(tmp_path, LONG, f"actor.backend={backend}")
    run.wait_for_step(2)
    family = run.family()
    run.child("trainer.rank").kill()
    assert run.finish(60) == 1
    assert "trainer" in run.stderr and "SIGKILL" in run.stderr
    assert_all_gone(family)


def test_controller_killed_leaves_no_process(tmp_path: Path) -> None:
    run = TrainRun(tmp_path, LONG)
    run.wait_for_step(2)
    family = run.family()
    assert len(family) >= 4  # controller, server, trainer, reward worker
    os.kill(run.process.pid, signal.SIGKILL)
    run.process.wait(10)
    assert_all_gone(family[1:])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_sigterm_end_everything_quickly(tmp_path: Path, number: signal.Signals) -> None:
    run = TrainRun(tmp_path, LONG)
    run.wait_for_step(2)
    family = run.family()
    os.kill(run.process.pid, number)
    assert run.finish(30) == 130
    assert "interrupted" in run.stderr
    assert "Traceback" not in run.stderr
    assert_all_gone(family)
    assert_no_shared_memory(run)


def test_ctrl_c_while_starting(tmp_path: Path) -> None:
    run = TrainRun(tmp_path, LONG)
    run.wait_until(lambda: len(psutil.Process(run.process.pid).children()) >= 2, 60)
    family = run.family()
    os.kill(run.process.pid, signal.SIGINT)
    assert run.finish(30) == 130
    assert_all_gone(family)
    assert_no_shared_memory(run)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("mounting a small tmpfs needs root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_full_disk_at_a_checkpoint(tmp_path: Path, small_disk: Path) -> None:
    """A step's checkpoint that does not fit is counted and the run goes on; the final one is an error. Neither leaves a folder."""
    checkpoints = tmp_path / "arithmetic" / "run" / "checkpoints"
    checkpoints.parent.mkdir(parents=True)
    run = TrainRun(tmp_path, "total_train_steps=8", "saver.every_steps=3")
    run.wait_until((run.folder / "config.yaml").exists, 60)
    (small_disk / "ballast").write_bytes(
        b"0" * (4 << 20) if shutil.disk_usage(small_disk).free >= 4 << 20 else b"0" * shutil.disk_usage(small_disk).free
    )
    checkpoints.symlink_to(small_disk)
    assert run.finish() == 1
    assert "could not be written" in run.stderr and "free space there" in run.stderr
    assert "checkpoint of step 3" in run.stderr
    assert [p.name for p in small_disk.iterdir()] == ["ballast"]


def test_reward_that_fails_is_counted_and_never_scored(tmp_path: Path) -> None:
    run = TrainRun(tmp_path, "reward_fn=tests.rewards:raises_sometimes", "stats_logger.dump_trajectories=true")
    summary = run.summary()
    assert summary["dropped"]["reward_raised"] > 0
    assert summary["train_steps"] == 6


def test_reward_that_always_fails_ends_the_run_with_its_reason(tmp_path: Path) -> None:
    run = TrainRun(tmp_path, "reward_fn=tests.rewards:always_nan", "evaluator.n_prompts=0")
    assert run.finish(90) == 1
    assert "reward_bad_value" in run.stderr and "nan" in run.stderr
