"""Cutting a batch of sequences into packed micro-batches of at most ``capacity`` tokens, and dealing these to ranks.

All ranks get the same number of micro-batches, and those at the same place, a turn, run in lockstep: a turn lasts as long as its
costliest micro-batch. So micro-batches of like cost share a turn, and how even they are matters as much as how few. The reference is
plain Python, with total orders everywhere, so that the C++ backend gives the same plan.
"""

from __future__ import annotations

import heapq
import math
from bisect import insort
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from areal.ops._dispatch import choose_backend, compiled_module, missing_cpp

Plan = list[list[list[int]]]
SPLIT_ROUNDS = 4  # halvings in the search for how many sequences must be packed tightly; csrc/plan_microbatches.cpp has the same


def plan_microbatches(
    lengths: Sequence[int] | NDArray[np.integer],
    capacity: int,
    *,
    world_size: int = 1,
    k_min: int = 1,
    cost: tuple[float, float] = (1.0, 0.0),
    algorithm: Literal["lpt", "kk", "ffd"] = "lpt",
    backend: Literal["cpp", "torch"] | None = None,
) -> Plan:
    """Indices of ``lengths`` [n] (tokens per sequence) as ``plan[rank][micro_batch]``, ascending in each; every index occurs once.

    Every rank gets the same number of micro-batches, at least ``k_min`` in all if there are as many sequences; none is empty unless
    there are fewer sequences than micro-batches. ``cost=(a, b)`` is the work of a sequence of L tokens, ``a * L + b * L**2`` (any
    unit): with causal attention, b / a is about 1 / (12 * hidden size). Micro-batches are put into turns of like cost, and each turn is
    dealt so that ranks get like totals. Algorithms:

    - ``lpt``: the smallest multiple of ``world_size`` for which a packing is found (the lower bound of ``lower_bound``, or up to 11/9 of
      it by first fit; finding the fewest is NP-hard). Costliest sequence first, into the micro-batch with the least cost that has room
      (Graham's longest processing time); where a single sequence makes a turn long, that turn's other micro-batches get more. Where
      there is no room left, as many of the longest sequences as necessary are packed by first fit before. O(n log n).
    - ``kk``: Karmarkar and Karp's largest differencing on tokens, at the smallest multiple of ``world_size`` where its result keeps to
      the capacity. Evener than ``lpt`` with few sequences per micro-batch, and some times slower.
    - ``ffd``: algorithm 1 of arXiv 2505.24298: longest first; a sequence opens a new micro-batch while there are fewer than ``k_min``
      or none has room, else it joins the fitting one with the fewest sequences. Rounded up to ``world_size`` by cutting finer.

    Both backends give the same plan. ``ValueError`` for a length below 1 or above ``capacity``, for capacity, world_size or k_min below
    1, and for a cost that is negative, not finite or zero.
    """
    sizes = _checked(lengths, capacity, world_size, k_min, cost)
    if algorithm not in ("lpt", "kk", "ffd"):
        raise ValueError(f"plan_microbatches: algorithm '{algorithm}' is unknown; there are 'lpt', 'kk' and 'ffd'")
    costs = cost[0] * sizes + cost[1] * np.square(sizes, dtype=np.float64)
    order = np.argsort(-sizes, kind="stable")
    least = max(lower_bound(sizes[order], capacity), min(k_min, len(sizes)))
    if choose_backend("plan_microbatches", {"cpp": missing_cpp(), "torch": None}, backend) == "cpp":
        module = compiled_module()
        assert module is not None
        arrays = (sizes.ctypes.data, costs.ctypes.data, order.ctypes.data)
        return module.plan_microbatches(algorithm, arrays, (len(sizes), capacity, world_size, least, min(k_min, len(sizes))))
    packing = _Packing(sizes.tolist(), costs.tolist(), order.tolist(), capacity)
    match algorithm:
        case "ffd":
            bins = _ffd(packing, world_size, min(k_min, len(sizes)))
        case "kk":
            bins = _kk(packing, world_size, least)
        case "lpt":
            bins = _lpt(packing, world_size, least)
    return _deal(bins, packing.costs, world_size)


def _checked(
    lengths: Sequence[int] | NDArray[np.integer], capacity: int, world_size: int, k_min: int, cost: tuple[float, float]
) -> NDArray[np.int64]:
    for name, value in (("capacity", capacity), ("world_size", world_size), ("k_min", k_min)):
        if not isinstance(value, int | np.integer) or value < 1:
            raise ValueError(f"plan_microbatches: {name}={value}; it must be an integer of at least 1")
    pair = isinstance(cost, Sequence) and len(cost) == 2
    if not pair or not all(math.isfinite(c) and c >= 0 for c in cost) or not any(cost):
        raise ValueError(f"plan_microbatches: cost={cost}; it must be two numbers (a, b) of at least 0, not both 0")
    sizes = np.asarray(lengths)
    if sizes.size and sizes.dtype.kind not in "iu":
        raise ValueError(f"plan_microbatches: lengths is {sizes.dtype}; it must be of integers")
    sizes = np.ascontiguousarray(sizes, dtype=np.int64)
    if sizes.ndim != 1:
        raise ValueError(f"plan_microbatches: lengths has {sizes.ndim} dimensions; it must have 1")
    bad = np.flatnonzero((sizes < 1) | (sizes > capacity))
    if bad.size:
        raise ValueError(
            f"plan_microbatches: lengths: sequence {bad[0]} has {sizes[bad[0]]} tokens; a micro-batch takes 1 to {capacity}, its capacity "
            "(of a run: actor.mb_spec.max_tokens_per_mb)"
        )
    return sizes


def lower_bound(descending: NDArray[np.int64], capacity: int) -> int:
    """No packing of these lengths (sorted, longest first) has fewer bins: Martello and Toth's bound L2 (Discrete Appl. Math. 28, 1990).

    Sequences above half the capacity need a bin each, and what these leave over is all that shorter ones can use beside new bins.
    For every threshold t those above capacity - t leave nothing over, as those below t are not counted.
    """
    n = len(descending)
    if n == 0:
        return 0
    sums = np.concatenate([[0], np.cumsum(descending)])
    ascending = descending[::-1]
    halves = n - int(np.searchsorted(ascending, capacity // 2, side="right"))  # 2 L > capacity
    small = np.unique(np.concatenate([[0], descending[halves:]]))  # thresholds
    counted = n - np.searchsorted(ascending, small, side="left")  # L >= t
    lonely = n - np.searchsorted(ascending, capacity - small, side="right")  # L > capacity - t
    left_over = (halves - lonely) * capacity - (sums[halves] - sums[lonely])
    beyond = sums[counted] - sums[halves] - left_over
    return int((halves + np.maximum(0, -(-beyond // capacity))).max())


class _Packing:
    """The sequences, longest first in ``order``, and bins being filled: the state of one attempt."""

    def __init__(self, lengths: list[int], costs: list[float], order: list[int], capacity: int) -> None:
        self.lengths, self.costs, self.order, self.capacity = lengths, costs, order, capacity
        self.head_starts: list[float] = []  # loads that the first bins have while they are empty; 0 for others
        self.reset()

    def reset(self, n_bins: int = 0) -> None:
        self.room = [self.capacity] * n_bins
        self.load = (self.head_starts + [0.0] * n_bins)[:n_bins]
        self.bins: list[list[int]] = [[] for _ in range(n_bins)]

    def _open(self) -> int:
        self.room.append(self.capacity)
        b = len(self.bins)
        self.load.append(self.head_starts[b] if b < len(self.head_starts) else 0.0)
        self.bins.append([])
        return b

    def _put(self, i: int, b: int, load: float) -> None:
        self.room[b] -= self.lengths[i]
        self.load[b] += load
        self.bins[b].append(i)

    def least_loaded(self, order: Sequence[int], loads: Sequence[float], most_bins: int) -> bool:
        """Each into the bin with the smallest load that has room, the first of equals; False if it takes more than ``most_bins``."""
        ready = [(load, b) for b, load in enumerate(self.load)]
        heapq.heapify(ready)
        parked: list[tuple[int, int]] = []  # (-room, bin): found too full, until lengths have come down to their room
        for i in order:
            length = self.lengths[i]
            while parked and -parked[0][0] >= length:
                b = heapq.heappop(parked)[1]
                heapq.heappush(ready, (self.load[b], b))
            while ready and self.room[ready[0][1]] < length:
                b = heapq.heappop(ready)[1]
                heapq.heappush(parked, (-self.room[b], b))
            if not ready:
                if len(self.bins) >= most_bins:
                    return False
                heapq.heappush(ready, (0.0, self._open()))
            b = ready[0][1]
            self._put(i, b, loads[i])
            heapq.heapreplace(ready, (self.load[b], b))
        return True

    def first_fit(self, order: Sequence[int]) -> None:
        """Each into the first bin that has room, which opens new ones as they are needed. Starts without bins."""
        self.reset()
        size = 1
        while size < len(order):
            size *= 2
        room = [self.capacity] * (2 * size)  # a tree: entry i is the most room below it, entry size + b that of bin b
        for i in order:
            length, at = self.lengths[i], 1
            while at < size:
                at *= 2
                if room[at] < length:
                    at += 1
            if at - size == len(self.bins):
                self._open()
            self._put(i, at - size, self.costs[i])
            room[at] -= length
            while at > 1:
                at //= 2
                most = max(room[2 * at], room[2 * at + 1])
                if room[at] == most:
                    break
                room[at] = most


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _ffd(packing: _Packing, world_size: int, k_min: int) -> list[list[int]]:
    # Opening k_min bins first is what starting from as many empty ones does: an empty one has the fewest sequences, and room.
    n, count = len(packing.order), k_min
    while True:
        packing.reset(count)
        packing.least_loaded(packing.order, [1.0] * n, n)
        count = _round_up(len(packing.bins), world_size)
        if count == len(packing.bins) or count > n:
            return packing.bins


def _lpt(packing: _Packing, world_size: int, least: int) -> list[list[int]]:
    count = _round_up(least, world_size)
    if not _split_fill(packing, 0, count):
        packing.first_fit(packing.order)
        tight = _round_up(max(len(packing.bins), least), world_size)
        if tight > count:  # differencing finds even packings that greedy rules miss
            bins = _differencing(packing, count)
            if bins is not None:
                return bins
        if tight == count or not _split_fill(packing, 0, tight):
            return _split_search(packing, tight)
        count = tight
    plain = packing.bins
    packing.head_starts = _head_starts(packing, world_size, count)
    if packing.head_starts and _split_fill(packing, 0, count):
        ahead = _without_empty(packing.bins)
        if _lockstep(ahead, packing.costs, world_size) < _lockstep(plain, packing.costs, world_size):
            return ahead
    return plain


def _head_starts(packing: _Packing, world_size: int, count: int) -> list[float]:
    """Negative loads for the first bins, against turns that single sequences make long; empty where there are none.

    A sequence that costs more than the mean bin sets the length of its turn, so the turn's other bins may as well cost as much, and
    those of later turns less: the level that is left for these is what all cost together, less the long turns.
    """
    left = 0.0
    for i in packing.order:
        left += packing.costs[i]
    longest: list[float] = []  # the costliest sequences of the turns above the level
    level = left / count if count else 0.0
    for at in range(0, min(count, len(packing.order)), world_size):
        costliest = packing.costs[packing.order[at]]
        if costliest <= level:
            break
        longest.append(costliest)
        left -= costliest * world_size
        level = max(0.0, left / max(world_size, count - at - world_size))
    return [level - cost for cost in longest for _ in range(world_size)]


def _lockstep(bins: list[list[int]], costs: list[float], world_size: int) -> float:
    """What all turns take together."""
    total = 0.0
    for longest in sorted(_work(bins, costs), reverse=True)[::world_size]:
        total += longest
    return total


def _work(bins: list[list[int]], costs: list[float]) -> list[float]:
    """Each bin's; its members are put in ascending order. Sums are one by one in that order: the other backend's rounding."""
    work = []
    for members in bins:
        members.sort()
        total = 0.0
        for i in members:
            total += costs[i]
        work.append(total)
    return work


def _split_search(packing: _Packing, count: int) -> list[list[int]]:
    """Bins by cost after as short a tight part as the capacity allows; ``count`` must do for first fit."""
    fails, suffices, packed = 0, len(packing.order), False
    for _ in range(SPLIT_ROUNDS):
        middle = (fails + suffices) // 2
        packed = _split_fill(packing, middle, count)
        fails, suffices = (fails, middle) if packed else (middle, suffices)
    packed = packed or _split_fill(packing, suffices, count)
    assert packed, "what first fit packed once, it packs again"
    return _without_empty(packing.bins)


def _split_fill(packing: _Packing, n_tight: int, count: int) -> bool:
    """The ``n_tight`` longest by first fit, the others by cost into what these leave of ``count`` bins."""
    packing.first_fit(packing.order[:n_tight])
    if len(packing.bins) > count:
        return False
    while len(packing.bins) < count:
        packing._open()
    return packing.least_loaded(packing.order[n_tight:], packing.costs, count)


def _without_empty(bins: list[list[int]]) -> list[list[int]]:
    """Empty bins get the last sequence of the bin that has the most."""
    crowded = [(-len(b), i) for i, b in enumerate(bins)]
    heapq.heapify(crowded)
    for b in bins:
        if not b and -crowded[0][0] > 1:
            size, i = crowded[0]
            b.append(bins[i].pop())
            heapq.heapreplace(crowded, (size + 1, i))
    return bins


def _kk(packing: _Packing, world_size: int, least: int) -> list[list[int]]:
    fails = _round_up(least, world_size)
    bins = _differencing(packing, fails)
    if bins is not None:
        return bins
    packing.first_fit(packing.order)
    suffices = _round_up(max(len(packing.bins), least), world_size)
    while suffices - fails > world_size:
        middle = _round_up((fails + suffices) // 2, world_size)
        bins = _differencing(packing, middle)
        if bins is None:
            fails = middle
        else:
            suffices = middle
    bins = _differencing(packing, suffices)
    return bins if bins is not None else _split_search(packing, suffices)


def _differencing(packing: _Packing, count: int) -> list[list[int]] | None:
    """Bins of like token totals, or None where these exceed the capacity.

    A partition is ``count`` sums, of which those of 0 are left implicit; at first there is one per sequence, with a single sum. The two
    with the largest differences between their sums are joined, largest sum with smallest, until one is left. Real sums are kept: taking
    the smallest off all of them, as is often written, changes neither order nor differences.
    """
    lengths, members = packing.lengths, {i: [i] for i in packing.order}
    partitions = {i: [(lengths[i], i)] for i in packing.order}  # (sum, first member), ascending
    differences = [(-lengths[i] if count > 1 else 0, i) for i in packing.order]
    heapq.heapify(differences)
    while len(differences) > 1:
        first = heapq.heappop(differences)[1]
        second = differences[0][1]
        large, small = partitions.pop(first), partitions.pop(second)
        if len(large) < len(small):
            large, small = small, large
        free = count - len(large)
        smallest = large[: max(0, len(small) - free)]
        joined = small[::-1][:free]
        for (a, i), (b, j) in zip(smallest, small[::-1][free:], strict=True):
            keep, give = min(i, j), max(i, j)
            members[keep] += members.pop(give)
            joined.append((a + b, keep))
        large = large[len(smallest) :]
        for entry in joined:
            insort(large, entry)
        key = min(first, second)
        partitions[key] = large
        heapq.heapreplace(differences, ((large[0][0] if len(large) == count else 0) - large[-1][0], key))
    sums = partitions.popitem()[1] if partitions else []
    if sums and sums[-1][0] > packing.capacity:
        return None
    return [members[i] for _, i in sums] + [[] for _ in range(count - len(sums))]


def _deal(bins: list[list[int]], costs: list[float], world_size: int) -> Plan:
    """Turns of like cost; in a turn the costliest goes to the rank with the least so far."""
    bins = bins + [[] for _ in range(-len(bins) % world_size)]
    work = _work(bins, costs)
    by_work = sorted(range(len(bins)), key=lambda b: -work[b])
    plan: Plan = [[] for _ in range(world_size)]
    load = [0.0] * world_size
    for turn in range(0, len(bins), world_size):
        for rank, b in zip(sorted(range(world_size), key=load.__getitem__), by_work[turn : turn + world_size], strict=True):
            load[rank] += work[b]
            plan[rank].append(bins[b])
    return plan
