"""Advantages and returns of single tokens against the formulas, written out in loops over the tokens."""

import math

import numpy as np
import pytest

from areal.algo.advantage import Scores, compute_advantages, compute_targets
from areal.algo.returns import LossTokens, kl_estimate
from areal.config import ActorConfig
from areal.types import Group, Trajectory

NO_NORM = {"reward_norm": None}
BATCH = {"mean_level": "batch", "std_level": "batch"}


def make_groups(seed=0, n_groups=4, n_samples=3):
    """Several turns a sample: stretches of loss tokens between stretches of what the policy did not say; one sample has no loss tokens."""
    rng = np.random.default_rng(seed)
    groups = []
    for g in range(n_groups):
        trajectories = []
        for s in range(n_samples):
            parts = [np.full(rng.integers(1, 6), i % 2 == 1) for i in range(int(rng.integers(2, 8)))]
            mask = np.concatenate(parts)
            if (g, s) == (1, 1):
                mask[:] = False
            logprobs = np.where(mask, -2 + rng.standard_normal(len(mask)), 0).astype(np.float32)
            versions = np.where(mask, 0, -1).astype(np.int32)
            trajectories.append(Trajectory(np.arange(len(mask)), mask, logprobs, versions, float(rng.normal()), truncated=s == 0))
        groups.append(Group(g, {}, trajectories))
    return groups


def samples_of(groups):
    return [t for g in groups for t in g.trajectories]


def random_scores(groups, *names, seed=1):
    rng = np.random.default_rng(seed)
    return Scores(**{name: [rng.standard_normal(len(t)).astype(np.float32) - 1.5 for t in samples_of(groups)] for name in names})


def loop_gae(sample, token_rewards, values, gamma, lam):
    """Over the loss tokens from the last to the first; what stands between them is no step."""
    advantages, returns = np.zeros(len(sample)), np.zeros(len(sample))
    next_value = next_advantage = 0.0
    for t in reversed(range(len(sample))):
        if not sample.loss_mask[t]:
            continue
        delta = token_rewards[t] + gamma * next_value - values[t]
        advantages[t] = delta + gamma * lam * next_advantage
        returns[t] = advantages[t] + values[t]
        next_value, next_advantage = values[t], advantages[t]
    return advantages, returns


def loop_kl(kind, logprob, ref):
    x = float(logprob) - float(ref)
    return {"k1": x, "k2": x * x / 2, "k3": math.exp(-x) - 1 + x}[kind]


def loop_rewards(sample, final, kl=None, kl_ctl=0.0):
    rewards = np.zeros(len(sample))
    places = [t for t in range(len(sample)) if sample.loss_mask[t]]
    if places:
        rewards[places[-1]] += final
    if kl is not None:
        for t in places:
            rewards[t] -= kl_ctl * kl[t]
    return rewards


def check(got, expected, places=5):
    assert all(x.dtype == np.float32 for x in got)
    for x, y in zip(got, expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=10.0**-places, atol=10.0**-places)


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (0.9, 0.8), (1.0, 0.0), (0.5, 1.0)])
def test_gae_skips_what_the_policy_did_not_say(gamma, lam):
    groups = make_groups()
    scores = random_scores(groups, "values")
    config = ActorConfig(path="x", discount=gamma, gae_lambda=lam, **NO_NORM)
    targets = compute_targets(groups, config, 10, scores=scores)
    expected = [
        loop_gae(t, loop_rewards(t, t.reward), values, gamma, lam) for t, values in zip(samples_of(groups), scores.values, strict=True)
    ]
    check(targets.advantages, [a for a, _ in expected])
    check(targets.returns, [r for _, r in expected])
    assert targets.kl is None


def test_values_of_other_tokens_do_not_matter():
    groups = make_groups()
    scores, config = random_scores(groups, "values"), ActorConfig(path="x", discount=0.9, gae_lambda=0.9, **NO_NORM)
    other = Scores([np.where(t.loss_mask, v, np.float32(np.nan)) for t, v in zip(samples_of(groups), scores.values, strict=True)])
    check(compute_targets(groups, config, 10, scores=other).advantages, compute_targets(groups, config, 10, scores=scores).advantages)


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
@pytest.mark.parametrize("recomputed", [True, False])
@pytest.mark.parametrize("with_critic", [True, False])
def test_kl_in_the_reward(kind, recomputed, with_critic):
    groups = make_groups(seed=3)
    names = ["ref_logprobs", *(["logprobs"] if recomputed else []), *(["values"] if with_critic else [])]
    scores = random_scores(groups, *names)
    config = ActorConfig(path="x", kl_ctl=0.3, kl_in="reward", kl_estimator=kind, discount=0.95, gae_lambda=0.7, **NO_NORM)
    targets = compute_targets(groups, config, 10, scores=scores)
    advantages, kls = [], []
    for i, t in enumerate(samples_of(groups)):
        logprobs = scores.logprobs[i] if recomputed else t.logprobs
        kl = [loop_kl(kind, logprobs[k], scores.ref_logprobs[i][k]) if t.loss_mask[k] else 0.0 for k in range(len(t))]
        values = scores.values[i] if with_critic else np.zeros(len(t))
        advantages.append(loop_gae(t, loop_rewards(t, t.reward, kl, 0.3), values, 0.95, 0.7 if with_critic else 1.0)[0])
        kls.append(kl)
    check(targets.advantages, advantages)
    check(targets.kl, kls)
    assert (targets.returns is None) == (not with_critic)


def test_discounted_returns_without_a_critic():
    groups = make_groups(seed=5)
    result = compute_advantages(groups, ActorConfig(path="x", discount=0.7, **NO_NORM), 10)
    for group, advantages in zip(groups, result, strict=True):
        for t, a in zip(group.trajectories, advantages, strict=True):
            left = np.cumsum(t.loss_mask[::-1])[::-1] - 1  # loss tokens still to come
            np.testing.assert_allclose(a, np.where(t.loss_mask, t.reward * 0.7**left, 0), rtol=1e-5, atol=1e-7)


def reinforce_pp(groups, scores, baseline):
    """arXiv 2501.03262: the reward without (or, in the variant with a baseline, against its group's mean), minus beta times the KL (k1) still
    to come; then normalised over all tokens of the batch."""
    beta, i, raw = 0.1, 0, []
    for group in groups:
        mean = sum(t.reward for t in group.trajectories) / len(group.trajectories) if baseline else 0.0
        for t in group.trajectories:
            tokens = [k for k in range(len(t)) if t.loss_mask[k]]
            kl = [float(scores.logprobs[i][k]) - float(scores.ref_logprobs[i][k]) for k in tokens]
            raw.append([t.reward - mean - beta * sum(kl[j:]) for j in range(len(tokens))])
            i += 1
    flat = [a for part in raw for a in part]
    mean = sum(flat) / len(flat)
    std = math.sqrt(sum((a - mean) ** 2 for a in flat) / len(flat))
    return [[(a - mean) / (std + 1e-5) for a in part] for part in raw]


@pytest.mark.parametrize("baseline", [False, True])
def test_reinforce_pp(baseline):
    groups = make_groups(seed=7)
    scores = random_scores(groups, "ref_logprobs", "logprobs")
    norm = {"mean_level": "group", "std_level": "none"} if baseline else None
    config = ActorConfig(path="x", reward_norm=norm, adv_norm=BATCH, kl_ctl=0.1, kl_in="reward", kl_estimator="k1")
    got = compute_targets(groups, config, 10, scores=scores).advantages
    for t, a, expected in zip(samples_of(groups), got, reinforce_pp(groups, scores, baseline), strict=True):
        np.testing.assert_allclose(a[t.loss_mask], expected, rtol=1e-4, atol=1e-5)
        assert (a[~t.loss_mask] == 0).all()


def test_returns_are_not_normalised_with_the_advantages():
    groups = make_groups()
    scores = random_scores(groups, "values")
    plain, normed = (compute_targets(groups, ActorConfig(path="x", adv_norm=norm, **NO_NORM), 10, scores=scores) for norm in (None, BATCH))
    check(normed.returns, plain.returns)
    tokens = LossTokens([t.loss_mask for t in samples_of(groups)])
    advantages = tokens.pack(normed.advantages)
    assert abs(advantages.mean()) < 1e-5 and abs(advantages.std() - 1) < 1e-4


def test_token_and_sample_levels_agree():
    """A critic that says 0 everywhere, gamma = lambda = 1, is no critic: the same advantages, also normalised over groups and tokens."""
    groups = make_groups(seed=9)
    zeros = Scores([np.zeros(len(t), np.float32) for t in samples_of(groups)])
    for keys in ({}, {"adv_norm": BATCH}, {"reward_norm": {"mean_level": "leave_one_out", "std_level": "none"}}):
        config = ActorConfig(path="x", **keys)
        check(compute_targets(groups, config, 10, scores=zeros).advantages, compute_targets(groups, config, 10).advantages)


def test_a_batch_without_loss_tokens():
    groups = make_groups(n_groups=1)
    for t in groups[0].trajectories:
        t.loss_mask[:] = False
    config = ActorConfig(path="x", adv_norm=BATCH, **NO_NORM)
    targets = compute_targets(groups, config, 10, scores=random_scores(groups, "values"))
    assert all((a == 0).all() for a in targets.advantages) and all((r == 0).all() for r in targets.returns)


def test_estimators_at_their_edges():
    x, zero = np.array([0.0, 80.0, -80.0], np.float32), np.zeros(3, np.float32)
    assert kl_estimate(x, zero, "k3").tolist() == pytest.approx([0.0, 79.0, math.exp(20) - 21])
    assert kl_estimate(x + 1e-6, x, "k3")[0] == pytest.approx(0.5e-12, rel=1e-3)  # exp(-x) - 1 + x has no digit left there
