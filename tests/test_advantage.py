"""Advantages from rewards."""

import numpy as np
import pytest

from areal.algo.advantage import compute_advantages
from areal.config import ActorConfig
from areal.types import Group, Trajectory


def make_groups(rewards, lengths=None):
    groups = []
    for g, group_rewards in enumerate(rewards):
        trajectories = []
        for s, reward in enumerate(group_rewards):
            n = 3 if lengths is None else lengths[g][s]
            mask = np.array([False, False] + [True] * n)
            trajectories.append(
                Trajectory(np.zeros(n + 2, np.int64), mask, np.zeros(n + 2, np.float32), np.where(mask, 0, -1).astype(np.int32), reward)
            )
        groups.append(Group(g, {}, trajectories))
    return groups


def values(groups, **keys):
    result = compute_advantages(groups, ActorConfig(path="x", **keys), max_new_tokens=10)
    for group, advantages in zip(groups, result, strict=True):
        for t, a in zip(group.trajectories, advantages, strict=True):
            assert a.dtype == np.float32
            assert a.shape == t.loss_mask.shape
            assert (a[~t.loss_mask] == 0).all()
            assert len(set(a[t.loss_mask].tolist())) <= 1
    return [[float(a[t.loss_mask][0]) for t, a in zip(g.trajectories, r, strict=True)] for g, r in zip(groups, result, strict=True)]


def test_group_norm():
    got = values(make_groups([[1, 0, 0, 0], [5, 5, -5, -5]]))
    x = np.array([1, 0, 0, 0.0])
    assert got[0] == pytest.approx(((x - x.mean()) / (x.std() + 1e-5)).tolist(), rel=1e-6)
    assert got[1] == pytest.approx([1, 1, -1, -1], abs=1e-5)


@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1, -1 / 3, 1e30])
def test_equal_rewards_give_exactly_zero(reward):
    assert values(make_groups([[reward] * 7, [1, 0]]))[0] == [0.0] * 7


def test_equal_rewards_never_explode_without_a_mean():
    norm = {"mean_level": "none", "std_level": "group"}
    assert values(make_groups([[2.0, 2.0]]), reward_norm=norm) == [[0.0, 0.0]]


def test_scaling_and_bias_come_first():
    got = values(make_groups([[1, 0]]), reward_norm=None, reward_scaling=10.0, reward_bias=-0.5)
    assert got == [[5.0, -5.0]]


def test_mixed_levels():
    groups = make_groups([[1, 0], [10, 0]])
    got = values(groups, reward_norm={"mean_level": "group", "std_level": "batch"})
    std = np.std([1, 0, 10, 0])
    assert got[0] == pytest.approx([0.5 / (std + 1e-5), -0.5 / (std + 1e-5)])
    assert got[1] == pytest.approx([5 / (std + 1e-5), -5 / (std + 1e-5)])


def test_advantages_are_normalised_over_loss_tokens():
    groups = make_groups([[5.0, -5.0, -5.0]], lengths=[[6, 2, 1]])
    got = values(groups, reward_norm=None, adv_norm={"mean_level": "batch", "std_level": "batch"})
    tokens = np.repeat([5.0, -5.0, -5.0], [6, 2, 1])
    expected = (np.array([5.0, -5.0, -5.0]) - tokens.mean()) / (tokens.std() + 1e-5)
    assert got[0] == pytest.approx(expected.tolist(), rel=1e-6)


def test_batch_of_equal_rewards():
    norm = {"mean_level": "batch", "std_level": "batch"}
    assert values(make_groups([[0.3] * 3, [0.3] * 2]), reward_norm=norm) == [[0.0] * 3, [0.0] * 2]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_rewards_must_be_finite(bad):
    with pytest.raises(ValueError, match="group 1"):
        compute_advantages(make_groups([[1, 0], [1, bad]]), ActorConfig(path="x"), max_new_tokens=10)


def test_an_episode_counts_once_however_many_sequences_it_has():
    (group,) = make_groups([[1.0, 0.5, 1.0, 0.0]])  # two turns and a last one, discounted, then two episodes of one
    group.episode_sizes = [2, 1, 1]
    x, w = np.array([1.0, 0.5, 1.0, 0.0]), np.array([0.5, 0.5, 1, 1])
    mean = (x * w).sum() / 3
    std = np.sqrt(((x - mean) ** 2 * w).sum() / 3)
    assert values([group])[0] == pytest.approx(((x - mean) / (std + 1e-5)).tolist(), rel=1e-6)
    assert values([group], reward_norm={"mean_level": "batch", "std_level": "none"})[0] == pytest.approx((x - mean).tolist(), rel=1e-6)
    left_out = values([group], reward_norm={"mean_level": "leave_one_out", "std_level": "none"})[0]
    assert left_out == pytest.approx([1 - 0.5, 0.5 - 0.5, 1 - 0.375, 0 - 0.875], abs=1e-7)


def test_leave_one_out_of_equal_episodes_teaches_nothing():
    (group,) = make_groups([[0.25, 0.25, 0.25]])
    group.episode_sizes = [2, 1]
    assert values([group], reward_norm={"mean_level": "leave_one_out", "std_level": "batch"})[0] == [0.0, 0.0, 0.0]
    group.episode_sizes = [3]
    assert values([group], reward_norm={"mean_level": "leave_one_out", "std_level": "none"})[0] == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("std_level", ["none", "group", "batch"])
def test_sequences_of_the_same_reward_are_as_one(std_level):
    """Whatever is left out or divided by: an episode in pieces is that episode."""
    norm = {"mean_level": "leave_one_out", "std_level": std_level}
    whole = values(make_groups([[1.0, 0.0, 0.25], [0.5, 0.5, 0.0]]), reward_norm=norm)
    cut = make_groups([[1.0, 1.0, 0.0, 0.25], [0.5, 0.5, 0.0]])
    cut[0].episode_sizes = [2, 1, 1]
    got = values(cut, reward_norm=norm)
    assert got[0] == pytest.approx([whole[0][0], *whole[0]], rel=1e-6) and got[1] == pytest.approx(whole[1], rel=1e-6)
