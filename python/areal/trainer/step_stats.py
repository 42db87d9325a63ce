"""Statistics of one train step: sums over loss tokens, added up over micro-batches and then over ranks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# Name in the result -> sum that is divided by the number of loss tokens.
_MEANS = {
    "clip_fraction": "clipped",
    "clip_high_fraction": "clipped_high",
    "clip_low_fraction": "clipped_low",
    "dual_clip_fraction": "dual_clipped",
    "filtered_fraction": "filtered",
    "truncated_fraction": "weight_truncated",
    "ratio_mean": "ratio",
    "importance_weight_mean": "importance_weight",
    "kl_proximal": "kl_proximal",
    "kl_behaviour": "kl_behaviour",
    "kl_ref": "kl_ref",
    "entropy": "entropy",
    "value_loss": "value_loss",
    "value_clip_fraction": "value_clipped",
}
# Of training on preferences: divided by the number of pairs.
_PAIR_MEANS = {
    "preference_accuracy": "preferred",
    "margin": "margin",
    "chosen_reward": "chosen_reward",
    "rejected_reward": "rejected_reward",
}


class StepStats:
    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._sums: dict[str, Tensor] = {}
        self._drift_max = torch.zeros((), device=device)
        self._drift_sum = torch.zeros((), device=device)
        self._drift_n = torch.zeros((), device=device)
        self._norms: list[float] = []
        self._skipped = 0
        self._spans: list[tuple[str, float, float]] = []

    def span(self, kind: str, begin: float, end: float) -> None:
        """Seconds since the epoch."""
        self._spans.append((kind, begin, end))

    def add(self, sums: Mapping[str, Tensor]) -> None:
        for name, value in sums.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value

    def add_drift(self, trainer: Tensor, engine: Tensor, fresh: Tensor) -> None:
        """Log-probs [T] of the same tokens under the same version, by trainer and by rollout engine; ``fresh`` marks those tokens."""
        difference = (trainer - engine).abs().masked_fill(~fresh, 0.0)
        self._drift_max = torch.maximum(self._drift_max, difference.max())
        self._drift_sum = self._drift_sum + difference.sum()
        self._drift_n = self._drift_n + fresh.sum()

    def add_step(self, grad_norm: float, finite: bool) -> None:
        if finite:
            self._norms.append(grad_norm)
        else:
            self._skipped += 1

    def result(self, world_size: int, n_minibatches: int) -> dict[str, Any]:
        """Over all ranks (a collective); the loss is the mean of the mini-batches, a mean without tokens or steps is None."""
        names = sorted(self._sums)
        sums = torch.stack([*(self._sums[name].float() for name in names), self._drift_sum, self._drift_n]).double()
        drift_max = self._drift_max.clone()
        if world_size > 1:
            dist.all_reduce(sums)
            dist.all_reduce(drift_max, op=dist.ReduceOp.MAX)
        *values, drift_sum, drift_n = sums.tolist()
        total = dict(zip(names, values, strict=True))
        n_tokens = total["n_tokens"]
        return {
            "loss": total["loss"] / n_minibatches,
            "n_tokens": int(n_tokens),
            **{name: total[key] / n_tokens if n_tokens else None for name, key in _MEANS.items() if key in total},
            **{name: total[key] / total["n_pairs"] for name, key in _PAIR_MEANS.items() if total.get("n_pairs")},
            "grad_norm": sum(self._norms) / len(self._norms) if self._norms else None,
            "skipped_nonfinite": self._skipped,
            "logprob_drift": {
                "mean_abs": drift_sum / drift_n if drift_n else None,
                "max_abs": float(drift_max) if drift_n else None,
                "n": int(drift_n),
            },
            "spans": [list(span) for span in self._spans],
        }
