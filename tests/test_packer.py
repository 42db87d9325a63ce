"""Packing groups into mini-batches and micro-batches: every sample once, whole groups, nothing moved against its tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from areal.packer import attention_cost, collect, fill, make_train_batch
from areal.types import Group, TrainBatch, Trajectory


def make_groups(n_groups: int, n_samples: int, seed: int = 0, longest: int = 50) -> tuple[list[Group], list[list[np.ndarray]]]:
    """Samples whose tokens say who they are: 1000 * running number + position; the other fields are functions of the token."""
    rng = np.random.default_rng(seed)
    groups, advantages = [], []
    for g in range(n_groups):
        trajectories = []
        for s in range(n_samples):
            length = int(rng.integers(2, longest))
            tokens = 1000 * (g * n_samples + s) + np.arange(length)
            mask = np.arange(length) >= int(rng.integers(1, length))
            trajectories.append(
                Trajectory(
                    tokens, mask, np.where(mask, -tokens / 7, 0).astype(np.float32), np.where(mask, tokens, -1).astype(np.int32), 0.0
                )
            )
        groups.append(Group(g, {}, trajectories))
        advantages.append([(t.input_ids * 0.5).astype(np.float32) for t in trajectories])
    return groups, advantages


def unpack(batch: TrainBatch, minibatch: int) -> dict[int, np.ndarray]:
    """Running number of the sample -> its tokens, checking every field on the way."""
    found = {}
    for mb in (mb for rank in batch.minibatches[minibatch].ranks for mb in rank):
        assert mb.cu_seqlens[0] == 0 and mb.cu_seqlens[-1] == mb.n_tokens
        assert (mb.cu_seqlens.dtype, mb.input_ids.dtype, mb.position_ids.dtype, mb.loss_mask.dtype) == (
            np.int32,
            np.int64,
            np.int64,
            np.bool_,
        )
        assert (mb.logprobs.dtype, mb.versions.dtype, mb.advantages.dtype) == (np.float32, np.int32, np.float32)
        for begin, end in zip(mb.cu_seqlens[:-1], mb.cu_seqlens[1:], strict=True):
            tokens, mask = mb.input_ids[begin:end], mb.loss_mask[begin:end]
            np.testing.assert_array_equal(mb.position_ids[begin:end], np.arange(end - begin))
            if end - begin == 1:
                assert not mask.any()
                continue
            np.testing.assert_array_equal(mb.logprobs[begin:end], np.where(mask, -tokens / 7, 0).astype(np.float32))
            np.testing.assert_array_equal(mb.versions[begin:end], np.where(mask, tokens, -1))
            np.testing.assert_array_equal(mb.advantages[begin:end], (tokens * 0.5).astype(np.float32))
            assert tokens[0] // 1000 not in found
            found[int(tokens[0] // 1000)] = tokens
    return found


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_sample_once_with_its_fields(world_size: int) -> None:
    groups, advantages = make_groups(10, 4)
    batch = make_train_batch(groups, advantages, n_minibatches=3, max_tokens_per_mb=120, world_size=world_size)
    assert (batch.n_groups, batch.n_samples, len(batch.minibatches)) == (10, 40, 3)
    samples = [trajectory for group in groups for trajectory in group.trajectories]
    begin = 0
    for m, n_groups in enumerate((3, 3, 4)):
        found = unpack(batch, m)
        assert sorted(found) == list(range(begin, begin + 4 * n_groups)), "whole groups, in order"
        for number, tokens in found.items():
            np.testing.assert_array_equal(tokens, samples[number].input_ids)
        ranks = batch.minibatches[m].ranks
        assert len(ranks) == world_size and len({len(rank) for rank in ranks}) == 1
        assert all(mb.n_tokens <= 120 for rank in ranks for mb in rank)
        assert batch.minibatches[m].denominator == sum(samples[number].loss_mask.sum() for number in found)
        begin += 4 * n_groups


def test_ranks_get_like_shares_of_the_work_not_of_the_tokens() -> None:
    assert attention_cost({"hidden_size": 1536}) == attention_cost({"text_config": {"hidden_size": 1536}}) == (1.0, 1 / 18432)
    assert attention_cost({"n_embd": 768}) == (1.0, 1 / 9216) and attention_cost({}) == (1.0, 0.0)
    cost = attention_cost({"hidden_size": 896})
    lengths = np.random.default_rng(0).lognormal(7.2, 1.0, 256).clip(16, 8192).astype(np.int64)
    samples = [Trajectory(np.ones(n, np.int64), np.ones(n, bool), np.ones(n, np.float32), np.zeros(n, np.int32), 0.0) for n in lengths]
    groups = [Group(i, {}, [sample]) for i, sample in enumerate(samples)]
    idle = []
    for given in ({}, {"cost": cost}):
        ranks = make_train_batch(groups, None, n_minibatches=1, max_tokens_per_mb=16384, world_size=4, **given).minibatches[0].ranks
        work = np.array([[sum(cost[0] * n + cost[1] * n**2 for n in np.diff(mb.cu_seqlens)) for mb in rank] for rank in ranks])
        idle.append(1 - work.sum() / (4 * work.max(0).sum()))
    assert idle[1] < 0.01 and idle[0] > 0.03, "all wait for the slowest in every turn"


def test_a_rank_without_samples_gets_a_masked_token() -> None:
    groups, advantages = make_groups(1, 1)
    batch = make_train_batch(groups, advantages, n_minibatches=1, max_tokens_per_mb=64, world_size=2)
    (filled,) = min(batch.minibatches[0].ranks, key=lambda rank: rank[0].n_tokens)
    assert (filled.n_tokens, filled.loss_mask.tolist(), filled.cu_seqlens.tolist()) == (1, [False], [0, 1])


def test_the_denominator_is_never_zero() -> None:
    groups, advantages = make_groups(1, 2)
    for trajectory in groups[0].trajectories:
        trajectory.loss_mask[:] = False
    assert make_train_batch(groups, advantages, n_minibatches=1, max_tokens_per_mb=64, world_size=1).minibatches[0].denominator == 1.0


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_denominator_of_the_policy(world_size: int) -> None:
    groups, advantages = make_groups(4, 3)
    groups[0].trajectories[1].loss_mask[:] = False
    samples = [t for group in groups for t in group.trajectories]

    def denominators(**options: Any) -> list[float | None]:
        batch = make_train_batch(groups, advantages, n_minibatches=2, max_tokens_per_mb=120, world_size=world_size, **options)
        assert [m.denominator for m in batch.minibatches] == tokens
        return [m.policy_denominator for m in batch.minibatches]

    tokens = [float(sum(t.loss_mask.sum() for t in half)) for half in (samples[:6], samples[6:])]
    assert denominators() == denominators(loss_normalization="token") == tokens
    assert denominators(loss_normalization="sequence") == [5.0, 6.0], "sequences without loss tokens do not count"
    assert denominators(loss_normalization="fixed", max_new_tokens=50) == [250.0, 300.0]
    with pytest.raises(ValueError, match="loss_normalization='fixed' needs max_new_tokens"):
        denominators(loss_normalization="fixed")


def test_mistakes_are_named() -> None:
    groups, advantages = make_groups(2, 2)
    with pytest.raises(ValueError, match="2 groups cannot be cut into 3 mini-batches"):
        make_train_batch(groups, advantages, n_minibatches=3, max_tokens_per_mb=64, world_size=1)
    with pytest.raises(ValueError, match="advantages for 1 groups, but 2"):
        make_train_batch(groups, advantages[:1], n_minibatches=1, max_tokens_per_mb=64, world_size=1)
    with pytest.raises(ValueError, match="group 1: advantages have the shapes"):
        make_train_batch(groups, [advantages[0], advantages[1][::-1][:1]], n_minibatches=1, max_tokens_per_mb=64, world_size=1)
    with pytest.raises(ValueError, match="max_tokens_per_mb"):
        make_train_batch(groups, advantages, n_minibatches=1, max_tokens_per_mb=3, world_size=1)


@pytest.mark.parametrize("world_size", [1, 3])
def test_collect_and_fill_lead_back_to_the_samples(world_size: int) -> None:
    """``advantages`` of the samples are packed with them: filled again from what was collected they do not move."""
    groups, advantages = make_groups(10, 4)
    keys = {"n_minibatches": 3, "max_tokens_per_mb": 120, "world_size": world_size}
    given, empty = make_train_batch(groups, advantages, **keys), make_train_batch(groups, None, **keys)
    assert not any(mb.advantages.any() for m in empty.minibatches for rank in m.ranks for mb in rank)
    per_sample = collect(given.minibatches, [[[mb.advantages for mb in rank] for rank in m.ranks] for m in given.minibatches])
    for got, expected in zip(per_sample, (a for group in advantages for a in group), strict=True):
        np.testing.assert_array_equal(got, expected)
    fill(empty.minibatches, "returns", per_sample)
    for m, n in zip(given.minibatches, empty.minibatches, strict=True):
        for mb, other in zip((mb for rank in m.ranks for mb in rank), (mb for rank in n.ranks for mb in rank), strict=True):
            np.testing.assert_array_equal(other.returns, mb.advantages)
            assert other.returns.dtype == np.float32
    with pytest.raises(ValueError, match="values: .* tokens for a micro-batch of"):
        fill(empty.minibatches, "values", [a[1:] for a in per_sample])
