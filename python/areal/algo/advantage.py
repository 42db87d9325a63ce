"""From rewards to per-token advantages: pure functions.

gamma = lambda = 1 and no critic, so every loss token of a sample carries the sample's advantage.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from areal.config import ActorConfig, NormConfig
from areal.ops.normalize_advantages import normalize_advantages
from areal.types import Group, Trajectory


def compute_advantages(
    groups: Sequence[Group], config: ActorConfig, max_new_tokens: int, *, answered: Sequence[Group] | None = None
) -> list[list[NDArray[np.float32]]]:
    """float32 [L] for every sample of every group: its advantage on loss tokens, 0 elsewhere.

    With ``overlong_reward_penalty`` the reward first becomes less by ``overlong_penalty`` of the sample's longest answer, where
    ``max_new_tokens`` is the most an answer could have. The reward r then becomes (r + reward_bias) * reward_scaling, and is normalised by
    ``reward_norm`` over its group or the batch, in which every episode counts once, however many sequences it has; the result is normalised
    by ``adv_norm`` over the loss tokens of the batch. Whatever is normalised over a set of equal values gives 0 there: such a group or batch
    does not say which answer is better.

    Args:
        answered: the groups before ``without_truncated``, where that was called: how long an answer was does not depend on what is masked.

    Raises:
        ValueError: an empty group, or a reward that is not finite.
    """
    rewards = [_shaped_rewards(group, config, max_new_tokens) for group in answered or groups]
    if config.reward_norm is not None:
        rewards = _over_episodes(groups, rewards, config.reward_norm)
    if config.adv_norm is not None:
        n_loss_tokens = [np.array([t.loss_mask.sum() for t in group.trajectories], np.float64) for group in groups]
        rewards = _normalise(rewards, n_loss_tokens, config.adv_norm)
    return [
        [np.where(t.loss_mask, np.float32(a), np.float32(0)) for t, a in zip(group.trajectories, values, strict=True)]
        for group, values in zip(groups, rewards, strict=True)
    ]


def without_truncated(groups: Sequence[Group]) -> tuple[list[Group], int]:
    """The groups with no loss on sequences that have a truncated answer (``actor.mask_truncated``), and how many those are.

    Their rewards stay, and count in normalisation as those of any other: what the others of a group are compared with does not change.
    """
    n = sum(t.truncated for group in groups for t in group.trajectories)
    if not n:
        return list(groups), 0
    return [replace(group, trajectories=[_masked(t) if t.truncated else t for t in group.trajectories]) for group in groups], n


def _masked(trajectory: Trajectory) -> Trajectory:
    return replace(trajectory, loss_mask=np.zeros_like(trajectory.loss_mask), logprobs=np.zeros_like(trajectory.logprobs))


def longest_answer(trajectory: Trajectory) -> int:
    """Tokens of the longest answer that is trained on: a sequence of several turns or calls has several, of which each could have had
    ``max_new_tokens``. An answer is a stretch that a policy sampled without a break, its over-age tokens included."""
    edges = np.flatnonzero(np.diff(trajectory.versions >= 0, prepend=False, append=False)).reshape(-1, 2)
    return max((int(end - begin) for begin, end in edges if trajectory.loss_mask[begin:end].any()), default=0)


def overlong_penalty(length: int, max_new_tokens: int, overlong_tokens: int, factor: float) -> float:
    """DAPO's soft overlong punishment (arXiv 2503.14476, eq. 13), times ``factor``: 0 for answers that leave ``overlong_tokens`` of
    ``max_new_tokens`` unused, from there on linear down to ``-factor``."""
    into_the_tail = length - (max_new_tokens - overlong_tokens)
    return -factor * min(1.0, max(0.0, into_the_tail / overlong_tokens))


def _shaped_rewards(group: Group, config: ActorConfig, max_new_tokens: int) -> NDArray[np.float64]:
    rewards = np.array([t.reward for t in group.trajectories], np.float64)
    if not rewards.size:
        raise ValueError(f"group {group.group_id} has no samples")
    if not np.isfinite(rewards).all():
        raise ValueError(f"group {group.group_id} has the rewards {rewards.tolist()}; they must be finite")
    if config.overlong_reward_penalty:
        tail, factor = config.overlong_tokens, config.overlong_penalty_factor
        rewards += [overlong_penalty(longest_answer(t), max_new_tokens, tail, factor) for t in group.trajectories]
    return (rewards + config.reward_bias) * config.reward_scaling


def _over_episodes(groups: Sequence[Group], rewards: list[NDArray[np.float64]], norm: NormConfig) -> list[NDArray[np.float64]]:
    """``rewards`` normalised, where the sequences of an episode share the weight 1."""
    sizes = [[len(members) for members in group.episodes()] for group in groups]
    if all(size == 1 for counts in sizes for size in counts):
        return _normalise(rewards, None, norm)
    weights = [np.repeat(1.0 / np.array(counts), counts) for counts in sizes]
    if norm.mean_level != "leave_one_out":
        return _normalise(rewards, weights, norm)
    # The rest of a group is its other episodes, not the other sequences. The deviation is that of the rewards, so it comes first.
    scaled = _normalise(rewards, weights, norm.new(mean_level="none"))
    return [values - _mean_of_others(values, counts) for values, counts in zip(scaled, sizes, strict=True)]


def _mean_of_others(values: NDArray[np.float64], counts: list[int]) -> NDArray[np.float64]:
    """For each value the mean of the other episodes' means; its own where there are no others, or all are equal: nothing is learned then."""
    means = np.array([part.mean() for part in np.split(values, np.cumsum(counts)[:-1])])
    if len(means) == 1 or values.min() == values.max():
        return values
    return np.repeat((means.sum() - means) / (len(means) - 1), counts)


def _normalise(groups: list[NDArray[np.float64]], weights: list[NDArray[np.float64]] | None, norm: NormConfig) -> list[NDArray[np.float64]]:
    """Each value minus the mean, over the deviation; ``weights`` say how often each counts, None once."""
    if not groups:
        return []
    normalised = normalize_advantages(
        torch.from_numpy(np.concatenate(groups)),
        [len(group) for group in groups],
        weights=None if weights is None else torch.from_numpy(np.concatenate(weights)),
        mean=norm.mean_level,
        std=norm.std_level,
        eps=norm.eps,
    )
    return np.split(normalised.numpy(), np.cumsum([len(group) for group in groups])[:-1])
