"""Log-probabilities and entropies straight from hidden states: a linear head whose logits [T, V] never exist as a whole.

    z = hidden @ weight.T / temperature,   log p = log_softmax(z),   logprob_t = log p_t[target_t],   entropy_t = -sum_v p_tv log p_tv

The logits are made for a chunk of tokens at a time, and again for the gradient

    dz = (g_logprob * (onehot - p) - g_entropy * p * (log p + entropy)) / temperature

which overwrites them: four matrix products in all, one less for each gradient that nobody needs, and one without gradients.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from areal.ops import _linear_rows
from areal.ops._linear_chunks import HeadGradients, LogitChunks, check_head, check_targets, memory_budget_for
from areal.ops._registration import define_op

Backend = Literal["torch", "cpp", "triton", "cuda"]
_OP = "linear_logprob_entropy"


def linear_logprob_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: float = 1.0,
    *,
    memory_budget: int | None = None,
    backend: Backend | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probs of ``targets`` under softmax(hidden @ weight.T / temperature), and the entropies of these distributions, in nats.

    Differentiable in hidden and weight, through both results, once. Do not put it under activation checkpointing: it recomputes by itself.

    Args:
        hidden: [T, H] float32, bfloat16, float16 or float64, contiguous; logits have this dtype, what is computed from them is float32.
        weight: [V, H] of the same dtype and device, contiguous; a plain tensor, gathered where it is sharded.
        targets: int64 [T], each in [0, V).
        temperature: > 0. A head that multiplies its logits by s is one of temperature / s.
        memory_budget: bytes for the chunk of logits, at least 128 tokens' worth; None = 1.25 GiB on a GPU (4096 tokens of a vocabulary of
            150k in bfloat16), 64 MiB on a CPU. Results do not depend on it beyond rounding.
        backend: what computes between the products, as in ``logprob_entropy``; None = the fastest that can run.

    Returns:
        logprobs, entropy: [T] each, float32 (float64 for float64 inputs).

    Raises:
        ValueError: arguments that do not fit, by name; BackendUnavailable: a forced backend cannot run.
    """
    check_head(_OP, hidden, weight, targets, temperature)
    budget = memory_budget_for(_OP, hidden.device, memory_budget)
    which = _linear_rows.choose(_OP, hidden, backend)
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        return _LinearLogprobEntropy.apply(hidden, weight, targets, temperature, budget, which)
    logprobs, entropy, _ = _forward_op(hidden, weight, targets, temperature, budget, which)
    return logprobs, entropy


def _forward(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, budget: int, backend: str) -> tuple[Tensor, ...]:
    check_targets(_OP, targets, len(weight))
    logprobs, entropy, statistics = _forward_fake(hidden, weight, targets, temperature, budget, backend)
    for rows, logits in LogitChunks(hidden, weight, budget):
        logprobs[rows], entropy[rows], statistics[:, rows] = _linear_rows.score(backend, logits, targets[rows], temperature)
    return logprobs, entropy, statistics


def _forward_fake(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, budget: int, backend: str) -> tuple[Tensor, ...]:
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    tokens = hidden.shape[0]
    return hidden.new_empty(tokens, dtype=dtype), hidden.new_empty(tokens, dtype=dtype), hidden.new_empty((2, tokens), dtype=dtype)


_forward_op = define_op(
    "linear_logprob_entropy(Tensor hidden, Tensor weight, Tensor targets, float temperature, int memory_budget, str backend)"
    " -> (Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
)


def _backward(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    scores: list[Tensor],
    grads: list[Tensor],
    temperature: float,
    budget: int,
    needs_hidden: bool,
    needs_weight: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    entropy, statistics = scores
    g_logprobs, g_entropy = grads
    chunks = LogitChunks(hidden, weight, budget)
    gradients = HeadGradients(chunks, needs_hidden=needs_hidden, needs_weight=needs_weight)
    logits = None
    for rows, logits in chunks:
        _linear_rows.differentiate_(
            backend, logits, targets[rows], temperature, entropy[rows], statistics[:, rows], g_logprobs[rows], g_entropy[rows]
        )
        gradients.add(rows, logits)
    del logits  # its memory is that of all chunks
    return gradients.result()


def _backward_fake(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    scores: list[Tensor],
    grads: list[Tensor],
    temperature: float,
    budget: int,
    needs_hidden: bool,
    needs_weight: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return (
        torch.empty_like(hidden) if needs_hidden else hidden.new_empty(0),
        torch.empty_like(weight) if needs_weight else weight.new_empty(0),
    )


_backward_op = define_op(
    "linear_logprob_entropy_backward(Tensor hidden, Tensor weight, Tensor targets, Tensor[] scores, Tensor[] grads, float temperature,"
    " int memory_budget, bool needs_hidden, bool needs_weight, str backend) -> (Tensor, Tensor)",
    _backward,
    _backward_fake,
)


class _LinearLogprobEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, budget: int, backend: str
    ) -> tuple[Tensor, Tensor]:
        logprobs, entropy, statistics = _forward_op(hidden, weight, targets, temperature, budget, backend)
        ctx.save_for_backward(hidden, weight, targets, entropy, statistics)
        ctx.options = temperature, budget, backend
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_logprobs: Tensor, g_entropy: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, entropy, statistics = ctx.saved_tensors
        temperature, budget, backend = ctx.options
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        grads = [g_logprobs.contiguous(), g_entropy.contiguous()]
        d_hidden, d_weight = _backward_op(
            hidden, weight, targets, [entropy, statistics], grads, temperature, budget, needs_hidden, needs_weight, backend
        )
        return d_hidden if needs_hidden else None, d_weight if needs_weight else None, None, None, None, None
