"""Episodes on held-out prompts: any workflow, any number of samples a prompt, on the same rollout servers as training.

Who waits on whom: an evaluation that runs beside training waits for its own episodes before it starts more (``EpisodeSlots``), so that
the servers' queues stay free for training; an episode ends after ``rollout.episode_timeout`` at the latest.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from areal.config import GRPOConfig
from areal.data import PromptDataset, load_dataset
from areal.evaluation_scores import EpisodeResult, Evaluation, SampleAnswer, answer_class, summarize
from areal.inference.client import RolloutClient, Route
from areal.runner import run_episode
from areal.types import Trajectory
from areal.workflow.base import EpisodeDropped, RolloutWorkflow

__all__ = ["EpisodeResult", "EpisodeSlots", "Evaluation", "SampleAnswer", "evaluate", "held_out_rows"]

_QUEUE = 4
"""Episodes in flight for each sequence that the servers decode at once, where nothing else is to be generated: some wait for scores."""


class EpisodeSlots:
    """Bounds the episodes that an evaluation has in flight; the bound may change meanwhile."""

    def __init__(self, config: GRPOConfig) -> None:
        slots = config.rollout.max_running_requests * config.layout.n_servers
        self._alone = _QUEUE * slots
        self._beside = config.evaluator.max_concurrent or max(1, slots // 4)
        self.limit = self._alone
        self._taken = 0
        self._changed = asyncio.Event()

    def share(self) -> None:
        """From now on the servers are training's first: ``evaluator.max_concurrent`` episodes at most."""
        self.limit = self._beside

    def have_all(self) -> None:
        """From now on nobody else generates."""
        self.limit = self._alone
        self._changed.set()

    async def take(self) -> None:
        while self._taken >= self.limit:
            self._changed.clear()
            await self._changed.wait()
        self._taken += 1

    def give_back(self) -> None:
        self._taken -= 1
        self._changed.set()


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
    client: RolloutClient,
    workflow: RolloutWorkflow,
    rows: Sequence[dict[str, Any]],
    *,
    seed: int,
    slots: EpisodeSlots,
    episode_timeout: float,
    n_samples: int = 1,
    tokenizer: Any = None,
    n_show: int = 5,
    on_episode: Callable[[EpisodeResult], None] | None = None,
) -> Evaluation:
    """Runs ``n_samples`` episodes a row, each with its own random numbers; those of a row go to one server.

    Args:
        slots: how many are in flight.
        episode_timeout: seconds an episode may take before it fails (``episode_timeout``).
        tokenizer: makes text of answers; without one there is none, and answers without a ``final_answer`` are equal if their tokens are.
        n_show: as many episodes come back as text.
        on_episode: called with each one that ended, in the order of their ends; with text if there is a tokenizer.
    """
    begin = time.monotonic()
    results: list[list[EpisodeResult]] = [[EpisodeResult(row, sample, "not_finished") for sample in range(n_samples)] for row in rows]
    shown: dict[int, SampleAnswer] = {}

    async def one(index: int, sample: int, route: Route) -> None:
        row = rows[index]
        try:
            async with asyncio.timeout(episode_timeout):
                episode = await run_episode(client, workflow, row, seed=seed, sample=sample, route=route)
        except (EpisodeDropped, TimeoutError) as error:  # run_episode itself raises no TimeoutError: that is the limit above
            cause = error.cause if isinstance(error, EpisodeDropped) else "episode_timeout"
            result = EpisodeResult(row, sample, cause, str(error) or f"it was not finished after {episode_timeout:g} s")
        else:
            result = _result(row, sample, episode, tokenizer, with_text=on_episode is not None, votes=n_samples > 2)
            if tokenizer is not None and sample == 0 and index < 4 * n_show:  # the first ones may fail
                shown[index] = _as_text(episode[-1], tokenizer)
        results[index][sample] = replace(result, prompt="", completion="")
        if on_episode is not None:
            on_episode(result)

    async with asyncio.TaskGroup() as tasks:
        for index in range(len(rows)):
            route = Route()
            for sample in range(n_samples):
                await slots.take()
                tasks.create_task(one(index, sample, route)).add_done_callback(lambda _: slots.give_back())
    return summarize(results, n_samples, time.monotonic() - begin, [shown[index] for index in sorted(shown)[:n_show]])


def _result(row: dict[str, Any], sample: int, episode: list[Trajectory], tokenizer: Any, *, with_text: bool, votes: bool) -> EpisodeResult:
    last, answer = episode[-1], episode[-1].final_answer
    prompt = completion = ""
    if tokenizer is not None and (with_text or (votes and answer is None)):
        begin, end = _last_answer(last)
        prompt, completion = (
            tokenizer.decode(ids.tolist(), skip_special_tokens=True) for ids in (last.input_ids[:begin], last.input_ids[begin:end])
        )
    if answer is None and (votes or with_text):
        answer = answer_class(completion) if tokenizer is not None else str(last.input_ids[slice(*_last_answer(last))].tolist())
    versions = np.concatenate([t.versions[t.loss_mask] for t in episode])
    return EpisodeResult(
        row=row,
        sample=sample,
        reward=last.reward,
        length=len(versions),
        truncated=any(t.truncated for t in episode),
        final_answer=answer,
        version_min=int(versions.min()),
        version_max=int(versions.max()),
        prompt=prompt,
        completion=completion,
    )


def _last_answer(trajectory: Trajectory) -> tuple[int, int]:
    """Where the last run of loss tokens begins and ends."""
    end = len(trajectory) - int(trajectory.loss_mask[::-1].argmax())
    masked = np.flatnonzero(~trajectory.loss_mask[:end])
    return int(masked[-1]) + 1 if masked.size else 0, end


def _as_text(trajectory: Trajectory, tokenizer: Any) -> SampleAnswer:
    """The whole sequence: what the model was asked first, and all that came of it."""
    first = int(trajectory.loss_mask.argmax())
    prompt, answer = (tokenizer.decode(ids.tolist()) for ids in (trajectory.input_ids[:first], trajectory.input_ids[first:]))
    return SampleAnswer(prompt, answer, trajectory.reward)
