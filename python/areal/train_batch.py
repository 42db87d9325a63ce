"""The batch of a train step: packed, judged by the other models on the ranks where a run has some, and given its advantages."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from areal.algo.advantage import Scores, Targets, compute_targets
from areal.config import ActorConfig, CriticConfig, GRPOConfig
from areal.packer import collect, fill, make_train_batch
from areal.types import Group, TrainBatch


class Scorer(Protocol):
    """The trainer, ``trainer.worker.TrainerHandle``, as this module sees it."""

    @property
    def n_data_ranks(self) -> int:
        """Ranks that get micro-batches of their own."""
        ...

    @property
    def sequence_cost(self) -> tuple[float, float]:
        """By which the ranks get like shares of a batch, as of ``plan_microbatches``."""
        ...

    async def score(self, batch: TrainBatch, logprobs: bool = False) -> dict[str, Any]:
        """ref_logprobs, values and logprobs by micro-batch, and spans."""
        ...


class PreparedBatch(NamedTuple):
    batch: TrainBatch
    row: dict[str, float | None]
    """For the row of the step: value_mean, return_mean and explained_variance (of returns by values) with a critic, kl_reward (mean of a
    token's KL) with the KL in the reward."""
    spans: list[tuple[str, float, float]]
    """What the ranks did for it."""


async def prepare_batch(config: GRPOConfig, trainer: Scorer, trained: Sequence[Group], answered: Sequence[Group]) -> PreparedBatch:
    """``trained`` as ``trainer.train_step`` takes it; ``answered`` are the same groups before ``without_truncated``."""
    batch = await asyncio.to_thread(_pack, config, trained, trainer.n_data_ranks, trainer.sequence_cost)
    scored: dict[str, Any] = {}
    if config.critic is not None or config.uses_ref:
        scored = await trainer.score(batch, logprobs=_recomputes(config))
    return await asyncio.to_thread(_complete, config, batch, trained, answered, scored)


def _recomputes(config: GRPOConfig) -> bool:
    """Whether the KL in the reward is that of the policy as it is before the step, not that of the one that sampled."""
    actor = config.actor
    return actor.kl_in_reward and actor.recompute_logprob and actor.prox_logp_method == "recompute"


def _pack(config: GRPOConfig, groups: Sequence[Group], world_size: int, cost: tuple[float, float]) -> TrainBatch:
    def cut(section: ActorConfig | CriticConfig) -> TrainBatch:
        return make_train_batch(
            groups,
            None,
            n_minibatches=section.ppo_n_minibatches,
            max_tokens_per_mb=section.mb_spec.max_tokens_per_mb,
            world_size=world_size,
            loss_normalization=config.actor.loss_normalization,
            max_new_tokens=config.gconfig.max_new_tokens,
            cost=cost,
        )

    batch = cut(config.actor)
    if config.critic is not None and not config.critic.shared:
        batch.critic_minibatches = cut(config.critic).minibatches
    return batch


def _complete(
    config: GRPOConfig, batch: TrainBatch, trained: Sequence[Group], answered: Sequence[Group], scored: dict[str, Any]
) -> PreparedBatch:
    cuts = {"values": batch.critic_minibatches or batch.minibatches}
    found = {name: collect(cuts.get(name, batch.minibatches), parts) for name, parts in scored.items() if name != "spans"}
    scores = Scores(**found)
    targets = compute_targets(trained, config.actor, config.gconfig.max_new_tokens, answered=answered, scores=scores)
    fill(batch.minibatches, "advantages", targets.advantages)
    if scores.ref_logprobs is not None and config.actor.kl_in == "loss":
        fill(batch.minibatches, "ref_logprobs", scores.ref_logprobs)
    if scores.logprobs is not None:
        fill(batch.minibatches[1:], "proximal_logprobs", scores.logprobs)  # the first one's are those of its training pass
    if scores.values is not None:
        assert targets.returns is not None
        fill(cuts["values"], "values", scores.values)
        fill(cuts["values"], "returns", targets.returns)
    return PreparedBatch(batch, _row(trained, scores, targets), [tuple(span) for span in scored.get("spans", ())])


def _row(groups: Sequence[Group], scores: Scores, targets: Targets) -> dict[str, float | None]:
    mask = np.concatenate([t.loss_mask for group in groups for t in group.trajectories])
    row: dict[str, float | None] = {}
    if not mask.any():
        return row
    if targets.kl is not None:
        row["kl_reward"] = float(np.concatenate(targets.kl)[mask].mean(dtype=np.float64))
    if scores.values is not None and targets.returns is not None:
        values, returns = (np.concatenate(x)[mask].astype(np.float64) for x in (scores.values, targets.returns))
        spread = returns.var()
        row |= {"value_mean": float(values.mean()), "return_mean": float(returns.mean())}
        row["explained_variance"] = float(1 - (returns - values).var() / spread) if spread else None
    return row
