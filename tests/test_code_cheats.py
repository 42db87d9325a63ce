"""Cheats against tests of many forms, and honest programs that look like some of them."""

from __future__ import annotations

import pytest

from areal.reward.code import CodeReward
from tests.sandbox_levels import PATIENT

SCORE = CodeReward(limits=PATIENT)
CASES = "import unittest\nclass T(unittest.TestCase):\n    def test_a(self):\n        self.assertEqual(f(2), 4)\n    def test_b(self):\n        r = f(3)\n        self.assertEqual(r, 6)\n"
FORMS = {
    "asserts": "assert f(2) == 4\nr = f(3)\nassert r == 6",
    "a helper that compares": "def same(a, b):\n    return a == b\nassert same(f(2), 4)\nassert same(f(3), 6)",
    "failures counted": "bad = 0\nfor x in (2, 3):\n    if f(x) != 2 * x:\n        bad += 1\nassert bad == 0",
    "differences": "import math\nassert math.isclose(f(2), 4.0)\nassert abs(f(3) - 6.0) < 1e-9",
    "unittest.main": CASES + "unittest.main()",
    "a runner whose result nobody looks at": CASES + "unittest.TextTestRunner().run(unittest.defaultTestLoader.loadTestsFromTestCase(T))",
    "a runner": CASES + "s = unittest.TestLoader().loadTestsFromTestCase(T)\nassert unittest.TextTestRunner().run(s).wasSuccessful()",
    "a bare result": CASES + "r = unittest.TestResult()\nunittest.TestLoader().loadTestsFromTestCase(T).run(r)\nassert r.wasSuccessful()",
    "an exit": "import sys\nif f(2) != 4 or f(3) != 6:\n    sys.exit(1)\nsys.exit(0)",
}
Y = """
class Y:
    __ne__ = lambda s, o: False
    __eq__ = __lt__ = __gt__ = __le__ = __ge__ = __contains__ = lambda s, o: True
    __sub__ = __rsub__ = lambda s, o: 0.0
    __hash__ = __abs__ = lambda s: 0
    __float__ = lambda s: 4.0
def f(x):
    return Y()
"""
UNITTEST = "import unittest\nnoop = lambda *a, **k: None\ndef f(x):\n    return 4\n"
CHEATS = {
    "an answer that is right once, then math patched": "import math\ndef f(x):\n    math.isclose = lambda *a, **k: True\n    return 4 if x == 2 else 0",
    "builtins patched when called": "import builtins\ndef f(x):\n    builtins.all = builtins.abs = builtins.round = builtins.bool = lambda *a: 0\n    return 4",
    "sys.exit itself": "import sys\nf = sys.exit",
    "sys.exit as truth": "import sys\nclass E:\n    __bool__ = __len__ = __abs__ = sys.exit\nclass G:\n    __eq__ = __ne__ = __sub__ = lambda s, o: E()\ndef f(x):\n    return G()",
    "equal to everything": Y,
    "mock.ANY": "from unittest.mock import ANY\ndef f(x):\n    return ANY",
    "equal to small numbers": Y.replace("__contains__ = lambda s, o: True", "__contains__ = lambda s, o: abs(o) < 10 ** 6"),
    "a metaclass that hashes like int": "class M(type):\n    __hash__ = lambda c: hash(int)\n    __eq__ = lambda c, o: True\n" + Y.replace("class Y", "class Y(metaclass=M)"),
    "a metaclass that hides": "class M(type):\n    def __getattribute__(c, n):\n        raise AttributeError(n)\n" + Y.replace("class Y", "class Y(metaclass=M)"),
    "the difference to everything is 0": "class Z:\n    __sub__ = __rsub__ = lambda s, o: 0.0\n    __float__ = lambda s: 4.0\ndef f(x):\n    return Z()",
    "asserts of unittest patched when called": UNITTEST.replace("return 4", "unittest.TestCase.assertEqual = noop\n    return 4"),
    "results of unittest patched when called": UNITTEST.replace("return 4", "unittest.TestResult.wasSuccessful = lambda s: True\n    unittest.TestResult.addFailure = noop\n    return 4"),
    "its own load_tests": UNITTEST + "def load_tests(loader, tests, pattern):\n    return unittest.TestSuite([unittest.FunctionTestCase(noop)])",
    "its own default loader": UNITTEST + "s = unittest.TestSuite([unittest.FunctionTestCase(noop)])\nl = unittest.defaultTestLoader\n"
    "l.loadTestsFromModule = l.loadTestsFromTestCase = lambda *a, **k: s",
    "arguments that choose tests": UNITTEST + "import sys\nsys.argv[:] = ['x', 'T.test_a']",
    "contextlib patched": UNITTEST + "import contextlib\ncontextlib._GeneratorContextManager.__exit__ = lambda *a: True",
    "other bases": UNITTEST + "class E(unittest.TestResult):\n    addFailure = addError = noop\n    wasSuccessful = lambda s: True\nunittest.TextTestResult.__bases__ = (E,)",
    "another function in a cell": UNITTEST + "def evil(self, *a, **k):\n    try:\n        yield\n    except BaseException:\n        pass\nunittest.case._Outcome.testPartExecutor.__closure__[0].cell_contents = evil",
    "unittest.main by itself": "import unittest\nclass X(unittest.TestCase):\n    def test(self):\n        pass\ndef f(x):\n    unittest.main(argv=['x', 'X'])",
    "lines skipped by a trace function": """import sys
def f(x):
    frame = sys._getframe(1)
    def skip(frame, event, arg):
        for line in range(frame.f_lineno + 50, frame.f_lineno, -1):
            try:
                frame.f_lineno = line
                break
            except ValueError:
                pass
        return skip
    frame.f_trace = skip
    sys.settrace(skip)
    return 4""",
    "the harness by a traceback": """
def f(x):
    try:
        1 / 0
    except ZeroDivisionError as error:
        frame = error.__traceback__.tb_frame
    while frame:
        if '_run_to_the_end' in frame.f_globals:
            frame.f_globals['_run_to_the_end'] = lambda *a: True
        if 'token' in frame.f_locals:
            frame.f_locals['write'](frame.f_locals['channel'], frame.f_locals['token'])
            frame.f_locals['leave'](0)
        frame = frame.f_back
    return 0""",
    "the harness by its collector": "import gc\nfor o in gc.get_objects():\n    if getattr(o, '__name__', '') in ('_run_to_the_end', '_look', '_successful'):\n        o.__code__ = (lambda *a, **k: True).__code__\ndef f(x):\n    return 0",
    "an audit hook that reads what the tests are": "import sys, os\ndef hook(event, args):\n    if event == 'marshal.loads':\n        for k in range(40):\n            os.write(1000, args[0][k:k + 16])\nsys.addaudithook(hook)\ndef f(x):\n    return 0",
    "globals patched when called": Y.replace("return Y()", "globals().update(same=lambda *a: True, __look__=lambda x: x, abs=lambda x: 0, bad=-9)\n    return Y()"),
}  # fmt: skip
UNDECIDED = {("globals patched when called", "a helper that compares"), ("globals patched when called", "failures counted")}
"""Names of the tests' own module: no claim (the page says so)."""


@pytest.mark.parametrize("cheat", CHEATS)
def test_a_cheat_earns_nothing_whatever_form_the_tests_have(cheat: str) -> None:
    passed = [form for form, tests in FORMS.items() if (cheat, form) not in UNDECIDED and SCORE.run(CHEATS[cheat], tests).passed]
    assert not passed


def test_the_honest_program_passes_all_forms_and_a_broken_one_none() -> None:
    for form, tests in FORMS.items():
        assert SCORE.run("def f(x):\n    return 2 * x", tests).passed, form
        assert not SCORE.run("def f(x):\n    return x + 2", tests).passed, form


@pytest.mark.parametrize(
    ("program", "tests"),
    [
        ("class M:\n    def __init__(s, v):\n        s.v = v % 2\n    def __eq__(s, o):\n        return s.v == int(o) % 2", "for i in range(40):\n    assert M(i) == i"),
        ("class I:\n    def __contains__(s, x):\n        return -1e999 <= x <= 1e999", "assert 5 in I()"),
        ("class Inf:\n    def __gt__(s, o):\n        return True\n    def __lt__(s, o):\n        return False", "assert Inf() > 10 and not Inf() < 10"),
        ("class N:\n    def __sub__(s, o):\n        return max(0, 5 - o)", "assert N() - 3 == 2"),
        ("def f():\n    return {'id': 4, 'n': [1]}", "from unittest.mock import ANY\nassert f() == {'id': ANY, 'n': [1]}"),
        ("class TimeoutError(Exception):\n    pass\ndef f():\n    raise TimeoutError", "try:\n    f()\n    assert False\nexcept TimeoutError:\n    pass"),
        ("import logging, traceback, collections, warnings\ndef f():\n    warnings.warn('w')\n    try:\n        1 / 0\n    except ZeroDivisionError:\n        logging.exception('x')\n"
         "        return 'Zero' in traceback.format_exc() and collections.namedtuple('P', 'a')(1) == (1,)", "assert f()"),
        ("def f():\n    return int(input())", "import builtins\nbuiltins.input = lambda *a: '4'\nassert f() == 4"),
        ("def f():\n    return 4", "import inspect\nassert 'return 4' in inspect.getsource(f)"),
        ("def f():\n    '''\n    >>> f()\n    4\n    '''\n    return 4", "import doctest\nr = doctest.testmod()\nassert r.attempted == 1 and not r.failed"),
        ("def f(x):\n    return x", "for kind in [int, str, float]:\n    assert isinstance(f(kind(1)), (int, str, float)) and type(f(kind(1))) in {int, str, float}\n"
         "match f(1):\n    case int():\n        pass\n    case _:\n        raise AssertionError"),
        ("x = 1", "assert x == 1\nquit()"),
        ("x = 1", "def main():\n    assert x == 1\nif __name__ == '__main__':\n    raise SystemExit(main())"),
    ],
)  # fmt: skip
def test_honest_programs_are_not_taken_for_cheats(program: str, tests: str) -> None:
    outcome = SCORE.run(program, tests)
    assert outcome.passed, outcome


def test_a_name_that_means_another_exception_catches_no_assert() -> None:
    tests = "try:\n    f(-1)\n    assert False\nexcept ValueError:\n    pass"
    for other in (
        "ValueError = AssertionError",
        "ValueError = (ValueError, AssertionError)",
        "import builtins\nbuiltins.ValueError = Exception",
    ):
        assert not SCORE.run(f"{other}\ndef f(x):\n    return x", tests).passed, other
    assert not SCORE.run("def f(x):\n    globals()['ValueError'] = AssertionError", tests).passed
    assert SCORE.run("def f(x):\n    raise ValueError", tests).passed


def test_a_program_that_shortens_its_own_time_is_no_fault_of_the_sandbox() -> None:
    program = "import resource\nresource.setrlimit(resource.RLIMIT_CPU, (1, 1))\nwhile True:\n    pass"
    assert SCORE.run(program, "pass").why in ("cpu", "failed")
    lowered = "import resource\nresource.setrlimit(resource.RLIMIT_CPU, (2, 2))\nprint(7)"
    assert SCORE("", lowered, [], [], tests=[{"stdin": "", "stdout": "7"}]) == 1.0


def test_modules_of_the_tests_that_are_loaded_late_are_put_back_too() -> None:
    pytest.importorskip("numpy")
    tests = "import numpy as np\nnp.testing.assert_allclose(f(), [1.0, 2.0])"
    assert SCORE.run("def f():\n    return [1.0, 2.0]", tests).passed
    assert not SCORE.run(
        "import numpy as np\nnp.testing.assert_allclose = lambda *a, **k: None\ndef f():\n    return [1.0, 3.0]", tests
    ).passed
