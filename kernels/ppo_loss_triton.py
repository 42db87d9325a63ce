"""Triton kernels of ``ppo_loss``. areal/ops/ppo_loss.py defines what is computed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from areal.kernels.ppo_token_triton import MAX_LOG_RATIO, log_ratio, ppo_term, ppo_token_gradient

__all__ = ["ppo_loss", "ppo_token_gradient"]

# Bits of `FLAGS`, as in csrc/bind_ppo_loss.cpp.
CISPO: tl.constexpr = tl.constexpr(1)
DECOUPLED: tl.constexpr = tl.constexpr(2)
MASK_WEIGHTS: tl.constexpr = tl.constexpr(4)
SEQUENCE_RATIO: tl.constexpr = tl.constexpr(8)
SEQUENCE_WEIGHT: tl.constexpr = tl.constexpr(16)
SEQUENCE_FILTER: tl.constexpr = tl.constexpr(32)
SEQUENCE_MEAN: tl.constexpr = tl.constexpr(64)
FILTER_BY_ADVANTAGE: tl.constexpr = tl.constexpr(128)

_ROW = 16  # floats between the sums of two programs: those of areal::PPOStatistic, then padding


@triton.jit
def _load(pointer, at, inside, MASKED: tl.constexpr):
    if MASKED:
        return tl.load(pointer + at, mask=inside, other=0)
    else:
        return tl.load(pointer + at)


@triton.jit
def _store(pointer, at, value, inside, MASKED: tl.constexpr):
    if MASKED:
        tl.store(pointer + at, value, mask=inside)
    else:
        tl.store(pointer + at, value)


@triton.jit
def _ratios(current_ptr, proximal_ptr, behavior_ptr, mask_ptr, at, inside, FLAGS: tl.constexpr, MASKED: tl.constexpr):
    counted = _load(mask_ptr, at, inside, MASKED) != 0
    current = _load(current_ptr, at, inside, MASKED)
    proximal = _load(proximal_ptr, at, inside, MASKED)
    behavior = _load(behavior_ptr, at, inside, MASKED)
    stale_log, stale, _ = log_ratio(proximal, behavior, counted)
    if DECOUPLED & FLAGS:
        moved_log, moved, free = log_ratio(current, proximal, counted)
    else:
        moved_log, moved, free = log_ratio(current, behavior, counted)
    return counted, current, moved_log, moved, free, stale_log, stale


@triton.jit
def _add_tokens(
    current_ptr,
    proximal_ptr,
    behavior_ptr,
    advantages_ptr,
    mask_ptr,
    entropy_ptr,
    gradient_ptr,
    entropy_gradient_ptr,
    at,
    inside,
    sequence_ratio,
    sequence_weight,
    sequence_filter,
    loss_weight,
    scale,
    lower,
    upper,
    c_clip,
    weight_cap,
    filter_lower,
    filter_upper,
    entropy_coef,
    FLAGS: tl.constexpr,
    MASKED: tl.constexpr,
):
    """The loss of a block of tokens: stores the gradients, returns the sum of the slopes and the statistics of ``_store_sums``."""
    counted, current, moved_log, moved, free, stale_log, stale = _ratios(
        current_ptr, proximal_ptr, behavior_ptr, mask_ptr, at, inside, FLAGS, MASKED
    )
    advantages = _load(advantages_ptr, at, inside, MASKED)
    ratio = moved
    weight_ratio = stale
    filter_ratio = stale
    if SEQUENCE_RATIO & FLAGS:
        ratio = tl.where(counted, sequence_ratio, 1.0)
    if SEQUENCE_WEIGHT & FLAGS:
        weight_ratio = tl.where(counted, sequence_weight, 1.0)
    if SEQUENCE_FILTER & FLAGS:
        filter_ratio = tl.where(counted, sequence_filter, 1.0)
    objective, slope, weight, kept, high, low, dual, truncated = ppo_term(
        counted,
        current,
        advantages,
        ratio,
        weight_ratio,
        filter_ratio,
        lower,
        upper,
        c_clip,
        weight_cap,
        filter_lower,
        filter_upper,
        (CISPO & FLAGS) != 0,
        (DECOUPLED & FLAGS) != 0,
        (MASK_WEIGHTS & FLAGS) != 0,
        (FILTER_BY_ADVANTAGE & FLAGS) != 0,
    )
    loss = -objective * loss_weight
    entropy_sum = tl.sum(loss) * 0.0
    if entropy_ptr is not None:
        entropy = tl.where(counted, _load(entropy_ptr, at, inside, MASKED), 0.0)
        loss -= entropy * (entropy_coef * loss_weight)
        entropy_sum = tl.sum(entropy)
    if gradient_ptr is not None:
        if not (CISPO & FLAGS):
            own = tl.where(free, slope, 0.0)
        else:
            own = slope
        _store(gradient_ptr, at, tl.where(counted, own * (-scale * loss_weight), 0.0), inside, MASKED)
    if entropy_gradient_ptr is not None:
        _store(entropy_gradient_ptr, at, tl.where(counted, -scale * loss_weight * entropy_coef, 0.0), inside, MASKED)
    return (
        tl.sum(slope),
        tl.sum(loss),
        _count(counted),
        _count(high),
        _count(low),
        _count(dual),
        tl.sum(tl.where(counted, ratio, 0.0)),
        tl.sum(tl.where(counted, weight, 0.0)),
        _count(truncated),
        _count(counted & (kept == 0)),
        tl.sum(moved - 1.0 - moved_log),
        tl.sum(stale - 1.0 - stale_log),
        entropy_sum,
    )


@triton.jit
def _count(mask):
    return tl.sum(mask.to(tl.float32))


@triton.jit
def _store_sums(sums_ptr, loss, counted, high, low, dual, ratio, weight, truncated, filtered, kl_proximal, kl_behavior, entropy):
    tl.store(sums_ptr, loss)
    tl.store(sums_ptr + 1, counted)
    tl.store(sums_ptr + 2, high + low)
    tl.store(sums_ptr + 3, high)
    tl.store(sums_ptr + 4, low)
    tl.store(sums_ptr + 5, dual)
    tl.store(sums_ptr + 6, ratio)
    tl.store(sums_ptr + 7, weight)
    tl.store(sums_ptr + 8, truncated)
    tl.store(sums_ptr + 9, filtered)
    tl.store(sums_ptr + 10, kl_proximal)
    tl.store(sums_ptr + 11, kl_behavior)
    tl.store(sums_ptr + 12, entropy)


@triton.jit
def ppo_tokens_kernel(
    current_ptr,
    proximal_ptr,
    behavior_ptr,
    advantages_ptr,
    mask_ptr,
    entropy_ptr,
    denominator_ptr,
    gradient_ptr,
    entropy_gradient_ptr,
    partial_ptr,
    n_tokens,
    scale,
    lower,
    upper,
    c_clip,
    weight_cap,
    filter_lower,
    filter_upper,
    entropy_coef,
    FLAGS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROW: tl.constexpr,
):
    """A block of tokens a program, one pass. Blocks that are full have no mask, so that their loads are wide."""
    program = tl.program_id(0).to(tl.int64)
    begin = program * BLOCK
    at = begin + tl.arange(0, BLOCK)
    sums_ptr = partial_ptr + program * ROW
    if denominator_ptr is not None:
        scale = scale / tl.load(denominator_ptr)
    if begin + BLOCK <= n_tokens:
        _, s_loss, s_counted, s_high, s_low, s_dual, s_ratio, s_weight, s_truncated, s_filtered, s_kl_proximal, s_kl_behavior, s_entropy = _add_tokens(current_ptr, proximal_ptr, behavior_ptr, advantages_ptr, mask_ptr, entropy_ptr, gradient_ptr, entropy_gradient_ptr, at, at < n_tokens, 1.0, 1.0, 1.0, 1.0, scale, lower, upper, c_clip, weight_cap, filter_lower, filter_upper, entropy_coef, FLAGS, False)  # fmt: skip
    else:
        _, s_loss, s_counted, s_high, s_low, s_dual, s_ratio, s_weight, s_truncated, s_filtered, s_kl_proximal, s_kl_behavior, s_entropy = _add_tokens(current_ptr, proximal_ptr, behavior_ptr, advantages_ptr, mask_ptr, entropy_ptr, gradient_ptr, entropy_gradient_ptr, at, at < n_tokens, 1.0, 1.0, 1.0, 1.0, scale, lower, upper, c_clip, weight_cap, filter_lower, filter_upper, entropy_coef, FLAGS, True)  # fmt: skip
    _store_sums(
        sums_ptr,
        s_loss,
        s_counted,
        s_high,
        s_low,
        s_dual,
        s_ratio,
        s_weight,
        s_truncated,
        s_filtered,
        s_kl_proximal,
        s_kl_behavior,
        s_entropy,
    )


@triton.jit
def ppo_sequences_kernel(
    current_ptr,
    proximal_ptr,
    behavior_ptr,
    advantages_ptr,
    mask_ptr,
    entropy_ptr,
    denominator_ptr,
    gradient_ptr,
    entropy_gradient_ptr,
    partial_ptr,
    cu_seqlens_ptr,
    n_tokens,
    scale,
    lower,
    upper,
    c_clip,
    weight_cap,
    filter_lower,
    filter_upper,
    entropy_coef,
    FLAGS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROW: tl.constexpr,
):
    """A sequence a program: its log-ratios are added up, then its tokens taken, then, where the ratio is the sequence's, the gradients
    written."""
    program = tl.program_id(0).to(tl.int64)
    begin = tl.maximum(tl.load(cu_seqlens_ptr + program).to(tl.int64), 0)
    end = tl.minimum(tl.load(cu_seqlens_ptr + program + 1).to(tl.int64), n_tokens)
    sums_ptr = partial_ptr + program * ROW
    if denominator_ptr is not None:
        scale = scale / tl.load(denominator_ptr)
    counts = tl.zeros([BLOCK], tl.float32)
    moved_sums = tl.zeros([BLOCK], tl.float32)
    stale_sums = tl.zeros([BLOCK], tl.float32)
    for start in range(begin, end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        counted, _, moved_log, _, _, stale_log, _ = _ratios(current_ptr, proximal_ptr, behavior_ptr, mask_ptr, at, at < end, FLAGS, True)
        counts += counted.to(tl.float32)
        moved_sums += moved_log
        stale_sums += stale_log
    n = tl.sum(counts)
    mean = tl.where(n > 0.0, 1.0 / tl.maximum(n, 1.0), 0.0)
    stale_sum = tl.sum(stale_sums)
    product = tl.where(stale_sum > MAX_LOG_RATIO, MAX_LOG_RATIO, tl.where(stale_sum < -MAX_LOG_RATIO, -MAX_LOG_RATIO, stale_sum))
    ratio = tl.exp(tl.sum(moved_sums) * mean)
    weight_ratio = tl.exp(product)
    filter_ratio = tl.exp(stale_sum * mean)
    loss_weight = mean * 0.0 + 1.0
    if SEQUENCE_MEAN & FLAGS:
        loss_weight = mean

    slope = mean * 0.0
    s_loss = slope
    s_counted = slope
    s_high = slope
    s_low = slope
    s_dual = slope
    s_ratio = slope
    s_weight = slope
    s_truncated = slope
    s_filtered = slope
    s_kl_proximal = slope
    s_kl_behavior = slope
    s_entropy = slope
    for start in range(begin, end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        sums = _add_tokens(current_ptr, proximal_ptr, behavior_ptr, advantages_ptr, mask_ptr, entropy_ptr, gradient_ptr, entropy_gradient_ptr, at, at < end, ratio, weight_ratio, filter_ratio, loss_weight, scale, lower, upper, c_clip, weight_cap, filter_lower, filter_upper, entropy_coef, FLAGS, True)  # fmt: skip
        slope += sums[0]
        s_loss += sums[1]
        s_counted += sums[2]
        s_high += sums[3]
        s_low += sums[4]
        s_dual += sums[5]
        s_ratio += sums[6]
        s_weight += sums[7]
        s_truncated += sums[8]
        s_filtered += sums[9]
        s_kl_proximal += sums[10]
        s_kl_behavior += sums[11]
        s_entropy += sums[12]
    _store_sums(
        sums_ptr,
        s_loss,
        s_counted,
        s_high,
        s_low,
        s_dual,
        s_ratio,
        s_weight,
        s_truncated,
        s_filtered,
        s_kl_proximal,
        s_kl_behavior,
        s_entropy,
    )
    if gradient_ptr is not None and (SEQUENCE_RATIO & FLAGS) and not (CISPO & FLAGS):
        # d(log of the geometric mean) / d(log-prob) is 1 / n for each of its tokens.
        gradient = -scale * loss_weight * mean * slope
        for start in range(begin, end, BLOCK):
            at = start + tl.arange(0, BLOCK)
            counted, _, _, _, free, _, _ = _ratios(current_ptr, proximal_ptr, behavior_ptr, mask_ptr, at, at < end, FLAGS, True)
            tl.store(gradient_ptr + at, tl.where(counted & free, gradient, 0.0), mask=at < end)


def ppo_loss(
    logprobs: Tensor,
    proximal: Tensor,
    behavior: Tensor,
    advantages: Tensor,
    mask: Tensor,
    cu_seqlens: Tensor | None,
    entropy: Tensor | None,
    denominator: Tensor | None,
    gradient: Tensor | None,
    entropy_gradient: Tensor | None,
    loss: Tensor,
    sums: Tensor,
    numbers: Sequence[float],
    scale: float,
    flags: int,
) -> None:
    """Writes gradient and entropy_gradient [T] where given, loss [], and sums [13]; arguments as of csrc/ppo_loss.h."""
    n_tokens = logprobs.shape[0]
    of_sequences = cu_seqlens is not None
    block, warps = (4096, 8) if n_tokens >= 1 << 20 and not of_sequences else (1024, 4)
    programs = cu_seqlens.shape[0] - 1 if cu_seqlens is not None else triton.cdiv(n_tokens, block)
    partial = torch.zeros(max(1, programs), _ROW, device=logprobs.device)
    tensors = (
        logprobs,
        proximal,
        behavior,
        advantages,
        mask.view(torch.uint8) if mask.dtype == torch.bool else mask,
        entropy,
        denominator,
        gradient,
        entropy_gradient,
        partial,
    )
    constants = {"FLAGS": flags & 255, "BLOCK": block, "ROW": _ROW, "num_warps": warps}
    if of_sequences:
        for given in gradient, entropy_gradient:
            if given is not None:
                given.zero_()  # tokens outside of all sequences
    if programs and of_sequences:
        ppo_sequences_kernel[(programs,)](*tensors, cu_seqlens, n_tokens, scale, *numbers, **constants)
    elif programs:
        ppo_tokens_kernel[(programs,)](*tensors, n_tokens, scale, *numbers, **constants)
    torch.sum(partial[:, : sums.shape[0]], 0, out=sums)
    sums[0] *= scale if denominator is None else scale / denominator
    loss.copy_(sums[0])
