"""Rewards, returns and advantages of single tokens: pure functions on the loss tokens of a batch, packed one sample after another.

A loss token is an action; the state before it is everything that stands before it. What was not sampled by the policy (prompts, the output
of tools) belongs to the transition between two actions: it earns nothing, and neither discount nor lambda count it. A sample ends with its
last loss token, also one that was cut off by its length: ``gconfig.max_new_tokens`` is a rule of the task and its answer was scored, so
nothing is expected behind it (no bootstrap).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from areal.ops.gae import gae
from areal.ops.ppo_token import MAX_LOG_RATIO

Floats = NDArray[np.float32] | NDArray[np.float64]


def kl_estimate(logprobs: Floats, ref_logprobs: Floats, estimator: Literal["k1", "k2", "k3"]) -> NDArray[np.float64]:
    """Of the KL of each token from its two log-probs, whose difference is x (http://joschu.net/blog/kl-approx.html):
    k1 = x, k2 = x^2 / 2, k3 = exp(-x) - 1 + x; beyond +-20 k2 grows linearly, and k3 does not grow below -20."""
    x = logprobs.astype(np.float64) - ref_logprobs
    bound = x.clip(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    match estimator:
        case "k1":
            return x
        case "k2":
            return bound * (x - bound / 2)
        case "k3":
            x = np.maximum(x, bound)
            return np.expm1(-x) + x


class LossTokens:
    """Where the loss tokens of the samples of a batch are; N of them in all.

    Args:
        masks: bool [L] of every sample.
    """

    def __init__(self, masks: Sequence[NDArray[np.bool_]]) -> None:
        self._masks = masks
        self.counts = np.array([mask.sum() for mask in masks], np.int64)
        self.cu_seqlens = np.concatenate([[0], np.cumsum(self.counts)]).astype(np.int32)

    def pack(self, per_sample: Sequence[Floats]) -> Floats:
        """[L] of every sample -> [N]."""
        return (
            np.concatenate([x[mask] for x, mask in zip(per_sample, self._masks, strict=True)]) if self._masks else np.zeros(0, np.float32)
        )

    def unpack(self, packed: Floats) -> list[NDArray[np.float32]]:
        """[N] -> float32 [L] of every sample, 0 elsewhere."""
        result = []
        for mask, part in zip(self._masks, np.split(packed, self.cu_seqlens[1:-1]), strict=True):
            result.append(np.zeros(len(mask), np.float32))
            result[-1][mask] = part
        return result

    def at_the_end(self, rewards: Floats) -> NDArray[np.float64]:
        """The reward of every sample on its last loss token, float64 [N]; that of a sample without any is nobody's."""
        packed = np.zeros(int(self.cu_seqlens[-1]))
        some = self.counts > 0
        packed[self.cu_seqlens[1:][some] - 1] = np.asarray(rewards)[some]
        return packed

    def returns(self, rewards: Floats, values: Floats | None, discount: float, lam: float) -> tuple[Floats, Floats]:
        """Advantages and returns of rewards [N] by GAE; without ``values`` [N] both are the discounted sum of what is still to come."""
        known = np.zeros(len(rewards), np.float32) if values is None else values.astype(np.float32)
        r, v, cu_seqlens = (torch.from_numpy(np.ascontiguousarray(x)) for x in (rewards.astype(np.float32), known, self.cu_seqlens))
        advantages, returns = gae(r, v, cu_seqlens, discount, 1.0 if values is None else lam)
        return advantages.numpy(), returns.numpy()
