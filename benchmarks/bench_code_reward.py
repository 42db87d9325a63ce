"""Short programs with their tests, one after the other: in the sandbox at each level, and in a fresh interpreter each.

Workload: the problems of tests/code_problems.py that need no threads or big stacks, correct solutions, asserts. The variants take turns.
``programs/s`` is by the wall clock, ``per core second`` by CPU time of the scoring process, the fork server and the programs together,
which other work on the machine disturbs less. The fresh interpreter is not confined at all.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

from areal.reward.code import CodeReward
from areal.reward.sandbox.client import close_all
from areal.reward.sandbox.levels import namespaces_missing
from areal.reward.sandbox.limits import Isolation
from benchmarks.measure import report
from tests.code_problems import PROBLEMS, Problem

_NOT_SHORT = ("thread", "own names", "deep", "asyncio", "large", "mock", "input", "main block")


def workload(n: int) -> list[Problem]:
    short = [p for p in PROBLEMS if not any(word in p.name for word in _NOT_SHORT)]
    return [short[i % len(short)] for i in range(n)]


def cpu_seconds() -> float:
    """Of this process and of all its children that have ended."""
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(u.ru_utime + u.ru_stime for u in used)


def sandboxed(isolation: Isolation) -> Callable[[list[Problem]], None]:
    score = CodeReward(isolation)

    def run(problems: list[Problem]) -> None:
        for problem in problems:
            outcome = score.run(problem.right, problem.tests)
            assert outcome.passed, (problem.name, outcome)

    return run


def fresh_interpreters(problems: list[Problem]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for problem in problems:
            text = f"{problem.right}\n{problem.tests}"
            done = subprocess.run([sys.executable, "-I", "-c", text], capture_output=True, timeout=60, cwd=folder)
            assert done.returncode == 0, (problem.name, done.stderr)


def measure(run: Callable[[list[Problem]], None], problems: list[Problem]) -> tuple[float, float]:
    """Programs a second of wall clock and of CPU time. A fork server's start is part of it."""
    wall, cpu = time.perf_counter(), cpu_seconds()
    run(problems)
    wall = time.perf_counter() - wall
    close_all()  # so that its CPU time is counted
    return len(problems) / wall, len(problems) / (cpu_seconds() - cpu)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="bench code_reward", description=__doc__)
    parser.add_argument("--programs", type=int, default=500, help="programs of a round (the rival gets a fifth)")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args(argv)
    variants: dict[str, tuple[Callable[[list[Problem]], None], int]] = {
        "areal, rlimit": (sandboxed("rlimit"), arguments.programs),
        "a fresh interpreter": (fresh_interpreters, max(1, arguments.programs // 5)),
    }
    if missing := namespaces_missing():
        print(f"no namespaces here: {missing}", file=sys.stderr)
    else:
        variants = {"areal, namespaces": (sandboxed("namespaces"), arguments.programs), **variants}
    speeds: dict[str, list[tuple[float, float]]] = {name: [] for name in variants}
    for _ in range(arguments.rounds):
        for name, (run, n) in variants.items():
            speeds[name].append(measure(run, workload(n)))
    rival = statistics.median(core for _, core in speeds["a fresh interpreter"])
    rows = [
        {
            "what": name,
            "programs/s, median": round(statistics.median(wall for wall, _ in pairs)),
            "best": round(max(wall for wall, _ in pairs)),
            "per core second, median": round(statistics.median(core for _, core in pairs)),
            "best per core second": round(max(core for _, core in pairs)),
            "times rival": round(statistics.median(core for _, core in pairs) / rival, 2),
        }
        for name, pairs in speeds.items()
    ]
    report("code_reward", rows, programs=arguments.programs, rounds=arguments.rounds)


if __name__ == "__main__":
    main(sys.argv[1:])
