"""Tokenized demonstrations and the packed batches that supervised training takes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from areal.chat import ChatTemplateError, suffix_text, suffix_tokens
from areal.config import ConfigError, GRPOConfig
from areal.data import MalformedRow, PromptDataset, encode_prompt, load_dataset
from areal.packer import make_train_batch
from areal.types import Group, Minibatch, Trajectory

_MAX_DROPPED_IN_A_ROW = 1000

T = TypeVar("T")


class UnusableRow(ValueError):
    """A row that is not malformed, and cannot be trained on all the same."""

    def __init__(self, cause: str, message: str) -> None:
        super().__init__(message)
        self.cause = cause


def demonstration_rows(config: GRPOConfig, given: Any = None) -> PromptDataset:
    """Those of ``warmup.dataset``, else of ``train_dataset`` or the rows ``given`` in its place."""
    assert config.warmup is not None
    if config.warmup.dataset:
        return load_dataset(config.warmup.dataset, config.seed, "demonstrations", "warmup.dataset")
    if isinstance(given, PromptDataset):
        return given
    return load_dataset(config.train_dataset, config.seed, "demonstrations", "train_dataset", given)


def load_demonstrations(config: GRPOConfig, tokenizer: Any, rows: PromptDataset | None = None) -> Demonstrations:
    """``rows``: of ``demonstration_rows``; None = those that the config names."""
    assert config.warmup is not None
    longest = (config.warmup.dataset or config.train_dataset).max_prompt_len
    return Demonstrations(demonstration_rows(config) if rows is None else rows, tokenizer, config.actor.mb_spec.max_tokens_per_mb, longest)


class Demonstrations:
    """Tokenized demonstrations without end.

    A row's answer is its ``completion``, else its ``answer``: a text, or a list of texts of which every second one is the environment's
    (a tool's result) and not trained on. A row with neither is a conversation if its ``messages`` end with one of the assistant's, of which
    each is trained on, with the end-of-sequence token that ends it. Rows without an answer, prompts longer than ``max_prompt_len`` and
    samples longer than ``max_tokens`` are dropped and counted in ``dropped``.
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

    def state_dict(self) -> dict[str, Any]:
        """The place in the rows, and what was dropped so far."""
        return {"rows": self.rows.state_dict(), "dropped": dict(self._dropped)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises ConfigError when the state is of other rows."""
        self.rows.load_state_dict(state["rows"])
        self._dropped = Counter(state["dropped"])

    def batch(self, n: int) -> list[Trajectory]:
        return [self.next() for _ in range(n)]

    def next(self) -> Trajectory:
        """The next usable sample; ``loss_mask`` is true on the answer, but for the environment's parts of it.

        Raises:
            ConfigError: a thousand rows in a row were unusable.
        """
        return self.next_of(self.sample)

    def next_of(self, make: Callable[[Mapping[str, Any]], T]) -> T:
        """What ``make`` makes of the next row for which it raises neither ``MalformedRow`` nor ``UnusableRow``."""
        why = ""
        for _ in range(_MAX_DROPPED_IN_A_ROW):
            try:
                return make(next(self.rows))
            except (MalformedRow, UnusableRow) as error:
                self._dropped[error.cause if isinstance(error, UnusableRow) else "malformed_row"] += 1
                why = str(error)
        raise ConfigError(f"{_MAX_DROPPED_IN_A_ROW} demonstrations in a row were unusable, the last because {why}")

    def sample(self, row: Mapping[str, Any]) -> Trajectory:
        """``encode``, of a row that fits."""
        sample = self.encode(row)
        n_prompt = int(sample.loss_mask.argmax())
        if self._max_prompt_len is not None and n_prompt > self._max_prompt_len:
            raise UnusableRow(
                "prompt_too_long",
                f"{row['prompt_id']} has a prompt of {n_prompt} tokens, its data set's max_prompt_len is {self._max_prompt_len}",
            )
        if len(sample) > self._max_tokens:
            raise UnusableRow(
                "too_long",
                f"{row['prompt_id']} has {len(sample)} tokens, {self._max_tokens} fit into actor.mb_spec.max_tokens_per_mb",
            )
        return sample

    def encode(self, row: Mapping[str, Any]) -> Trajectory:
        answer = row.get("completion", row.get("answer"))
        if answer is None and (messages := row.get("messages")) and messages[-1].get("role") == "assistant":
            return self._conversation(row, messages)
        texts = [answer] if isinstance(answer, str) else answer
        if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
            raise MalformedRow(
                f"{row['prompt_id']}: the demonstrated answer must be a string (or a list of them), not {type(answer).__name__}; set answer_key"
            )
        prompt = encode_prompt(row, self._tokenizer)
        parts = [(self._tokens(row, text), i % 2 == 0) for i, text in enumerate(texts)]
        return _trajectory([(prompt, False), *parts, ([self._tokenizer.eos_token_id], True)])

    def _conversation(self, row: Mapping[str, Any], messages: Sequence[Mapping[str, Any]]) -> Trajectory:
        """The messages before the first of the assistant's are the prompt; what the template writes between two answers is not trained on."""
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if answers[0] == 0 or not all(isinstance(messages[i]["content"], str) for i in answers):
            raise MalformedRow(f"{row['prompt_id']}: a conversation begins with other messages than the assistant's, whose content is text")
        parts = [(encode_prompt({**row, "messages": messages[: answers[0]]}, self._tokenizer), False)]
        for here, following in zip(answers, [*answers[1:], len(messages)], strict=True):
            answer = [*self._tokens(row, messages[here]["content"]), self._tokenizer.eos_token_id]
            parts.append((answer, True))
            if following < len(messages):
                try:
                    suffix = suffix_text(self._tokenizer, messages[here + 1 : following], history=messages[:here])
                except ChatTemplateError as error:
                    raise MalformedRow(f"{row['prompt_id']}: {error}") from error
                parts.append((suffix_tokens(self._tokenizer, answer, suffix, stopped=True), False))
        return _trajectory(parts)

    def _tokens(self, row: Mapping[str, Any], text: str) -> list[int]:
        try:
            return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])
        except Exception as error:  # tokenizers raises bare Exception: the row is at fault
            raise MalformedRow(f"{row['prompt_id']}: its answer cannot be tokenized ({error})") from error


def _trajectory(parts: Sequence[tuple[list[int], bool]]) -> Trajectory:
    """Of tokens, and whether they are trained on."""
    ids = np.array([token for tokens, _ in parts for token in tokens], np.int64)
    mask = np.array([is_trained for tokens, is_trained in parts for _ in tokens])
    mask[0] = False  # nothing predicts it
    return Trajectory(ids, mask, np.zeros(len(ids), np.float32), np.full(len(ids), -1, np.int32), 0.0)


def make_sft_batch(samples: list[Trajectory], max_tokens_per_mb: int, world_size: int, cost: tuple[float, float] = (1.0, 0.0)) -> Minibatch:
    """Packed micro-batches for the ranks; the denominator is the number of answer tokens over all of them."""
    groups = [Group(i, {}, [sample]) for i, sample in enumerate(samples)]
    nothing = [[np.zeros(len(sample), np.float32)] for sample in samples]
    batch = make_train_batch(groups, nothing, n_minibatches=1, max_tokens_per_mb=max_tokens_per_mb, world_size=world_size, cost=cost)
    return batch.minibatches[0]
