"""From rewards to per-token advantages: numpy, pure functions.

gamma = lambda = 1 and no critic, so every loss token of a sample carries the sample's advantage.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from areal.config import ActorConfig, NormConfig
from areal.types import Group


def compute_advantages(groups: Sequence[Group], config: ActorConfig) -> list[list[NDArray[np.float32]]]:
    """float32 [L] for every sample of every group: its advantage on loss tokens, 0 elsewhere.

    The reward r becomes (r + reward_bias) * reward_scaling, then is normalised by ``reward_norm`` over its group or the batch; the
    result is normalised by ``adv_norm`` over the loss tokens of the batch. Whatever is normalised over a set of equal values gives 0
    there: such a group or batch does not say which answer is better. ``ValueError`` for an empty group or a reward that is not finite.
    """
    rewards = [_scaled_rewards(group, config) for group in groups]
    if config.reward_norm is not None:
        rewards = _normalise(rewards, [np.ones_like(r) for r in rewards], config.reward_norm)
    if config.adv_norm is not None:
        n_loss_tokens = [np.array([t.loss_mask.sum() for t in group.trajectories], np.float64) for group in groups]
        rewards = _normalise(rewards, n_loss_tokens, config.adv_norm)
    return [
        [np.where(t.loss_mask, np.float32(a), np.float32(0)) for t, a in zip(group.trajectories, values, strict=True)]
        for group, values in zip(groups, rewards, strict=True)
    ]


def _scaled_rewards(group: Group, config: ActorConfig) -> NDArray[np.float64]:
    rewards = np.array([t.reward for t in group.trajectories], np.float64)
    if not rewards.size:
        raise ValueError(f"group {group.group_id} has no samples")
    if not np.isfinite(rewards).all():
        raise ValueError(f"group {group.group_id} has the rewards {rewards.tolist()}; they must be finite")
    return (rewards + config.reward_bias) * config.reward_scaling


def _normalise(groups: list[NDArray[np.float64]], weights: list[NDArray[np.float64]], norm: NormConfig) -> list[NDArray[np.float64]]:
    """(x - mean) / (std + eps); ``weights`` say how often each value counts. The deviation is that of the population."""
    batch = np.concatenate(groups) if groups else np.zeros(0)
    batch_mean, batch_std = _moments(batch, np.concatenate(weights) if groups else batch)
    result = []
    for values, weight in zip(groups, weights, strict=True):
        mean, std = _moments(values, weight) if "group" in (norm.mean_level, norm.std_level) else (0.0, 0.0)
        used = {"group": (mean, std), "batch": (batch_mean, batch_std), "none": (0.0, None)}
        deviation = used[norm.std_level][1]
        if used[norm.mean_level][1] == 0.0 or deviation == 0.0:
            result.append(np.zeros_like(values))
            continue
        result.append((values - used[norm.mean_level][0]) / (1.0 if deviation is None else deviation + norm.eps))
    return result


def _moments(values: NDArray[np.float64], weights: NDArray[np.float64]) -> tuple[float, float]:
    """Weighted mean and deviation; a set of equal values has the deviation 0 exactly, whatever the rounding of its mean."""
    counted = values[weights > 0]
    if not counted.size or counted.min() == counted.max():
        return (float(counted[0]) if counted.size else 0.0), 0.0
    mean = float(np.average(values, weights=weights))
    return mean, float(np.sqrt(np.average((values - mean) ** 2, weights=weights)))
