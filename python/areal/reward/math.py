"""Rewards for mathematics: 1.0 when the final answer of a completion equals the reference, else 0.0.

Where both are plain numbers they are compared as exact fractions (``answers.py``); everything else, expressions, sets, intervals, matrices,
equations, is math-verify's business (``math_process.py``).
"""

from __future__ import annotations

import re
from typing import Any

from areal.reward.answers import (
    as_latex,
    choice_of,
    chosen,
    final_answer,
    is_prose,
    is_words,
    last_expression,
    plain_number,
    same_base,
    same_number,
    same_text,
)
from areal.reward.math_process import symbolically_equal

TIME_LIMIT = 5.0
"""Seconds of CPU time that an answer may take; one that takes longer is wrong."""
_ASSIGNMENT = re.compile(r"([A-Za-z](?:_\{?\w+\}?)?)\s*=\s*([^=]+)")
_TERM = re.compile(r"[\d}][A-Za-z]$")


def reference_answer(answer: object = None, solution: object = None) -> str:
    """What a row's answer must equal: ``answer``, or what is boxed in it or follows its ``####``; without one, the last box of ``solution``.

    Raises:
        ValueError: the row has no reference answer, or its box is not closed.
    """
    given = solution if answer is None else answer
    if given is None or isinstance(given, bool) or not isinstance(given, (str, int, float)) or not str(given).strip():
        kind = "" if given is None or isinstance(given, str) else f", but a {type(given).__name__}"
        raise ValueError(f"the row has no 'answer' to compare with{kind}; name its column with answer_key")
    text = str(given).strip()
    if answer is None and "\\boxed" not in text and "####" not in text:
        raise ValueError("the row has no 'answer', and nothing is boxed in its 'solution'")
    if "\\boxed" in text or "\\fbox" in text or "####" in text:
        text = final_answer(text) or ""
    text = text.strip()
    if not text or "\\boxed" in text:
        raise ValueError(f"the reference answer is {'a box that is not closed' if text else 'empty'}")
    return text


def math_equal(prediction: str, reference: str, time_limit: float = TIME_LIMIT) -> bool:
    """Whether the final answer of the text ``prediction`` equals that of ``reference``; errors as of ``math_score``."""
    return bool(math_score(prediction, reference, time_limit=time_limit))


def math_score(completion: str, answer: object = None, solution: object = None, time_limit: float = TIME_LIMIT) -> float:
    """1.0 when the final answer of ``completion`` equals the reference, else 0.0.

    Args:
        time_limit: seconds of CPU time; an answer that takes longer is wrong.

    Raises:
        ValueError: there is no reference, or it is empty.
        MathScorerError: no verdict can be had, or the reference takes over ``time_limit`` seconds.
    """
    return float(_verdict(completion, reference_answer(answer, solution), time_limit))


def _verdict(prediction: str, gold: str, time_limit: float) -> bool:
    if (letter := choice_of(gold)) is not None:
        return chosen(prediction) == letter
    answer = final_answer(prediction)
    if answer is None:  # no expression anywhere: the reference may be a word
        return same_text(prediction.strip(), gold)
    number, wanted = plain_number(answer), plain_number(gold)
    if number is not None and wanted is not None:
        return same_number(number, wanted)
    if same_text(answer, gold):
        return True
    if is_words(gold):
        return False
    if (same := same_base(answer, gold)) is not None:
        return same
    if number is None and is_prose(answer):
        answer = last_expression(answer)
    return answer is not None and _equal(answer, gold, time_limit)


def _equal(answer: str, gold: str, time_limit: float) -> bool:
    """For two expressions of which at most one is a plain number as it stands."""
    left, right = _ASSIGNMENT.fullmatch(answer), _ASSIGNMENT.fullmatch(gold)
    if bool(left) != bool(right) or (left and right and left[1] == right[1]):
        answer, gold = left[2] if left else answer, right[2] if right else gold
    number, wanted = plain_number(answer), plain_number(gold)
    if number is not None and wanted is not None:
        return same_number(number, wanted)
    if same_text(answer, gold):
        return True
    mine, theirs = as_latex(answer), as_latex(gold)
    if not mine or not theirs or is_words(answer):
        return False
    return symbolically_equal(theirs, mine, time_limit, units=not _TERM.search(gold))  # of 3t the t is no unit


def math_reward(
    prompt: str,
    completions: str,
    prompt_ids: list[int],
    completion_ids: list[int],
    answer: str | float | None = None,
    solution: str | None = None,
    **row: Any,
) -> float:
    """1.0 when the final answer of ``completions`` equals the row's ``answer``, else 0.0.

    ``answer`` is a number, an expression, a choice, words, or a solution with a ``####`` or a box. A row without ``answer`` may have a ``solution`` whose last box is the answer (MATH).

    Raises:
        ValueError: the row has neither: that is a fault of the data, not of the model.
        MathScorerError: no verdict can be had, or the reference takes too long to read.
    """
    return math_score(str(completions), answer, solution)


gsm8k_reward_fn = math_reward  # AReaL's name
