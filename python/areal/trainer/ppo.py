"""The policy's loss of one micro-batch, by the actor's configuration, and its gradients."""

from __future__ import annotations

from torch import Tensor

from areal.config import ActorConfig
from areal.models.heads import PPOInputs
from areal.trainer.inputs import Inputs
from areal.trainer.model import RankModel
from areal.trainer.step_stats import StepStats


def ppo_backward(
    actor: RankModel, config: ActorConfig, x: Inputs, proximal: Tensor | None, denominator: float, temperature: float, stats: StepStats
) -> None:
    """Adds to the gradients; ``proximal`` None: the current policy still is the proximal one."""
    result = actor.model.packed_ppo_loss(
        x.input_ids,
        x.position_ids,
        x.lengths,
        temperature,
        PPOInputs(proximal, x.behavior_logprobs, x.advantages),
        rows=x.rows,
        denominator=denominator,
        shared=x.shared,
        eps_clip=config.eps_clip,
        eps_clip_higher=config.eps_clip_higher,
        c_clip=config.c_clip,
        behav_imp_weight_cap=config.behav_imp_weight_cap,
        behav_filter_cap=config.behav_filter_cap,
        decoupled=config.use_decoupled_loss,
    )
    with stats.phase("backward"):
        result.loss.backward()
    if proximal is None:
        stats.add_drift(result.logprobs, x.behavior_logprobs, x.fresh)
    elif config.recompute_logprob:
        stats.add_drift(proximal, x.behavior_logprobs, x.fresh)
    stats.add(result.stats)
