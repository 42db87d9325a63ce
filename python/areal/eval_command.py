"""``areal eval``: one model on held-out prompts, on rollout servers and reward workers of its own, without a trainer."""

from __future__ import annotations

import asyncio
import json
import tempfile
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, BinaryIO, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from areal.cluster import first_error
from areal.config import ConfigError, GRPOConfig
from areal.evaluation import EpisodeResult, EpisodeSlots, Evaluation, evaluate, held_out_rows
from areal.inference.client import RolloutClient
from areal.inference.servers import start_server
from areal.reward import RewardService
from areal.run_folder import load_tokenizer
from areal.threads import use_daemon_threads
from areal.workflow.build import build_workflow
from areal.workflow.user_code import end_others


def run_eval(config: GRPOConfig, out: Path | None = None) -> Evaluation:
    """Evaluates the model in ``actor.path`` as a run of this config would; every episode goes to ``out`` as a line of JSON."""
    rows = held_out_rows(config)
    if not rows:
        raise ConfigError("there are no held-out prompts to evaluate on", "set valid_dataset, and evaluator.n_prompts above 0")
    try:
        with Watcher(len(rows) * config.evaluator.n_samples, out) as watcher:
            return asyncio.run(_run(config, Path(config.actor.path).expanduser(), rows, watcher))
    except BaseExceptionGroup as group:  # the boundary of the loop's tasks: the first error is the command's
        raise first_error(group) from group


async def _run(config: GRPOConfig, model_folder: Path, rows: list[dict[str, Any]], watcher: Watcher) -> Evaluation:
    use_daemon_threads()
    tokenizer = load_tokenizer(model_folder)
    workflow = build_workflow(config, tokenizer, evaluation=True)
    async with AsyncExitStack() as resources:
        resources.push_async_callback(end_others)
        logs = Path(resources.enter_context(tempfile.TemporaryDirectory(prefix="areal_eval_")))
        rewards = RewardService(config.reward.workers, config.reward.timeout, logs, config.reward.max_concurrent)
        await resources.enter_async_context(rewards)
        client = RolloutClient(config.rollout.new(max_restarts=0))  # nobody replaces a server here
        resources.push_async_callback(client.close)
        try:
            async with asyncio.TaskGroup() as starting:
                started = [starting.create_task(start_server(config, model_folder, logs, i)) for i in range(config.layout.n_servers)]
        finally:
            for task in started:
                if not task.cancelled() and task.exception() is None:
                    resources.callback(task.result().terminate)
        for task in started:
            client.add_server(task.result().url, task.result().process)
        return await evaluate(
            client,
            workflow,
            rows,
            seed=config.seed,
            slots=EpisodeSlots(config),
            episode_timeout=config.rollout.episode_timeout,
            n_samples=config.evaluator.n_samples,
            tokenizer=tokenizer,
            on_episode=watcher,
        )


class Watcher:
    """Told of every episode that ended: a progress bar where stderr is a terminal, and a file where one is wanted."""

    def __init__(self, n_episodes: int, out: Path | None) -> None:
        console = Console(stderr=True, highlight=False)
        self._progress = Progress(
            TextColumn("evaluating"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal or console.is_dumb_terminal,
            transient=True,
        )
        self._task = self._progress.add_task("", total=n_episodes)
        self._out = out
        self._file: BinaryIO | None = None
        self._n_right = self._n_failed = self._n_done = 0

    def __enter__(self) -> Self:
        if self._out is not None:
            try:
                self._file = self._out.open("wb")
            except OSError as error:
                raise ConfigError(f"--out: the file '{self._out}' cannot be written ({error.strerror})", "name one that can") from error
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()
        if self._file is not None:
            self._file.close()

    def __call__(self, episode: EpisodeResult) -> None:
        self._n_done += 1
        self._n_failed += bool(episode.failure)
        self._n_right += episode.right
        failed = f", {self._n_failed} failed" if self._n_failed else ""
        share = 100 * self._n_right / max(1, self._n_done - self._n_failed)
        self._progress.update(self._task, completed=self._n_done, description=f"{share:.1f}% right{failed}")
        if self._file is not None:  # whole lines at any moment: a long evaluation may be cut short
            line = json.dumps(episode_line(episode), default=str, ensure_ascii=False)
            self._file.write(f"{line}\n".encode())
            self._file.flush()


def episode_line(episode: EpisodeResult) -> dict[str, Any]:
    """What ``--out`` holds of an episode, for ``areal score`` among others: the row's own columns, then ours."""
    if episode.failure:
        return {**episode.row, "sample": episode.sample, "failure": {"cause": episode.failure, "message": episode.message}}
    ours = ("sample", "completion", "reward", "length", "truncated", "final_answer")
    return {"prompt": episode.prompt, **episode.row} | {name: getattr(episode, name) for name in ours}
