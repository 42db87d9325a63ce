"""From finished groups to what one train step consumes: mini-batches of whole groups, cut into packed micro-batches for the ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from areal.ops.plan_microbatches import plan_microbatches
from areal.types import Group, Microbatch, Minibatch, TrainBatch, Trajectory


def make_train_batch(
    groups: Sequence[Group],
    advantages: Sequence[Sequence[NDArray[np.float32]]] | None,
    *,
    n_minibatches: int,
    max_tokens_per_mb: int,
    world_size: int,
    loss_normalization: Literal["token", "sequence", "fixed"] = "token",
    max_new_tokens: int | None = None,
    cost: tuple[float, float] = (1.0, 0.0),
) -> TrainBatch:
    """Packs ``groups``, in their order, into ``n_minibatches`` that differ by at most one group.

    ``advantages[g][s]`` is float32 [L], aligned with the tokens of sample s of group g; None = zeros, for ``fill``. A mini-batch's
    denominator is its number of loss tokens over all ranks, at least 1; that of the policy's loss is, by ``loss_normalization``, the same
    (``token``), the number of sequences that have loss tokens (``sequence``), or that number times ``max_new_tokens`` (``fixed``). Ranks
    get like shares of ``cost``, as of ``plan_microbatches``. ``ValueError`` when there are fewer groups than mini-batches, when advantages
    do not match their samples, or when a sample is longer than ``max_tokens_per_mb``.
    """
    if n_minibatches < 1 or len(groups) < n_minibatches:
        raise ValueError(f"{len(groups)} groups cannot be cut into {n_minibatches} mini-batches (actor.ppo_n_minibatches)")
    if advantages is None:
        advantages = [[np.zeros(len(sample), np.float32) for sample in group.trajectories] for group in groups]
    if len(advantages) != len(groups):
        raise ValueError(f"there are advantages for {len(advantages)} groups, but {len(groups)} groups")
    minibatches: list[Minibatch] = []
    n_packed = 0
    for m in range(n_minibatches):
        begin, end = (len(groups) * m // n_minibatches, len(groups) * (m + 1) // n_minibatches)
        samples: list[Trajectory] = []
        sample_advantages: list[NDArray[np.float32]] = []
        for group, group_advantages in zip(groups[begin:end], advantages[begin:end], strict=True):
            _check_group(group, group_advantages)
            samples += group.trajectories
            sample_advantages += group_advantages
        minibatch = _make_minibatch(samples, sample_advantages, n_packed, max_tokens_per_mb, world_size, cost)
        minibatch.policy_denominator = _policy_denominator(samples, loss_normalization, max_new_tokens)
        minibatches.append(minibatch)
        n_packed += len(samples)
    return TrainBatch(minibatches, n_groups=len(groups), n_samples=n_packed)


def attention_cost(model: Mapping[str, Any]) -> tuple[float, float]:
    """The work of a sequence of L tokens, ``a * L + b * L**2``, for a Hugging Face config: attention against all else. Tokens alone where it
    does not say how wide the model is."""
    text = model.get("text_config")
    width = (text if isinstance(text, Mapping) else model).get("hidden_size", model.get("n_embd"))
    return (1.0, 1.0 / (12 * width)) if isinstance(width, int) and width > 0 else (1.0, 0.0)


def _check_group(group: Group, advantages: Sequence[NDArray[np.float32]]) -> None:
    shapes = [(len(trajectory),) for trajectory in group.trajectories]
    if [a.shape for a in advantages] != shapes:
        raise ValueError(f"group {group.group_id}: advantages have the shapes {[a.shape for a in advantages]}, its samples {shapes}")


def _make_minibatch(
    samples: list[Trajectory],
    advantages: list[NDArray[np.float32]],
    first: int,
    capacity: int,
    world_size: int,
    cost: tuple[float, float],
) -> Minibatch:
    """``first``: the place in the batch of the first sample."""
    plan = plan_microbatches([len(sample) for sample in samples], capacity, world_size=world_size, cost=cost)
    ranks = [[pack([samples[i] for i in members], [advantages[i] for i in members]) for members in turns] for turns in plan]
    for microbatches, turns in zip(ranks, plan, strict=True):
        for microbatch, members in zip(microbatches, turns, strict=True):
            microbatch.members = [first + i for i in members]
    return Minibatch(ranks, denominator=float(max(1, sum(int(sample.loss_mask.sum()) for sample in samples))))


def _policy_denominator(samples: Sequence[Trajectory], normalization: str, max_new_tokens: int | None) -> float:
    if normalization == "token":
        return float(max(1, sum(int(sample.loss_mask.sum()) for sample in samples)))
    sequences = float(max(1, sum(bool(sample.loss_mask.any()) for sample in samples)))
    if normalization == "sequence":
        return sequences
    if not max_new_tokens:
        raise ValueError(f"loss_normalization='{normalization}' needs max_new_tokens, the length that every sequence counts as")
    return sequences * max_new_tokens


def pack(samples: list[Trajectory], advantages: list[NDArray[np.float32]]) -> Microbatch:
    """One micro-batch of these samples, in their order; without samples one that nothing is learned from."""
    if not samples:
        return _fill_up()
    lengths = np.array([len(sample) for sample in samples])
    cu_seqlens = np.concatenate([[0], np.cumsum(lengths)])
    return Microbatch(
        input_ids=np.concatenate([sample.input_ids for sample in samples]).astype(np.int64, copy=False),
        position_ids=np.arange(cu_seqlens[-1]) - np.repeat(cu_seqlens[:-1], lengths),
        cu_seqlens=cu_seqlens.astype(np.int32),
        loss_mask=np.concatenate([sample.loss_mask for sample in samples]).astype(np.bool_, copy=False),
        logprobs=np.concatenate([sample.logprobs for sample in samples]).astype(np.float32, copy=False),
        versions=np.concatenate([sample.versions for sample in samples]).astype(np.int32, copy=False),
        advantages=np.concatenate(advantages).astype(np.float32, copy=False),
    )


def _fill_up() -> Microbatch:
    """One token that nothing is learned from, for a rank with fewer micro-batches than the others: their collectives need its part."""
    return Microbatch(
        input_ids=np.zeros(1, np.int64),
        position_ids=np.zeros(1, np.int64),
        cu_seqlens=np.array([0, 1], np.int32),
        loss_mask=np.zeros(1, np.bool_),
        logprobs=np.zeros(1, np.float32),
        versions=np.full(1, -1, np.int32),
        advantages=np.zeros(1, np.float32),
    )


PerMicrobatch = Sequence[Sequence[Sequence[NDArray[np.float32]]]]
"""``[m][r][k]``: float32 [T] of micro-batch k of rank r of mini-batch m."""


def collect(minibatches: Sequence[Minibatch], per_microbatch: PerMicrobatch) -> list[NDArray[np.float32]]:
    """What was computed for packed tokens, float32 [L] for each sample of the batch, in its order."""
    found: dict[int, NDArray[np.float32]] = {}
    for minibatch, ranks in zip(minibatches, per_microbatch, strict=True):
        for microbatches, arrays in zip(minibatch.ranks, ranks, strict=True):
            for microbatch, array in zip(microbatches, arrays, strict=True):
                parts = np.split(array, microbatch.cu_seqlens[1:-1]) if microbatch.members else []
                found.update(zip(microbatch.members, parts, strict=True))
    return [found[place] for place in range(len(found))]


def fill(minibatches: Sequence[Minibatch], field: str, per_sample: Sequence[NDArray[np.float32]]) -> None:
    """Sets ``field`` of every micro-batch, from float32 [L] for each sample of the batch."""
    for microbatch in (mb for minibatch in minibatches for rank in minibatch.ranks for mb in rank):
        parts = [per_sample[place] for place in microbatch.members] or [np.zeros(microbatch.n_tokens, np.float32)]
        packed = np.concatenate(parts).astype(np.float32, copy=False)
        if packed.shape != (microbatch.n_tokens,):
            raise ValueError(f"{field}: {len(packed)} tokens for a micro-batch of {microbatch.n_tokens}")
        setattr(microbatch, field, packed)
