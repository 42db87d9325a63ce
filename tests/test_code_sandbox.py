"""The sandbox as processes: without privileges, killed, hung, and with many programs at once."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest

from areal.reward import RewardService
from areal.reward.code import CodeReward
from areal.reward.process import RewardFailure
from areal.reward.sandbox.client import fork_server
from areal.reward.sandbox.harness import STOP
from areal.reward.sandbox.judge import Outcome, SandboxError
from areal.reward.sandbox.limits import MIB, Isolation, Limits
from tests.code_problems import PROBLEMS
from tests.hostile_programs import CHEATS, HARMFUL, HONEST, SPIES, TESTS
from tests.sandbox_levels import LEVELS, PATIENT, needs_namespaces

UNPRIVILEGED = """
from areal.reward.code import CodeReward
from areal.reward.sandbox.limits import Limits
from tests.hostile_programs import CHEATS, HARMFUL, HONEST, SPIES, TESTS
score = CodeReward({level!r}, Limits(cpu_seconds=0.4, wall_seconds=20))
assert score.run(HONEST, TESTS["asserts"]).passed
assert not any(score.run(CHEATS[name], TESTS["unittest"]).passed for name in ("exit 0", "_exit 0 later", "a child that goes on", "builtins replaced"))
assert not any(score.run(HARMFUL[name], TESTS["asserts"]).passed for name in ("fork bomb", "kill everybody", "memory bomb", "daemons"))
assert not any(score.run(SPIES[name] + chr(10) + HONEST, TESTS["asserts"]).passed for name in {spies!r})
print("all well")
"""


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.skipif(os.geteuid() != 0, reason="the other tests run without privileges then")
def test_without_privileges(level: Isolation) -> None:
    """As an ordinary user, by an interpreter that is not root's own."""
    root = Path(__file__).parents[1]
    python = next((p for p in (sys.executable, f"/usr/bin/python3.{sys.version_info.minor}") if _everybody_may(Path(p))), None)
    if python is None or not _everybody_may(root):
        pytest.skip("no Python, or not this folder, is open to everybody")
    spies = [name for name in SPIES if level == "namespaces" or name in ("the environment", "writing to the file system", "more rights")]
    environment = {"PYTHONPATH": f"{root / 'python'}{os.pathsep}{root}", "PYTHONDONTWRITEBYTECODE": "1", "HOME": "/nonexistent"}
    done = subprocess.run(
        [python, "-c", UNPRIVILEGED.format(level=level, spies=spies)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
        user=65534,
        group=65534,
        extra_groups=[],
        cwd="/",
    )
    assert done.stdout.strip() == "all well", done.stderr[-3000:]


def _everybody_may(path: Path) -> bool:
    return path.exists() and all(p.stat().st_mode & 0o001 for p in (path.resolve(), *path.resolve().parents))


@pytest.mark.parametrize("level", LEVELS)
def test_descriptors_of_a_process_with_many_are_as_closed_as_of_one_with_few(level: Isolation) -> None:
    """The number of the fork server's connection is then high: a program must not find it."""
    found = "import os\nfor fd in range(3, 8192):\n    try:\n        os.fstat(fd)\n        print(fd)\n    except OSError:\n        pass\n"
    script = f"""
import os, resource
from areal.reward.run_python import RunPython
resource.setrlimit(resource.RLIMIT_NOFILE, (8192, max(8192, resource.getrlimit(resource.RLIMIT_NOFILE)[1])))
many = [os.open(os.devnull, os.O_RDONLY) for _ in range({{n}})]
print(RunPython({level!r})({found!r}))
"""
    few, many = (subprocess.run([sys.executable, "-c", script.format(n=n)], capture_output=True, text=True, timeout=100) for n in (0, 4000))
    assert few.returncode == 0 and few.stdout.split() == many.stdout.split(), (few, many)


@pytest.mark.parametrize("level", LEVELS)
def test_the_end_of_the_scoring_process_is_the_end_of_everything(level: Isolation) -> None:
    program = HARMFUL["fork bomb that sleeps"]
    script = f"""
from areal.reward.code import CodeReward
from areal.reward.sandbox.limits import Limits
CodeReward({level!r}, Limits(cpu_seconds=60, wall_seconds=60)).run({program!r}, "pass")
"""
    worker = subprocess.Popen(
        [sys.executable, "-c", script],
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
    )
    deadline = time.monotonic() + 30
    least = 12 if level == "namespaces" else 2
    while len(family := psutil.Process(worker.pid).children(recursive=True)) < least and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(family) >= least, family
    worker.send_signal(signal.SIGKILL)
    worker.wait()
    _, alive = psutil.wait_procs(family, timeout=10)
    assert not [p for p in alive if p.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.parametrize("level", LEVELS[:1])
def test_a_fork_server_that_dies_or_hangs_is_a_failure_and_is_replaced(level: Isolation) -> None:

    score = CodeReward(level, Limits(cpu_seconds=0.5, wall_seconds=0.5))
    for number, message in ((signal.SIGKILL, "died"), (signal.SIGSTOP, "said nothing")):
        assert score.run(HONEST, TESTS["asserts"]).passed
        with fork_server(level) as server:
            pid = server._process.pid
        servers = [psutil.Process(pid), *psutil.Process(pid).children()]
        if number == signal.SIGSTOP:
            servers[-1].send_signal(number)
            with pytest.raises(SandboxError, match=message):
                score.run(HONEST, TESTS["asserts"])
        else:  # idle: nobody is hurt
            servers[0].kill()
            servers[0].wait(10)
        assert score.run(HONEST, TESTS["asserts"]).passed


@pytest.mark.parametrize("level", LEVELS)
def test_a_program_that_ends_while_it_is_told_to_does_no_harm_to_the_next(level: Isolation) -> None:
    score = CodeReward(level, PATIENT)
    assert score.run(HONEST, TESTS["asserts"]).passed
    with fork_server(level) as server:
        server._socket.send(STOP)  # comes when the program has been reported
        pid = server._process.pid
    assert score.run(HONEST, TESTS["asserts"]).passed
    with fork_server(level) as server:
        assert server._process.pid == pid


def mixture(n: int, seed: int) -> list[tuple[str, str, str, float]]:
    """(name, completion, tests, the score it has earned), hostile and honest ones in turns."""
    rng = random.Random(seed)
    hostile = [(name, text, TESTS[rng.choice(list(TESTS))]) for name, text in {**CHEATS, **HARMFUL}.items()]
    quick = [p for p in PROBLEMS if "stack" not in p.name and "deep" not in p.name]
    rows = []
    for index in range(n):
        if index % 2:
            rows.append((*hostile[index // 2 % len(hostile)], 0.0))
        else:
            problem = rng.choice(quick)
            rows.append((problem.name, problem.right, problem.tests, 1.0))
    return rows


async def score_all(rows: list[tuple[str, str, str, float]], score: CodeReward, workers: int, timeout: float) -> Counter[str]:
    """How many scores were lost, by what was lost."""
    lost: Counter[str] = Counter()
    async with RewardService(workers, timeout) as service:

        async def one(name: str, completion: str, tests: str, earned: float) -> None:
            try:
                got = await service.score(score, ("", completion, [], []), {"tests": tests})
            except RewardFailure as failure:
                lost[f"{name}: {failure}"] += 1
                return
            if got != earned:
                lost[f"{name}: {got}"] += 1

        async with asyncio.TaskGroup() as tasks:
            for row in rows:
                tasks.create_task(one(*row))
    return lost


@needs_namespaces
def test_hostile_and_honest_programs_side_by_side() -> None:
    rows = mixture(int(os.environ.get("AREAL_HOSTILE_PROGRAMS", "100")), seed=1)
    limits = Limits(cpu_seconds=0.8, wall_seconds=30, memory_bytes=512 * MIB, output_bytes=MIB)
    rows = [row for row in rows if "sleep" not in row[0]]  # they only take time
    lost = asyncio.run(score_all(rows, CodeReward("namespaces", limits), workers=3, timeout=40))
    assert not lost


def test_an_outcome_has_its_reason() -> None:
    assert CodeReward("auto", PATIENT).run("raise KeyError('k')", "pass") == Outcome(
        False, "failed", CodeReward("auto", PATIENT).run("raise KeyError('k')", "pass").detail
    )
    assert "KeyError: 'k'" in CodeReward("auto", PATIENT).run("raise KeyError('k')", "pass").detail
