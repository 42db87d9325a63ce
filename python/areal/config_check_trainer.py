"""Combinations of the trainer's keys that cannot work, or of which one would have no effect; called from ``check_config``."""

from __future__ import annotations

from areal.config import ActorConfig, ConfigError, GRPOConfig


def check_objective(config: GRPOConfig) -> None:
    """Keys of the policy's loss."""
    actor = config.actor
    _check_ratio(actor)
    _check_proximal(actor)
    _check_weights(actor)


def _check_ratio(actor: ActorConfig) -> None:
    if actor.objective == "cispo":
        if actor.c_clip is not None:
            raise ConfigError(
                f"actor.c_clip={actor.c_clip:g} has no effect with actor.objective=cispo, whose ratio is clipped on both sides",
                "remove actor.c_clip, or set actor.objective=ppo",
            )
    elif actor.eps_clip >= 1:
        raise ConfigError(
            f"actor.eps_clip={actor.eps_clip:g} leaves no lower end to the clip range",
            "set actor.eps_clip=0.2, and actor.eps_clip_higher for the upper end alone; actor.objective=cispo takes 1 and more",
        )


def _check_proximal(actor: ActorConfig) -> None:
    if actor.prox_logp_method == "loglinear" and not actor.use_decoupled_loss:
        raise ConfigError(
            "actor.prox_logp_method=loglinear stands in for the proximal policy, which only the decoupled loss has",
            "set actor.use_decoupled_loss=true, or actor.prox_logp_method=recompute",
        )
    if actor.behav_filter_cap is not None and not actor.recompute_logprob:
        raise ConfigError("actor.behav_filter_cap needs the recomputed log-probs", "set actor.recompute_logprob=true, or remove the cap")


def _check_weights(actor: ActorConfig) -> None:
    if actor.behav_imp_weight_cap is not None and not actor.use_decoupled_loss:
        raise ConfigError(
            "actor.behav_imp_weight_cap truncates a weight that only the decoupled loss has",
            "set actor.use_decoupled_loss=true, or remove the cap",
        )
    needs_cap = {
        "behav_imp_weight_mode=mask": actor.behav_imp_weight_mode == "mask",
        "behav_imp_weight_level=sequence": actor.behav_imp_weight_level == "sequence",
    }
    for key, given in needs_cap.items():
        if given and actor.behav_imp_weight_cap is None:
            why = "has no weight to mask" if key.endswith("mask") else "multiplies the weights of a whole sequence, without a bound"
            raise ConfigError(f"actor.{key} {why}", f"set actor.behav_imp_weight_cap=2, or remove actor.{key.partition('=')[0]}")
    if actor.behav_filter_level == "sequence" and actor.behav_filter_cap is None:
        raise ConfigError("actor.behav_filter_level=sequence has no effect", "set actor.behav_filter_cap=2, or remove it")
