"""The advantages that every example of examples/algorithms gives its tokens, against the papers' formulas in loops over plain numbers."""

import math
from pathlib import Path

import numpy as np
import pytest

from areal.algo.advantage import Scores, compute_targets, without_truncated
from areal.config import GRPOConfig
from areal.config_load import load_expr_config
from areal.types import Group, Trajectory

ALGORITHMS = Path(__file__).parents[1] / "examples" / "algorithms"
LONGEST = 56


def sample(n, reward, rng, truncated=False):
    mask = np.arange(n + 3) >= 3
    logprobs = np.where(mask, -1 - rng.random(n + 3), 0).astype(np.float32)
    return Trajectory(np.arange(n + 3), mask, logprobs, np.where(mask, 0, -1).astype(np.int32), reward, truncated)


def make_groups():
    """Mixed rewards, equal ones, single-token answers, and answers of the greatest length, which were cut off."""
    rng = np.random.default_rng(0)
    rewards = [[1.0, 0.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0]]
    lengths = [[1, 30, 44, 56], [40, 41, 56, 3], [56, 56, 1, 1], [2, 3, 4, 5]]
    return [
        Group(g, {}, [sample(n, r, rng, n == LONGEST) for n, r in zip(*rows, strict=True)])
        for g, rows in enumerate(zip(lengths, rewards, strict=True))
    ]


def mean(values):
    return sum(values) / len(values)


def deviation(values):
    return math.sqrt(mean([(v - mean(values)) ** 2 for v in values]))


def of_groups(of_group):
    """An advantage for each sample, from the rewards of its group; every loss token has it."""

    def formula(groups, scores):
        samples = [(t, a) for g in groups for t, a in zip(g.trajectories, of_group([t.reward for t in g.trajectories], g), strict=True)]
        return [[a] * int(t.loss_mask.sum()) for t, a in samples]

    return formula


def standardised(rewards, group=None):
    return [0.0] * len(rewards) if len(set(rewards)) == 1 else [(r - mean(rewards)) / (deviation(rewards) + 1e-5) for r in rewards]


def dapo(rewards, group):
    """arXiv 2503.14476, eq. 9 and 13."""
    lengths = [int(t.loss_mask.sum()) for t in group.trajectories]
    soft = [0.0 if n <= LONGEST - 16 else (LONGEST - 16 - n) / 16 if n <= LONGEST else -1.0 for n in lengths]
    return standardised([r + s for r, s in zip(rewards, soft, strict=True)])


def rloo(rewards, group):
    return [r - mean(rewards[:i] + rewards[i + 1 :]) for i, r in enumerate(rewards)]


def over_tokens(per_sample):
    flat = [a for part in per_sample for a in part]
    centre, spread = mean(flat), deviation(flat)
    return [[(a - centre) / (spread + 1e-5) for a in part] for part in per_sample]


def token_rewards(t, logprobs, ref):
    """The reward on the last token, and everywhere -0.01 times k1."""
    kl = [float(a) - float(b) for a, b in zip(logprobs[t.loss_mask], ref[t.loss_mask], strict=True)]
    return [-0.01 * x + (t.reward if k == len(kl) - 1 else 0.0) for k, x in enumerate(kl)]


def reinforce_plus_plus(groups, scores):
    samples = [t for g in groups for t in g.trajectories]
    rewards = [token_rewards(*row) for row in zip(samples, scores.logprobs, scores.ref_logprobs, strict=True)]
    return over_tokens([[sum(r[k:]) for k in range(len(r))] for r in rewards])


def ppo(groups, scores):
    """GAE (arXiv 1506.02438, eq. 16) as the sum that it stands for, lambda = 0.95."""
    samples, result = [t for g in groups for t in g.trajectories], []
    for t, logprobs, ref, values in zip(samples, scores.logprobs, scores.ref_logprobs, scores.values, strict=True):
        r, v = token_rewards(t, logprobs, ref), [*map(float, values[t.loss_mask]), 0.0]
        deltas = [r[k] + v[k + 1] - v[k] for k in range(len(r))]
        result.append([sum(0.95**j * d for j, d in enumerate(deltas[k:])) for k in range(len(r))])
    return over_tokens(result)


def dr_grpo(rewards, group):
    return [r - mean(rewards) for r in rewards]


FORMULAS = {
    "dr_grpo": of_groups(dr_grpo),
    "dapo": of_groups(dapo),
    "rloo": of_groups(rloo),
    "reinforce_plus_plus": reinforce_plus_plus,
    "ppo": ppo,
    **dict.fromkeys(["grpo", "gspo", "cispo", "tis", "mis", "loglinear"], of_groups(standardised)),
}


def test_every_file_has_a_formula():
    assert set(FORMULAS) == {path.stem for path in ALGORITHMS.glob("*.yaml")}


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("mask_truncated", [False, True])
def test_advantages_of_the_examples(name, mask_truncated):
    config, _ = load_expr_config([str(ALGORITHMS / f"{name}.yaml")], GRPOConfig)
    assert config.gconfig.max_new_tokens == LONGEST
    groups, rng = make_groups(), np.random.default_rng(1)
    trained, n_masked = without_truncated(groups) if mask_truncated else (groups, 0)
    assert n_masked == (4 if mask_truncated else 0)
    samples = [t for g in trained for t in g.trajectories]

    def said():
        return [-1 - rng.random(len(t)).astype(np.float32) for t in samples]

    has_kl = config.actor.kl_in_reward
    scores = Scores(said() if config.critic else None, said() if has_kl else None, said() if has_kl else None)
    got = compute_targets(trained, config.actor, LONGEST, answered=groups, scores=scores).advantages
    if mask_truncated and name == "dapo":  # how long an answer was does not depend on what is masked
        whole = FORMULAS[name](groups, scores)
        expected = [a if t.loss_mask.any() else [] for t, a in zip(samples, whole, strict=True)]
    else:
        expected = FORMULAS[name](trained, scores)
    for t, a, wanted in zip(samples, got, expected, strict=True):
        np.testing.assert_allclose(a[t.loss_mask], wanted, rtol=2e-5, atol=2e-6)
        assert (a[~t.loss_mask] == 0).all()
