"""Rewards for mathematics: 1.0 when the final answer equals the reference, else 0.0 (math-verify, in a reward worker)."""

from __future__ import annotations

from typing import Any

_PARSE_SECONDS = 5


def final_answer(text: str) -> str:
    """What follows the last ``####`` (the form of GSM8K's references), or the whole text."""
    return text.rpartition("####")[2].strip() if "####" in text else text


def math_equal(prediction: str, reference: str) -> bool:
    """Whether the last answer in ``prediction`` (boxed, after ####, or the last expression) equals that of ``reference``."""
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    gold = final_answer(reference).replace(",", "")
    if not any(mark in gold for mark in ("\\", "$")):
        gold = f"${gold}$"
    gold_expressions = parse(
        gold,
        extraction_config=[LatexExtractionConfig()],
        parsing_timeout=_PARSE_SECONDS,
    )
    extraction = [ExprExtractionConfig(), LatexExtractionConfig()]
    found = parse(
        final_answer(prediction),
        extraction_config=extraction,
        parsing_timeout=_PARSE_SECONDS,
    )
    return bool(verify(gold_expressions, found, timeout_seconds=_PARSE_SECONDS))


def math_reward(
    prompt: str,
    completions: str,
    prompt_ids: list[int],
    completion_ids: list[int],
    answer: str | float | None = None,
    **row: Any,
) -> float:
    """1.0 when the final answer of ``completions`` equals the row's ``answer`` (a number, an expression, or a GSM8K solution), else 0.0.

    Raises:
        ValueError: the row has no answer: that is a fault of the data, not of the model.
    """
    if answer is None or not str(answer).strip():
        raise ValueError("the row has no 'answer' to compare with; name its column with answer_key")
    return float(math_equal(str(completions), str(answer)))


gsm8k_reward_fn = math_reward  # AReaL's name
