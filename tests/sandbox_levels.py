"""What tests of the sandbox share: the levels of this machine, and what is left of programs."""

from __future__ import annotations

import time

import psutil
import pytest

from areal.reward.code import CodeReward
from areal.reward.sandbox.levels import namespaces_missing
from areal.reward.sandbox.limits import Isolation, Limits
from tests.hostile_programs import HONEST, TESTS

needs_namespaces = pytest.mark.skipif(bool(namespaces_missing()), reason=f"no namespaces here: {namespaces_missing()}")
LEVELS: list[Isolation] = ["rlimit"] if namespaces_missing() else ["namespaces", "rlimit"]
PATIENT = Limits(cpu_seconds=5, wall_seconds=60)


def descendants() -> list[psutil.Process]:
    return [p for p in psutil.Process().children(recursive=True) if p.status() != psutil.STATUS_ZOMBIE]


def nothing_runs(processes_before: int, seconds: float = 5.0) -> bool:
    """No process is left that was not there before the programs."""
    deadline = time.monotonic() + seconds
    while len(descendants()) > processes_before and time.monotonic() < deadline:
        time.sleep(0.02)
    return len(descendants()) <= processes_before


def idle(level: Isolation) -> int:
    """Processes of a fork server without a program."""
    assert CodeReward(level, PATIENT).run(HONEST, TESTS["asserts"]).passed
    return len(descendants())
