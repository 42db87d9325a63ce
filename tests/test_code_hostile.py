"""Hostile programs: no reward that was not earned, nothing left behind, no harm to honest neighbours."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from areal.reward.code import CodeReward
from areal.reward.sandbox.limits import MIB, Isolation, Limits
from tests.hostile_programs import CHEATS, HARMFUL, HONEST, SPIES, TESTS
from tests.sandbox_levels import LEVELS, PATIENT, descendants, idle, needs_namespaces, nothing_runs

SHORT = Limits(cpu_seconds=0.4, wall_seconds=1.5, memory_bytes=256 * MIB, output_bytes=MIB)


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
    assert seconds < SHORT.wall_seconds + 10, f"{harmful} took {seconds:.1f} s"
    assert nothing_runs(before), descendants()
    assert CodeReward("namespaces", PATIENT).run(HONEST, TESTS["asserts"]).passed


@needs_namespaces
def test_the_limit_that_was_exceeded_is_named() -> None:
    score = CodeReward("namespaces", Limits(cpu_seconds=0.3, wall_seconds=1.0, memory_bytes=300 * MIB, output_bytes=MIB))
    assert score.run(HARMFUL["endless sleep"], "pass").why == "wall"
    patient = CodeReward("namespaces", Limits(cpu_seconds=0.3, wall_seconds=30, memory_bytes=300 * MIB))
    assert patient.run(HARMFUL["endless loop"], "pass").why == "cpu"
    assert (
        CodeReward("namespaces", Limits(cpu_seconds=30, wall_seconds=60, output_bytes=MIB)).run(HARMFUL["endless output"], "pass").why
        == "output"
    )
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
        assert time.monotonic() - begin < SHORT.wall_seconds + 10, name
        assert nothing_runs(before), name
    for name in ("the environment", "writing to the file system", "more rights", "higher limits", "an Internet socket"):
        if name != "more rights" or os.geteuid() != 0:
            assert not CodeReward("rlimit", PATIENT).run(f"{SPIES[name]}\n{HONEST}", TESTS["asserts"]).passed, name
    assert set(Path("/tmp").glob("areal-program-*")) <= left
