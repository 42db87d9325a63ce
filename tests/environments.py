"""Tools and feedback for the tests, importable by worker processes: nothing heavy."""

from __future__ import annotations

import os
import re
import signal
import time
from typing import Any


def calculator(expression: str) -> int:
    """Works out a product, sum or difference of two numbers.

    Args:
        expression: For example 12*4.
    """
    left, sign, right = re.fullmatch(r"(\d+)([-+*])(\d+)", expression).groups()  # type: ignore[union-attr]
    if left == "0":
        raise ValueError("no zeros here")
    if left == "9":
        time.sleep(60)
    if left == "13":
        os.kill(os.getpid(), signal.SIGKILL)
    a, b = int(left), int(right)
    return {"+": a + b, "-": a - b, "*": a * b}[sign]


def next_digit(digit: int) -> int:
    return (digit + 1) % 10


def long_text() -> str:
    return "a" * 100_000


def again(prompt: str, completion: str, reward: float, turn: int, **row: Any) -> str | None:
    return None if completion == "#9" else f"+{turn}-{completion.removeprefix('#')}={row['answer']}"


def fails(prompt: str, completion: str, reward: float, turn: int, **row: Any) -> str:
    raise ZeroDivisionError("hm")
