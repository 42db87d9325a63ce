"""Statistics of one train step: sums over loss tokens, added up over micro-batches and then over ranks."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from areal.trainer.meters import PHASES, PhaseMeter

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
    def __init__(self, device: torch.device, *, counts: bool = True, meter: PhaseMeter | None = None) -> None:
        """``counts``: whether sums are added here, not on another rank that has the same ones; ``meter``: that of another part of the step."""
        self._counts = counts
        self._device = device
        self.meter = meter or PhaseMeter(device)
        self._flops = 0.0
        self._minibatch_loss = torch.zeros((), device=device)
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

    def phase(self, name: str) -> AbstractContextManager[None]:
        """What runs within it belongs to this one of ``meters.PHASES``."""
        return self.meter.phase(name)

    def add_flops(self, flops: float) -> None:
        self._flops += flops

    @property
    def minibatch_loss(self) -> Tensor:
        """Of this rank, since the last optimizer step."""
        return self._minibatch_loss

    def add(self, sums: Mapping[str, Tensor]) -> None:
        if "loss" in sums:
            self._minibatch_loss = self._minibatch_loss + sums["loss"]
        for name, value in sums.items():
            value = value if self._counts else torch.zeros_like(value)
            self._sums[name] = self._sums[name] + value if name in self._sums else value

    def add_drift(self, trainer: Tensor, engine: Tensor, fresh: Tensor) -> None:
        """Log-probs [T] of the same tokens under the same version, by trainer and by rollout engine; ``fresh`` marks those tokens."""
        if not self._counts:
            return
        difference = (trainer - engine).abs().masked_fill(~fresh, 0.0)
        self._drift_max = torch.maximum(self._drift_max, difference.max())
        self._drift_sum = self._drift_sum + difference.sum()
        self._drift_n = self._drift_n + fresh.sum()

    def add_step(self, grad_norm: float, finite: bool) -> None:
        self._minibatch_loss = torch.zeros((), device=self._device)
        if finite:
            self._norms.append(grad_norm)
        else:
            self._skipped += 1

    def result(self, world_size: int, n_minibatches: int, peak_flops: float = 0.0) -> dict[str, Any]:
        """Over all ranks (a collective); the loss is the mean of the mini-batches, a mean without tokens or steps is None.

        ``peak_flops``: FLOP/s of this rank's device in a matrix product. Of the meters FLOPs and ``peak_flops`` are sums over the ranks,
        seconds means, memory is that of the rank that needs most.
        """
        names = sorted(self._sums)
        seconds, peaks = self.meter.result()
        phases = [*PHASES, "other"]
        metered = torch.tensor([self._flops, peak_flops, *(seconds[p] / world_size for p in phases)], dtype=torch.float64)
        sums = torch.stack([*(self._sums[name].float() for name in names), self._drift_sum, self._drift_n]).double()
        sums = torch.cat([metered.to(self._device), sums])
        maxima = torch.stack([*(torch.tensor(peaks[p], device=self._device) for p in phases), self._drift_max]).double()
        if world_size > 1:
            dist.all_reduce(sums)
            dist.all_reduce(maxima, op=dist.ReduceOp.MAX)
        flops, peak_flops, *rest = sums.tolist()
        *values, drift_sum, drift_n = rest[len(phases) :]
        *of_memory, drift_max = maxima.tolist()
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
                "max_abs": drift_max if drift_n else None,
                "n": int(drift_n),
            },
            "meters": {
                "model_flops": flops,
                "peak_flops_per_s": peak_flops,
                "seconds": dict(zip(phases, rest, strict=False)),
                "peak_mb": {p: size / 2**20 if size else None for p, size in zip(phases, of_memory, strict=True)},
            },
            "spans": [list(span) for span in self._spans],
        }
