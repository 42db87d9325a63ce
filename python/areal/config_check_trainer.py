"""Combinations of the trainer's keys that cannot work; called from ``config_check``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from areal.config import ConfigError, GRPOConfig
from areal.launcher.gpus import count_gpus


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
    if config.actor.offload and (config.actor.device == "cpu" or count_gpus() == 0):
        raise ConfigError(
            "actor.offload=true moves parameters out of a GPU's memory, but the trainer is on the CPU", "remove actor.offload"
        )
