"""From rewards to per-token advantages: pure functions.

Without critic, discount and KL in the reward every loss token of a sample carries the sample's advantage; with them see ``returns``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from areal.algo.returns import LossTokens, kl_estimate
from areal.config import ActorConfig, NormConfig
from areal.ops.normalize_advantages import normalize_advantages
from areal.types import Group, Trajectory


class Scores(NamedTuple):
    """What models said of every sample of a batch, in its order: float32 [L], looked at in the loss tokens only."""

    values: list[NDArray[np.float32]] | None = None
    """The critic's: ``values[t]`` is what the state before token t is worth; None = no critic."""
    ref_logprobs: list[NDArray[np.float32]] | None = None
    """The reference model's."""
    logprobs: list[NDArray[np.float32]] | None = None
    """The actor's before the train step; None = those of the behaviour policy."""


class Targets(NamedTuple):
    """What is learned from every sample of a batch, in its order: float32 [L], 0 on tokens that are not loss tokens."""

    advantages: list[NDArray[np.float32]]
    returns: list[NDArray[np.float32]] | None = None
    """What the values should have been; None without a critic."""
    kl: list[NDArray[np.float32]] | None = None
    """The estimate of each token's KL to the reference model, where it was taken off the reward."""


def compute_advantages(
    groups: Sequence[Group], config: ActorConfig, max_new_tokens: int, *, answered: Sequence[Group] | None = None
) -> list[list[NDArray[np.float32]]]:
    """``compute_targets`` without critic and reference model: float32 [L] for every sample of every group."""
    flat = iter(compute_targets(groups, config, max_new_tokens, answered=answered).advantages)
    return [[next(flat) for _ in group.trajectories] for group in groups]


def compute_targets(
    groups: Sequence[Group],
    config: ActorConfig,
    max_new_tokens: int,
    *,
    answered: Sequence[Group] | None = None,
    scores: Scores | None = None,
) -> Targets:
    """The advantages of all samples, and with a critic the returns.

    With ``overlong_reward_penalty`` the reward first becomes less by ``overlong_penalty`` of the sample's longest answer, where
    ``max_new_tokens`` is the most an answer could have. The reward r then becomes (r + reward_bias) * reward_scaling, and is normalised by
    ``reward_norm`` over its group or the batch, in which every episode counts once, however many sequences it has. A sample's last loss token
    gets it; with ``kl_in: reward`` every loss token gets -kl_ctl times the estimate of its KL to the reference model. The advantage is by GAE
    over the critic's values, or without a critic the sum of the rewards from the token on, discounted. It is normalised by ``adv_norm`` over
    the loss tokens of the batch; returns are not. Whatever is normalised over a set of equal values gives 0 there: such a group or batch does
    not say which answer is better.

    Args:
        answered: the groups before ``without_truncated``, where that was called: how long an answer was does not depend on what is masked.

    Raises:
        ValueError: an empty group, or a reward that is not finite.
    """
    scores = scores or Scores()
    rewards = [_shaped_rewards(group, config, max_new_tokens) for group in answered or groups]
    if config.reward_norm is not None:
        rewards = _over_episodes(groups, rewards, config.reward_norm)
    samples = [t for group in groups for t in group.trajectories]
    of_samples = np.concatenate(rewards) if rewards else np.zeros(0)
    if config.discount < 1 or scores.values is not None or config.kl_in_reward:
        return _of_tokens(samples, of_samples, config, scores)
    if config.adv_norm is not None:
        n_loss_tokens = np.array([t.loss_mask.sum() for t in samples], np.float64)
        (of_samples,) = _normalise([of_samples], [n_loss_tokens], config.adv_norm)
    return Targets([np.where(t.loss_mask, np.float32(a), np.float32(0)) for t, a in zip(samples, of_samples, strict=True)])


def _of_tokens(samples: list[Trajectory], rewards: NDArray[np.float64], config: ActorConfig, scores: Scores) -> Targets:
    """The advantages where tokens of a sample have different ones; ``rewards`` [n] are the shaped ones."""
    tokens = LossTokens([t.loss_mask for t in samples])
    packed, kl = tokens.at_the_end(rewards), None
    if config.kl_in_reward:
        assert scores.ref_logprobs is not None
        logprobs = [t.logprobs for t in samples] if scores.logprobs is None else scores.logprobs
        kl = kl_estimate(tokens.pack(logprobs), tokens.pack(scores.ref_logprobs), config.kl_estimator)
        packed -= config.kl_ctl * kl
    values = None if scores.values is None else tokens.pack(scores.values)
    advantages, returns = tokens.returns(packed, values, config.discount, config.gae_lambda)
    if config.adv_norm is not None and len(advantages):
        (advantages,) = _normalise([advantages.astype(np.float64)], None, config.adv_norm)
    return Targets(
        tokens.unpack(advantages),
        None if values is None else tokens.unpack(returns),
        None if kl is None else tokens.unpack(kl),
    )


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
