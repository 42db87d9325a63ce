"""The policy's loss of one micro-batch, by the actor's configuration, and its gradients.

``docs/algorithms.md`` lists which keys make which algorithm; ``models.heads.packed_ppo_loss`` chooses the way through the output head.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from areal.algo.policy_loss import PPOInputs, loglinear_share
from areal.config import ActorConfig
from areal.models.value_head import ValueInputs
from areal.trainer.inputs import Inputs
from areal.trainer.model import RankModel
from areal.trainer.step_stats import StepStats


def recomputes_proximal(config: ActorConfig) -> bool:
    """Whether the proximal log-probs of the later mini-batches take a forward pass before the step's first optimizer step."""
    return config.recompute_logprob and config.prox_logp_method == "recompute"


def policy_denominator(config: ActorConfig, given: float | None, n_loss_tokens: float) -> float:
    """What the policy's loss of a mini-batch is divided by: ``given`` with it, or its loss tokens over all ranks."""
    if given is None and config.loss_normalization != "token":
        raise ValueError(
            f"actor.loss_normalization={config.loss_normalization} needs a policy_denominator with each mini-batch; make_train_batch gives it"
        )
    return n_loss_tokens if given is None else given


def loss_options(config: ActorConfig) -> dict[str, Any]:
    """The arguments of ``packed_ppo_loss`` that do not change from call to call."""
    return {
        "objective": config.objective,
        "ratio_level": config.importance_sampling_level,
        # A fixed length is in the denominator.
        "normalization": "sequence" if config.loss_normalization == "sequence" else "token",
        "eps_clip": config.eps_clip,
        "eps_clip_higher": config.eps_clip_higher,
        "c_clip": config.c_clip,
        "decoupled": config.use_decoupled_loss,
        "behav_imp_weight_cap": config.behav_imp_weight_cap,
        "behav_imp_weight_mode": config.behav_imp_weight_mode,
        "behav_imp_weight_level": config.behav_imp_weight_level,
        "behav_filter_cap": config.behav_filter_cap if config.recompute_logprob else None,
        "behav_filter_level": config.behav_filter_level,
        "behav_filter_side": config.behav_filter_side,
        "entropy_coef": config.entropy_coef,
        "kl_coef": config.kl_ctl,
        "kl_estimator": config.kl_estimator,
    }


def ppo_backward(
    actor: RankModel,
    config: ActorConfig,
    x: Inputs,
    recomputed: Tensor | None,
    progress: float,
    denominator: float,
    temperature: float,
    stats: StepStats,
    values: ValueInputs | None = None,
) -> None:
    """Adds to the gradients.

    Args:
        recomputed: the proximal log-probs [T], where ``recomputes_proximal`` and ``progress`` is above 0.
        progress: the share of the step's optimizer steps that are taken; 0: the current policy still is the proximal one.
        denominator: that of the policy's loss of the mini-batch, over all ranks.
        values: of a critic on the actor's layers.
    """
    result = actor.model.packed_ppo_loss(
        x.input_ids,
        x.position_ids,
        x.lengths,
        temperature,
        _ppo_inputs(config, x, recomputed, progress),
        rows=x.rows,
        denominator=denominator,
        shared=x.shared,
        part=x.part,
        values=values,
        **loss_options(config),
    )
    with stats.phase("backward"):
        result.loss.backward()
    if progress == 0:
        stats.add_drift(result.logprobs, x.behavior_logprobs, x.fresh)
    elif recomputed is not None:
        stats.add_drift(recomputed, x.behavior_logprobs, x.fresh)
    stats.add(result.stats)


def _ppo_inputs(config: ActorConfig, x: Inputs, recomputed: Tensor | None, progress: float) -> PPOInputs:
    """The proximal policy is the current one, recomputed, interpolated, or (``recompute_logprob`` false) that of behaviour."""
    proximal, share = recomputed, None
    if progress > 0 and recomputed is None:
        if config.recompute_logprob:
            share = loglinear_share(x.age, progress)
        else:
            proximal = x.behavior_logprobs
    ref = None
    if config.kl_ctl > 0 and config.kl_in == "loss":
        ref = x.ref_logprobs
        if ref is None:
            raise ValueError(
                f"actor.kl_ctl={config.kl_ctl:g} with kl_in=loss needs the log-probs of the reference model with each micro-batch"
            )
    return PPOInputs(proximal, x.behavior_logprobs, x.advantages, ref, share)
