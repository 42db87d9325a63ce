"""PPO straight from hidden states: a linear head and the loss of its tokens, whose gradients are made in the forward pass.

A token-level objective knows d(loss) / d(logits) of a token as soon as it knows the token's log-prob, so a chunk of logits is overwritten
by its gradient at once, and goes into d(hidden) and d(weight): three matrix products where recomputing the logits in the backward pass
takes four, and never more logits than a chunk.

    logits z (chunk) -> log-prob c, entropy H, g = d(loss) / dc of ``ppo_loss`` -> dz = (g (onehot - p) + entropy_coef m p (log p + H)) / temperature
    d(hidden) = dz @ weight,   d(weight) += dz.T @ hidden

The importance of a token, m, comes from outside (mask, normalization, denominator), so a batch may span many calls and ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from areal.ops._dispatch import compiled_module, triton_kernels
from areal.ops._linear_chunks import HeadGradients, LogitChunks, check_head, check_targets, memory_budget_for
from areal.ops._linear_rows import choose, differentiate_, score
from areal.ops._registration import check_tensor, define_op, on_device
from areal.ops.ppo_loss import ppo_loss
from areal.ops.ppo_token import PPOParameters, choice, ppo_parameters, ppo_token_gradient
from areal.ops.ppo_torch import _sequences

Backend = Literal["torch", "cpp", "triton"]
_OP = "linear_ppo_loss"


class LinearPPOLoss(NamedTuple):
    """What ``linear_ppo_loss`` returns; only ``loss`` is differentiable."""

    loss: Tensor
    stats: Mapping[str, Tensor]
    """As of ``ppo_loss``."""
    logprobs: Tensor
    """float32 [T]"""
    entropy: Tensor
    """float32 [T], in nats."""


def linear_ppo_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    proximal_logprobs: Tensor | None,
    behavior_logprobs: Tensor,
    advantages: Tensor,
    loss_mask: Tensor,
    *,
    eps_clip: float,
    eps_clip_higher: float | None = None,
    c_clip: float | None = None,
    denominator: float | Tensor,
    cu_seqlens: Tensor | None = None,
    ratio_level: Literal["token"] = "token",
    objective: Literal["ppo", "cispo"] = "ppo",
    decoupled: bool = True,
    behav_imp_weight_cap: float | None = None,
    behav_imp_weight_mode: Literal["truncate", "mask"] = "truncate",
    behav_imp_weight_level: Literal["token"] = "token",
    behav_filter_cap: float | None = None,
    behav_filter_level: Literal["token"] = "token",
    behav_filter_side: Literal["both", "advantage"] = "both",
    normalization: Literal["token", "sequence", "fixed"] = "token",
    fixed_length: float | None = None,
    entropy_coef: float = 0.0,
    temperature: float = 1.0,
    memory_budget: int | None = None,
    backend: Backend | None = None,
) -> LinearPPOLoss:
    """``ppo_loss`` of ``linear_logprob_entropy``, in three matrix products; two with a frozen head, one without gradients.

    The gradients are made in this call, for the weights as they are, and kept until ``loss.backward()``, which only scales them. Do not
    put it under activation checkpointing, which would make them twice.

    Args:
        hidden, weight, targets, temperature, memory_budget: as in ``linear_logprob_entropy``. Gradients take their own memory besides:
            those of hidden and weight, and, for a 16-bit weight and more than one chunk, float32 for that of the weight until it is summed.
            They exist before a gradient scaler can act, so that those of float16 lose digits where ``denominator`` is large; train
            float16 heads by ``linear_logprob_entropy`` and ``ppo_loss``.
        proximal_logprobs: float32 [T], or None: the current policy is the proximal one (ratio 1), as in the first mini-batch of a step.
        behavior_logprobs, advantages: float32 [T].
        loss_mask: bool or float32 [T], False or 0 where a token does not count.
        denominator and the others: as in ``ppo_loss``; the entropy bonus needs no ``entropy`` here. What is of level "sequence" needs all
            log-probs of a sequence before the first gradient, which is what this op does without: a ``ValueError``.
        backend: as in ``linear_logprob_entropy``, without cuda.

    Returns:
        LinearPPOLoss(loss, stats, logprobs, entropy); only the loss is differentiable, in hidden and weight.

    Raises:
        ValueError: arguments that do not fit, by name; BackendUnavailable: a forced backend cannot run.
    """
    levels = {"ratio_level": ratio_level, "behav_imp_weight_level": behav_imp_weight_level, "behav_filter_level": behav_filter_level}
    _check(hidden, weight, targets, proximal_logprobs, behavior_logprobs, advantages, loss_mask, temperature, levels)
    parameters = ppo_parameters(
        _OP,
        eps_clip,
        eps_clip_higher,
        c_clip,
        objective,
        decoupled,
        behav_imp_weight_cap,
        behav_imp_weight_mode,
        behav_filter_cap,
        behav_filter_side,
    )
    budget = memory_budget_for(_OP, hidden.device, memory_budget)
    which = choose(_OP, hidden, backend, has=("torch", "cpp", "triton"))
    loss_mask = loss_mask != 0
    weights = _loss_weights(loss_mask, behavior_logprobs.dtype, denominator, normalization, fixed_length, cu_seqlens)
    grads = torch.is_grad_enabled()
    needs_hidden, needs_weight = grads and hidden.requires_grad, grads and weight.requires_grad
    logprobs, entropy, d_hidden, d_weight = _op(
        hidden.detach(),
        weight.detach(),
        targets,
        None if proximal_logprobs is None else proximal_logprobs.detach(),
        [behavior_logprobs.detach(), advantages.detach(), weights.detach()],
        [float(x) for x in parameters],
        [temperature, entropy_coef],
        budget,
        needs_hidden,
        needs_weight,
        which,
    )
    loss, stats = ppo_loss(
        logprobs,
        logprobs if proximal_logprobs is None else proximal_logprobs,
        behavior_logprobs,
        advantages,
        loss_mask,
        eps_clip=eps_clip,
        eps_clip_higher=eps_clip_higher,
        c_clip=c_clip,
        denominator=denominator,
        cu_seqlens=cu_seqlens,
        objective=objective,
        decoupled=decoupled,
        behav_imp_weight_cap=behav_imp_weight_cap,
        behav_imp_weight_mode=behav_imp_weight_mode,
        behav_filter_cap=behav_filter_cap,
        behav_filter_side=behav_filter_side,
        normalization=normalization,
        fixed_length=fixed_length,
        entropy=entropy,
        entropy_coef=entropy_coef,
        backend=backend,
    )
    if needs_hidden or needs_weight:
        loss = _WithGradients.apply(loss, hidden, weight, d_hidden, d_weight)
    return LinearPPOLoss(loss, stats, logprobs, entropy)


def _check(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    proximal: Tensor | None,
    behavior: Tensor,
    advantages: Tensor,
    loss_mask: Tensor,
    temperature: float,
    levels: Mapping[str, str],
) -> None:
    for name, level in levels.items():
        if level != "token":
            raise ValueError(
                f"{_OP}: {name} is '{level}', which needs all log-probs of a sequence before the first gradient; call linear_logprob_entropy "
                "and ppo_loss instead"
            )
    check_head(_OP, hidden, weight, targets, temperature)
    tokens = (hidden.shape[0],)
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    if proximal is not None:
        check_tensor(_OP, "proximal_logprobs", proximal, tokens, (dtype,), hidden.device)
    check_tensor(_OP, "behavior_logprobs", behavior, tokens, (dtype,), hidden.device)
    check_tensor(_OP, "advantages", advantages, tokens, (dtype,), hidden.device)
    check_tensor(_OP, "loss_mask", loss_mask, tokens, (torch.bool, torch.float32), hidden.device)


def _loss_weights(
    loss_mask: Tensor,
    dtype: torch.dtype,
    denominator: float | Tensor,
    normalization: str,
    fixed_length: float | None,
    cu_seqlens: Tensor | None,
) -> Tensor:
    """m_t / denominator, [T]: 0 for tokens without loss."""
    choice(_OP, "normalization", normalization, "token", "sequence", "fixed")
    if not isinstance(denominator, Tensor):
        if not denominator > 0:
            raise ValueError(f"{_OP}: denominator is {denominator}; it must be above 0")
    elif denominator.dim() != 0 or denominator.device != loss_mask.device:
        found = f"has the shape {list(denominator.shape)} and is on {denominator.device}"
        raise ValueError(f"{_OP}: denominator {found}; it must be a number or a tensor of shape [] on {loss_mask.device}")
    weights = loss_mask.to(dtype)
    if normalization == "sequence":
        if cu_seqlens is None:
            raise ValueError(f"{_OP}: normalization='sequence' needs cu_seqlens")
        check_tensor(_OP, "cu_seqlens", cu_seqlens, (None,), (torch.int32,), loss_mask.device)
        sequences, inside = _sequences(cu_seqlens, loss_mask.shape[0])
        weights = weights * inside
        weights = weights / sequences.sums(weights).clamp(min=1.0)
    if (normalization == "fixed") != (fixed_length is not None) or (fixed_length is not None and not fixed_length > 0):
        raise ValueError(f"{_OP}: fixed_length is {fixed_length}; normalization='fixed', and no other, needs it, above 0")
    if fixed_length is not None:
        weights = weights / fixed_length
    return weights / denominator


class _WithGradients(torch.autograd.Function):
    """The loss, with gradients that are there already."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, hidden: Tensor, weight: Tensor, d_hidden: Tensor, d_weight: Tensor) -> Tensor:
        ctx.save_for_backward(d_hidden, d_weight)
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_loss: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_weight = ctx.saved_tensors
        needs_hidden, needs_weight = ctx.needs_input_grad[1:3]
        return None, d_hidden * g_loss if needs_hidden else None, d_weight * g_loss if needs_weight else None, None, None


# -- the op -------------------------------------------------------------------------------------------------------------------------


def _forward(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    proximal: Tensor | None,
    token_inputs: list[Tensor],
    parameters: list[float],
    scalars: list[float],
    budget: int,
    needs_hidden: bool,
    needs_weight: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """token_inputs: behaviour log-probs, advantages, loss weights; scalars: temperature, entropy_coef."""
    check_targets(_OP, targets, len(weight))
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    logprobs, entropy = (hidden.new_empty(len(hidden), dtype=dtype) for _ in range(2))
    chunks = LogitChunks(hidden, weight, budget)
    gradients = HeadGradients(chunks, needs_hidden=needs_hidden, needs_weight=needs_weight)
    run = {"torch": _rows_torch, "cpp": _rows_cpp, "triton": _rows_triton}[backend]
    lower, upper, c_clip, weight_cap, filter_lower, filter_upper = parameters[:6]
    parsed = PPOParameters(lower, upper, c_clip, weight_cap, filter_lower, filter_upper, *(bool(x) for x in parameters[6:]))
    temperature, entropy_coef = scalars
    wanted = needs_hidden or needs_weight
    logits = None
    for rows, logits in chunks:
        behavior, advantages, weights = (x[rows] for x in token_inputs)
        known = None if proximal is None else proximal[rows]
        known_inputs = known, behavior, advantages, weights
        run(logits, targets[rows], *known_inputs, logprobs[rows], entropy[rows], parsed, temperature, entropy_coef, wanted)
        if wanted:
            gradients.add(rows, logits)
    del logits  # its memory is that of all chunks
    return logprobs, entropy, *gradients.result()


def _fake(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    proximal: Tensor | None,
    token_inputs: list[Tensor],
    parameters: list[float],
    scalars: list[float],
    budget: int,
    needs_hidden: bool,
    needs_weight: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    return (
        hidden.new_empty(hidden.shape[0], dtype=dtype),
        hidden.new_empty(hidden.shape[0], dtype=dtype),
        torch.empty_like(hidden) if needs_hidden else hidden.new_empty(0),
        torch.empty_like(weight) if needs_weight else weight.new_empty(0),
    )


_op = define_op(
    "linear_ppo_loss(Tensor hidden, Tensor weight, Tensor targets, Tensor? proximal, Tensor[] token_inputs, float[] parameters,"
    " float[] scalars, int memory_budget, bool needs_hidden, bool needs_weight, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _fake,
)


# -- what lies between the products: logits [n, V] to log-probs and entropies [n], and d(loss) / d(logits) over the logits -----------


def _rows_torch(
    logits: Tensor,
    targets: Tensor,
    proximal: Tensor | None,
    behavior: Tensor,
    advantages: Tensor,
    weights: Tensor,
    logprobs: Tensor,
    entropy: Tensor,
    parameters: PPOParameters,
    temperature: float,
    entropy_coef: float,
    gradients: bool,
) -> None:
    current, row_entropy, statistics = score("torch", logits, targets, temperature)
    logprobs.copy_(current)
    entropy.copy_(row_entropy)
    if gradients:
        g = ppo_token_gradient(parameters, current, current if proximal is None else proximal, behavior, advantages, weights)
        differentiate_("torch", logits, targets, temperature, row_entropy, statistics, g, -entropy_coef * weights)
        logits.masked_fill_((weights == 0).unsqueeze(1), 0.0)  # 0 * NaN is NaN, in d(weight) for all tokens


def _rows_cpp(
    logits: Tensor,
    targets: Tensor,
    proximal: Tensor | None,
    behavior: Tensor,
    advantages: Tensor,
    weights: Tensor,
    logprobs: Tensor,
    entropy: Tensor,
    parameters: PPOParameters,
    temperature: float,
    entropy_coef: float,
    gradients: bool,
) -> None:
    module = compiled_module()
    assert module is not None
    tensors = logits, targets, proximal, behavior, advantages, weights, logprobs, entropy
    addresses = [0 if x is None else x.data_ptr() for x in tensors]
    is_bfloat16, scalars = logits.dtype == torch.bfloat16, (1.0 / temperature, entropy_coef)
    module.linear_ppo_rows(addresses, logits.shape, is_bfloat16, gradients, scalars, parameters, torch.get_num_threads())


def _rows_triton(
    logits: Tensor,
    targets: Tensor,
    proximal: Tensor | None,
    behavior: Tensor,
    advantages: Tensor,
    weights: Tensor,
    logprobs: Tensor,
    entropy: Tensor,
    parameters: PPOParameters,
    temperature: float,
    entropy_coef: float,
    gradients: bool,
) -> None:
    kernels = triton_kernels(_OP)
    rows, n = logits.shape
    block, num_warps = kernels.block_of(n)
    with on_device(logits):
        kernels.linear_ppo_kernel[(rows,)](
            logits,
            targets,
            weights if proximal is None else proximal,
            behavior,
            advantages,
            weights,
            logprobs,
            entropy,
            n,
            1.0 / temperature,
            entropy_coef,
            *parameters,
            ON_POLICY=proximal is None,
            GRADIENTS=gradients,
            BLOCK=block,
            num_warps=num_warps,
        )
