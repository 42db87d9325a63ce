"""Tokenized demonstrations and the packed batches that supervised training takes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from itertools import chain
from typing import Any

import numpy as np

from areal.config import ConfigError, GRPOConfig
from areal.data import MalformedRow, PromptDataset, encode_prompt, load_dataset
from areal.packer import make_train_batch
from areal.types import Group, Minibatch, Trajectory

_MAX_DROPPED_IN_A_ROW = 1000


def load_demonstrations(config: GRPOConfig, tokenizer: Any, given: Any = None) -> Demonstrations:
    """Those of ``warmup.dataset``, else of ``train_dataset`` or the rows ``given`` in its place."""
    assert config.warmup is not None
    dataset = config.warmup.dataset or config.train_dataset
    key = "warmup.dataset" if config.warmup.dataset else "train_dataset"
    given = None if config.warmup.dataset else given
    rows = given if isinstance(given, PromptDataset) else load_dataset(dataset, config.seed, "demonstrations", key, given)
    return Demonstrations(rows, tokenizer, config.actor.mb_spec.max_tokens_per_mb, dataset.max_prompt_len)


class Demonstrations:
    """Tokenized demonstrations without end.

    A row's answer is its ``completion``, else its ``answer``: a text, or a list of texts of which every second one is the environment's
    (a tool's result) and not trained on. Rows without one, prompts longer than ``max_prompt_len`` and samples longer
    than ``max_tokens`` are dropped and counted in ``dropped``.
    """

    def __init__(self, rows: PromptDataset, tokenizer: Any, max_tokens: int, max_prompt_len: int | None = None) -> None:
        if tokenizer.eos_token_id is None:
            raise ConfigError(
                "supervised training needs a tokenizer with an end-of-sequence token", "set eos_token in tokenizer_config.json"
            )
        self.rows, self._tokenizer, self._max_tokens, self._max_prompt_len = rows, tokenizer, max_tokens, max_prompt_len
        self._dropped: Counter[str] = Counter()

    @property
    def dropped(self) -> Counter[str]:
        """By cause: malformed_row, prompt_too_long, too_long."""
        return self.rows.dropped + self._dropped

    def batch(self, n: int) -> list[Trajectory]:
        return [self.next() for _ in range(n)]

    def next(self) -> Trajectory:
        """The next usable sample; ``loss_mask`` is true on the answer, but for the environment's parts of it.

        Raises:
            ConfigError: a thousand rows in a row were unusable.
        """
        why = ""
        for _ in range(_MAX_DROPPED_IN_A_ROW):
            row = next(self.rows)
            try:
                sample = self.encode(row)
            except MalformedRow as error:
                self._dropped["malformed_row"] += 1
                why = str(error)
                continue
            n_prompt = int(sample.loss_mask.argmax())
            if self._max_prompt_len is not None and n_prompt > self._max_prompt_len:
                self._dropped["prompt_too_long"] += 1
                why = f"{row['prompt_id']} has a prompt of {n_prompt} tokens, its data set's max_prompt_len is {self._max_prompt_len}"
                continue
            if len(sample) <= self._max_tokens:
                return sample
            self._dropped["too_long"] += 1
            why = f"{row['prompt_id']} has {len(sample)} tokens, {self._max_tokens} fit into actor.mb_spec.max_tokens_per_mb"
        raise ConfigError(f"{_MAX_DROPPED_IN_A_ROW} demonstrations in a row were unusable, the last because {why}")

    def encode(self, row: Mapping[str, Any]) -> Trajectory:
        answer = row.get("completion", row.get("answer"))
        texts = [answer] if isinstance(answer, str) else answer
        if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
            raise MalformedRow(
                f"{row['prompt_id']}: the demonstrated answer must be a string (or a list of them), not {type(answer).__name__}; set answer_key"
            )
        prompt = encode_prompt(row, self._tokenizer)
        try:
            parts = [self._tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        except Exception as error:  # tokenizers raises bare Exception: the row is at fault
            raise MalformedRow(f"{row['prompt_id']}: its answer cannot be tokenized ({error})") from error
        ids = np.array([*prompt, *chain.from_iterable(parts), self._tokenizer.eos_token_id], np.int64)
        trained = [[i % 2 == 0] * len(part) for i, part in enumerate(parts)]
        mask = np.array([*([False] * len(prompt)), *chain.from_iterable(trained), True])
        mask[0] = False  # nothing predicts it
        return Trajectory(ids, mask, np.zeros(len(ids), np.float32), np.full(len(ids), -1, np.int32), 0.0)


def make_sft_batch(samples: list[Trajectory], max_tokens_per_mb: int, world_size: int) -> Minibatch:
    """Packed micro-batches for the ranks; the denominator is the number of answer tokens over all of them."""
    groups = [Group(i, {}, [sample]) for i, sample in enumerate(samples)]
    nothing = [[np.zeros(len(sample), np.float32)] for sample in samples]
    batch = make_train_batch(groups, nothing, n_minibatches=1, max_tokens_per_mb=max_tokens_per_mb, world_size=world_size)
    return batch.minibatches[0]
