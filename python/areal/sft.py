"""Supervised training on demonstrations, on the engine that also does reinforcement learning: ``SFTTrainer``, and the warm-up of a run.

The loss is the negative log-likelihood of answer tokens (end-of-sequence included), summed over the global batch and divided by the
number of its answer tokens. The rates fall linearly; with ``stop_at_accuracy`` they go on falling, to nearly nothing, from the moment
when sampled answers are that accurate, and training ends there. Answers are checked while training goes on.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from areal.config import ConfigError, GRPOConfig, OptimizerConfig, SFTConfig
from areal.data import MalformedRow, PromptDataset, encode_prompt, load_dataset
from areal.packer import make_train_batch
from areal.tasks.arithmetic import THINKING_PREFIX
from areal.types import Group, Minibatch, Trajectory

_MAX_DROPPED_IN_A_ROW = 1000


class SupervisedEngine(Protocol):
    """``trainer.worker.TrainerHandle`` as this module sees it."""

    @property
    def world_size(self) -> int: ...
    async def set_optimizer(self, config: OptimizerConfig) -> None:
        """A new optimizer with empty state."""
        ...

    def sft_step(self, minibatch: Minibatch, lr_scale: float) -> Coroutine[Any, Any, Mapping[str, Any]]:
        """One optimizer step at ``lr_scale`` times the configured rates; ``loss`` (per token) and ``grad_norm`` are in the answer."""
        ...


class AccuracyCheck(Protocol):
    """Judges the model in training by its sampled answers."""

    async def publish(self) -> None:
        """Takes the weights as they are now; training waits for it."""
        ...

    def accuracy(self) -> Coroutine[Any, Any, float]:
        """Accuracy of those weights, in [0, 1]; training goes on meanwhile."""
        ...


class Demonstrations:
    """Tokenized demonstrations without end.

    A row's answer is its ``completion``, else its ``answer``. Rows without one, and samples longer than ``max_tokens``, are dropped and
    counted in ``dropped``.
    """

    def __init__(self, rows: PromptDataset, tokenizer: Any, max_tokens: int) -> None:
        if tokenizer.eos_token_id is None:
            raise ConfigError(
                "supervised training needs a tokenizer with an end-of-sequence token", "set eos_token in tokenizer_config.json"
            )
        self.rows, self._tokenizer, self._max_tokens = rows, tokenizer, max_tokens
        self._dropped: Counter[str] = Counter()

    @property
    def dropped(self) -> Counter[str]:
        """By cause: malformed_row, too_long."""
        return self.rows.dropped + self._dropped

    def batch(self, n: int) -> list[Trajectory]:
        return [self.next() for _ in range(n)]

    def next(self) -> Trajectory:
        """The next usable sample; ``loss_mask`` is true on the answer.

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
            if len(sample) <= self._max_tokens:
                return sample
            self._dropped["too_long"] += 1
            why = f"{row['prompt_id']} has {len(sample)} tokens, {self._max_tokens} fit into actor.mb_spec.max_tokens_per_mb"
        raise ConfigError(f"{_MAX_DROPPED_IN_A_ROW} demonstrations in a row were unusable, the last because {why}")

    def encode(self, row: Mapping[str, Any]) -> Trajectory:
        answer = row.get("completion", row.get("answer"))
        if not isinstance(answer, str):
            raise MalformedRow(f"{row['prompt_id']}: the demonstrated answer must be a string, not {type(answer).__name__}; set answer_key")
        prompt = encode_prompt(row, self._tokenizer)
        try:
            answer_ids = self._tokenizer(answer, add_special_tokens=False)["input_ids"]
        except Exception as error:  # tokenizers raises bare Exception: the row is at fault
            raise MalformedRow(f"{row['prompt_id']}: its answer cannot be tokenized ({error})") from error
        ids = np.array([*prompt, *answer_ids, self._tokenizer.eos_token_id], np.int64)
        mask = np.arange(len(ids)) >= max(1, len(prompt))
        return Trajectory(ids, mask, np.zeros(len(ids), np.float32), np.full(len(ids), -1, np.int32), 0.0)


def make_sft_batch(samples: list[Trajectory], max_tokens_per_mb: int, world_size: int) -> Minibatch:
    """Packed micro-batches for the ranks; the denominator is the number of answer tokens over all of them."""
    groups = [Group(i, {}, [sample]) for i, sample in enumerate(samples)]
    nothing = [[np.zeros(len(sample), np.float32)] for sample in samples]
    batch = make_train_batch(groups, nothing, n_minibatches=1, max_tokens_per_mb=max_tokens_per_mb, world_size=world_size)
    return batch.minibatches[0]


@dataclass
class RateSchedule:
    """Linear from 1 to ``lr_end`` over ``total_steps``; after ``cool_down(s)`` from there to ``cooldown_lr_end`` in ``cooldown_steps``."""

    config: SFTConfig
    _cooling_since: int | None = None
    _cooling_from: float = 1.0

    @property
    def cooling(self) -> bool:
        return self._cooling_since is not None

    @property
    def n_steps(self) -> int:
        """Steps in all, as far as is known."""
        if self._cooling_since is None:
            return self.config.total_steps
        return self._cooling_since + self.config.cooldown_steps

    def scale(self, step: int) -> float:
        """Share of the configured rates at the step numbered ``step`` from 0."""
        if self._cooling_since is None:
            return 1 - (1 - self.config.lr_end) * step / self.config.total_steps
        done = (step - self._cooling_since) / self.config.cooldown_steps
        return self._cooling_from + (min(self._cooling_from, self.config.cooldown_lr_end) - self._cooling_from) * min(1.0, done)

    def cool_down(self, step: int) -> None:
        self._cooling_from, self._cooling_since = self.scale(step), step


@dataclass(slots=True)
class SFTResult:
    steps: int = 0
    tokens: int = 0
    """Answer tokens trained on."""
    seconds: float = 0.0
    loss: float = float("nan")
    """Of the last step, per token."""
    accuracy: float | None = None
    """Of the last finished check."""
    reached: bool = False
    """Whether stop_at_accuracy was reached."""
    dropped: dict[str, int] = field(default_factory=dict)


class SupervisedRun:
    """One supervised training run: ``await SupervisedRun(...).run()``.

    Args:
        config: the recipe.
        max_tokens_per_mb: capacity of a micro-batch.
        check: judges answers every ``eval_every`` steps when ``stop_at_accuracy`` is set.
        report: called after every step with {step, total_steps, phase, loss, grad_norm, lr_scale, tokens, tokens_per_s, seconds}, and
            accuracy when one has just been measured.
        overlap: go on training while answers are checked; false where runs must repeat bit for bit.
    """

    def __init__(
        self,
        config: SFTConfig,
        engine: SupervisedEngine,
        demonstrations: Demonstrations,
        max_tokens_per_mb: int,
        *,
        check: AccuracyCheck | None = None,
        report: Callable[[dict[str, Any]], None] = lambda row: None,
        overlap: bool = True,
    ) -> None:
        if config.stop_at_accuracy is not None and check is None:
            raise ConfigError(
                "warmup.stop_at_accuracy needs rollout servers, which this run does not have", "set warmup.stop_at_accuracy=null"
            )
        self.config, self.schedule, self.result = config, RateSchedule(config), SFTResult()
        self._engine, self._demonstrations, self._capacity = engine, demonstrations, max_tokens_per_mb
        self._check, self._report, self._overlap = check, report, overlap
        self._checking: asyncio.Task[float] | None = None

    async def run(self) -> SFTResult:
        begin = time.monotonic()
        await self._engine.set_optimizer(self.config.optimizer)
        batch = self._next_batch()
        try:
            while self.result.steps < self.schedule.n_steps:
                stepping = asyncio.create_task(self._engine.sft_step(batch, self.schedule.scale(self.result.steps)))
                await asyncio.sleep(0)  # the ranks get this batch before the next one is made
                tokens, batch = batch.denominator, self._next_batch()
                stats = await stepping
                self.result.steps += 1
                self.result.tokens += int(tokens)
                self.result.loss = float(stats["loss"])
                measured = await self._look_at_check()
                self.result.seconds = time.monotonic() - begin
                self._report(self._row(stats) | ({} if measured is None else {"accuracy": measured}))
        finally:
            if self._checking is not None:
                self._checking.cancel()
        self.result.dropped = dict(self._demonstrations.dropped)
        return self.result

    def _next_batch(self) -> Minibatch:
        return make_sft_batch(self._demonstrations.batch(self.config.batch_size), self._capacity, self._engine.world_size)

    async def _look_at_check(self) -> float | None:
        """Starts a check when one is due, acts on one that is finished and returns its accuracy."""
        target = self.config.stop_at_accuracy
        if target is None or self._check is None or self.schedule.cooling:
            return None
        if self._checking is None and self.result.steps % self.config.eval_every == 0:
            await self._check.publish()
            self._checking = asyncio.create_task(self._check.accuracy())
        if self._checking is None or not (self._checking.done() or not self._overlap):
            return None
        accuracy, self._checking = await self._checking, None
        self.result.accuracy = accuracy
        if accuracy >= target:
            self.result.reached = True
            self.schedule.cool_down(self.result.steps)
        return accuracy

    def _row(self, stats: Mapping[str, Any]) -> dict[str, Any]:
        result = self.result
        return {
            "step": result.steps,
            "total_steps": self.schedule.n_steps,
            "phase": "cool-down" if self.schedule.cooling else "training",
            "loss": result.loss,
            "grad_norm": stats.get("grad_norm"),
            "lr_scale": self.schedule.scale(result.steps - 1),
            "tokens": result.tokens,
            "tokens_per_s": result.tokens / result.seconds if result.seconds else 0.0,
            "seconds": result.seconds,
        }


def load_demonstrations(config: GRPOConfig, tokenizer: Any) -> Demonstrations:
    """Those of ``warmup.dataset``, else of ``train_dataset``."""
    assert config.warmup is not None
    dataset = config.warmup.dataset or config.train_dataset
    key = "warmup.dataset" if config.warmup.dataset else "train_dataset"
    rows = load_dataset(dataset, seed=config.seed, split="demonstrations", key=key)
    return Demonstrations(rows, tokenizer, config.actor.mb_spec.max_tokens_per_mb)


def check_rows(config: GRPOConfig, train_dataset: PromptDataset, tokenizer: Any) -> list[dict[str, Any]]:
    """The prompts of an accuracy check, as ``input_ids`` that end with the forced prefix of the answer.

    They come from the training prompts: held-out ones must not decide when to stop.
    """
    assert config.warmup is not None
    prefix = config.warmup.forced_prefix or (THINKING_PREFIX if config.train_dataset.type == "arithmetic" else "")
    forced = list(tokenizer(prefix, add_special_tokens=False)["input_ids"]) if prefix else []
    rows = []
    for row in train_dataset.first(config.warmup.eval_samples):
        prompt = encode_prompt(row, tokenizer)
        rows.append({key: value for key, value in row.items() if key not in ("prompt", "messages")} | {"input_ids": prompt + forced})
    return rows
