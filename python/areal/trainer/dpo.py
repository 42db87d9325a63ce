"""Preferences on a rank: the gradients of a micro-batch of pairs.

A pair is never cut: its two sequences lie one behind the other in one micro-batch, so the loss of a pair is there when its log-probs are, and
the sum over micro-batches and ranks is the loss of the whole, however it is cut. They share their prompt, which is computed once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from areal.algo.loss import dpo_loss
from areal.config import DPOConfig
from areal.trainer.inputs import Inputs
from areal.trainer.model import RankModel
from areal.trainer.step_stats import StepStats


def answer_sums(x: Inputs, values: Tensor) -> Tensor:
    """[T] -> [n]: the sum over the loss tokens of each sequence; of a micro-batch that only fills up, which is one sequence, none."""
    n = len(x.lengths)
    owner = torch.repeat_interleave(torch.arange(n), torch.tensor(x.lengths)).to(values.device)
    sums = values.new_zeros(n).index_add(0, owner, values.masked_fill(~x.loss_mask, 0.0))
    return sums[: n // 2 * 2]


def dpo_backward(actor: RankModel, config: DPOConfig, x: Inputs, reference: Tensor, denominator: float, stats: StepStats) -> None:
    """Adds to the gradients. ``reference``: the reference's log-probs [T]; ``denominator``: pairs of the whole batch."""
    logprobs, entropy = actor.logprobs(x, temperature=1.0)
    log_ratios = answer_sums(x, logprobs - reference)  # token by token: sums of long answers would lose digits
    loss, sums = dpo_loss(log_ratios, beta=config.beta, label_smoothing=config.label_smoothing, denominator=denominator)
    loss.backward()
    stats.add(sums)
    stats.add({"n_tokens": x.loss_mask.sum().float(), "entropy": entropy.sum()})
