"""Combinations of the trainer's keys that cannot work, or of which one would have no effect; called from ``check_config``."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from areal.config import ActorConfig, ConfigError, CriticConfig, GRPOConfig, RefConfig
from areal.config_trainer import TrainEngineConfig
from areal.launcher.gpus import count_gpus


def check_objective(config: GRPOConfig) -> None:
    """Keys of the policy's loss."""
    actor = config.actor
    if actor.reward_scaling == 0:
        raise ConfigError("actor.reward_scaling=0 makes every reward the same, so nothing is learned", "set actor.reward_scaling=1")
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
    # The default is no demand: naive PPO's own clip already bounds what has moved.
    cap = actor.behav_filter_cap
    if cap not in (None, ActorConfig.model_fields["behav_filter_cap"].default) and not actor.recompute_logprob:
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
    if actor.behav_filter_cap is None:
        _refuse_without_effect(
            actor, ("behav_filter_level", "behav_filter_side"), "actor.behav_filter_cap=null", "actor.behav_filter_cap=1.4"
        )


def _refuse_without_effect(actor: ActorConfig, keys: Sequence[str], why: str, way_out: str) -> None:
    """``keys`` must have their defaults, spelled out or not."""
    for key in keys:
        if (value := getattr(actor, key)) != ActorConfig.model_fields[key].default:
            raise ConfigError(f"actor.{key}={value} has no effect with {why}", f"set {way_out}, or remove actor.{key}")


def check_critic_and_reference(config: GRPOConfig, longest: int) -> None:
    """``longest``: tokens of the longest sequence. ``ConfigError``."""
    _check_kl(config)
    if config.critic is None:
        if config.actor.gae_lambda != 1:
            raise ConfigError(
                f"actor.gae_lambda={config.actor.gae_lambda:g} has no effect without a critic", "set critic={}, or remove actor.gae_lambda"
            )
        return
    _check_rewards_of_critic(config)
    if config.critic.shared:
        _check_shared(config.critic)
    else:
        _check_own(config, config.critic, longest)


def _check_kl(config: GRPOConfig) -> None:
    if config.uses_ref:
        return
    _refuse_without_effect(config.actor, ("kl_in", "kl_estimator"), "actor.kl_ctl=0", "actor.kl_ctl=0.001")
    if config.ref != RefConfig():
        raise ConfigError("ref.* is set, but with actor.kl_ctl=0 there is no reference model", "set actor.kl_ctl=0.001, or remove ref")


def _check_rewards_of_critic(config: GRPOConfig) -> None:
    norm = config.actor.reward_norm
    if norm is not None and {"group", "leave_one_out"} & {norm.mean_level, norm.std_level}:
        raise ConfigError(
            f"critic learns what a prompt is worth, which rewards that are compared within their group do not tell "
            f"(actor.reward_norm has mean_level={norm.mean_level}, std_level={norm.std_level})",
            "set actor.reward_norm=null, and actor.adv_norm={mean_level: batch, std_level: batch} to normalise the advantages",
        )


def _check_shared(critic: CriticConfig) -> None:
    if critic.path:
        raise ConfigError(
            f"critic.shared=true puts the value head on the actor's layers, and critic.path='{critic.path}' names others",
            "remove critic.path, or set critic.shared=false",
        )
    plain = CriticConfig()
    for key in [*TrainEngineConfig.model_fields, "ppo_n_minibatches"]:
        if getattr(critic, key) != getattr(plain, key):
            raise ConfigError(
                f"critic.{key} has no effect with critic.shared=true: the value head is trained with the actor", f"set actor.{key} instead"
            )


def _check_own(config: GRPOConfig, critic: CriticConfig, longest: int) -> None:
    if critic.loss_coef != CriticConfig().loss_coef:
        raise ConfigError(
            f"critic.loss_coef={critic.loss_coef:g} has no effect: a critic with layers of its own has a loss of its own",
            "set critic.optimizer.lr, or critic.shared=true",
        )
    capacity = critic.mb_spec.max_tokens_per_mb
    if longest > capacity:
        raise ConfigError(
            f"critic.mb_spec.max_tokens_per_mb={capacity} cannot hold the longest sequence of {longest} tokens",
            f"set critic.mb_spec.max_tokens_per_mb={longest} or more",
        )
    batch, n = config.rollout.consumer_batch_size, critic.ppo_n_minibatches
    if batch % n:
        near = min((k for k in range(1, batch + 1) if batch % k == 0), key=lambda k: abs(k - n))
        raise ConfigError(
            f"rollout.consumer_batch_size={batch} groups cannot be cut into critic.ppo_n_minibatches={n} equal parts",
            f"set critic.ppo_n_minibatches={near}",
        )
    samples, n_ranks = batch // n * config.gconfig.n_samples, config.trainer_layout.data
    if samples < n_ranks:
        raise ConfigError(
            f"a mini-batch of the critic has {samples} samples, fewer than the {n_ranks} ranks of actor.backend='{config.actor.backend}'",
            "lower critic.ppo_n_minibatches, or raise rollout.consumer_batch_size",
        )


def check_same_vocabulary(key: str, path: str, actor_path: str) -> None:
    """Whether the model of ``path`` reads the actor's token ids as the same text, as far as the folders tell. ``ConfigError``."""
    ours, theirs = _vocabulary(Path(actor_path).expanduser()), _vocabulary(Path(path).expanduser())
    if ours and theirs and ours != theirs:
        raise ConfigError(
            f"{key}: the tokenizer of '{path}' has other token ids than that of actor.path='{actor_path}'",
            "use a model with the same tokenizer",
        )


def _vocabulary(folder: Path) -> tuple[Any, Any] | None:
    """What ``tokenizer.json`` says; None where there is no such file, or nothing in it."""
    try:
        tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None  # loading the actor's tokenizer says what is wrong with it
    model = tokenizer.get("model")
    return (model.get("vocab"), [(t["content"], t["id"]) for t in tokenizer.get("added_tokens", ())]) if model else None


def check_recipe(config: GRPOConfig) -> None:
    """No recipe that is not for reinforcement learning."""
    if config.dpo is not None:
        raise ConfigError("dpo is the recipe of another command", "run `areal dpo CONFIG`, or remove dpo")


def check_adapters(config: GRPOConfig) -> None:
    """Keys of actor.lora."""
    lora = config.actor.lora
    if lora is None:
        return
    if not lora.target_modules:
        raise ConfigError("actor.lora.target_modules is empty, so nothing would be trained", "set actor.lora.target_modules=all-linear")
    if lora.sync == "merged":
        return
    if config.layout.engine == "sglang":
        raise ConfigError(
            "actor.lora.sync=adapter needs the embedded engine: SGLang takes an adapter under a name that every request must then give, and "
            "what it holds of it cannot be compared with what was sent",
            "set actor.lora.sync=merged",
        )
    if config.transport not in ("shm", "disk"):
        raise ConfigError(
            f"actor.lora.sync=adapter works by shared memory or files, and the transport is {config.transport}",
            "set weight_sync.transport=shm (servers on this machine) or disk, or actor.lora.sync=merged",
        )


def check_peft(config: GRPOConfig) -> None:
    """What actor.lora needs is installed."""
    if config.actor.lora is not None and importlib.util.find_spec("peft") is None:
        raise ConfigError("actor.lora needs the package 'peft'", "pip install '.[lora]' in areal's folder, or set actor.lora=null")


def check_heads(config: GRPOConfig, model: Mapping[str, Any], where: str) -> None:
    """Whether context ranks can share the attention heads of ``model``, a Hugging Face config that came from ``where``."""
    context = config.trainer_layout.context
    text = model.get("text_config")
    heads = (text if isinstance(text, Mapping) else model).get("num_attention_heads", model.get("n_head"))
    if not isinstance(heads, int) or heads % context == 0:
        return
    best = max(n for n in range(1, context) if heads % n == 0)
    layout = config.trainer_layout
    replicas = f"r{layout.replicas}" if layout.replicas > 1 else ""
    raise ConfigError(
        f"actor.backend='{config.actor.backend}': the model of {where} has {heads} attention heads, which {context} context ranks cannot share equally",
        f"set actor.backend=fsdp:d{layout.data}{replicas}" + (f"c{best}" if best > 1 else ""),
    )


def check_offload(config: GRPOConfig) -> None:
    """Offloading needs a GPU to offload from."""
    sections = {"actor": config.actor, "ref": config.ref, "critic": config.critic}
    for key, section in sections.items():
        if section is not None and section.offload and (config.actor.device == "cpu" or count_gpus() == 0):
            raise ConfigError(
                f"{key}.offload=true moves parameters out of a GPU's memory, but the trainer is on the CPU", f"remove {key}.offload"
            )


def check_overlong(config: GRPOConfig) -> None:
    """Keys of the penalty for long answers."""
    actor, longest = config.actor, config.gconfig.max_new_tokens
    if not actor.overlong_reward_penalty:
        for key in ("overlong_tokens", "overlong_penalty_factor"):
            if (value := getattr(actor, key)) != ActorConfig.model_fields[key].default:
                raise ConfigError(f"actor.{key}={value:g} has no effect", "set actor.overlong_reward_penalty=true, or remove it")
        return
    if not 0 < actor.overlong_tokens <= longest:
        raise ConfigError(
            f"actor.overlong_reward_penalty needs the tokens in which it grows, 1 to gconfig.max_new_tokens={longest}, "
            f"and actor.overlong_tokens={actor.overlong_tokens}",
            f"set actor.overlong_tokens={max(1, longest // 5)}",
        )
