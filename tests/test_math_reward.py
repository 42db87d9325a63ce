"""The math scorer: what counts as the answer, what equals what, and answers that would take forever, on the real math-verify."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from areal.config import DatasetConfig
from areal.data import load_dataset
from areal.reward import AsyncRewardWrapper, RewardFailure, RewardService, math_process
from areal.reward.math import math_equal, math_reward
from areal.reward.math_process import MathScorerError

RIGHT = [
    ("\\boxed{2516_{\\text{8}}}", "2516_8"), ("\\boxed{2516}", "2516_8"), ("\\boxed{1e3}", "1000"), ("\\boxed{0.001}", "1e-3"), ("\\boxed{18\\ }", "18"),
    ("\\boxed{602000000000000000000000}", "6.02\\times 10^{23}"), ("\\boxed{1.5 \\cdot 10^{-3}\\text{ m}}", "0.0015"), ("\\boxed{12\\,cm^2}", "12\\text{ cm}^2"),
    ("\\boxed{\\frac13}", "0.\\overline{3}"), ("\\boxed{-0.1\\overline{6}}", "-\\frac16"), ("\\boxed{2 < x \\le 5}", "(2,5]"), ("\\boxed{\\varnothing}", "\\emptyset"),
    ("The correct option is C", "(C)"), ("Yes", "yes"), ("\\boxed{\\text{no}}", "No"), ("\\boxed{18{}}", "18"),
    # integers and decimals
    ("\\boxed{18}", "18"), ("\\boxed{18.00}", "18"), ("\\boxed{18.}", "18"), ("\\boxed{1,000}", "1000"), ("1000", "1,000"),
    ("\\boxed{1{,}000}", "1000"), ("\\boxed{10\\,000}", "10000"), ("\\boxed{10,\\!000}", "10000"), ("\\boxed{1 000 000}", "1000000"),
    ("\\boxed{-3}", "-3"), ("\\boxed{−3}", "-3"), ("\\boxed{.5}", "0.5"), ("\\boxed{007}", "7"), ("\\boxed{1,234.50}", "1234.5"),
    ("\\boxed{2^{10}}", "1024"), ("\\boxed{1.5 \\times 10^3}", "1500"), ("\\boxed{5 million}", "5,000,000"), ("\\boxed{1/3}", "0.333333"),
    # money, units, words
    ("\\boxed{\\$18}", "18"), ("\\boxed{$18}", "18"), ("\\boxed{18}", "$18"), ("#### $18", "18"), ("#### -$5", "-5"), ("\\boxed{18 dollars}", "18"),
    ("\\boxed{18\\text{ cm}}", "18"), ("\\boxed{18\\text{ cm}^2}", "18"), ("\\boxed{18 \\mathrm{~cm}}", "18"), ("\\boxed{90^\\circ}", "90"),
    ("\\boxed{90^{\\circ}}", "90"), ("\\boxed{60 miles per hour}", "60"), ("\\boxed{18 \\text{ m}}", "18 \\text{ m}"), ("\\boxed{\\text{3 apples}}", "3"),
    ("\\boxed{\\text{She has 72 apples}}", "72"), ("\\boxed{18 m}", "18"),
    # fractions, percent
    ("\\boxed{\\frac{1}{2}}", "0.5"), ("\\boxed{\\dfrac{1}{2}}", "1/2"), ("\\boxed{\\frac12}", "\\frac{1}{2}"), ("\\boxed{1/2}", "\\tfrac{1}{2}"),
    ("\\boxed{-\\frac{1}{2}}", "\\frac{-1}{2}"), ("\\boxed{1\\frac{1}{2}}", "3/2"), ("\\boxed{1 1/2}", "1.5"), ("\\boxed{-1\\frac12}", "-1.5"),
    ("\\boxed{50\\%}", "50"), ("\\boxed{50\\%}", "0.5"), ("\\boxed{50}", "50\\%"), ("\\boxed{50 percent}", "50%"), ("\\boxed{12.5\\%}", "1/8"),
    ("It is 50 %.", "50"),
    # assignments, symbolic, sets, intervals, matrices
    ("\\boxed{x=3}", "3"), ("\\boxed{3}", "x = 3"), ("\\boxed{x = \\frac{1}{2}}", "0.5"), ("\\boxed{x=3}", "x=3"), ("so $x = 3$.", "3"),
    ("\\boxed{\\frac{\\sqrt{3}}{2}}", "\\frac{3}{2\\sqrt{3}}"), ("\\boxed{2*sqrt(3)}", "2\\sqrt{3}"), ("\\boxed{(x+1)^2}", "x^2+2x+1"),
    ("\\boxed{3\\pi}", "3 \\pi"), ("\\boxed{3pi}", "3\\pi"), ("\\boxed{3π}", "3\\pi"), ("\\boxed{\\{2, 1\\}}", "\\{1,2\\}"), ("\\boxed{2, 1}", "1,2"),
    ("\\boxed{5 \\text{ or } 7}", "5, 7"), ("\\boxed{5} and \\boxed{7}", "7, 5"), ("$\\boxed{5}$, $\\boxed{7}$", "5,7"), ("\\boxed{\\pm 2}", "-2, 2"),
    ("\\boxed{[0,1)}", "[0, 1)"), ("\\boxed{x \\in [1,2]}", "[1,2]"), ("\\boxed{[1,2]}", "x \\in [1,2]"), ("\\boxed{(-\\infty, 3] \\cup [4,5)}", "(-\\infty,3]\\cup[4,5)"),
    ("\\boxed{2<x}", "x>2"), ("\\boxed{(1, 2)}", "\\left(1,2\\right)"), ("\\boxed{\\begin{bmatrix}1\\\\2\\end{bmatrix}}", "\\begin{pmatrix}1\\\\2\\end{pmatrix}"),
    ("\\boxed{y = 2x+1}", "2x+1"), ("\\boxed{2i+1}", "1+2i"), ("\\boxed{3:4}", "\\frac{3}{4}"), ("\\boxed{x >= 2}", "x \\ge 2"),
    # choices
    ("\\boxed{B}", "B"), ("\\boxed{\\text{(B)}}", "B"), ("\\boxed{(B) 12}", "(B)"), ("\\boxed{b}", "B"), ("\\boxed{\\textbf{(B)}\\ 12}", "\\text{(B)}"),
    ("The answer is (B).", "B"), ("The correct answer is **B**.", "B"), ("Answer: B", "B"), ("(A) is wrong, so it is (B).", "B"), ("So we take\nB", "B"),
    ("#### B", "B"), ("I choose option B.", "B"), ("The answer is option B because A is wrong.", "B"), ("\\boxed{B}", "B. 12"),
    # words
    ("\\boxed{\\text{Monday}}", "Monday"), ("\\boxed{monday}", "\\text{Monday}"), ("Monday", "Monday"), ("The answer is Monday.", "Monday"),
    ("\\boxed{\\text{even}}", "even"), ("\\boxed{yes}", "Yes"), ("The answer is no solution.", "no solution"),
    # a reference that math-verify cannot read equals itself
    ("\\boxed{\\foo{1}(}", "\\foo{1}("), ("#### }{a", "}{a"), ("\\boxed{\\begin{x}}", "\\begin{x}"),
    # where the answer stands
    ("\\boxed{5} is a first guess, but it is \\boxed{6}", "6"), ("\\boxed{5}\n#### 6", "6"), ("#### 5\n\\boxed{6}", "6"), ("#### 72\n\nQuestion: what is 5?", "72"),
    ("#### \\boxed{72}", "72"), ("\\boxed{5}\n#### Check\nIndeed 3 + 2 = 6 - 1.", "5"), ("#### Step 3: add\nIt is 4 + 4 = 8.", "8"), ("####72", "72"),
    ("#### The final answer is 72.", "72"), ("#### Answer: $72$", "72"), ("### Answer\n72", "72"), ("\\fbox{5}", "5"), ("\\boxed 5", "5"), ("\\boxed{\\boxed{5}}", "5"),
    ("\\boxed{4} \\boxed{\\text{unfinished", "4"),
    ("The answer is 5 because 2 + 3 = 5 and not 6.", "5"), ("**Answer:** 18", "18"), ("**Answer**: $18.50", "18.5"), ("The answer is: \\(x = 4\\). Done.", "4"),
    ("The answer to the question is therefore 42.", "42"), ("The answer is $\\frac{1}{2}$, which is less than 1.", "0.5"), ("Final answer: 3/4", "0.75"),
    ("To answer that we add 5 apples and 7 apples. So she has 12.", "12"), ("She pays $5 and $7, in total $12.", "12"), ("x = 5+3 = 8.", "8"),
    ("Thus $a=3$, and \\[ x^2 + 1 \\]", "x^2+1"), ("= 3\\sqrt{2}.", "3\\sqrt{2}"), ("(so it is 18)", "18"), ("He is an 18-year-old.", "18"),
    ("He shoveled 48+24 = <<48+24=72>>72 drives.", "72"), ("It takes 1 1/2 hours", "1.5"), ("- 5 apples", "5"), ("a temperature of -5.", "-5"),
    ("It took 3 days.\n\n**18**", "18"),
]  # fmt: skip

WRONG = [
    ("\\boxed{2516_9}", "2516_8"), ("\\boxed{12_5}", "12"), ("\\boxed{1358}", "2516_8"), ("\\boxed{1e4}", "1000"), ("\\boxed{1.5 \\times 10^3}", "0.0015"),
    ("\\boxed{0.\\overline{3}}", "0.3"), ("\\boxed{x \\le 3}", "(-\\infty,3)"), ("The correct option is C", "(D)"), ("No", "yes"),
    ("\\boxed{15}", "5"), ("\\boxed{5}", "15"), ("\\boxed{5}", "0.5"), ("\\boxed{0.5}", "5"), ("\\boxed{5.0}", "50"), ("\\boxed{1,000}", "1"), ("\\boxed{-5}", "5"),
    ("\\boxed{1.000}", "1000"), ("\\boxed{0.333}", "1/3"), ("\\boxed{0}", "0.0000001"), ("\\boxed{2 \\times 10^{-8}}", "10^{-8}"), ("\\boxed{1 1/2}", "11/2"),
    ("\\boxed{12}", "1 2/1"), ("\\boxed{50\\%}", "5"), ("\\boxed{0.5}", "50"), ("\\boxed{5000\\%}", "0.5"), ("\\boxed{1/0}", "0"),
    ("The 5 apples and 3 pears are 8.", "5"), ("First we see that the answer to a part is 5. Then we have 3 more, \\boxed{8}.", "5"), ("5\n#### 8", "5"),
    ("The answer is 8, not 5", "5"), ("We need 5 of them", "4"), ("I do not know", "5"), ("", "5"), ("\\boxed{}", "5"), ("#### ", "5"), ("\\boxed{\\text{none}}", "5"),
    ("5 \\boxed{\\text{no}}", "5"), ("\\boxed{3 \\text{ or } 5}", "5"), ("\\boxed{1,2,3,4,5}", "5"), ("\\boxed{5} and \\boxed{6}", "6"), ("\\boxed{5}\n#### 6", "5"),
    ("\\boxed{5x}", "5"), ("\\boxed{3}", "3t"), ("\\boxed{3t}", "3x"), ("\\boxed{5 + 5}", "5"), ("\\boxed{\\sqrt{5}}", "5"), ("= 3\\sqrt{2}", "3"), ("\\boxed{2^{100}+1}", "2^{100}"),
    ("\\boxed{y=3}", "x=3"), ("\\boxed{x \\ne 3}", "x = 3"), ("\\boxed{(2,1)}", "(1,2)"), ("\\boxed{(3,1)}", "(2,1)"), ("\\boxed{[1,2]}", "(1,2)"), ("\\boxed{\\{1\\}}", "\\{1,2\\}"),
    ("\\boxed{x+1}", "y+1"), ("\\boxed{x<2}", "x>2"), ("\\boxed{5 million}", "5"), ("\\boxed{5}}", "15"), ("5 boxed", "15"), ("\\boxed{NaN}", "5"), ("\\boxed{\\infty}", "5"),
    ("\\boxed{A}", "B"), ("\\boxed{12}", "B"), ("B is wrong. The answer is (A).", "B"), ("(B) is not it, so (A)", "B"), ("A big bus", "B"), ("\\boxed{AB}", "A"), ("But A, not B. Answer: A", "B"),
    ("\\boxed{\\text{Tuesday}}", "Monday"), ("Not Monday. The answer is Tuesday.", "Monday"), ("\\boxed{\\text{odd}}", "\\text{even}"), ("we get \\boxed{5", "5"),
    ("\\boxed{\\foo{2}(}", "\\foo{1}("), ("\\boxed{18} m", "19"), ("The answer is 5x + 3 because y = 5", "3"),
]  # fmt: skip


@pytest.mark.parametrize(("completion", "answer"), RIGHT)
def test_right(completion: str, answer: str) -> None:
    assert math_reward("", completion, [], [], answer=answer) == 1.0


@pytest.mark.parametrize(("completion", "answer"), WRONG)
def test_wrong(completion: str, answer: str) -> None:
    assert math_reward("", completion, [], [], answer=answer) == 0.0


ENDLESS = [
    "2^{2^{2^{100}}}", "9^{9^{9^{9}}} \\mod 10", "(10^8)!", "((10^4)!)!", "\\binom{10^9}{10^8}", "\\sum_{n=1}^{10^9} \\frac{1}{n^2}", "(x+1)^{10^6} + 1",
    "(" * 200 + "1" + ")" * 200, "\\frac{" * 2000 + "1" + "}" * 2000, "9" * 6000, "1+" * 5000 + "1", "\\boxed{" * 3000, "\\(" * 50000, "$a " * 30000, "#### " * 30000,
    "answer: " * 20000, "5 " * 50000, "((((" * 20000 + "5", "A" * 100000, "\\frac" * 20000, "x_" * 20000 + "1",
]  # fmt: skip


@pytest.mark.parametrize("answer", ENDLESS, ids=lambda answer: answer[:20])
def test_an_answer_that_takes_forever_is_wrong(answer: str) -> None:
    for completion in (f"\\boxed{{{answer}}}", answer):
        begin = time.monotonic()
        assert not math_equal(completion, "7", time_limit=0.1)
        assert time.monotonic() - begin < 15.0  # 0.1 s, but for the machine's other work and a new child
    assert math_equal("\\boxed{\\sqrt{2}}", "\\frac{2}{\\sqrt 2}")  # the next one is scored


def test_a_reference_that_takes_forever_is_a_failure_and_equal_text_is_right() -> None:
    endless = "(" * 200 + "1" + ")" * 200
    assert math_equal(f"\\boxed{{{endless}}}", endless, time_limit=0.2)
    with pytest.raises(MathScorerError, match=r"the reference answer '\(\(\(.*0\.2 s"):
        math_equal("\\boxed{x+1}", endless, time_limit=0.2)


def _unequal(_: int = 0) -> bool:
    return (
        math_equal("\\boxed{x+1}", "1+x")
        and not math_equal("\\boxed{x+2}", "1+x")
        and not math_equal("\\boxed{2^{2^{99}}}", "y", time_limit=0.2)
    )


def test_threads_and_forked_processes_score_too() -> None:
    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(_unequal, range(8)))
    assert _unequal()  # the threads have ended, and one of them had started the child
    pid = os.fork()
    if not pid:
        code = 1
        try:
            code = 0 if _unequal() and _unequal() else 1
        finally:
            os._exit(code)
    assert _unequal()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_a_child_that_is_killed_by_others_costs_no_score() -> None:
    for _ in range(3):
        assert math_equal("\\boxed{x+1}", "1+x")
        child = math_process._VERIFIER.child
        assert child is not None
        os.kill(child.process.pid, signal.SIGKILL)
        assert math_equal("\\boxed{x+1}", "1+x")
    assert math_process._VERIFIER.child is not child


def test_an_answer_over_which_the_child_dies_twice_is_wrong() -> None:
    with ThreadPoolExecutor(1) as thread:
        endless = thread.submit(math_equal, "\\boxed{2^{2^{2^{100}}}}", "7", 60.0)
        killed: set[int] = set()
        while not endless.done():
            child = math_process._VERIFIER.child
            if child is not None and child.process.pid not in killed and _cpu_seconds(child.process.pid) > 1.5:
                killed.add(child.process.pid)
                os.kill(child.process.pid, signal.SIGKILL)
            time.sleep(0.02)
        assert not endless.result() and len(killed) == 2
        assert math_equal("\\boxed{x+1}", "1+x")


def test_a_child_that_gets_no_time_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    assert math_equal("\\boxed{x+1}", "1+x")
    child = math_process._VERIFIER.child
    assert child is not None
    assert f"{2 << 30} " in Path(f"/proc/{child.process.pid}/limits").read_text()  # its memory
    os.kill(child.process.pid, signal.SIGSTOP)
    monkeypatch.setattr(math_process, "_STARVED", 0.2)
    with pytest.raises(MathScorerError, match="got no CPU time"):
        math_equal("\\boxed{x+1}", "1+x", 0.1)
    monkeypatch.undo()
    assert math_equal("\\boxed{x+1}", "1+x")


def test_what_no_python_signal_interrupts_is_ended_by_the_kernel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import signal\nsignal.setitimer = lambda *_: None\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    math_process._VERIFIER.drop()
    assert not math_equal("\\boxed{2^{2^{2^{100}}}}", "7", time_limit=0.1)
    assert math_equal("\\boxed{x+1}", "1+x")
    with pytest.raises(MathScorerError, match=r"the reference answer .* 0\.1 s"):
        math_equal("\\boxed{x+1}", "(" * 200 + "1" + ")" * 200, time_limit=0.1)
    math_process._VERIFIER.drop()


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_without_math_verify_a_score_fails_with_the_way_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "math_verify.py").write_text("raise ImportError('No module named math_verify')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    math_process._VERIFIER.drop()
    assert math_equal("\\boxed{72.0}", "72")
    with pytest.raises(MathScorerError, match=r"does not start: No module named math_verify; pip install '\.\[train\]'"):
        math_equal("\\boxed{x+1}", "1+x")


@pytest.mark.parametrize(
    "row",
    [
        {},
        {"answer": ""},
        {"answer": " "},
        {"answer": None},
        {"answer": "#### "},
        {"answer": "\\boxed{}"},
        {"answer": "so \\boxed{5"},
        {"answer": ["5"]},
        {"answer": True},
    ],
)
def test_a_row_without_an_answer_is_the_rows_fault(row: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="answer"):
        math_reward("", "\\boxed{5}", [], [], **row)


def test_rows_of_gsm8k_and_math(tmp_path: Path) -> None:
    rows = [
        {"question": "q", "answer": "It is 40+32 = <<40+32=72>>72.\n#### 72"},
        {"question": "q", "solution": "First \\boxed{1}, so it is $\\boxed{\\frac{\\pi}{2}}$.", "level": "Level 5"},
        {"question": "q", "answer": 12.5},
        {"question": "q", "answer": "3", "solution": "\\boxed{4}"},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    completions = ["\\boxed{72}", "\\boxed{\\pi/2}", "#### 12.50", "\\boxed{3}"]
    config = DatasetConfig(type="jsonl", path=str(tmp_path / "rows.jsonl"), prompt_key="question")
    for row, completion in zip(load_dataset(config).first(4), completions, strict=True):
        assert math_reward("", completion, [], [], **row) == 1.0
        assert math_reward("", "\\boxed{73}", [], [], **row) == 0.0
    with pytest.raises(ValueError, match="nothing is boxed in its 'solution'"):
        math_reward("", "5", [], [], solution="It is 5.")


def test_rows_of_a_hugging_face_data_set(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list([{"problem": "q", "solution": "so \\boxed{x^2}"}]).save_to_disk(str(tmp_path / "math"))
    config = DatasetConfig(type="huggingface", path=str(tmp_path / "math"), prompt_key="problem")
    (row,) = load_dataset(config).first(1)
    assert math_reward("", "\\boxed{x \\cdot x}", [], [], **row) == 1.0


GSM8K = Path(__file__).parents[1] / "../shared/data/gsm8k_train.jsonl"


@pytest.mark.skipif(not GSM8K.exists(), reason="no ../shared/data/gsm8k_train.jsonl")
def test_every_gold_solution_is_right_and_every_answer_off_by_one_is_wrong() -> None:
    rows = [json.loads(line) for line in GSM8K.read_text().splitlines()]
    assert len(rows) == 7473
    for row in rows:
        solution, _, number = row["answer"].rpartition("#### ")
        off = int(number.replace(",", "")) + 1
        assert math_reward("", row["answer"], [], [], **row) == 1.0, row
        assert math_reward("", f"{solution}#### {off}", [], [], **row) == 0.0, row
        assert math_reward("", f"{solution}So the answer is {number}.", [], [], **row) == 1.0, row
        assert math_reward("", f"{solution}So the answer is \\boxed{{{off:,}}}.", [], [], **row) == 0.0, row


def test_in_the_reward_service(tmp_path: Path) -> None:
    async def main() -> None:
        async with RewardService(workers=2, timeout=30.0, log_dir=tmp_path):
            reward = AsyncRewardWrapper(math_reward)
            scores = await asyncio.gather(*(reward("", f"\\boxed{{x+{i}}}", [], [], answer="x+1") for i in range(8)))
            assert scores == [0.0, 1.0] + [0.0] * 6
            with pytest.raises(RewardFailure, match="no 'answer'") as caught:
                await reward("", "5", [], [])
            assert caught.value.cause == "reward_raised"

    asyncio.run(main())
