"""Reward functions for the tests, importable by worker processes."""

from typing import Any


def raises_sometimes(prompt: str, completions: str, prompt_ids: list[int], completion_ids: list[int], **row: Any) -> float:
    if sum(completion_ids) % 5 == 0:
        raise RuntimeError("no score for this one")
    return 1.0


def always_nan(prompt: str, completions: str, prompt_ids: list[int], completion_ids: list[int], **row: Any) -> float:
    return float("nan")


def share_of_even_ids(prompt: str, completions: str, prompt_ids: list[int], completion_ids: list[int], **row: Any) -> float:
    """Varies within a group also for a random model."""
    return sum(token % 2 == 0 for token in completion_ids) / len(completion_ids)


def first_id_is_even(prompt: str, completions: str, prompt_ids: list[int], completion_ids: list[int], **row: Any) -> float:
    """Two values: groups of few samples often have the same."""
    return float(completion_ids[0] % 2 == 0)


def minus_one(prompt: str, completions: str, prompt_ids: list[int], completion_ids: list[int], **row: Any) -> float:
    return -1.0
