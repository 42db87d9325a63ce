"""Cutting a batch into packed micro-batches of at most ``capacity`` tokens (arXiv 2505.24298, algorithm 1)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from areal.ops._dispatch import choose_backend, compiled_module, missing_cpp

Plan = list[list[list[int]]]


def plan_microbatches(
    lengths: Sequence[int] | NDArray[np.integer],
    capacity: int,
    *,
    world_size: int = 1,
    k_min: int = 1,
    algorithm: Literal["ffd"] = "ffd",
    backend: Literal["cpp", "torch"] | None = None,
) -> Plan:
    """Indices of ``lengths`` [n] (tokens per sequence) as ``plan[rank][micro_batch]``; every index occurs once.

    ``ffd``: longest first; a sequence opens a new micro-batch while there are fewer than ``k_min`` or none has room, else it joins the
    fitting one with the fewest sequences. Every rank gets the same number of micro-batches: their count is raised to a multiple of
    ``world_size`` by cutting finer, or, with too few sequences, by empty ones. Micro-batches of like size have the same place in their
    ranks (ranks run in lockstep), and ranks get like totals. Both backends give the same plan.

    ``ValueError`` for a length below 1 or above ``capacity``, and for arguments below 1.
    """
    for name, value in (("capacity", capacity), ("world_size", world_size), ("k_min", k_min)):
        if value < 1:
            raise ValueError(f"plan_microbatches: {name}={value}; it must be at least 1")
    if algorithm != "ffd":
        raise ValueError(f"plan_microbatches: algorithm '{algorithm}' is unknown; there is 'ffd'")
    sizes = np.ascontiguousarray(lengths, dtype=np.int64)
    if sizes.ndim != 1:
        raise ValueError(f"plan_microbatches: lengths has {sizes.ndim} dimensions; it must have 1")
    bad = np.flatnonzero((sizes < 1) | (sizes > capacity))
    if bad.size:
        raise ValueError(
            f"sequence {bad[0]} has {sizes[bad[0]]} tokens; a micro-batch takes 1 to {capacity} (actor.mb_spec.max_tokens_per_mb)"
        )

    if choose_backend("plan_microbatches", {"cpp": missing_cpp(), "torch": None}, backend) == "cpp":
        module = compiled_module()
        assert module is not None
        return module.plan_microbatches_ffd(sizes.ctypes.data, len(sizes), capacity, world_size, k_min)
    return _deal(_cut(sizes.tolist(), capacity, world_size, k_min), world_size)


def _fill_bins(lengths: list[int], order: list[int], capacity: int, k_min: int) -> list[tuple[int, list[int]]]:
    tokens: list[int] = []
    members: list[list[int]] = []
    for i in order:
        fitting = [b for b in range(len(tokens)) if tokens[b] + lengths[i] <= capacity] if len(tokens) >= k_min else []
        if fitting:
            best = min(fitting, key=lambda b: len(members[b]))
            tokens[best] += lengths[i]
            members[best].append(i)
        else:
            tokens.append(lengths[i])
            members.append([i])
    return list(zip(tokens, members, strict=True))


def _cut(lengths: list[int], capacity: int, world_size: int, k_min: int) -> list[tuple[int, list[int]]]:
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    bins = _fill_bins(lengths, order, capacity, k_min)
    while len(bins) % world_size:
        rounded = -(-len(bins) // world_size) * world_size
        if rounded > len(lengths):
            bins += [(0, []) for _ in range(rounded - len(bins))]
            break
        bins = _fill_bins(lengths, order, capacity, rounded)
    return bins


def _deal(bins: list[tuple[int, list[int]]], world_size: int) -> Plan:
    bins = sorted(bins, key=lambda b: -b[0])
    plan: Plan = [[] for _ in range(world_size)]
    load = [0] * world_size
    for turn in range(0, len(bins), world_size):
        for rank, (tokens, members) in zip(sorted(range(world_size), key=load.__getitem__), bins[turn : turn + world_size], strict=True):
            load[rank] += tokens
            plan[rank].append(members)
    return plan
