"""Losses over packed tokens: torch, pure functions. All per-token tensors are [T]; sums are over loss tokens only.

A loss is a sum over this micro-batch divided by ``denominator``, the number of loss tokens of the whole mini-batch over all ranks and
micro-batches, so that how a mini-batch is cut cannot change its gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MAX_LOG_RATIO = 20.0
"""Log-ratios are clamped here, far outside of any clip range: exp must not overflow, because 0 * inf in its gradient is NaN."""


def ppo_loss(
    logprobs: Tensor,
    proximal_logprobs: Tensor,
    behavior_logprobs: Tensor,
    advantages: Tensor,
    loss_mask: Tensor,
    *,
    eps_clip: float,
    eps_clip_higher: float | None = None,
    c_clip: float | None = None,
    denominator: float,
    behav_imp_weight_cap: float | None = None,
    behav_filter_cap: float | None = None,
    decoupled: bool = True,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Decoupled PPO (AReaL, arXiv 2505.24298, eq. 5) as a loss to minimise, and sums for statistics.

        loss = -1 / denominator * sum_t w_t * min(u_t * A_t, clip(u_t, 1 - eps_clip, 1 + eps_clip_higher) * A_t)
        u = current / proximal,   w = proximal / behaviour, a constant for the gradient

    With ``decoupled=False`` it is PPO against the behaviour policy: u = current / behaviour, w = 1. The switches are independent:

    - ``eps_clip_higher``: another upper range (clip-higher of DAPO, arXiv 2503.14476); none = ``eps_clip``.
    - ``c_clip``: dual clip (arXiv 1912.09729): where A < 0, the term is at least c_clip * A.
    - ``behav_imp_weight_cap``: w is truncated at it.
    - ``behav_filter_cap``: tokens whose proximal / behaviour leaves [1/cap, cap] give no loss; the denominator stays.

    Only ``logprobs`` gets a gradient. The sums are detached float32 scalars: loss, n_tokens, clipped, dual_clipped, ratio,
    importance_weight, weight_truncated, filtered, kl_proximal and kl_behaviour: KL(proximal || current) and KL(behaviour || proximal) by
    the estimator x - 1 - log x of http://joschu.net/blog/kl-approx.html.
    """
    log_w = _log_ratio(proximal_logprobs.detach(), behavior_logprobs, loss_mask)
    log_u = _log_ratio(logprobs, proximal_logprobs.detach() if decoupled else behavior_logprobs, loss_mask)
    ratio = log_u.exp()
    proximal_ratio = log_w.exp()
    weight = proximal_ratio if decoupled else torch.ones_like(proximal_ratio)
    truncated = torch.zeros_like(loss_mask)
    if behav_imp_weight_cap is not None:
        truncated = loss_mask & (weight > behav_imp_weight_cap)
        weight = weight.clamp(max=behav_imp_weight_cap)
    kept = loss_mask
    if behav_filter_cap is not None:
        kept = loss_mask & (proximal_ratio <= behav_filter_cap) & (proximal_ratio >= 1.0 / behav_filter_cap)

    upper = 1.0 + (eps_clip if eps_clip_higher is None else eps_clip_higher)
    plain, clipped = ratio * advantages, ratio.clamp(1.0 - eps_clip, upper) * advantages
    objective = torch.minimum(plain, clipped)
    dual = torch.zeros_like(loss_mask)
    if c_clip is not None:
        floor = c_clip * advantages
        dual = kept & (advantages < 0) & (objective < floor)
        objective = torch.where(dual, floor, objective)
    loss = -(weight * objective).masked_fill(~kept, 0.0).sum() / denominator

    with torch.no_grad():
        sums = {
            "loss": loss.detach(),
            "n_tokens": loss_mask.sum().float(),
            "clipped": (kept & (clipped < plain)).sum().float(),
            "dual_clipped": dual.sum().float(),
            "ratio": ratio.masked_fill(~loss_mask, 0.0).sum(),
            "importance_weight": weight.masked_fill(~loss_mask, 0.0).sum(),
            "weight_truncated": truncated.sum().float(),
            "filtered": (loss_mask & ~kept).sum().float(),
            "kl_proximal": (ratio - 1.0 - log_u).sum(),
            "kl_behaviour": (proximal_ratio - 1.0 - log_w).sum(),
        }
    return loss, sums


def sft_loss(logprobs: Tensor, loss_mask: Tensor, *, denominator: float) -> tuple[Tensor, dict[str, Tensor]]:
    """Negative log-likelihood of the loss tokens over ``denominator``, and the sums loss and n_tokens."""
    loss = -logprobs.masked_fill(~loss_mask, 0.0).sum() / denominator
    return loss, {"loss": loss.detach(), "n_tokens": loss_mask.sum().float()}


def _log_ratio(above: Tensor, below: Tensor, loss_mask: Tensor) -> Tensor:
    """log(above / below), 0 outside of the mask."""
    return (above - below).masked_fill(~loss_mask, 0.0).clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO)
