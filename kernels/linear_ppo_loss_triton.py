"""The Triton kernel of ``linear_ppo_loss``: what lies between its matrix products, in place on a chunk of logits.

A program works on one row: statistics, log-prob and entropy, the PPO gradient of the token, then d(loss) / d(logits) over the logits. The
second read of a row comes from L2, which holds the rows that are at work.
"""

from __future__ import annotations

import triton
import triton.language as tl

from areal.kernels.logprob_entropy_triton import block_of, row_statistics, write_row_gradient
from areal.kernels.ppo_loss_triton import ppo_token_gradient

__all__ = ["block_of", "linear_ppo_kernel"]


@triton.jit
def _write_zeros(row, n, BLOCK: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    zeros = tl.zeros((BLOCK,), tl.float32).to(row.dtype.element_ty)
    whole = n // BLOCK * BLOCK
    for start in range(0, whole, BLOCK):
        tl.store(row + start + lanes, zeros)
    if whole < n:
        tl.store(row + whole + lanes, zeros, mask=lanes < n - whole)


@triton.jit
def linear_ppo_kernel(
    logits,
    targets,
    proximal,
    behavior,
    advantages,
    loss_weights,
    logprobs,
    entropies,
    n,
    inverse_temperature,
    entropy_coef,
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
    ON_POLICY: tl.constexpr,
    GRADIENTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """logits [T, n], overwritten if GRADIENTS; targets int64 [T]; the rest fp32 [T]. ON_POLICY: the current policy is the proximal one, and
    ``proximal`` is not read. Grid: (T,)."""
    t = tl.program_id(0).to(tl.int64)
    row = logits + t * n
    target = tl.load(targets + t)
    inside = (target >= 0) & (target < n)
    # Read before the statistics, whose reductions are barriers: later, a fast warp could have overwritten it already.
    logit = tl.load(row + target, mask=inside, other=float("nan")).to(tl.float32)
    largest, log_sum, entropy = row_statistics(row, n, inverse_temperature, BLOCK)
    current = (logit - largest) * inverse_temperature - log_sum
    tl.store(logprobs + t, current)
    tl.store(entropies + t, entropy)
    if GRADIENTS:
        loss_weight = tl.load(loss_weights + t)
        if ON_POLICY:
            reference = current
        else:
            reference = tl.load(proximal + t)
        grad_logprob = ppo_token_gradient(
            current,
            reference,
            tl.load(behavior + t),
            tl.load(advantages + t),
            loss_weight,
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
        grad_entropy = -entropy_coef * loss_weight
        if (grad_logprob == 0.0) & (grad_entropy == 0.0):
            _write_zeros(row, n, BLOCK)
        else:
            write_row_gradient(row, row, n, target, largest, log_sum, entropy, grad_logprob, grad_entropy, inverse_temperature, BLOCK)
