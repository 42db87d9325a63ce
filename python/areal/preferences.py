"""Tokenized pairs of answers, one preferred to the other, and the packed batches that training on preferences takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from areal.config import GRPOConfig
from areal.data import MalformedRow, PromptDataset, load_dataset
from areal.demonstrations import Demonstrations, UnusableRow
from areal.ops.plan_microbatches import plan_microbatches
from areal.packer import pack
from areal.types import Minibatch, Trajectory


class Pair(NamedTuple):
    """Two answers to one prompt; ``loss_mask`` is true on the answers."""

    chosen: Trajectory
    rejected: Trajectory

    @property
    def n_tokens(self) -> int:
        return len(self.chosen) + len(self.rejected)


class Preferences(Demonstrations):
    """Pairs without end, of rows with a prompt and the answers ``chosen`` and ``rejected``: texts, or chat messages.

    Of messages the assistant's last one is the answer; those before it, if there are any, must be the prompt's. Rows that are malformed or
    whose two answers are the same, prompts longer than ``max_prompt_len``, and pairs that do not fit into a micro-batch together, are dropped
    and counted.
    """

    def pairs(self, n: int) -> list[Pair]:
        return [self.next_of(self.pair) for _ in range(n)]

    def pair(self, row: Mapping[str, Any]) -> Pair:
        plain = {key: value for key, value in row.items() if key not in ("completion", "answer")}
        pair = Pair(*(self.sample({**plain, "completion": _answer(row, key)}) for key in ("chosen", "rejected")))
        if np.array_equal(pair.chosen.input_ids, pair.rejected.input_ids):
            raise UnusableRow("same_answers", f"{row['prompt_id']}: the chosen and the rejected answer are the same")
        if pair.n_tokens > self._max_tokens:
            raise UnusableRow(
                "too_long",
                f"the two answers of {row['prompt_id']} have {pair.n_tokens} tokens with their prompts, and a pair is not cut: "
                f"{self._max_tokens} fit into actor.mb_spec.max_tokens_per_mb",
            )
        return pair


def _answer(row: Mapping[str, Any], key: str) -> str:
    """The text of an answer."""
    answer = row.get(key)
    if isinstance(answer, list) and answer and all(isinstance(message, Mapping) for message in answer):
        *before, last = answer
        prompt = row.get("messages")
        if before and prompt is not None and list(before) != list(prompt):
            raise MalformedRow(f"{row['prompt_id']}: the messages of '{key}' before its last are not those of the prompt")
        if last.get("role") != "assistant":
            raise MalformedRow(f"{row['prompt_id']}: '{key}' must end with a message of the assistant, not of '{last.get('role')}'")
        answer = last.get("content")
    if not isinstance(answer, str):
        raise MalformedRow(f"{row['prompt_id']}: '{key}' must be a text, or chat messages that end with one, not {type(answer).__name__}")
    return answer


def preference_rows(config: GRPOConfig, given: Any = None) -> PromptDataset:
    """Those of ``train_dataset``, or of the rows ``given`` in its place."""
    return given if isinstance(given, PromptDataset) else load_dataset(config.train_dataset, config.seed, given=given)


def load_preferences(config: GRPOConfig, tokenizer: Any, rows: PromptDataset) -> Preferences:
    """Of ``preference_rows``."""
    return Preferences(rows, tokenizer, config.actor.mb_spec.max_tokens_per_mb, config.train_dataset.max_prompt_len)


def make_dpo_batch(pairs: Sequence[Pair], max_tokens_per_mb: int, world_size: int, cost: tuple[float, float] = (1.0, 0.0)) -> Minibatch:
    """Packed micro-batches for the ranks: chosen, rejected, chosen, rejected, ...; the denominator is the number of pairs over all of them."""
    plan = plan_microbatches([pair.n_tokens for pair in pairs], max_tokens_per_mb, world_size=world_size, cost=cost)

    def packed(members: Sequence[int]) -> Any:
        samples = [sample for i in members for sample in pairs[i]]
        return pack(samples, [np.zeros(len(sample), np.float32) for sample in samples])

    return Minibatch([[packed(members) for members in turns] for turns in plan], denominator=float(len(pairs)))
