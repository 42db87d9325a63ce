"""Softmax statistics of rows of logits and the gradient through them, in Triton: log-probability of a target, and entropy.

A program works on one row and loops over blocks of it. The main loop has no mask, so that loads and stores are 16 bytes wide where rows
start at multiples of 16 bytes; only the last block is masked. Formulas as in csrc/softmax_row.h: with z the row,
x_j = (z_j - max) / temperature and S = sum exp(x_j), log p_j = x_j - log S and entropy H = log S - sum exp(x_j) x_j / S.

``row_statistics`` and ``write_row_gradient`` are for kernels of other ops too; their pointers point to the row's start.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _add_block(z, largest, sums, products, inverse_temperature):
    """One block's elements into the running maximum (a scalar) and the sums of exp(x) and exp(x) x (one a lane of the block)."""
    new = tl.maximum(largest, tl.max(z, 0))
    # In a row that has only -inf so far, differences to it would be NaN.
    base = tl.where(new == float("-inf"), 0.0, new)
    # Exponents not below -1000, whose exp is 0 too: 0 * -inf is NaN.
    step = tl.maximum((largest - base) * inverse_temperature, -1000.0)
    scale = tl.exp(step)
    x = (z - base) * inverse_temperature
    e = tl.exp(x)
    products = scale * (products + sums * step) + e * tl.maximum(x, -1000.0)
    return new, scale * sums + e, products


@triton.jit
def row_statistics(row, n, inverse_temperature, BLOCK: tl.constexpr):
    """(max, log_sum, entropy) of the ``n`` logits at ``row``: fp32 scalars; max is that of the logits, not divided by the temperature."""
    lanes = tl.arange(0, BLOCK)
    largest = tl.full((), float("-inf"), tl.float32)
    sums = tl.zeros((BLOCK,), tl.float32)
    products = tl.zeros((BLOCK,), tl.float32)
    whole = n // BLOCK * BLOCK
    for start in range(0, whole, BLOCK):
        z = tl.load(row + start + lanes).to(tl.float32)
        largest, sums, products = _add_block(z, largest, sums, products, inverse_temperature)
    if whole < n:
        z = tl.load(row + whole + lanes, mask=lanes < n - whole, other=float("-inf")).to(tl.float32)
        largest, sums, products = _add_block(z, largest, sums, products, inverse_temperature)
    sum = tl.sum(sums, 0)
    log_sum = tl.log(sum)
    return largest, log_sum, log_sum - tl.sum(products, 0) / sum


@triton.jit
def row_logprob(row, n, target, largest, log_sum, inverse_temperature):
    """log p of the element ``target`` of the row; NaN where ``target`` is no column."""
    inside = (target >= 0) & (target < n)
    logit = tl.load(row + target, mask=inside, other=float("nan")).to(tl.float32)
    return (logit - largest) * inverse_temperature - log_sum


@triton.jit
def _gradient(z, columns, target, largest, log_sum, constant, slope, at_target, inverse_temperature):
    log_p = (z - largest) * inverse_temperature - log_sum
    through_p = tl.exp(log_p) * (tl.maximum(log_p, -1000.0) * slope + constant)
    return through_p + tl.where(columns == target, at_target, 0.0)


@triton.jit
def write_row_gradient(
    row, out, n, target, largest, log_sum, entropy, grad_logprob, grad_entropy, inverse_temperature, BLOCK: tl.constexpr
):
    """out_j = (grad_logprob (1[j = target] - p_j) - grad_entropy p_j (log p_j + H)) / temperature for the row; ``out`` may be ``row``."""
    constant = -inverse_temperature * (grad_logprob + grad_entropy * entropy)
    slope = -inverse_temperature * grad_entropy
    at_target = inverse_temperature * grad_logprob
    lanes = tl.arange(0, BLOCK)
    whole = n // BLOCK * BLOCK
    for start in range(0, whole, BLOCK):
        z = tl.load(row + start + lanes).to(tl.float32)
        gradient = _gradient(z, start + lanes, target, largest, log_sum, constant, slope, at_target, inverse_temperature)
        tl.store(out + start + lanes, gradient.to(out.dtype.element_ty))
    if whole < n:
        mask = lanes < n - whole
        z = tl.load(row + whole + lanes, mask=mask, other=float("-inf")).to(tl.float32)
        gradient = _gradient(z, whole + lanes, target, largest, log_sum, constant, slope, at_target, inverse_temperature)
        tl.store(out + whole + lanes, gradient.to(out.dtype.element_ty), mask=mask)


@triton.jit
def logprob_entropy_kernel(logits, targets, logprobs, entropies, maxima, log_sums, n, inverse_temperature, BLOCK: tl.constexpr):
    """A program a row: logits [T, n], targets int64 [T], the rest fp32 [T]. Grid: (T,)."""
    t = tl.program_id(0).to(tl.int64)
    row = logits + t * n
    largest, log_sum, entropy = row_statistics(row, n, inverse_temperature, BLOCK)
    tl.store(logprobs + t, row_logprob(row, n, tl.load(targets + t), largest, log_sum, inverse_temperature))
    tl.store(entropies + t, entropy)
    tl.store(maxima + t, largest)
    tl.store(log_sums + t, log_sum)


@triton.jit
def gradient_kernel(
    logits, targets, entropies, maxima, log_sums, grad_logprobs, grad_entropies, out, n, inverse_temperature, BLOCK: tl.constexpr
):
    """A program a row; out [T, n] is of the logits' type, and may be the logits. Grid: (T,)."""
    t = tl.program_id(0).to(tl.int64)
    write_row_gradient(
        logits + t * n,
        out + t * n,
        n,
        tl.load(targets + t),
        tl.load(maxima + t),
        tl.load(log_sums + t),
        tl.load(entropies + t),
        tl.load(grad_logprobs + t),
        tl.load(grad_entropies + t),
        inverse_temperature,
        BLOCK,
    )


def block_of(n: int) -> tuple[int, int]:
    """(BLOCK, num_warps) for rows of ``n`` elements."""
    for block, warps in (256, 1), (1024, 4), (4096, 8):
        if n <= 4 * block:
            return block, warps
    return 8192, 16
