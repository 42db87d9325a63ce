"""Code rewards: what counts as the program, as its tests, as a pass, and as a failure of the data or the sandbox."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import marshal
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from areal import doctor
from areal.config import ConfigError, GRPOConfig, RewardConfig
from areal.config_check import check_machine
from areal.reward import RewardFailure, RewardService
from areal.reward.code import CodeReward, code_reward, extract_code
from areal.reward.sandbox import levels
from areal.reward.sandbox.client import same_output, start
from areal.reward.sandbox.judge import MissingModule, TestProgram
from areal.reward.sandbox.limits import Limits
from areal.workflow.build import reward_function

SCORE = CodeReward(limits=Limits(cpu_seconds=4, wall_seconds=60))


def passes(program: str, tests: Any, **row: Any) -> bool:
    return SCORE("", program, [], [], tests=tests, **row) == 1.0


@pytest.mark.parametrize(
    ("completion", "code"),
    [
        ("x = 1", "x = 1"),
        ("So:\n```python\nx = 1\n```\nor better\n```py\nx = 2\n```\n", "x = 2\n"),
        ("```python\nx = 1\n```\nprints\n```\n1\n```", "x = 1\n"),
        ("```\nx = 1\n```\n```text\nno code\n```\nend", "x = 1\n"),
        ("1. first\n   ```python\n   if x:\n       y\n   ```", "if x:\n    y\n"),
        ("<think>```python\nx = 0\n```</think>\n```Python3\nx = 1\n```", "x = 1\n"),
        ("cut off:\n```python\nx = 1\ny = 2", "x = 1\ny = 2"),
        ("~~~~python\ns = '''\n```\n'''\n~~~~", "s = '''\n```\n'''\n"),
        ("```json\n{}\n```", "```json\n{}\n```"),
        ("Here: ```python\nx = 1\n```", "x = 1\n"),
        ("```python\nx = 1```\nDone.", "x = 1"),
        (
            "```python\ndef f():\n    '''\n    ```\n    f()\n    ```\n    '''\n```\n",
            "def f():\n    '''\n    ```\n    f()\n    ```\n    '''\n",
        ),
        ("```python\ns = '''a\n   \nb'''\n```", "s = '''a\n   \nb'''\n"),
        ("\ufeffx = 1", "x = 1"),
        ("", ""),
    ],
)
def test_the_program_of_a_completion(completion: str, code: str) -> None:
    assert extract_code(completion) == code


def test_the_block_that_defines_what_the_tests_call() -> None:
    right, wrong = "```python\ndef f(x):\n    return x + 1\n```\n", "```python\ndef f(x):\n    return x\n```\n"
    tests = "assert f(1) == 2"
    assert passes(right + "Usage:\n```python\nprint(f(3))\n```", tests) and not passes(wrong + "```python\nprint(f(3))\n```", tests)
    assert passes(wrong + right, tests) and not passes(right + wrong, tests)
    assert passes("```python\ndef g(x):\n    return x + 1\n```\nand\n```python\ndef f(x):\n    return g(x)\n```", tests)
    assert passes("    def f(x):\n        return x + 1\n", tests)
    assert passes("\ufeffdef f(x):\r\n    return x + 1\r\n", "\ufeff" + tests)


def test_a_completion_that_goes_on_from_a_prompt_of_code() -> None:
    prompt = 'from typing import List\n\ndef f(x: List[int]) -> int:\n    """Adds them."""\n'
    tests = "def check(candidate):\n    assert candidate([1, 2]) == 3\n"

    def score(completion: str, prompt: str = prompt) -> float:
        return SCORE(prompt, completion, [], [], tests=tests, entry_point="f")

    assert score("    return sum(x)\n") == 1.0 and score("    return len(x)\n") == 0.0
    assert score("```python\ndef f(x: List[int]) -> int:\n    return sum(x)\n```") == 1.0
    assert score("def f(x):\n    return sum(x)", "Complete:\n```python\ndef f(x):\n```") == 1.0
    assert score("    return sum(x)\n", "Write f.") == 0.0


def test_cases_of_stdin_and_stdout() -> None:
    program = "import sys\nif __name__ == '__main__':\n    n = int(input())\n    print(sum(map(int, sys.stdin.read().split())) * n, ' ')\n    print()"
    cases = [{"stdin": "2\n1 2\n3\n", "stdout": "12\n"}, {"stdin": "1\n\n", "stdout": "0"}]
    assert passes(program, cases) and passes(program, json.dumps(cases))
    assert not passes(program, [*cases, {"stdin": "1\n1", "stdout": "2"}])
    assert not passes("print(12)\nraise SystemExit(1)", cases[:1])
    assert passes("import sys\nprint(12)\nsys.exit()", cases[:1])
    assert not passes("print(12)\n1/0", cases[:1])
    assert passes("import threading\nthreading.Thread(target=lambda: print(12)).start()", cases[:1])
    assert passes("import atexit\natexit.register(print, 12)", cases[:1])
    assert passes("import os\nos.write(1, b'12')\nos._exit(0)", cases[:1]), "what counts is what it wrote"
    assert passes("print(len(open(0).read()))", [{"stdin": "é" * 300_000, "stdout": "300000"}])
    assert passes("import sys\nif 1 is 1: print('debug', file=sys.stderr)\nprint(12)", cases[:1]), "stderr is not stdout"
    assert not passes("import sys\nprint(12, file=sys.stderr)", cases[:1])
    assert passes("print('x' * 3_000_000)", [{"stdin": "", "stdout": "x" * 3_000_000}])


def test_outputs_are_compared_line_by_line() -> None:
    assert same_output("a \nb\r\n\n", "a\nb")
    assert not same_output("a\n\nb", "a\nb") and not same_output(" a", "a") and not same_output("", "a")
    assert same_output("", "\n \n")


def test_rows_of_known_data_sets() -> None:
    check = "def check(candidate):\n    assert candidate(2) == 4"
    assert passes("def f(x):\n    return 2 * x", check, entry_point="f")
    assert not passes("def f(x):\n    return x", check, entry_point="f")
    assert passes("def check(f):\n    return 1\ndef g(x):\n    return 4", check + "\ncheck(g)", entry_point="g")
    mbpp = {"test_list": ["assert f(2) == 4", "assert f(x) == 6"], "test_setup_code": "x = 3", "test_imports": ["import math"]}
    assert passes("def f(x):\n    return 2 * x", None, **mbpp)
    assert not passes("def f(x):\n    return 4", None, **mbpp)
    assert passes("def max(a):\n    return 7", "assert max([1]) == 7", entry_point="max")
    leetcode = "class Solution:\n    def f(self, x):\n        return {}"
    assert passes(leetcode.format("2 * x"), check, entry_point="Solution().f") and not passes(
        leetcode.format("x"), check, entry_point="Solution().f"
    )


@pytest.mark.parametrize(
    ("tests", "message"),
    [
        (None, "has no 'tests'"),
        ("  \n", "are empty"),
        ([], "an empty list"),
        ("assert f(1 ==", "do not compile"),
        ([{"stdin": "1"}], "entry 0"),
        ([{"stdin": "", "stdout": ""}, {"stdin": 1, "stdout": "1"}], "entry 1"),
        ({"a": 1}, "are dict"),
        (b"x", "are bytes"),
        ("def check(candidate):\n    assert candidate(2) == 4", "only define functions"),
        ("def test_it(tmp_path):\n    assert x", "gives it tmp_path"),
        ("async def test_it():\n    assert x", "a coroutine test_it"),
        ("import a_module_that_nobody_has\nassert True", "import 'a_module_that_nobody_has'"),
    ],
)
def test_tests_that_cannot_be_run_are_a_fault_of_the_data(tests: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        passes("x = 1", tests)
    with pytest.raises(ValueError, match="not the name of a function"):
        passes("x = 1", "def check(c):\n    pass", entry_point="f(")


def test_modules_that_the_tests_can_do_without() -> None:
    assert passes("x = 1", "try:\n    import a_module_that_nobody_has\nexcept ImportError:\n    pass\nassert x == 1")
    assert passes("import math", "assert math.pi > 3"), "what the program imported is there"
    assert passes("def f():\n    return 1", "from solution import f as g\nassert g() == 1")
    with pytest.raises(MissingModule):
        passes("import sys, types\nsys.modules['nobody_has_me'] = types.ModuleType('nobody_has_me')", "import nobody_has_me")


def test_unittest_has_to_run_something() -> None:
    body = "import unittest\nclass T(unittest.TestCase):\n    {}\n    def test(self):\n        self.assertEqual(x, 1)\n"
    for end in ("unittest.main()", "unittest.main(exit=False)", "from unittest import main\nmain(argv=['x'], verbosity=0)"):
        assert passes("x = 1", body.format("") + end) and not passes("x = 2", body.format("") + end), end
    assert not passes("x = 1", "import unittest\nunittest.main()")
    skipped = body.format("@unittest.skip('later')\n    def test_other(self):\n        self.fail()\n") + "unittest.main()"
    assert passes("x = 1", skipped)
    runner = (
        body.format("")
        + "result = unittest.TextTestRunner().run(unittest.defaultTestLoader.loadTestsFromTestCase(T))\nassert result.wasSuccessful()"
    )
    assert passes("x = 1", runner) and not passes("x = 2", runner)


def test_tests_that_nobody_calls_are_called() -> None:
    """As pytest would; else any program would pass."""
    cases = "from unittest import TestCase\nclass TestX(TestCase):\n    def test(self):\n        self.assertEqual(x, 1)"
    functions = "def test_one():\n    assert x == 1\n\ndef helper():\n    raise KeyError"
    classes = "class TestX:\n    def setup_method(self):\n        self.y = 1\n    def test_x(self):\n        assert x == self.y"
    given = "import pytest\n@pytest.mark.parametrize('a,b', [(1, 1), pytest.param(2, 0)])\n@pytest.mark.parametrize(['c'], [(0,)])\ndef test(a, b, c):\n    assert (x == a) == b + c"
    running = cases.replace(
        "self.assertEqual(x, 1)",
        "import asyncio, logging\n        logging.debug(asyncio.run(asyncio.sleep(0)))\n        self.assertEqual(x, 1)",
    )
    with_pytest = functions + "\nif __name__ == '__main__':\n    import pytest\n    pytest.main([__file__])"
    called = "def test_it(n):\n    assert x == n\n\ndef test_all():\n    test_it(1)\n\nif __name__ == '__main__':\n    test_all()"
    for tests in (cases, functions, classes, given, running, with_pytest, called):
        assert passes("x = 1", tests) and not passes("x = 2", tests), tests


def test_the_same_program_has_the_same_score() -> None:
    program = "import random\nx = random.random(), list({'a', 'b', 'c', 'd', 'e'}), hash('x')"
    first = SCORE.run(program + "\nprint(x, flush=True)\n1/0", "pass").detail.splitlines()[0]
    fresh = start("auto")
    try:
        again = fresh.run_tests(
            program + "\nprint(x, flush=True)\n1/0", TestProgram(marshal.dumps(compile("pass", "x", "exec"))), Limits()
        ).detail.splitlines()[0]
    finally:
        fresh.close()
    assert first == again


def test_importing_and_sending_it_is_cheap() -> None:
    assert pickle.loads(pickle.dumps(code_reward)) == code_reward
    code = "import sys, areal.reward.code; print([m for m in ('torch', 'numpy', 'pydantic', 'math_verify') if m in sys.modules])"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True).stdout.strip() == "[]"


def test_in_the_service_wrong_is_a_score_and_bad_data_a_failure() -> None:
    short = CodeReward(limits=Limits(cpu_seconds=0.5, wall_seconds=30))

    async def run() -> None:
        async with RewardService(1, 60) as service:

            async def score(completion: str, tests: Any) -> float:
                return await service.score(short, ("", completion, [], []), {"tests": tests, "prompt_id": "p"})

            assert await score("x = 1", "assert x == 1") == 1.0
            assert await score("while True: pass", "assert x == 1") == 0.0
            with pytest.raises(RewardFailure, match="do not compile") as failure:
                await score("x = 1", "assert (")
            assert failure.value.cause == "reward_raised"
            assert await score("x = 1", "assert x == 1") == 1.0

    asyncio.run(run())


MODEL = {"actor": {"init_from_scratch": {"model_type": "qwen2"}}, "train_dataset": {"type": "arithmetic"}, "gconfig": {"n_samples": 4}}
generous = CodeReward(limits=Limits(wall_seconds=30))


def config(reward_fn: str, **reward: Any) -> GRPOConfig:
    return GRPOConfig.model_validate({**MODEL, "reward_fn": reward_fn, "reward": reward})


def test_a_run_hands_down_its_isolation_and_its_time() -> None:
    function = reward_function(config("areal.reward.code:code_reward", isolation="rlimit", timeout=6))
    assert isinstance(function, CodeReward) and function.isolation == "rlimit" and function.limits == Limits(wall_seconds=4)
    assert code_reward.within(RewardConfig(timeout=600)).limits == Limits()
    assert CodeReward("rlimit").within(RewardConfig()).isolation == "rlimit"
    with pytest.raises(ConfigError, match=r"reward.timeout=15 s leaves a program 10 s.*30 s") as error:
        check_machine(config("tests.test_code_reward:generous"))
    assert error.value.hint == "set reward.timeout=45"
    check_machine(config("tests.test_code_reward:generous", timeout=45))


def test_a_level_that_is_demanded_and_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["areal.reward.sandbox.levels"], "namespaces_missing", lambda: "unshare: Operation not permitted")
    for reward_fn in ("areal.reward.code:code_reward", ""):
        with pytest.raises(ConfigError, match=r"reward.isolation=namespaces.*unshare: Operation not permitted") as error:
            check_machine(config(reward_fn, isolation="namespaces"))
        assert "kernel.unprivileged_userns_clone" in error.value.hint and "reward.isolation=auto" in error.value.hint
    check_machine(config("areal.reward.code:code_reward"))


def test_doctor_tells_the_level() -> None:
    finding = doctor.check_sandbox()
    assert finding.text.startswith("rlimit" if levels.namespaces_missing() else "namespaces")
    assert finding.state == ("optional" if levels.namespaces_missing() else "ok") and doctor.check_sandbox in doctor.CHECKS


WITHOUT_NAMESPACES = """
import ctypes, struct
from areal.reward.sandbox import filters, syscalls
asm = filters._Assembler()
asm.emit(filters._LOAD, filters._NUMBER)
asm.refuse({"x86_64": 272, "aarch64": 97}[syscalls.MACHINE], 1)
asm.answer(filters._ALLOW)
syscalls.prctl(syscalls.PR_SET_NO_NEW_PRIVS, 1)
filters.Seccomp(b"".join(asm.code)).install()
from areal.reward.code import CodeReward
from areal.reward.sandbox.levels import describe, namespaces_missing
print(namespaces_missing())
print(describe("auto"))
print(CodeReward().run("x = 1", "assert x == 1").passed, CodeReward().run("x = 1", "assert x == 2").passed)
"""


def test_where_namespaces_are_refused_auto_falls_back_and_says_so() -> None:
    """As in a container with the usual filter: unshare is not permitted."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run([sys.executable, "-c", WITHOUT_NAMESPACES], capture_output=True, text=True, env=environment, timeout=100)
    lines = done.stdout.splitlines()
    assert lines[0] == "[Errno 1] unshare: Operation not permitted", done.stderr
    assert lines[1].startswith("rlimit (") and "no namespaces: [Errno 1] unshare: Operation not permitted" in lines[1]
    assert lines[2] == "True False"
    assert "code is scored at isolation level rlimit" in done.stderr, "the worker's log says it"


def test_limits_are_checked() -> None:
    with pytest.raises(ValueError, match=r"Limits.cpu_seconds=0 must be above 0"):
        Limits(cpu_seconds=0)
    with pytest.raises(ValueError, match="isolation='none' is not one of auto, namespaces, rlimit"):
        CodeReward("none")  # type: ignore[arg-type]


def test_the_sandbox_needs_nothing_of_areal() -> None:
    """The fork server loads the folder as a package of its own."""
    folder = Path(sys.modules["areal.reward.sandbox"].__file__ or "").parent
    for file in folder.glob("*.py"):
        assert "areal." not in "".join(line for line in file.read_text().splitlines() if line.startswith(("import ", "from "))), file


def test_the_page_about_it_is_true() -> None:
    page = (Path(__file__).parents[1] / "docs" / "rewards.md").read_text().partition("## Code")[2].partition("\n## ")[0]
    (settings,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    assert isinstance(reward_function(GRPOConfig.model_validate({**MODEL, **yaml.safe_load(settings)})), CodeReward)
    (example,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names: dict[str, Any] = {}
    exec(example, names)
    assert names["reward"]("", "x = 1", [], [], tests="assert x == 1") == 1.0
    for field in dataclasses.fields(Limits):
        assert f"`{field.name}`" in page
    assert f"| `cpu_seconds` | {Limits.cpu_seconds:g} |" in page and f"| `wall_seconds` | {Limits.wall_seconds:g} |" in page
