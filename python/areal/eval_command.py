"""``areal eval``: one model on held-out prompts, on rollout servers and reward workers of its own, without a trainer."""

from __future__ import annotations

import asyncio
import tempfile
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

from areal.cluster import first_error
from areal.config import ConfigError, GRPOConfig
from areal.evaluation import Evaluation, evaluate, held_out_rows
from areal.inference.client import RolloutClient
from areal.inference.servers import start_server
from areal.reward import RewardService
from areal.run_folder import load_tokenizer
from areal.workflow.build import build_workflow


def run_eval(config: GRPOConfig) -> Evaluation:
    """Evaluates the model in ``actor.path`` as a run of this config would."""
    rows = held_out_rows(config)
    if not rows:
        raise ConfigError("there are no held-out prompts to evaluate on", "set valid_dataset, and evaluator.n_prompts above 0")
    try:
        return asyncio.run(_run(config, Path(config.actor.path).expanduser(), rows))
    except BaseExceptionGroup as group:  # the boundary of the loop's tasks: the first error is the command's
        raise first_error(group) from group


async def _run(config: GRPOConfig, model_folder: Path, rows: list[dict[str, Any]]) -> Evaluation:
    tokenizer = load_tokenizer(model_folder)
    workflow = build_workflow(config, tokenizer, evaluation=True)
    async with AsyncExitStack() as resources:
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
        return await evaluate(client, workflow, rows, seed=config.seed, tokenizer=tokenizer)
