"""The supervised loss over packed tokens; that of PPO is the op ``areal.ops.ppo_loss``."""

from __future__ import annotations

from torch import Tensor


def sft_loss(logprobs: Tensor, loss_mask: Tensor, *, denominator: float) -> tuple[Tensor, dict[str, Tensor]]:
    """Negative log-likelihood of the loss tokens over ``denominator``, and the sums loss and n_tokens."""
    loss = -logprobs.masked_fill(~loss_mask, 0.0).sum() / denominator
    return loss, {"loss": loss.detach(), "n_tokens": loss_mask.sum().float()}
