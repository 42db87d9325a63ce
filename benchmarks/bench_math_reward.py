"""The math scorer against plain math-verify (its parse and verify with their defaults): rows a second on one core, and who is right.

GSM8K: every gold solution as its own completion must be right, and the same with its final number one higher wrong. Expressions: pairs as
in MATH, right and wrong ones, each judged by math-verify in either variant. Both variants take turns, a block of rows each.

    python -m benchmarks math_reward -- [--file ../shared/data/gsm8k_train.jsonl] [--rows 0] [--rival-rows 500] [--rounds 5]
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from areal.reward.math import math_reward
from benchmarks.measure import report

GSM8K = Path(__file__).parents[1] / "../shared/data/gsm8k_train.jsonl"
Row = tuple[str, str, float]  # completion, reference, the score that is right

EXPRESSIONS = [
    ("\\frac{\\sqrt{3}}{2}", "\\frac{3}{2\\sqrt{3}}", 1.0), ("x^2+2x+1", "(x+1)^2", 1.0), ("3\\pi", "3 \\pi", 1.0), ("[0,1)", "[0, 1)", 1.0),
    ("\\{1,2\\}", "2, 1", 1.0), ("(-\\infty,3]\\cup[4,5)", "(-\\infty, 3] \\cup [4,5)", 1.0), ("x \\in [1,2]", "[1,2]", 1.0), ("2\\sqrt{3}", "\\sqrt{12}", 1.0),
    ("\\frac{\\sqrt{3}}{2}", "\\frac{\\sqrt{2}}{2}", 0.0), ("x^2+2x+1", "x^2+2x+2", 0.0), ("3\\pi", "3", 0.0), ("[0,1)", "(0,1)", 0.0), ("\\{1,2\\}", "1, 3", 0.0),
]  # fmt: skip


def gsm8k(path: Path, limit: int) -> tuple[list[Row], str]:
    """Right and wrong completions in turns, and where they come from."""
    if path.exists():
        answers = [json.loads(line)["answer"] for line in path.read_text().splitlines()]
    else:
        draw = random.Random(0)
        numbers = [(draw.randrange(1000), draw.randrange(1000)) for _ in range(2000)]
        answers = [f"She has {a} of them.\nThat is {a} + {b} = <<{a}+{b}={a + b}>>{a + b}.\n#### {a + b}" for a, b in numbers]
    rows: list[Row] = []
    for answer in answers[: limit or None]:
        solution, _, number = answer.rpartition("#### ")
        rows += [(answer, number, 1.0), (f"{solution}#### {int(number.replace(',', '')) + 1}", number, 0.0)]
    return rows, path.name if path.exists() else "generated"


def ours(completion: str, reference: str) -> float:
    return math_reward("", completion, [], [], answer=reference)


def rival(completion: str, reference: str) -> float:
    """As its README has it."""
    from math_verify import parse, verify

    return float(verify(parse(f"${reference}$"), parse(completion)))


def measure(
    rows: Sequence[Row], variants: dict[str, Callable[[str, str], float]], share: dict[str, int], rounds: int
) -> list[dict[str, Any]]:
    """``share``: rows a variant judges a round; a variant's blocks cover the rows from the start."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    mistakes = dict.fromkeys(variants, 0)
    for function in variants.values():
        function("\\boxed{x+1}", "1+x")  # imports, and starts the process of math-verify
    for turn in range(rounds):
        for name, function in variants.items():
            block = [rows[(turn * share[name] + i) % len(rows)] for i in range(share[name])]
            begin = time.perf_counter()
            scores = [function(completion, reference) for completion, reference, _ in block]
            seconds[name].append((time.perf_counter() - begin) / len(block))
            mistakes[name] += sum(score != wanted for score, (_, _, wanted) in zip(scores, block, strict=True))
    slow = statistics.median(seconds["math-verify"])
    return [
        {
            "variant": name,
            "rows/s": 1 / statistics.median(seconds[name]),
            "rows": share[name] * rounds,
            "mistakes": mistakes[name],
            "times math-verify": slow / statistics.median(seconds[name]),
        }
        for name in variants
    ]


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks math_reward --", description=__doc__)
    parser.add_argument("--file", type=Path, default=GSM8K, help="GSM8K as JSONL; generated rows where there is none")
    parser.add_argument("--rows", type=int, default=0, help="solutions to take; 0 = all, each right and wrong, in every round")
    parser.add_argument("--rival-rows", type=int, default=500, help="rows that math-verify judges a round")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args(argv)
    rows, source = gsm8k(arguments.file, arguments.rows)
    expressions: list[Row] = [(f"So it is $\\boxed{{{answer}}}$.", reference, score) for reference, answer, score in EXPRESSIONS]
    variants = {"areal": ours, "math-verify": rival}
    n = min(arguments.rival_rows, len(rows))
    table = [{"what": "GSM8K", **line} for line in measure(rows, variants, {"areal": len(rows), "math-verify": n}, arguments.rounds)]
    both = dict.fromkeys(variants, len(expressions))
    table += [{"what": "expressions", **line} for line in measure(expressions, variants, both, 4 * arguments.rounds)]
    report("math_reward", table, source=source)
