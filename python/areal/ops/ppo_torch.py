"""The torch reference of ``ppo_loss``: any device, any floating dtype, differentiable by autograd."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from areal.ops.ppo_token import MAX_LOG_RATIO, LogRatio, PPOParameters, PPOTerm, filtered, log_ratio, ppo_term


class PPOOptions(NamedTuple):
    """All switches of ``ppo_loss``: what does not change from call to call."""

    token: PPOParameters
    sequence_ratio: bool
    sequence_weight: bool
    sequence_filter: bool
    sequence_mean: bool
    """Each sequence counts 1, not each token."""
    fixed_length: float
    """Loss weights are divided by it; 1 without normalisation by a fixed length."""
    entropy_coef: float

    @property
    def of_sequences(self) -> bool:
        return self.sequence_ratio or self.sequence_weight or self.sequence_filter or self.sequence_mean


class Sequences(NamedTuple):
    ids: Tensor
    """int64 [T]: the sequence of each token; n for one outside of all."""
    n: int

    def sums(self, values: Tensor) -> Tensor:
        """Per token [T]: the sum over its sequence."""
        return values.new_zeros(self.n + 1).index_add(0, self.ids, values)[self.ids]


def ppo_loss_torch(
    options: PPOOptions,
    logprobs: Tensor,
    proximal: Tensor,
    behavior: Tensor,
    advantages: Tensor,
    counted: Tensor,
    cu_seqlens: Tensor | None,
    entropy: Tensor | None,
    denominator: float | Tensor,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss and the statistics; checked arguments of ``ppo_loss``."""
    p = options.token
    proximal = proximal.detach()
    sequences = None
    if cu_seqlens is not None and options.of_sequences:
        sequences, inside = _sequences(cu_seqlens, len(logprobs))
        counted = counted & inside
    stale = log_ratio(proximal, behavior.detach(), counted)
    weight_ratio, filter_ratio = stale.ratio, stale.ratio
    weights = counted.to(logprobs.dtype) / options.fixed_length
    if sequences is not None:
        n = sequences.sums(counted.to(logprobs.dtype)).clamp(min=1.0)
        if options.sequence_weight:
            weight_ratio = sequences.sums(stale.log).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
        if options.sequence_filter:
            filter_ratio = (sequences.sums(stale.log) / n).exp()
        if options.sequence_mean:
            weights = weights / n
    if math.isfinite(p.filter_upper):
        # Nothing depends on a filtered token, or, where the ratio is the sequence's, on a sequence all of whose tokens are filtered: the 0
        # that comes back to it must not become 0 * NaN in the gradient of exp.
        gone = filtered(p, filter_ratio, advantages)
        if sequences is not None and options.sequence_ratio:
            gone = sequences.sums((counted & ~gone).to(logprobs.dtype)) == 0
        logprobs = torch.where(gone, logprobs.detach(), logprobs)
    moved = log_ratio(logprobs, proximal if p.decoupled else behavior.detach(), counted)
    ratio = moved.ratio
    if sequences is not None and options.sequence_ratio:
        ratio = (sequences.sums(moved.log) / n).exp()

    term = ppo_term(p, counted, logprobs, advantages.detach(), ratio, weight_ratio, filter_ratio)
    loss = -(weights * term.objective).sum() / denominator
    if entropy is not None:
        entropy = torch.where(counted, entropy, 0.0)
        loss = loss - options.entropy_coef * (weights * entropy).sum() / denominator

    sums = _statistics(loss, counted, ratio, moved, stale, term)
    if entropy is not None:
        sums["entropy"] = entropy.detach().sum()
    return loss, {name: value.float() for name, value in sums.items()}


@torch.no_grad()
def _statistics(loss: Tensor, counted: Tensor, ratio: Tensor, moved: LogRatio, stale: LogRatio, term: PPOTerm) -> dict[str, Tensor]:
    return {
        "loss": loss.detach(),
        "n_tokens": counted.sum(),
        "clipped": term.high.sum() + term.low.sum(),
        "clipped_high": term.high.sum(),
        "clipped_low": term.low.sum(),
        "dual_clipped": term.dual.sum(),
        "ratio": torch.where(counted, ratio, 0.0).sum(),
        "importance_weight": torch.where(counted, term.weight, 0.0).sum(),
        "weight_truncated": term.truncated.sum(),
        "filtered": (counted & ~term.kept).sum(),
        "kl_proximal": (moved.ratio - 1.0 - moved.log).sum(),
        "kl_behaviour": (stale.ratio - 1.0 - stale.log).sum(),
    }


def _sequences(cu_seqlens: Tensor, n_tokens: int) -> tuple[Sequences, Tensor]:
    """The sequences, and bool [T]: which tokens are in one."""
    at = torch.arange(n_tokens, dtype=torch.int32, device=cu_seqlens.device)
    n = len(cu_seqlens) - 1
    ids = torch.searchsorted(cu_seqlens[1:], at, right=True)
    return Sequences(ids, n), (ids < n) & (at >= cu_seqlens[0])
