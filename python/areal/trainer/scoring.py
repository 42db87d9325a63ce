"""What a model says of the micro-batches of a batch, on its way to the controller."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from areal.trainer.inputs import Inputs
from areal.trainer.model import RankModel
from areal.trainer.step_stats import StepStats
from areal.types import Microbatch


def score_each(
    cut: Sequence[Sequence[Microbatch]],
    put: Callable[[Microbatch], Inputs],
    model: RankModel,
    compute: Callable[[list[Inputs]], list[Tensor]],
    stats: StepStats,
    *,
    head: bool = True,
) -> list[list[NDArray[np.float32]]]:
    """float32 [T] of every micro-batch of every mini-batch: ``compute``, by ``model``, of what ``put`` brings to its device.

    ``head``: whether it computes log-probs.
    """
    inputs = [[put(microbatch) for microbatch in microbatches] for microbatches in cut]
    with stats.phase("recompute"):
        found = [zip(microbatches, compute(x), strict=True) for microbatches, x in zip(cut, inputs, strict=True)]
    stats.add_flops(sum(model.flops_of(x, training=False, head=head) for same in inputs for x in same))
    return [[t[: microbatch.n_tokens].cpu().numpy() for microbatch, t in pairs] for pairs in found]
