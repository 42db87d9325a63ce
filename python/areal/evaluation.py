"""Held-out accuracy and length: any workflow, one episode a prompt, on the same rollout servers as training."""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from areal.config import GRPOConfig
from areal.data import PromptDataset, load_dataset
from areal.inference.client import RolloutClient, Route
from areal.runner import run_episode
from areal.types import Trajectory
from areal.workflow.base import EpisodeDropped, RolloutWorkflow

_MAX_IN_FLIGHT = 1024


@dataclass(frozen=True, slots=True)
class SampleAnswer:
    prompt: str
    answer: str
    reward: float


@dataclass(frozen=True, slots=True)
class Evaluation:
    """``accuracy`` is the share of scored answers with a positive reward, ``length`` their mean number of generated tokens.

    An episode that failed is in ``failures`` by its cause and in neither of the means: a failure is not a wrong answer. The means
    are None when nothing was scored.
    """

    accuracy: float | None
    length: float | None
    reward: float | None
    n_scored: int
    failures: dict[str, int] = field(default_factory=dict)
    samples: list[SampleAnswer] = field(default_factory=list)


def held_out_rows(config: GRPOConfig, given: Any = None) -> list[dict[str, Any]]:
    """The prompts of every evaluation of a run, ``evaluator.n_prompts`` at most; none when the config names no held-out data."""
    n = config.evaluator.n_prompts
    if given is not None:
        if isinstance(given, Iterator) and not isinstance(given, PromptDataset):
            return [{"prompt_id": f"valid_dataset/{i}", **row} for i, row in enumerate(itertools.islice(given, n))]
        rows = given if isinstance(given, PromptDataset) else load_dataset(config.held_out, config.seed, "valid", given=given)
        return rows.first(n)
    source = config.valid_dataset or (config.train_dataset if config.train_dataset.type == "arithmetic" else None)
    return load_dataset(source, config.seed, "valid").first(n) if source is not None and n else []


async def evaluate(
    client: RolloutClient, workflow: RolloutWorkflow, rows: Sequence[dict[str, Any]], *, seed: int, tokenizer: Any = None, n_show: int = 5
) -> Evaluation:
    """Runs one episode a row, all in flight together; ``n_show`` of them come back as text."""
    slots = asyncio.Semaphore(_MAX_IN_FLIGHT)
    failures: Counter[str] = Counter()

    async def one(row: dict[str, Any]) -> list[Trajectory] | None:
        async with slots:
            try:
                return await run_episode(client, workflow, row, seed=seed, route=Route())
            except EpisodeDropped as dropped:
                failures[dropped.cause] += 1
                return None

    async with asyncio.TaskGroup() as tasks:
        running = [tasks.create_task(one(row)) for row in rows]
    scored = [episode for task in running if (episode := task.result()) is not None]
    if not scored:
        return Evaluation(None, None, None, 0, dict(failures))
    rewards = np.array([episode[-1].reward for episode in scored])
    return Evaluation(
        accuracy=float((rewards > 0).mean()),
        length=float(np.mean([sum(t.loss_mask.sum() for t in episode) for episode in scored])),
        reward=float(rewards.mean()),
        n_scored=len(scored),
        failures=dict(failures),
        samples=[_as_text(episode[-1], tokenizer) for episode in scored[:n_show]] if tokenizer is not None else [],
    )


def _as_text(trajectory: Trajectory, tokenizer: Any) -> SampleAnswer:
    first = int(trajectory.loss_mask.argmax())
    prompt, answer = (tokenizer.decode(ids.tolist()) for ids in (trajectory.input_ids[:first], trajectory.input_ids[first:]))
    return SampleAnswer(prompt, answer, trajectory.reward)
