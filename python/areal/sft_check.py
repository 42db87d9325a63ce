"""Accuracy checks of supervised training: sampled answers to training prompts, judged by the rollout servers of the run."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any

from areal.config import ConfigError, GRPOConfig
from areal.data import MalformedRow, PromptDataset, encode_prompt
from areal.tasks.arithmetic import THINKING_PREFIX

if TYPE_CHECKING:
    from areal.cluster import Cluster
    from areal.workflow.base import RolloutWorkflow

log = logging.getLogger(__name__)


class WarmupFailed(RuntimeError):
    """Why supervised training cannot go on, in one sentence."""


def check_rows(config: GRPOConfig, train_dataset: Any, tokenizer: Any) -> list[dict[str, Any]]:
    """The prompts of an accuracy check, as ``input_ids`` that end with the forced prefix of the answer.

    They come from the training prompts: held-out ones must not decide when to stop.
    """
    assert config.warmup is not None
    if not isinstance(train_dataset, PromptDataset):
        raise ConfigError("warmup.stop_at_accuracy looks at training prompts again, which an iterator cannot give", "hand over a sequence")
    prefix = config.warmup.forced_prefix or (THINKING_PREFIX if config.train_dataset.type == "arithmetic" else "")
    forced = list(tokenizer(prefix, add_special_tokens=False)["input_ids"]) if prefix else []
    rows = []
    for row in train_dataset.first(config.warmup.eval_samples):
        try:
            prompt = encode_prompt(row, tokenizer)
        except MalformedRow as error:
            log.warning("left out of the accuracy checks: %s", error)
            continue
        rows.append({key: value for key, value in row.items() if key not in ("prompt", "messages")} | {"input_ids": prompt + forced})
    if not rows:
        raise ConfigError(
            "no prompt of train_dataset can be tokenized, so warmup.stop_at_accuracy cannot be checked", "check train_dataset.path"
        )
    return rows


class RolloutCheck:
    """An ``AccuracyCheck`` on the rollout servers of a run.

    All weights of the warm-up have version 0: publishing takes a new number only where policies must be told apart.
    """

    def __init__(self, cluster: Cluster, workflow: RolloutWorkflow, rows: list[dict[str, Any]]) -> None:
        self._cluster, self._workflow, self._rows = cluster, workflow, rows

    async def publish(self) -> None:
        await self._cluster.weights.publish(0, announce=False)

    async def accuracy(self, number: int) -> float:
        from areal.evaluation import EpisodeSlots, evaluate

        await self._cluster.weights.push()
        begin, config = time.time(), self._cluster.config
        result = await evaluate(
            self._cluster.client,
            self._workflow,
            self._rows,
            seed=config.seed + number,
            slots=EpisodeSlots(config),
            episode_timeout=config.rollout.episode_timeout,
        )
        self._cluster.stats.span("controller", "evaluation", begin, time.time())
        if result.accuracy is None:
            causes = ", ".join(f"{n} {cause}" for cause, n in result.failures.items())
            raise WarmupFailed(f"none of the {len(self._rows)} answers of an accuracy check of the warm-up could be scored ({causes})")
        return result.accuracy
