"""The losses of supervised training and of preferences; that of PPO is the op ``areal.ops.ppo_loss``."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def sft_loss(logprobs: Tensor, loss_mask: Tensor, *, denominator: float) -> tuple[Tensor, dict[str, Tensor]]:
    """Negative log-likelihood of the loss tokens over ``denominator``, and the sums loss and n_tokens."""
    loss = -logprobs.masked_fill(~loss_mask, 0.0).sum() / denominator
    return loss, {"loss": loss.detach(), "n_tokens": loss_mask.sum().float()}


def dpo_loss(log_ratios: Tensor, *, beta: float, label_smoothing: float = 0.0, denominator: float) -> tuple[Tensor, dict[str, Tensor]]:
    """Direct preference optimisation (arXiv 2305.18290, eq. 7): an answer's reward is beta * log(actor / reference),

        h = reward of the chosen answer - reward of the rejected one,   loss = -(1 - e) log sigmoid(h) - e log sigmoid(-h)

    with e = ``label_smoothing`` the share of pairs that are the wrong way round. Over ``denominator``, the number of pairs.

    Args:
        log_ratios: [2 n], log-prob of the actor - of the reference, over the tokens of an answer: chosen, rejected, chosen, rejected, ...

    Returns:
        the loss, and the sums over pairs loss, n_pairs, preferred (h > 0), margin (h), chosen_reward, rejected_reward.
    """
    rewards = beta * log_ratios
    chosen, rejected = rewards[0::2], rewards[1::2]
    margin = chosen - rejected
    loss = -((1 - label_smoothing) * F.logsigmoid(margin) + label_smoothing * F.logsigmoid(-margin)).sum() / denominator
    sums = {"preferred": margin > 0, "margin": margin, "chosen_reward": chosen, "rejected_reward": rejected}
    return loss, {
        "loss": loss.detach(),
        "n_pairs": margin.new_tensor(float(len(margin))),
        **{name: value.detach().float().sum() for name, value in sums.items()},
    }
