"""Training on preferences (direct preference optimisation, arXiv 2305.18290) on the engine that also does reinforcement learning: ``DPOTrainer``.

Every step takes ``dpo.batch_size`` pairs of answers to one prompt. The loss of a pair is -log sigmoid of how much more the actor prefers the
chosen answer than the reference does (``algo.loss.dpo_loss``), summed over the global batch and divided by its number of pairs. The reference
is ``ref.path``, else the model at the start: a frozen copy beside the actor or, with ``actor.lora``, the actor without its adapters.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from areal.config import ConfigError, GRPOConfig, OptimizerConfig
from areal.config_check_supervised import check_dpo_config, check_dpo_machine
from areal.data import PromptDataset
from areal.metrics import step_meters
from areal.preferences import Pair, Preferences, load_preferences, make_dpo_batch, preference_rows
from areal.recover_supervised import DPOState
from areal.supervised import SupervisedTrainer
from areal.types import Minibatch

_LOOKED_AT = 8
"""Rows that are looked at before anything starts."""


@dataclass(slots=True)
class DPOResult:
    """Of the last step, but for the counts."""

    steps: int = 0
    pairs: int = 0
    tokens: int = 0
    """Answer tokens trained on."""
    seconds: float = 0.0
    loss: float = float("nan")
    """Per pair; log 2 where actor and reference are the same."""
    preference_accuracy: float | None = None
    """Pairs of which the actor prefers the chosen answer more than the reference does."""
    margin: float | None = None
    """Mean reward of the chosen answers - that of the rejected ones."""
    dropped: dict[str, int] = field(default_factory=dict)


class DPOTrainer(SupervisedTrainer[DPOResult, DPOState]):
    """``with DPOTrainer(config) as trainer: trainer.train()``; the result is the Hugging Face checkpoint ``run_folder/checkpoints/final``.

    ``config.dpo`` is the recipe, ``config.actor`` model and optimizer, ``config.train_dataset`` says where rows {prompt, chosen, rejected} are;
    what concerns rollouts is ignored. ``metrics.jsonl`` has a row a step.

    Args:
        train_dataset: a sequence of such rows in place of those of the config.

    Raises:
        ConfigError: the configuration has no dpo.
    """

    _state = DPOState
    _takes_preferences = True

    def __init__(self, config: GRPOConfig, train_dataset: Any = None) -> None:
        if config.dpo is None:
            raise ConfigError("DPOTrainer needs the recipe under the key 'dpo'", "add dpo: {beta: 0.1, total_steps: ...}")
        super().__init__(config, train_dataset)
        self._recipe = config.dpo

    def _check(self) -> PromptDataset:
        check_dpo_config(self.config)
        check_dpo_machine(self.config, self._given)
        rows = preference_rows(self.config, self._cluster.given_rows[0])
        _check_rows(rows.first(_LOOKED_AT))
        return rows

    @property
    def _optimizer(self) -> OptimizerConfig:
        return self.config.actor.optimizer

    async def _learn(self, resumed: DPOState | None) -> DPOResult:
        cluster, recipe, result = self._cluster, self._recipe, DPOResult()
        preferences = load_preferences(self.config, cluster.tokenizer, self._rows)
        if resumed is not None:
            result = DPOResult(**resumed.result)
            preferences.load_state_dict(resumed.rows)
        begin = time.monotonic() - result.seconds
        place, batch = self._next_batch(preferences)
        while result.steps < recipe.total_steps:
            started = time.time()
            stepping = asyncio.create_task(cluster.trainer.dpo_step(batch, recipe, self._lr_scale(result.steps)))
            await asyncio.sleep(0)  # the ranks get this batch before the next one is made
            n_pairs, (place, batch) = int(batch.denominator), self._next_batch(preferences)
            stats = await stepping
            cluster.stats.span("trainer 0", "training", started, time.time())
            result.steps, result.pairs, result.tokens = result.steps + 1, result.pairs + n_pairs, result.tokens + stats["n_tokens"]
            result.seconds, result.loss = time.monotonic() - begin, float(stats["loss"])
            result.preference_accuracy, result.margin = stats.get("preference_accuracy"), stats.get("margin")
            row = self._row(result, stats)
            cluster.stats.step(row)
            cluster.display.warmup(row, "dpo")
            state = {"result": asdict(result), "rows": place, "progress": {}}
            await self._stepped(result.steps, recipe.total_steps, state)
        result.dropped = dict(preferences.dropped)
        return result

    def _next_batch(self, preferences: Preferences) -> tuple[dict[str, Any], Minibatch]:
        """With the place in the rows before it."""
        place = preferences.state_dict()
        pairs: list[Pair] = preferences.pairs(self._recipe.batch_size)
        trainer = self._cluster.trainer
        return place, make_dpo_batch(pairs, self.config.actor.mb_spec.max_tokens_per_mb, trainer.n_data_ranks, trainer.sequence_cost)

    def _lr_scale(self, step: int) -> float:
        """Share of the configured rates at the step numbered ``step`` from 0: linear up over the warm-up, linear down to ``lr_end``."""
        warmed = min(1.0, (step + 1) / max(1, self.config.actor.optimizer.warmup_steps))
        return warmed * (1 - (1 - self._recipe.lr_end) * step / self._recipe.total_steps)

    def _row(self, result: DPOResult, stats: Mapping[str, Any]) -> dict[str, Any]:
        kept = ("loss", "preference_accuracy", "margin", "chosen_reward", "rejected_reward", "entropy", "grad_norm", "lr_scale")
        return {
            "step": result.steps,
            "total_steps": self._recipe.total_steps,
            **{key: stats.get(key) for key in (*kept, "skipped_nonfinite")},
            "pairs": result.pairs,
            "tokens": result.tokens,
            "tokens_per_s": result.tokens / result.seconds if result.seconds else 0.0,
            "seconds": result.seconds,
            **step_meters(stats),
        }

    def _line(self, result: DPOResult) -> str:
        accuracy = "–" if result.preference_accuracy is None else f"{100 * result.preference_accuracy:.1f}%"
        margin = "–" if result.margin is None else f"{result.margin:.3f}"
        return (
            f"{result.steps} steps in {result.seconds:.0f} s, {result.pairs} pairs; of the last step: loss {result.loss:.4f}, "
            f"{accuracy} preferred as they should be, margin {margin}"
        )


def _check_rows(rows: list[dict[str, Any]]) -> None:
    if rows and not any("chosen" in row and "rejected" in row for row in rows):
        have = ", ".join(key for key in rows[0] if key not in ("prompt_id", "epoch"))
        raise ConfigError(
            f"train_dataset: none of the first {len(rows)} rows has 'chosen' and 'rejected' (the first one has {have})",
            "give rows {prompt, chosen, rejected}",
        )
