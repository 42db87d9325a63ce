"""Which GPUs a run's rollout servers get; nothing here imports torch."""

from __future__ import annotations

from areal.config import GRPOConfig
from areal.launcher.gpus import count_gpus


def rollout_device(config: GRPOConfig, index: int) -> str:
    """The (first) device of server ``index``: GPUs behind those of the trainer where there are enough, shared ones otherwise."""
    n_ranks = config.layout.n_ranks
    if config.rollout.device not in ("auto", "cuda"):
        first = config.rollout.device
        return first if first == "cpu" else f"cuda:{int(first.partition(':')[2] or 0) + index * n_ranks}"
    n_gpus = count_gpus()
    if n_gpus == 0:
        return "cpu"
    behind = 0 if config.rollout.colocate else trainer_gpus(config)
    if behind + config.layout.n_servers * n_ranks <= n_gpus:
        return f"cuda:{behind + index * n_ranks}"
    places = max(1, n_gpus // n_ranks)
    return f"cuda:{(-(-behind // n_ranks) + index) % places * n_ranks}"


def trainer_gpus(config: GRPOConfig) -> int:
    """Rank r of the trainer has GPU r; 0 where it has none."""
    return config.trainer_layout.world_size if config.actor.device != "cpu" and count_gpus() else 0


def shares_gpu(config: GRPOConfig, index: int) -> bool:
    """Whether the trainer has one of the GPUs of server ``index``."""
    device = rollout_device(config, index)
    return device != "cpu" and int(device.partition(":")[2] or 0) < trainer_gpus(config)
