"""Reward functions for the tests, importable by worker processes."""

from typing import Any


def raises_sometimes(prompt: str, completions: str, prompt_ids: list[int], completion_ids: list[int], **row: Any) -> float:
    if sum(completion_ids) % 5 == 0:
        raise RuntimeError("no score for this one")
    return 1.0


def always_nan(prompt: str, completions: str, prompt_ids: list[int], completion_ids: list[int], **row: Any) -> float:
    return float("nan")
