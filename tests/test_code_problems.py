"""Every correct solution of a usual problem passes, every broken one fails, at each level that this machine has."""

from __future__ import annotations

import importlib.util

import pytest

from areal.reward.code import CodeReward
from areal.reward.sandbox.limits import Isolation, Limits
from tests.code_problems import PROBLEMS, Problem
from tests.sandbox_levels import LEVELS


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("problem", PROBLEMS, ids=[p.name for p in PROBLEMS])
def test_right_passes_and_wrong_fails(problem: Problem, level: Isolation) -> None:
    score = CodeReward(level, Limits(cpu_seconds=4, wall_seconds=60))
    outcome = score.run(f"Here it is:\n```python\n{problem.right}\n```\nDone.", problem.tests)
    assert outcome.passed, outcome
    for wrong in problem.wrong:
        assert not score.run(wrong, problem.tests).passed, wrong
    assert not score.run("", problem.tests).passed


@pytest.mark.skipif(importlib.util.find_spec("numpy") is None, reason="needs numpy")
@pytest.mark.parametrize("level", LEVELS)
def test_numpy_where_it_is_installed(level: Isolation) -> None:
    right = "import numpy as np\n\ndef scale(x):\n    return x / np.linalg.norm(x)"
    tests = "import numpy as np\nnp.testing.assert_allclose(scale(np.array([3.0, 4.0])), [0.6, 0.8])\nassert np.allclose(scale(np.ones(4)), 0.5)"
    score = CodeReward(level, Limits(cpu_seconds=8, wall_seconds=60))
    assert score.run(right, tests).passed
    assert not score.run(
        "import numpy as np\nnp.allclose = np.testing.assert_allclose = lambda *a, **k: True\ndef scale(x):\n    return x", tests
    ).passed


def test_there_are_enough_of_them() -> None:
    assert len(PROBLEMS) >= 30 and all(problem.wrong for problem in PROBLEMS)
