"""plan_microbatches: time per plan; the limit of the default algorithm is a fixed time.

The label says how many micro-batches there are, over the fewest that their tokens could fill, and the lockstep efficiency: the work of all
ranks over what they would have done if each turn took as long as its costliest micro-batch. Rivals are ffd that looks through all
micro-batches for every sequence, and differencing that sorts all sums at every step, both in plain Python.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from areal.ops.plan_microbatches import Plan, lower_bound, plan_microbatches
from benchmarks.op_bench import Case, Seconds

DEVICES = ("cpu",)
CAPACITY, RANKS = 32768, 8
ALGORITHMS = ("lpt", "kk", "ffd")
LIMITS = {256: 0.001, 4096: 0.010, 100_000: 0.300}  # seconds, for the default
EFFICIENCY = 0.975


def cases(device: str, backends: Sequence[str]) -> Iterator[Case]:
    if device not in DEVICES:
        return
    rng = np.random.default_rng(0)
    for n, limit in LIMITS.items():
        # Answers of reasoning models: log-normal, with a tail up to the generation limit.
        lengths = np.clip(rng.lognormal(8.0, 0.8, n), 64, CAPACITY).astype(np.int64)
        for algorithm in ALGORITHMS if n <= 4096 else ALGORITHMS[:1]:  # the others' references take 10 s
            plan = plan_microbatches(lengths, CAPACITY, world_size=RANKS, algorithm=algorithm)
            efficiency = lockstep_efficiency(plan, lengths)
            if algorithm == "lpt" and n >= 4096 and efficiency < EFFICIENCY:
                raise AssertionError(f"plan_microbatches: lockstep efficiency {efficiency:.4f} at {n} sequences, wanted {EFFICIENCY}")
            least = -(-lower_bound(np.sort(lengths)[::-1], CAPACITY) // RANKS) * RANKS
            label = f"{n} {algorithm}: {sum(map(len, plan))}/{least} micro-batches, {100 * efficiency:.2f}% lockstep"
            variants: dict[str, Callable[[], object]] = {
                b: partial(plan_microbatches, lengths, CAPACITY, world_size=RANKS, algorithm=algorithm, backend=b)
                for b in backends
                if b in ("torch", "cpp")
            }
            if n == 4096 and algorithm != "lpt":
                rival = {"ffd": search_all_bins, "kk": sort_all_sums}[algorithm]
                variants[f"plain {algorithm}"] = partial(rival, lengths.tolist(), sum(map(len, plan)))
            yield Case(label, n, variants, same_plan, "torch", Seconds(limit) if algorithm == "lpt" else None, 1.0, algorithm)


def lockstep_efficiency(plan: Plan, lengths: NDArray[np.int64]) -> float:
    work = np.array([[lengths[mb].sum() for mb in rank] for rank in plan])
    return float(lengths.sum() / len(plan) / work.max(axis=0).sum())


def same_plan(found: object, expected: object) -> None:
    """The same plan of a backend; of a rival, which breaks ties in its own way and deals nothing, as many micro-batches."""
    assert isinstance(found, list) and isinstance(expected, list)
    if isinstance(found[0][0], list):
        assert found == expected, "another plan"
    else:
        assert len(found) == sum(map(len, expected)), f"{len(found)} micro-batches, not {sum(map(len, expected))}"


def search_all_bins(lengths: list[int], count: int) -> list[list[int]]:
    """ffd with ``count`` micro-batches opened first."""
    tokens, members = [0] * count, [[] for _ in range(count)]
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fitting = [b for b in range(len(tokens)) if tokens[b] + lengths[i] <= CAPACITY]
        if not fitting:
            fitting = [len(tokens)]
            tokens.append(0)
            members.append([])
        b = min(fitting, key=lambda b: len(members[b]))
        tokens[b] += lengths[i]
        members[b].append(i)
    return members


def sort_all_sums(lengths: list[int], count: int) -> list[list[int]]:
    """Differencing as it is usually written: every partition has all ``count`` sums, added up pairwise and sorted."""
    heap = [(-length, i, [(0, [])] * (count - 1) + [(length, [i])]) for i, length in enumerate(lengths)]
    heapq.heapify(heap)
    while len(heap) > 1:
        (_, i, a), (_, j, b) = heapq.heappop(heap), heapq.heappop(heap)
        sums = sorted(((x + y, p + q) for (x, p), (y, q) in zip(a, reversed(b), strict=True)), key=lambda entry: entry[0])
        heapq.heappush(heap, (sums[0][0] - sums[-1][0], min(i, j), sums))
    return [members for _, members in heap[0][2]]
