"""Small real training runs for the tests: ``areal train`` in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[1]
TINY = [
    "warmup=null",
    "total_train_steps=6",
    "rollout.consumer_batch_size=4",
    "rollout.max_concurrent_rollouts=16",
    "gconfig.n_samples=2",
    "gconfig.max_new_tokens=24",
    "actor.ppo_n_minibatches=2",
    "evaluator.n_prompts=8",
]
"""No warm-up: the model is random, everything else is the real thing."""


class TrainRun:
    """A started ``areal train examples/arithmetic.yaml`` (or another command) with ``TINY`` and more overrides."""

    def __init__(
        self,
        folder: Path,
        *overrides: str,
        config: str = "examples/arithmetic.yaml",
        env: dict[str, str] | None = None,
        command: str = "train",
    ) -> None:
        self.folder = folder / "arithmetic" / "run"
        words = [
            sys.executable,
            "-m",
            "areal",
            command,
            config,
            f"stats_logger.fileroot={folder}",
            "experiment_name=arithmetic",
            "trial_name=run",
        ]
        self.process = subprocess.Popen(
            [*words, *TINY, *overrides],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=(folder / "stderr").open("wb"),
            text=True,
            env={**os.environ, "NO_COLOR": "1", **(env or {})},
            start_new_session=True,
        )
        self._stderr = folder / "stderr"

    @property
    def stderr(self) -> str:
        return self._stderr.read_text(errors="replace")

    def family(self) -> list[psutil.Process]:
        """The controller and everything that it started."""
        controller = psutil.Process(self.process.pid)
        return [controller, *controller.children(recursive=True)]

    def child(self, module: str) -> psutil.Process:
        """The first child process that runs ``module``."""
        return next(p for p in self.family()[1:] if any(module in word for word in p.cmdline()))

    def metrics(self) -> list[dict[str, Any]]:
        path = self.folder / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def wait_for_step(self, step: int, seconds: float = 90) -> None:
        self.wait_until(lambda: len(self.metrics()) >= step, seconds)

    def wait_until(self, condition: Callable[[], bool], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, f"the run ended early:\n{self.stderr[-3000:]}"
            assert time.monotonic() < deadline, f"nothing came within {seconds} s:\n{self.stderr[-3000:]}"
            time.sleep(0.05)

    def finish(self, seconds: float = 110) -> int:
        try:
            self.process.wait(seconds)
        finally:
            self.kill()
        return self.process.returncode

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(10)

    def summary(self) -> dict[str, Any]:
        assert self.finish() == 0, self.stderr[-3000:]
        return json.loads((self.folder / "summary.json").read_text())


def assert_all_gone(family: list[psutil.Process], seconds: float = 15) -> None:
    _, alive = psutil.wait_procs(family, timeout=seconds)
    left = [p for p in alive if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    names = [" ".join(p.cmdline())[:120] for p in left]
    for process in left:
        process.kill()
    assert not left, f"still alive: {names}"
