"""decode_attention on a GPU: every row's positions are split over programs, whose partial results a second kernel adds up.

A program takes one row, one K/V head and SPLIT positions: all query heads of that K/V head read each K and V once (padded to the 16 rows
of a tensor core's product). How many programs there are follows from the capacity, so the host does not read the lengths; those behind a
row's end return at once. Partial results are combined in order, so the result does not depend on timing, nor on the other rows.
"""

import torch
import triton
import triton.language as tl

LOG2_E = 1.4426950408889634
_LEAST_GROUP = 16


@triton.jit
def store_kernel(
    new_k, new_v, k_cache, v_cache, slots, lengths, k_row, k_head, v_row, v_head, capacity,
    KV_HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, HAS_SLOTS: tl.constexpr,
):  # fmt: skip
    """Program (row, K/V head): its new K and V go to position lengths - 1."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    length = tl.load(lengths + row)
    if length == 0:
        return
    slot = tl.load(slots + row) if HAS_SLOTS else row
    d = tl.arange(0, BLOCK_D)
    to = ((slot * KV_HEADS + head) * capacity + length - 1) * D + d
    tl.store(k_cache + to, tl.load(new_k + row * k_row + head * k_head + d, mask=d < D), mask=d < D)
    tl.store(v_cache + to, tl.load(new_v + row * v_row + head * v_head + d, mask=d < D), mask=d < D)


@triton.jit
def attend_kernel(
    q, k_cache, v_cache, slots, lengths, out, partial, statistics, q_row, q_head, capacity, n_splits, window, scaling, softcap,
    GROUP: tl.constexpr, BLOCK_G: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    SPLIT: tl.constexpr, STAGES: tl.constexpr, HAS_SLOTS: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, DIRECT: tl.constexpr,
):  # fmt: skip
    """Program (row * KV_HEADS + K/V head, split). Scores are in units of log(2): scaling, or softcap, has the factor log2(e).

    DIRECT, one split in all: writes out [rows, heads, D]. Else partial [rows, heads, n_splits, D] and statistics [rows, heads,
    n_splits, 2] (largest score, sum of 2^(score - largest)), float32.
    """
    row = (tl.program_id(0) // KV_HEADS).to(tl.int64)
    head = (tl.program_id(0) % KV_HEADS).to(tl.int64)
    split = tl.program_id(1)
    length = tl.load(lengths + row)
    first = tl.maximum(length - window, 0) if WINDOW else length * 0
    begin = first + split * SPLIT
    end = tl.minimum(begin + SPLIT, length)
    g = tl.arange(0, BLOCK_G)
    d = tl.arange(0, BLOCK_D)
    inside = (g < GROUP)[:, None] & (d < D)[None, :]
    heads = head * GROUP + g
    if begin >= end:
        if DIRECT:
            to = (row * KV_HEADS * GROUP + heads)[:, None] * D + d[None, :]
            tl.store(out + to, tl.zeros([BLOCK_G, BLOCK_D], tl.float32).to(out.dtype.element_ty), mask=inside)
        return
    slot = tl.load(slots + row) if HAS_SLOTS else row
    start = (slot * KV_HEADS + head) * capacity + begin
    keys = k_cache + start * D
    values = v_cache + start * D
    queries = tl.load(q + row * q_row + heads[:, None] * q_head + d[None, :], mask=inside, other=0.0)
    largest = tl.full([BLOCK_G], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_G], tl.float32)
    sums = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
    n = tl.arange(0, BLOCK_N)
    count = (end - begin).to(tl.int32)
    for j in tl.range(0, count, BLOCK_N, num_stages=STAGES):
        seen = j + n < count
        at = (j + n)[:, None] * D + d[None, :]
        mask = seen[:, None] & (d < D)[None, :]
        k = tl.load(keys + at, mask=mask, other=0.0)
        v = tl.load(values + at, mask=mask, other=0.0)
        scores = tl.dot(queries, tl.trans(k), input_precision="ieee") * scaling
        if SOFTCAP:
            # tanh. Near 0 the difference would lose the digits that the cap then magnifies; the series is right to 1e-8 of it there.
            x2 = scores * scores
            series = scores * (1.0 + x2 * (-1.0 / 3.0 + x2 * (2.0 / 15.0 + x2 * (-17.0 / 315.0 + x2 * (62.0 / 2835.0)))))
            scores = softcap * tl.where(x2 < 0.0625, series, 2.0 * tl.sigmoid(2.0 * scores) - 1.0)
        scores = tl.where(seen[None, :], scores, -float("inf"))
        top = tl.maximum(largest, tl.max(scores, 1))
        shrink = tl.exp2(largest - top)
        weights = tl.exp2(scores - top[:, None])
        total = total * shrink + tl.sum(weights, 1)
        sums = sums * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        largest = top
    rows = row * KV_HEADS * GROUP + heads
    if DIRECT:
        tl.store(out + rows[:, None] * D + d[None, :], (sums / total[:, None]).to(out.dtype.element_ty), mask=inside)
    else:
        part = rows * n_splits + split
        tl.store(partial + part[:, None] * D + d[None, :], sums, mask=inside)
        tl.store(statistics + part * 2, largest, mask=g < GROUP)
        tl.store(statistics + part * 2 + 1, total, mask=g < GROUP)


@triton.jit
def combine_kernel(
    partial, statistics, lengths, out, n_splits, window,
    HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, SPLIT: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """Program (row, head): adds up the splits that its row has, in order."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    seen = tl.load(lengths + row)
    if WINDOW:
        seen = tl.minimum(seen, window)
    splits = ((seen + SPLIT - 1) // SPLIT).to(tl.int32)
    d = tl.arange(0, BLOCK_D)
    largest = -float("inf")
    total = 0.0
    sums = tl.zeros([BLOCK_D], tl.float32)
    part = (row * HEADS + head) * n_splits
    for split in range(0, splits):
        score = tl.load(statistics + (part + split) * 2)
        top = tl.maximum(largest, score)
        shrink, grow = tl.exp2(largest - top), tl.exp2(score - top)
        total = total * shrink + tl.load(statistics + (part + split) * 2 + 1) * grow
        sums = sums * shrink + tl.load(partial + (part + split) * D + d, mask=d < D, other=0.0) * grow
        largest = top
    result = sums / tl.where(total > 0, total, 1.0)
    tl.store(out + (row * HEADS + head) * D + d, result.to(out.dtype.element_ty), mask=d < D)


def config(d, itemsize, capacity):
    """(BLOCK_N, SPLIT, STAGES): positions a step and a program, steps whose K and V are under way.

    A step's K and V are 32 KiB at d = 128 in bfloat16, so that two programs fit into the shared memory of one multiprocessor. Short
    splits feed all multiprocessors when there are few rows; long ones write fewer partial results.
    """
    block_d = max(16, triton.next_power_of_2(d))
    block_n = max(16, min(64, 16384 // (block_d * itemsize)))
    return block_n, 256 if capacity <= 4096 else 1024, 3


def launch(q, k_cache, v_cache, slots, lengths, new_k, new_v, out, scaling, window, softcap):
    """Two or three kernels on the current stream; arguments as in ``ops.decode_attention``, already checked. Fills ``out``."""
    rows, heads, d = q.shape
    if not q.numel():
        return
    kv_heads, capacity = k_cache.shape[1], k_cache.shape[2]
    group = heads // kv_heads
    block_d = max(16, triton.next_power_of_2(d))
    has_slots = slots is not None
    slots = lengths if slots is None else slots
    if new_k is not None:
        store_kernel[rows, kv_heads](
            new_k, new_v, k_cache, v_cache, slots, lengths, *new_k.stride()[:2], *new_v.stride()[:2], capacity,
            KV_HEADS=kv_heads, D=d, BLOCK_D=block_d, HAS_SLOTS=has_slots,
        )  # fmt: skip
    block_n, split, stages = config(d, q.element_size(), capacity)
    longest = capacity if window is None else min(window, capacity)
    n_splits = triton.cdiv(longest, split)
    direct = n_splits <= 1
    partial = statistics = out
    if not direct:
        partial = q.new_empty((rows, heads, n_splits, d), dtype=torch.float32)
        statistics = q.new_empty((rows, heads, n_splits, 2), dtype=torch.float32)
    in_log2 = (scaling * LOG2_E, 1.0) if softcap is None else (scaling / softcap, softcap * LOG2_E)
    attend_kernel[rows * kv_heads, max(1, n_splits)](
        q, k_cache, v_cache, slots, lengths, out, partial, statistics, *q.stride()[:2], capacity, n_splits, window or 0, *in_log2,
        GROUP=group, BLOCK_G=max(_LEAST_GROUP, triton.next_power_of_2(group)), KV_HEADS=kv_heads, D=d, BLOCK_D=block_d, BLOCK_N=block_n,
        SPLIT=split, STAGES=stages, HAS_SLOTS=has_slots, WINDOW=window is not None, SOFTCAP=softcap is not None, DIRECT=direct, num_warps=4,
    )  # fmt: skip
    if not direct:
        combine_kernel[rows, heads](
            partial, statistics, lengths, out, n_splits, window or 0,
            HEADS=heads, D=d, BLOCK_D=block_d, SPLIT=split, WINDOW=window is not None, num_warps=2,
        )  # fmt: skip
