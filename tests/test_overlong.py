"""What long answers earn less, and cut off ones are not trained on."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from areal.algo.advantage import compute_advantages, longest_answer, overlong_penalty, without_truncated
from areal.config import ActorConfig
from areal.metrics import batch_row
from areal.packer import make_train_batch
from areal.types import Group, Trajectory

MOST = 20


def sequence(*parts: int, reward: float = 1.0, truncated: bool = False) -> Trajectory:
    """Stretches of this many tokens: given ones and sampled ones in turn."""
    mask = np.concatenate([np.full(n, bool(i % 2)) for i, n in enumerate(parts)])
    versions = np.where(mask, 3, -1).astype(np.int32)
    return Trajectory(np.arange(len(mask)), mask, np.where(mask, -1, 0).astype(np.float32), versions, reward, truncated)


def dapo(length: int, longest: int, cache: int) -> float:
    """Equation 13 as it is written."""
    if length <= longest - cache:
        return 0.0
    if length <= longest:
        return ((longest - cache) - length) / cache
    return -1.0


@given(length=st.integers(0, 60), longest=st.integers(1, 50), data=st.data(), factor=st.floats(0.1, 5))
def test_the_penalty_is_that_of_the_paper(length: int, longest: int, data: st.DataObject, factor: float) -> None:
    cache = data.draw(st.integers(1, longest))
    assert overlong_penalty(length, longest, cache, factor) == pytest.approx(factor * dapo(length, longest, cache))


def test_the_longest_answer_counts() -> None:
    assert longest_answer(sequence(4, 7)) == 7
    assert longest_answer(sequence(4, 7, 2, 9, 1, 3)) == 9
    shown = sequence(4, 7, 2, 3)  # an earlier turn that is context here
    shown.loss_mask[4:11] = False
    assert longest_answer(shown) == 3
    over_age = sequence(4, 7)  # its oldest tokens were masked
    over_age.loss_mask[4:8] = False
    assert longest_answer(over_age) == 7
    over_age.loss_mask[:] = False
    assert longest_answer(over_age) == 0


def advantages(group: Group, **keys: object) -> list[float]:
    config = ActorConfig(path="x", **keys)  # type: ignore[arg-type]
    (values,) = compute_advantages([group], config, MOST)
    return [float(a[t.loss_mask][0]) if t.loss_mask.any() else 0.0 for a, t in zip(values, group.trajectories, strict=True)]


def test_it_comes_before_everything_else_and_leaves_the_reward() -> None:
    group = Group(0, {}, [sequence(3, 12), sequence(3, 18), sequence(3, 20, reward=0.0), sequence(3, 9, 1, 16)])
    keys = {"overlong_reward_penalty": True, "overlong_tokens": 8, "overlong_penalty_factor": 2.0}
    shaped = [1.0, 1 - 2 * 6 / 8, -2.0, 1 - 2 * 4 / 8]
    assert advantages(group, **keys, reward_norm=None) == shaped
    assert advantages(group, **keys, reward_norm=None, reward_scaling=10.0, reward_bias=0.5) == [10 * (r + 0.5) for r in shaped]
    x = np.array(shaped)
    assert advantages(group, **keys) == pytest.approx(((x - x.mean()) / (x.std() + 1e-5)).tolist(), rel=1e-6)
    assert batch_row([group], 3)["reward"] == 0.75  # metrics show what the reward function said
    assert advantages(group, reward_norm=None) == [1.0, 1.0, 0.0, 1.0]


def test_truncated_sequences_are_not_trained_on() -> None:
    groups = [
        Group(0, {}, [sequence(3, 4), sequence(3, 20, reward=0.0, truncated=True)]),
        Group(1, {}, [sequence(3, 5), sequence(2, 6, reward=0.0)], episode_sizes=[1, 1]),
    ]
    before = advantages(groups[0])
    trained, n_masked = without_truncated(groups)
    assert n_masked == 1 and trained[0].trajectories[0] is groups[0].trajectories[0] and groups[0].trajectories[1].loss_mask.sum() == 20
    assert advantages(trained[0]) == [before[0], 0.0]  # its reward is still what the other is compared with
    batch = make_train_batch(
        trained, compute_advantages(trained, ActorConfig(path="x"), MOST), n_minibatches=1, max_tokens_per_mb=100, world_size=1
    )
    (minibatch,) = batch.minibatches
    assert minibatch.denominator == 4 + 5 + 6 == sum(m.loss_mask.sum() for m in minibatch.ranks[0])
    row = batch_row(groups, 5, trained)
    assert (row["length"], row["truncated"], row["tokens_trained"], row["staleness_max"]) == (35 / 4, 0.25, 15, 2)
    everything, n_masked = without_truncated([Group(0, {}, [sequence(3, 20, truncated=True)] * 2)])
    row = batch_row(groups[:1], 5, everything)
    assert n_masked == 2 and (row["tokens_trained"], row["staleness_mean"], row["staleness_max"]) == (0, 0.0, 0)
    assert without_truncated(groups[1:]) == (groups[1:], 0)


def test_a_truncated_answer_is_compared_with_its_penalty() -> None:
    """That it is not trained on does not make it a short one."""
    groups = [Group(0, {}, [sequence(3, 5), sequence(3, 20, truncated=True)])]
    trained, _ = without_truncated(groups)
    config = ActorConfig(path="x", overlong_reward_penalty=True, overlong_tokens=8, reward_norm={"std_level": "none"})  # type: ignore[arg-type]
    ((kept, masked),) = compute_advantages(trained, config, MOST, answered=groups)
    assert kept[3:].tolist() == [0.5] * 5 and not masked.any()  # 1 against a mean of (1 + 0) / 2
