"""Supervised training on a rank: the gradients of a micro-batch of demonstrations."""

from __future__ import annotations

from areal.algo.loss import sft_loss
from areal.trainer.inputs import Inputs
from areal.trainer.model import RankModel
from areal.trainer.step_stats import StepStats


def sft_backward(actor: RankModel, x: Inputs, denominator: float, stats: StepStats) -> None:
    """Adds to the gradients; temperature 1. ``denominator``: loss tokens of the whole batch."""
    with stats.phase("forward"):
        logprobs, entropy = actor.logprobs(x, temperature=1.0)
        loss, sums = sft_loss(logprobs, x.loss_mask, denominator=denominator)
        with stats.phase("backward"):
            loss.backward()
        stats.add(sums)
        stats.add({"entropy": entropy.sum()})
    stats.add_flops(actor.flops_of(x, training=True))
