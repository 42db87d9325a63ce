"""The PPO loss of single tokens in plain torch: what ``ppo_loss`` and ``linear_ppo_loss`` share. Its twins: csrc/ppo_token.h for C++ and
CUDA, ``ppo_token_gradient`` in kernels/ppo_loss_triton.py.

All tensors are [T], of one floating dtype; ``counted`` bool [T] marks the loss tokens. What other tokens hold, NaN too, has no effect;
a NaN in a loss token comes through, so that somebody notices it.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

MAX_LOG_RATIO = 20.0
"""Log-ratios are clamped here, far outside of any clip range: exp must not overflow, because 0 * inf in its gradient is NaN."""


class PPOParameters(NamedTuple):
    """The switches that act on single tokens; what is off is a number without effect. Same order as in csrc/ppo_parameters.h."""

    lower: float
    """Lower end of the ratio's range: 1 - eps_clip."""
    upper: float
    """Upper end: 1 + eps_clip_higher."""
    c_clip: float
    """Infinity: no dual clip."""
    weight_cap: float
    """Largest importance weight; infinity: none."""
    filter_lower: float
    """Tokens are kept where proximal / behaviour is in [filter_lower, filter_upper]; 0: all."""
    filter_upper: float
    """Infinity: all."""
    cispo: bool
    decoupled: bool
    mask_weights: bool
    """A weight above its cap becomes 0 instead of the cap."""
    filter_by_advantage: bool
    """Tokens above the filter's range go only where the advantage is positive, those below it only where it is negative."""


def ppo_parameters(
    op: str,
    eps_clip: float,
    eps_clip_higher: float | None = None,
    c_clip: float | None = None,
    objective: Literal["ppo", "cispo"] = "ppo",
    decoupled: bool = True,
    behav_imp_weight_cap: float | None = None,
    behav_imp_weight_mode: Literal["truncate", "mask"] = "truncate",
    behav_filter_cap: float | None = None,
    behav_filter_side: Literal["both", "advantage"] = "both",
) -> PPOParameters:
    """From the arguments of ``ppo_loss``; ``ValueError`` naming ``op`` and the argument for one out of range."""
    higher = eps_clip if eps_clip_higher is None else eps_clip_higher
    for name, value, least in (
        ("eps_clip", eps_clip, 0.0),
        ("eps_clip_higher", higher, 0.0),
        ("c_clip", c_clip, 1.0),
        ("behav_imp_weight_cap", behav_imp_weight_cap, 0.0),
        ("behav_filter_cap", behav_filter_cap, 1.0),
    ):
        if value is not None and not value >= least:
            raise ValueError(f"{op}: {name} is {value}; it must be at least {least:g}")
    choice(op, "objective", objective, "ppo", "cispo")
    choice(op, "behav_imp_weight_mode", behav_imp_weight_mode, "truncate", "mask")
    choice(op, "behav_filter_side", behav_filter_side, "both", "advantage")
    return PPOParameters(
        lower=1.0 - eps_clip,
        upper=1.0 + higher,
        c_clip=math.inf if c_clip is None else float(c_clip),
        weight_cap=math.inf if behav_imp_weight_cap is None else float(behav_imp_weight_cap),
        filter_lower=0.0 if behav_filter_cap is None else 1.0 / behav_filter_cap,
        filter_upper=math.inf if behav_filter_cap is None else float(behav_filter_cap),
        cispo=objective == "cispo",
        decoupled=bool(decoupled),
        mask_weights=behav_imp_weight_mode == "mask",
        filter_by_advantage=behav_filter_side == "advantage",
    )


def choice(op: str, name: str, value: str, *choices: str) -> None:
    """``ValueError`` unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{op}: {name} is '{value}'; it must be {' or '.join(repr(c) for c in choices)}")


class LogRatio(NamedTuple):
    log: Tensor
    """Clamped to +-MAX_LOG_RATIO; 0 where the token does not count."""
    ratio: Tensor
    """Its exp."""
    free: Tensor
    """Bool: not clamped."""


def log_ratio(above: Tensor, below: Tensor, counted: Tensor) -> LogRatio:
    """above / below from their log-probs; differentiable, with gradient 0 where clamped."""
    x = torch.where(counted, above - below, 0.0)
    high, low = x > MAX_LOG_RATIO, x < -MAX_LOG_RATIO
    clamped = torch.where(high, MAX_LOG_RATIO, torch.where(low, -MAX_LOG_RATIO, x))
    return LogRatio(clamped, clamped.exp(), ~(high | low))


class PPOTerm(NamedTuple):
    objective: Tensor
    """Importance weight * objective; 0 where the token is filtered or does not count."""
    slope: Tensor
    """Its derivative by log(ratio), or, for CISPO, by the current log-prob."""
    weight: Tensor
    """The importance weight."""
    kept: Tensor
    """Bool, like the following: counts, and is not filtered."""
    high: Tensor
    """Clipped at the upper end."""
    low: Tensor
    """Clipped at the lower end."""
    dual: Tensor
    """Dual-clipped."""
    truncated: Tensor
    """The weight was above its cap."""


def filtered(p: PPOParameters, filter_ratio: Tensor, advantages: Tensor) -> Tensor:
    """Bool: proximal / behaviour is out of the filter's range, on the side that is looked at."""
    above, below = filter_ratio > p.filter_upper, filter_ratio < p.filter_lower
    if p.filter_by_advantage:
        above, below = above & (advantages > 0), below & (advantages < 0)
    return above | below


def ppo_term(
    p: PPOParameters, counted: Tensor, logprobs: Tensor, advantages: Tensor, ratio: Tensor, weight_ratio: Tensor, filter_ratio: Tensor
) -> PPOTerm:
    """``ratio``: current / proximal (or behaviour), of the token or of its sequence; the other two: proximal / behaviour likewise.

    ``objective`` is differentiable by ``ratio`` (CISPO: by ``logprobs``).
    """
    weight = weight_ratio if p.decoupled else torch.ones_like(weight_ratio)
    heavy = weight > p.weight_cap
    weight = torch.where(heavy, 0.0 if p.mask_weights else p.weight_cap, weight)
    advantages = torch.where(counted, advantages, 0.0)
    kept = counted & ~filtered(p, filter_ratio, advantages)
    above, below = ratio > p.upper, ratio < p.lower
    clipped = torch.where(above, p.upper, torch.where(below, p.lower, ratio)) * advantages
    dual = torch.zeros_like(counted)
    if p.cispo:
        slope = clipped.detach()
        objective = slope * torch.where(counted, logprobs, 0.0)
        bound = kept
    else:
        plain = ratio * advantages
        bound = clipped < plain
        objective = torch.where(bound, clipped, plain)
        slope = torch.where(bound, 0.0, plain)
        if math.isfinite(p.c_clip):
            floor = p.c_clip * advantages
            dual = (advantages < 0) & (objective < floor)
            objective = torch.where(dual, floor, objective)
            slope = torch.where(dual, 0.0, slope)
    return PPOTerm(
        objective=torch.where(kept, weight * objective, 0.0),
        slope=torch.where(kept, weight * slope, 0.0),
        weight=weight,
        kept=kept,
        high=kept & bound & above,
        low=kept & bound & below,
        dual=kept & dual,
        truncated=counted & heavy,
    )


@torch.no_grad()
def ppo_token_gradient(
    p: PPOParameters, current: Tensor, proximal: Tensor, behavior: Tensor, advantages: Tensor, loss_weights: Tensor
) -> Tensor:
    """d(loss) / d(current) at token level, loss = -sum of loss_weights * importance weight * objective; weight 0: the token does not count."""
    counted = loss_weights != 0
    stale = log_ratio(proximal, behavior, counted).ratio
    moved = log_ratio(current, proximal if p.decoupled else behavior, counted)
    slope = ppo_term(p, counted, current, advantages, moved.ratio, stale, stale).slope
    if not p.cispo:
        slope = torch.where(moved.free, slope, 0.0)
    return torch.where(counted, -loss_weights * slope, 0.0)
