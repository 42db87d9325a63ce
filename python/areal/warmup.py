"""Supervised training before reinforcement learning, on the same trainer ranks and checked by the same rollout servers."""

from __future__ import annotations

from typing import Any

from areal.cluster import Cluster, RunFailed
from areal.config import GRPOConfig
from areal.evaluation import evaluate
from areal.sft import SFTResult, SupervisedRun, check_rows, load_demonstrations
from areal.workflow.base import RolloutWorkflow


class ServerCheck:
    """Accuracy of the model in training, by answers that the rollout servers sample from its weights.

    All of these weights go under version 0: reinforcement learning starts from the last of them.
    """

    def __init__(self, cluster: Cluster, workflow: RolloutWorkflow, rows: list[dict[str, Any]]) -> None:
        self._cluster, self._workflow, self._rows = cluster, workflow, rows

    async def publish(self) -> None:
        await self._cluster.publish(0, wait=True)

    async def accuracy(self) -> float:
        result = await evaluate(self._cluster.client, self._workflow, self._rows, seed=self._cluster.config.seed)
        if result.accuracy is None:
            raise RunFailed(f"no answer of the warm-up's accuracy check could be scored: {result.failures}")
        return result.accuracy


async def warm_up(config: GRPOConfig, cluster: Cluster, workflow: RolloutWorkflow) -> SFTResult:
    """Trains as ``config.warmup`` says; afterwards the ranks have the optimizer of reinforcement learning, with empty state."""
    assert config.warmup is not None
    run = SupervisedRun(
        config.warmup,
        cluster.trainer,
        load_demonstrations(config, cluster.tokenizer),
        config.actor.mb_spec.max_tokens_per_mb,
        check=ServerCheck(cluster, workflow, check_rows(config, cluster.train_dataset, cluster.tokenizer)),
        report=cluster.log_warmup,
        overlap=not config.deterministic,
    )
    result = await run.run()
    for cause, n in result.dropped.items():
        cluster.drops.add(f"warmup_{cause}", n=n)
    await cluster.trainer.set_optimizer(config.actor.optimizer)
    return result
