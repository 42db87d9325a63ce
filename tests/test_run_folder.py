"""The folder of a run: whose it is, and what is said where it cannot be."""

from __future__ import annotations

import fcntl
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from rollout_servers import make_model

from areal.cluster import Cluster
from areal.config import ConfigError, GRPOConfig
from areal.launcher.local import IMPORTING_MAIN_VARIABLE
from areal.run_folder import create_run_folder, keep_last, load_tokenizer, run_lock


def _config(root: Path) -> GRPOConfig:
    return GRPOConfig.model_validate(
        {"actor": {"path": "x"}, "train_dataset": {"type": "arithmetic"}, "stats_logger": {"fileroot": str(root)}}
    )


def test_an_earlier_run_is_kept_and_a_running_one_is_left_alone(tmp_path: Path) -> None:
    first = create_run_folder(_config(tmp_path))
    (first / "metrics.jsonl").write_text("{}")
    script = f"""
import sys, time
from pathlib import Path
from areal.run_folder import run_lock
with run_lock(Path({str(first)!r})):
    print("locked", flush=True)
    time.sleep(60)
"""
    running = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    try:
        assert running.stdout is not None and running.stdout.readline() == "locked\n"
        for start in (lambda: create_run_folder(_config(tmp_path)), lambda: run_lock(first).__enter__()):
            with pytest.raises(ConfigError, match="a run that is going on writes to .*trial.* another trial_name"):
                start()
    finally:
        running.kill()  # the kernel drops its lock
        running.wait()
    second = create_run_folder(_config(tmp_path))
    assert second == first and (first.with_name("trial.1") / "metrics.jsonl").is_file() and not (first / "metrics.jsonl").exists()
    with run_lock(second), pytest.raises(ConfigError, match="a run that is going on"), run_lock(second):
        raise AssertionError("two runs that start at the same moment")
    with (second / ".running").open("rb") as looking:
        fcntl.flock(looking, fcntl.LOCK_SH)
        threading.Timer(0.1, fcntl.flock, (looking, fcntl.LOCK_UN)).start()
        with run_lock(second):
            pass
    create_run_folder(_config(tmp_path))


def test_a_folder_that_cannot_be_written_names_the_key(tmp_path: Path) -> None:
    (tmp_path / "areal").write_text("a file where a folder should be")
    with pytest.raises(ConfigError, match=r"cannot be written \(Not a directory\) \(set stats_logger.fileroot"):
        create_run_folder(_config(tmp_path))
    (tmp_path / "areal").unlink()
    (tmp_path / "areal").mkdir()
    (tmp_path / "areal" / "trial").write_text("this too")
    with pytest.raises(ConfigError, match=r"cannot be written \(Not a directory\)"):
        create_run_folder(_config(tmp_path))


def test_a_model_without_tokenizer_is_told(tmp_path: Path) -> None:
    make_model(tmp_path)
    for file in tmp_path.glob("*token*"):
        file.unlink()
    with pytest.raises(ConfigError, match="has no tokenizer that can be loaded .its vocabulary is empty. .put tokenizer.json"):
        load_tokenizer(tmp_path)


def test_a_worker_that_imports_the_script_touches_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import asyncio

    monkeypatch.setenv(IMPORTING_MAIN_VARIABLE, "1")
    with pytest.raises(RuntimeError, match="if __name__ == '__main__'"):
        asyncio.run(Cluster(_config(tmp_path)).open())
    assert not list(tmp_path.iterdir())


def test_only_whole_step_checkpoints_are_removed(tmp_path: Path) -> None:
    for name in ("step_000001", "step_000002", "step_000003", "step_000009.partial-77", "final"):
        (tmp_path / name).mkdir()
    keep_last(tmp_path, 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["final", "step_000002", "step_000003", "step_000009.partial-77"]
