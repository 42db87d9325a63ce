"""The policy's loss where its gradient needs all log-probs at once; else it is the op ``areal.ops.linear_ppo_loss``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from areal.ops.ppo_loss import ppo_loss
from areal.ops.ppo_token import MAX_LOG_RATIO

KLEstimator = Literal["k1", "k2", "k3"]


class PPOInputs(NamedTuple):
    """What the policy's loss of packed tokens needs besides their log-probs: float32 [T] each, looked at in the loss tokens only."""

    proximal_logprobs: Tensor | None
    """None: the current policy is the proximal one, or ``proximal_share`` says where it is."""
    behavior_logprobs: Tensor
    advantages: Tensor
    ref_logprobs: Tensor | None = None
    """None: no penalty for leaving the reference model in the loss."""
    proximal_share: Tensor | None = None
    """How far the proximal policy is on the way from the behaviour policy (0) to the current one (1): see ``loglinear_share``."""

    @property
    def is_fused(self) -> bool:
        """Whether the gradient of a token is known as soon as its own log-prob is, by what ``linear_ppo_loss`` takes."""
        return self.ref_logprobs is None and self.proximal_share is None

    def at(self, rows: Tensor) -> PPOInputs:
        """Of these tokens alone."""

        def pick(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.index_select(0, rows)

        of_rows = self.behavior_logprobs.index_select(0, rows), self.advantages.index_select(0, rows)
        return PPOInputs(pick(self.proximal_logprobs), *of_rows, pick(self.ref_logprobs), pick(self.proximal_share))


def policy_loss(
    logprobs: Tensor,
    entropy: Tensor,
    inputs: PPOInputs,
    *,
    denominator: float,
    cu_seqlens: Tensor | None = None,
    normalization: Literal["token", "sequence"] = "token",
    kl_coef: float = 0.0,
    kl_estimator: KLEstimator = "k3",
    **options: Any,
) -> tuple[Tensor, Mapping[str, Tensor]]:
    """``ppo_loss`` of loss tokens alone, with its ``options``, plus the penalty for leaving the reference model:

        kl_coef / denominator * sum_t m_t * kl_penalty_t,   m as in ppo_loss: 1, or 1 / loss tokens of the sequence

    All tensors are float32 [n]; ``cu_seqlens`` counts loss tokens. The statistics are those of ``ppo_loss``, loss with the penalty, and
    kl_ref (the sum of the estimates) where there is a reference. The penalty takes every loss token, those that a filter masks too.
    """
    proximal = inputs.proximal_logprobs
    if inputs.proximal_share is not None:
        proximal = interpolate(inputs.behavior_logprobs, logprobs.detach(), inputs.proximal_share)
    elif proximal is None:
        proximal = logprobs.detach()
    everything = torch.ones_like(logprobs, dtype=torch.bool)
    loss, stats = ppo_loss(
        logprobs,
        proximal,
        inputs.behavior_logprobs,
        inputs.advantages,
        everything,
        denominator=denominator,
        cu_seqlens=cu_seqlens,
        normalization=normalization,
        entropy=entropy,
        **options,
    )
    if inputs.ref_logprobs is None:
        return loss, stats
    estimates = kl_penalty(logprobs, inputs.ref_logprobs, kl_estimator)
    weighted = estimates
    if normalization == "sequence":
        assert cu_seqlens is not None
        lengths = cu_seqlens.diff()
        weighted = estimates / lengths.repeat_interleave(lengths, output_size=len(estimates))
    loss = loss + kl_coef / denominator * weighted.sum()
    return loss, {**stats, "loss": loss.detach(), "kl_ref": estimates.detach().sum()}


def kl_penalty(logprobs: Tensor, ref_logprobs: Tensor, estimator: KLEstimator) -> Tensor:
    """``returns.kl_estimate`` of KL(current || ref), one a token, with a gradient; x = logprobs - ref_logprobs.

    The gradient of a good estimate need not be a good estimate of the gradient, which is E[x * d(logprob)]: the distribution the tokens
    come from moves too.

    - k1 has it: its own derivative, 1, would be that of E[d(logprob)] = 0, noise that pulls nowhere, so x stands in for it.
    - k2 has it by itself: d(x^2 / 2) = x. k1 and k2 differ in the value they report, of which k1's has no bias.
    - k3 has 1 - exp(-x): that is the gradient of KL(ref || current), with the same minimum. It is close to x where the policies are, and
      small in variance; GRPO (arXiv 2402.03300) uses it so.

    Far from the reference the pull stays: beyond +-20 k1 and k2 have the gradient that they have there, and k2 grows linearly. Only k3, which
    would overflow, ends: below -20 it is that of -20, without a gradient.
    """
    x = logprobs - ref_logprobs
    if estimator == "k3":
        x = x.clamp(min=-MAX_LOG_RATIO)
        return torch.expm1(-x) + x
    bound = x.detach().clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    square = bound * (x - bound / 2)  # x^2 / 2 within the bound
    return square if estimator == "k2" else x.detach() + (square - square.detach())


def interpolate(behavior: Tensor, current: Tensor, share: Tensor) -> Tensor:
    """Log-probs on the straight line from ``behavior`` (share 0) to ``current`` (share 1)."""
    return torch.lerp(behavior, current, share)


def loglinear_share(age: Tensor, progress: float) -> Tensor:
    """Where the proximal policy lies on the way from the behaviour to the current one, if log-probs move evenly from version to version.

    A token of ``age`` a was sampled a versions before the step's start, the proximal policy; the current one has taken ``progress`` (above
    0, at most 1) of this step's optimizer steps since: a / (a + progress). 0 for a token of the step's own version: its proximal policy is
    its behaviour policy.
    """
    age = age.clamp(min=0.0)
    return age / (age + progress)
