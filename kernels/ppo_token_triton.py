"""The PPO loss of single tokens, for Triton kernels. areal/ops/ppo_token.py has the same in torch.

Blocks of tokens are float32; ``counted`` is a block of bools: the tokens with loss. Switches that are off are numbers without effect:
infinity for ``c_clip``, ``weight_cap`` and ``filter_upper``, 0 for ``filter_lower``.
"""

from __future__ import annotations

import triton
import triton.language as tl

MAX_LOG_RATIO: tl.constexpr = tl.constexpr(20.0)


@triton.jit
def log_ratio(above, below, counted):
    """log(above / below) clamped, 0 where the token does not count; its exp; and where it is not clamped."""
    x = tl.where(counted, above - below, 0.0)
    high = x > MAX_LOG_RATIO
    low = x < -MAX_LOG_RATIO
    clamped = tl.where(high, MAX_LOG_RATIO, tl.where(low, -MAX_LOG_RATIO, x))  # a NaN comes through
    return clamped, tl.exp(clamped), (high | low) == 0


@triton.jit
def ppo_term(
    counted,
    logprob,
    advantage,
    ratio,
    weight_ratio,
    filter_ratio,
    lower,
    upper,
    c_clip,
    weight_cap,
    filter_lower,
    filter_upper,
    CISPO: tl.constexpr,
    DECOUPLED: tl.constexpr,
    MASK_WEIGHTS: tl.constexpr,
    FILTER_BY_ADVANTAGE: tl.constexpr,
):
    """Importance weight * objective, its derivative by log(ratio) (CISPO: by the log-prob), the weight, and where the token is kept,
    clipped at the upper end, at the lower end, dual-clipped, and of a weight above its cap."""
    if DECOUPLED:
        weight = weight_ratio
    else:
        weight = weight_ratio * 0.0 + 1.0
    heavy = weight > weight_cap
    if MASK_WEIGHTS:
        weight = tl.where(heavy, 0.0, weight)
    else:
        weight = tl.where(heavy, weight_cap, weight)
    truncated = counted & heavy
    advantage = tl.where(counted, advantage, 0.0)
    far = filter_ratio > filter_upper
    near = filter_ratio < filter_lower
    if FILTER_BY_ADVANTAGE:
        far = far & (advantage > 0.0)
        near = near & (advantage < 0.0)
    kept = counted & ((far | near) == 0)

    above = ratio > upper
    below = ratio < lower
    clipped = tl.where(above, upper, tl.where(below, lower, ratio)) * advantage
    if CISPO:
        objective = clipped * tl.where(counted, logprob, 0.0)
        slope = clipped
        dual = counted & (counted == 0)
        bound = kept
    else:
        plain = ratio * advantage
        bound = clipped < plain
        objective = tl.where(bound, clipped, plain)
        floor = advantage * c_clip
        dual = kept & (advantage < 0.0) & (objective < floor)
        objective = tl.where(dual, floor, objective)
        slope = tl.where(bound | dual, 0.0, plain)
    objective = tl.where(kept, weight * objective, 0.0)
    slope = tl.where(kept, weight * slope, 0.0)
    return objective, slope, weight, kept, kept & bound & above, kept & bound & below, dual, truncated


@triton.jit
def ppo_token_gradient(
    current,
    proximal,
    behavior,
    advantage,
    loss_weight,
    lower,
    upper,
    c_clip,
    weight_cap,
    filter_lower,
    filter_upper,
    CISPO: tl.constexpr,
    DECOUPLED: tl.constexpr,
    MASK_WEIGHTS: tl.constexpr,
    FILTER_BY_ADVANTAGE: tl.constexpr,
):
    """d(loss) / d(current) at token level, where loss = -sum of loss_weight * importance weight * objective; a token of weight 0 does not
    count: whatever else it holds, its gradient is 0."""
    counted = loss_weight != 0.0
    _, stale, _ = log_ratio(proximal, behavior, counted)
    if DECOUPLED:
        _, ratio, free = log_ratio(current, proximal, counted)
    else:
        _, ratio, free = log_ratio(current, behavior, counted)
    _, slope, _, _, _, _, _, _ = ppo_term(
        counted,
        current,
        advantage,
        ratio,
        stale,
        stale,
        lower,
        upper,
        c_clip,
        weight_cap,
        filter_lower,
        filter_upper,
        CISPO,
        DECOUPLED,
        MASK_WEIGHTS,
        FILTER_BY_ADVANTAGE,
    )
    if not CISPO:
        slope = tl.where(free, slope, 0.0)
    return tl.where(counted, -loss_weight * slope, 0.0)
