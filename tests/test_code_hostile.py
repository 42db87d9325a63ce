"""Hostile programs: no reward that was not earned, nothing left behind, no harm to honest neighbours."""

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
from areal.reward.sandbox.client import fork_server
from areal.reward.sandbox.judge import Outcome, SandboxError
from areal.reward.sandbox.levels import namespaces_missing
from areal.reward.sandbox.limits import MIB, Isolation, Limits
from tests.code_problems import PROBLEMS
from tests.hostile_programs import CHEATS, HARMFUL, HONEST, SPIES, TESTS

needs_namespaces = pytest.mark.skipif(bool(namespaces_missing()), reason=f"no namespaces here: {namespaces_missing()}")
LEVELS: list[Isolation] = ["rlimit"] if namespaces_missing() else ["namespaces", "rlimit"]
SHORT = Limits(cpu_seconds=0.4, wall_seconds=1.5, memory_bytes=256 * MIB, output_bytes=MIB)
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


@pytest.mark.parametrize("tests", TESTS)
@pytest.mark.parametrize("cheat", CHEATS)
@needs_namespaces
def test_no_cheat_passes(cheat: str, tests: str) -> None:
    outcome = CodeReward("namespaces", PATIENT).run(CHEATS[cheat], TESTS[tests])
    assert not outcome.passed, (cheat, outcome)


@pytest.mark.parametrize("tests", TESTS)
@pytest.mark.parametrize("level", LEVELS)
def test_the_honest_pass_where_the_cheats_do_not(level: Isolation, tests: str) -> None:
    assert CodeReward(level, PATIENT).run(HONEST, TESTS[tests]).passed


def test_cheats_with_rlimits_alone() -> None:
    score = CodeReward("rlimit", PATIENT)
    passed = [cheat for cheat in CHEATS if any(score.run(CHEATS[cheat], text).passed for text in TESTS.values())]
    assert not passed


@pytest.mark.parametrize("harmful", HARMFUL)
@needs_namespaces
def test_harm_ends_at_a_limit_and_leaves_nothing(harmful: str) -> None:
    before = idle("namespaces")
    begin = time.monotonic()
    outcome = CodeReward("namespaces", SHORT).run(
        f"{HARMFUL[harmful]}\n{HONEST}" if harmful != "daemons" else HARMFUL[harmful], TESTS["asserts"]
    )
    seconds = time.monotonic() - begin
    assert not outcome.passed, (harmful, outcome)
    assert seconds < SHORT.wall_seconds + 3, f"{harmful} took {seconds:.1f} s"
    assert nothing_runs(before), descendants()
    assert CodeReward("namespaces", PATIENT).run(HONEST, TESTS["asserts"]).passed


@needs_namespaces
def test_the_limit_that_was_exceeded_is_named() -> None:
    score = CodeReward("namespaces", Limits(cpu_seconds=0.3, wall_seconds=1.0, memory_bytes=300 * MIB, output_bytes=MIB))
    assert score.run(HARMFUL["endless sleep"], "pass").why == "wall"
    assert score.run(HARMFUL["endless output"], "pass").why == "output"
    patient = CodeReward("namespaces", Limits(cpu_seconds=0.3, wall_seconds=30, memory_bytes=300 * MIB))
    assert patient.run(HARMFUL["endless loop"], "pass").why == "cpu"
    assert patient.run(HARMFUL["fork bomb"], "pass").why == "cpu", "the CPU time of all processes counts together"
    assert (
        CodeReward("namespaces", Limits(cpu_seconds=30, wall_seconds=60, memory_bytes=300 * MIB))
        .run(HARMFUL["memory in many processes"], "pass")
        .why
        == "memory"
    )


@pytest.mark.parametrize("spy", SPIES)
@needs_namespaces
def test_nothing_of_the_machine_is_to_be_had(spy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AREAL_TEST_SECRET", "s")
    outcome = CodeReward("namespaces", PATIENT).run(f"{SPIES[spy]}\n{HONEST}", TESTS["asserts"])
    assert not outcome.passed, spy
    assert not Path("/usr/lib/areal-was-here").exists() and not Path("/tmp/areal-was-here").exists()


@needs_namespaces
def test_the_working_folder_is_empty_and_new_each_time() -> None:
    score = CodeReward("namespaces", PATIENT)
    program = "import os\nassert os.listdir('.') == [] and os.getcwd() == os.environ['HOME'], os.listdir('.')\nopen('left', 'w').write('x')\nos.makedirs('a/b')\nos.chmod('.', 0o700) if os.access('.', os.W_OK) and os.stat('.').st_uid == os.getuid() else None"
    for _ in range(2):
        outcome = score.run(program, "assert open('left').read() == 'x'")
        assert outcome.passed, outcome
    full = "n = 0\ntry:\n    for i in range(100):\n        with open(f'f{i}', 'wb') as f:\n            n += f.write(bytes(1 << 20))\nexcept OSError:\n    pass"
    assert CodeReward("namespaces", Limits(folder_bytes=8 * MIB)).run(full, "assert 1 << 20 < n <= 8 << 20").passed
    long = "n = 0\ntry:\n    with open('f', 'wb', buffering=0) as f:\n        while True:\n            n += f.write(bytes(1 << 16))\nexcept OSError:\n    pass"
    assert CodeReward("namespaces", Limits(file_bytes=2 * MIB)).run(long, "assert n == 2 << 20").passed


def test_rlimits_alone_hold_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is left without namespaces: harm ends, and nothing of it stays."""
    monkeypatch.setenv("AREAL_TEST_SECRET", "s")
    before = idle("rlimit")
    left = set(Path("/tmp").glob("areal-program-*"))
    for name in (
        "fork bomb that sleeps",
        "daemons",
        "memory bomb",
        "endless output",
        "endless sleep",
        "endless loop",
        "kill everybody",
        "thread bomb",
    ):
        begin = time.monotonic()
        assert not CodeReward("rlimit", SHORT).run(HARMFUL[name], TESTS["asserts"]).passed, name
        assert time.monotonic() - begin < SHORT.wall_seconds + 3, name
        assert nothing_runs(before), name
    for name in ("the environment", "writing to the file system", "more rights", "higher limits", "an Internet socket"):
        if name != "more rights" or os.geteuid() != 0:
            assert not CodeReward("rlimit", PATIENT).run(f"{SPIES[name]}\n{HONEST}", TESTS["asserts"]).passed, name
    assert set(Path("/tmp").glob("areal-program-*")) <= left


UNPRIVILEGED = """
from areal.reward.code import CodeReward
from areal.reward.sandbox.limits import Limits
from tests.hostile_programs import CHEATS, HARMFUL, HONEST, SPIES, TESTS
score = CodeReward({level!r}, Limits(cpu_seconds=1, wall_seconds=20))
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


@pytest.mark.parametrize("level", LEVELS)
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
            got = await service.score(score, ("", completion, [], []), {"tests": tests})
            if got != earned:
                lost[f"{name}: {got}"] += 1

        async with asyncio.TaskGroup() as tasks:
            for row in rows:
                tasks.create_task(one(*row))
    return lost


@needs_namespaces
def test_hostile_and_honest_programs_side_by_side() -> None:
    rows = mixture(int(os.environ.get("AREAL_HOSTILE_PROGRAMS", "100")), seed=1)
    limits = Limits(cpu_seconds=1, wall_seconds=20, memory_bytes=512 * MIB, output_bytes=MIB)
    rows = [row for row in rows if "sleep" not in row[0]]  # they only take time
    lost = asyncio.run(score_all(rows, CodeReward("namespaces", limits), workers=3, timeout=40))
    assert not lost


def test_an_outcome_has_its_reason() -> None:
    assert CodeReward("auto", PATIENT).run("raise KeyError('k')", "pass") == Outcome(
        False, "failed", CodeReward("auto", PATIENT).run("raise KeyError('k')", "pass").detail
    )
    assert "KeyError: 'k'" in CodeReward("auto", PATIENT).run("raise KeyError('k')", "pass").detail
