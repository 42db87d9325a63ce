"""Inputs for ``ppo_loss``, and what it should give: sequence by sequence and token by token, in Python floats."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


def make_inputs(seed: int, n: int, spread: float = 0.3, share: float = 0.7) -> dict[str, Tensor]:
    """float32 values as float64, so that both precisions see the same numbers."""
    g = torch.Generator().manual_seed(seed)

    def noise(scale: float) -> Tensor:
        return scale * torch.randn(n, generator=g)

    proximal = -torch.rand(n, generator=g) * 3
    values = {
        "logprobs": proximal + noise(spread),
        "proximal_logprobs": proximal,
        "behavior_logprobs": proximal + noise(spread),
        "advantages": noise(1.0),
    }
    return {name: value.double() for name, value in values.items()} | {"loss_mask": torch.rand(n, generator=g) < share}


def make_cuts(seed: int, n: int, n_sequences: int) -> Tensor:
    """cu_seqlens: sequences of random lengths, 0 among them."""
    g = torch.Generator().manual_seed(seed)
    inner = torch.randint(0, n + 1, (max(0, n_sequences - 1),), generator=g).sort().values.tolist() if n_sequences else []
    return torch.tensor([0, *inner, n], dtype=torch.int32)


@dataclass
class Expected:
    loss: float = 0.0
    gradient: list[float] = field(default_factory=list)
    entropy_gradient: list[float] = field(default_factory=list)
    sums: dict[str, float] = field(default_factory=dict)
    margin: float = math.inf
    """How far the closest ratio is from a threshold; nearer than float32 can tell, results may differ."""

    def count(self, name: str, value: float = 1.0) -> None:
        self.sums[name] = self.sums.get(name, 0.0) + value

    def compare(self, value: float, threshold: float) -> bool:
        if value > 0 and 0 < threshold < math.inf:
            self.margin = min(self.margin, abs(math.log(value / threshold)))
        return value > threshold


def clamp(x: float) -> float:
    return min(max(x, -20.0), 20.0)


def expected(
    x: dict[str, Tensor], *, denominator: float, cu_seqlens: Tensor | None = None, entropy: Tensor | None = None, **o: Any
) -> Expected:
    """By the formulas in the docstring of ``ppo_loss``."""
    n = len(x["logprobs"])
    out = Expected(gradient=[0.0] * n, entropy_gradient=[0.0] * n)
    cuts = [0, n] if cu_seqlens is None else cu_seqlens.tolist()
    columns = {name: values.tolist() for name, values in x.items()}
    entropies = None if entropy is None else entropy.tolist()
    for begin, end in itertools.pairwise(cuts):
        tokens = [t for t in range(begin, end) if columns["loss_mask"][t]]
        if tokens:
            _sequence(out, columns, entropies, tokens, denominator, **o)
    return out


def _sequence(out: Expected, x: dict[str, list], entropies: list | None, tokens: list[int], denominator: float, *, eps_clip, eps_clip_higher=None,
              c_clip=None, ratio_level="token", objective="ppo", decoupled=True, behav_imp_weight_cap=None, behav_imp_weight_mode="truncate",
              behav_imp_weight_level="token", behav_filter_cap=None, behav_filter_level="token", behav_filter_side="both",
              normalization="token", fixed_length=None, entropy_coef=0.0):  # fmt: skip
    """Adds the loss tokens of one sequence."""
    below = x["proximal_logprobs"] if decoupled else x["behavior_logprobs"]
    moved = {t: clamp(x["logprobs"][t] - below[t]) for t in tokens}
    stale = {t: clamp(x["proximal_logprobs"][t] - x["behavior_logprobs"][t]) for t in tokens}
    n = len(tokens)
    m = {"token": 1.0, "sequence": 1.0 / n, "fixed": 1.0 / (fixed_length or 1.0)}[normalization] / denominator
    upper, lower = 1 + (eps_clip if eps_clip_higher is None else eps_clip_higher), 1 - eps_clip
    d_log_u = dict.fromkeys(tokens, 0.0)
    for t in tokens:
        a = x["advantages"][t]
        u = math.exp(moved[t] if ratio_level == "token" else math.fsum(moved.values()) / n)
        w = math.exp(stale[t] if behav_imp_weight_level == "token" else clamp(math.fsum(stale.values()))) if decoupled else 1.0
        if behav_imp_weight_cap is not None and out.compare(w, behav_imp_weight_cap):
            out.count("weight_truncated")
            w = behav_imp_weight_cap if behav_imp_weight_mode == "truncate" else 0.0
        kept = True
        if behav_filter_cap is not None:
            r = math.exp(stale[t] if behav_filter_level == "token" else math.fsum(stale.values()) / n)
            above, under = out.compare(r, behav_filter_cap), out.compare(1 / r, behav_filter_cap)
            kept = not (above or under) if behav_filter_side == "both" else not ((above and a > 0) or (under and a < 0))
        above, under = out.compare(u, upper), lower > 0 and not out.compare(u, lower)
        clipped = min(max(u, lower), upper)
        if objective == "cispo":
            term, slope, high, low = clipped * a * x["logprobs"][t], clipped * a, above, under
        else:
            term = min(u * a, clipped * a)
            high, low = above and a > 0, under and a < 0
            slope = 0.0 if high or low else u * a
            if c_clip is not None and a < 0 and out.compare(term / a, c_clip):
                term, slope = c_clip * a, 0.0
                out.count("dual_clipped", kept)
        out.count("n_tokens")
        out.count("filtered", not kept)
        out.count("ratio", u)
        out.count("importance_weight", w)
        out.count("kl_proximal", math.expm1(moved[t]) - moved[t])
        out.count("kl_behaviour", math.expm1(stale[t]) - stale[t])
        if kept:
            out.count("clipped_high", high)
            out.count("clipped_low", low)
            out.count("clipped", high or low)
            out.loss -= m * w * term
            d_log_u[t] = -m * w * slope
        if entropies is not None:
            out.count("entropy", entropies[t])
            out.loss -= entropy_coef * m * entropies[t]
            out.entropy_gradient[t] = -entropy_coef * m
    for t in tokens:
        if objective == "cispo":
            out.gradient[t] = d_log_u[t]
        elif -20 < x["logprobs"][t] - below[t] < 20:
            out.gradient[t] = d_log_u[t] if ratio_level == "token" else math.fsum(d_log_u.values()) / n
