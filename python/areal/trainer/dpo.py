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
    """[T] -> [answers]: the sum over the loss tokens of each sequence that has any; one without only fills up."""
    owner = torch.repeat_interleave(torch.arange(len(x.lengths)), torch.tensor(x.lengths)).to(values.device)
    zeros = values.new_zeros(len(x.lengths))
    n_tokens = zeros.index_add(0, owner, x.loss_mask.to(values.dtype))
    return zeros.index_add(0, owner, values.masked_fill(~x.loss_mask, 0.0))[n_tokens > 0]


def dpo_backward(actor: RankModel, config: DPOConfig, x: Inputs, reference: Tensor, denominator: float, stats: StepStats) -> None:
    """Adds to the gradients. ``reference``: the reference's log-probs [T]; ``denominator``: pairs of the whole batch."""
    with stats.phase("forward"):
        logprobs, entropy = actor.logprobs(x, temperature=1.0)
        log_ratios = answer_sums(x, logprobs - reference)  # token by token: sums of long answers would lose digits
        loss, sums = dpo_loss(log_ratios, beta=config.beta, label_smoothing=config.label_smoothing, denominator=denominator)
        with stats.phase("backward"):
            loss.backward()
        stats.add(sums)
        stats.add({"n_tokens": x.loss_mask.sum().float(), "entropy": entropy.sum()})
    stats.add_flops(actor.flops_of(x, training=True))
