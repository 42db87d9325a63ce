"""Switches of the policy's loss drawn at random, together: loss and gradient against one formula for all of them, on whole logits in float64.

Log-probs drift far in some draws, so that every cap is hit; what is not a loss token holds NaN.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from test_trainer_engine import relative_difference
from torch import Tensor
from trainer_setup import save_small_model
from transformers import AutoModelForCausalLM

from areal.algo.policy_loss import PPOInputs, loglinear_share
from areal.models.heads import packed_ppo_loss
from areal.models.loading import load_model

torch.set_num_threads(1)
DENOMINATOR = 7.0
CHOICES: dict[str, list[Any]] = {
    "objective": ["ppo", "ppo", "cispo"],
    "ratio_level": ["token", "sequence"],
    "decoupled": [True, True, True, False],
    "eps_clip": [0.02, 0.2],
    "eps_clip_higher": [None, 0.05, 0.4],
    "c_clip": [None, 1.05],
    "behav_imp_weight_cap": [None, 1.05, 1.5],
    "behav_imp_weight_mode": ["truncate", "mask"],
    "behav_imp_weight_level": ["token", "sequence"],
    "behav_filter_cap": [None, None, 1.1, 1.5],
    "behav_filter_level": ["token", "sequence"],
    "behav_filter_side": ["advantage", "both"],
    "normalization": ["token", "sequence"],
    "entropy_coef": [0.0, 0.1],
    "kl_coef": [0.0, 0.3],
    "kl_estimator": ["k1", "k2", "k3"],
}


def objective(o: dict[str, Any], theta: Tensor, entropy: Tensor, p: Tensor, b: Tensor, ref: Tensor, advantages: Tensor) -> Tensor:
    """Of the loss tokens of one sequence, to be maximised; log-ratios end at +-20."""
    n, drift = len(theta), (p - b).clamp(-20, 20)
    moved = (theta - (p if o["decoupled"] else b)).clamp(-20, 20)
    u = (moved.mean() if o["ratio_level"] == "sequence" else moved).exp().expand(n)
    w = torch.ones(n).double()
    if o["decoupled"]:
        w = (drift.sum().clamp(-20, 20) if o["behav_imp_weight_level"] == "sequence" else drift).exp().expand(n)
    if o["behav_imp_weight_cap"] is not None:
        above = 0.0 if o["behav_imp_weight_mode"] == "mask" else o["behav_imp_weight_cap"]
        w = torch.where(w > o["behav_imp_weight_cap"], above, w)
    if (cap := o["behav_filter_cap"]) is not None:
        of_filter = (drift.mean() if o["behav_filter_level"] == "sequence" else drift).exp().expand(n)
        outside = (of_filter > cap) | (of_filter < 1 / cap)
        if o["behav_filter_side"] == "advantage":
            outside &= torch.where(of_filter > 1, advantages > 0, advantages < 0)
        w = torch.where(outside, 0.0, w)
    clipped = u.clamp(1 - o["eps_clip"], 1 + (o["eps_clip_higher"] or o["eps_clip"]))
    if o["objective"] == "cispo":
        term = clipped.detach() * advantages * theta
    else:
        term = torch.minimum(u * advantages, clipped * advantages)
        if o["c_clip"] is not None:
            term = torch.where(advantages < 0, torch.maximum(term, o["c_clip"] * advantages), term)
    x = theta - ref
    pull = x.detach().clamp(-20, 20)
    kl = {"k1": pull * x, "k2": pull * (x - pull / 2), "k3": (-x.clamp(min=-20)).exp() - 1 + x.clamp(min=-20)}[o["kl_estimator"]]
    total = (w * term + o["entropy_coef"] * entropy - o["kl_coef"] * kl).sum()
    return total / n if o["normalization"] == "sequence" else total


class Batch:
    """Sequences of 2 to 11 tokens, some loss tokens each, some none; everything [L] by sequence."""

    def __init__(self, rng: np.random.Generator, hf: Any) -> None:
        self.lengths = [*rng.integers(2, 12, rng.integers(1, 6)).tolist(), 2]
        self.ids = [torch.from_numpy(rng.integers(2, 40, n)) for n in self.lengths]
        self.masks = [torch.from_numpy((rng.random(n) < 0.7) & (np.arange(n) > 0) & (rng.random() < 0.8)) for n in self.lengths]
        self.masks[-1][1] = True  # a sequence with a single loss token
        self.temperature = float(rng.choice([1.0, 0.7]))
        drift = float(rng.choice([0.05, 0.3, 30.0]))

        def around(centre: list[Tensor], spread: float) -> list[Tensor]:
            noisy = [c + spread * torch.from_numpy(rng.standard_normal(len(c))) for c in centre]
            return [torch.where(m, x, torch.nan) for m, x in zip(self.masks, noisy, strict=True)]

        with torch.no_grad():
            now = [torch.cat([torch.zeros(1), self.score(hf, ids)[0]]).double() for ids in self.ids]
        self.proximal = around(now, min(drift, 0.3))
        self.behavior = around(self.proximal, drift)
        self.ref = around(now, drift)
        self.advantages = around([torch.zeros(n) for n in self.lengths], 1.0)
        ages = [torch.from_numpy(rng.integers(0, 4, n).astype(float)) for n in self.lengths]
        self.share = [loglinear_share(torch.where(m, a, 0.0), 0.5) for m, a in zip(self.masks, ages, strict=True)]

    def score(self, hf: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
        log_p = (hf(ids[None]).logits[0, :-1] / self.temperature).log_softmax(-1)
        return log_p.gather(1, ids[1:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)

    def loss(self, hf: Any, o: dict[str, Any], proximal: str) -> Tensor:
        total = torch.zeros(()).double()
        for i, (ids, mask) in enumerate(zip(self.ids, self.masks, strict=True)):
            if not mask.any():
                continue
            theta, entropy = (x[mask[1:]] for x in self.score(hf, ids))
            p, b, ref, a, s = (x[i][mask] for x in (self.proximal, self.behavior, self.ref, self.advantages, self.share))
            p = {"given": p, "current": theta.detach(), "loglinear": (1 - s) * b + s * theta.detach()}[proximal]
            total = total - objective(o, theta, entropy, p, b, ref, a)
        return total / DENOMINATOR


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    folder = save_small_model(tmp_path_factory.mktemp("model"))
    return load_model(folder, dtype=torch.float64), AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float64, attn_implementation="eager"
    )


@pytest.mark.parametrize("seed", range(40))
def test_switches_together(models: tuple[Any, Any], seed: int) -> None:
    model, hf = models
    rng = np.random.default_rng(seed)
    o = {key: values[rng.integers(len(values))] for key, values in CHOICES.items()}
    o["c_clip"] = None if o["objective"] == "cispo" else o["c_clip"]
    proximal = str(rng.choice(["given", "current", "loglinear"]))
    batch = Batch(rng, hf)
    model.zero_grad(), hf.zero_grad()

    expected = batch.loss(hf, o, proximal)
    expected.backward()
    mask = torch.cat(batch.masks)
    inputs = PPOInputs(
        torch.cat(batch.proximal) if proximal == "given" else None,
        torch.cat(batch.behavior),
        torch.cat(batch.advantages),
        torch.cat(batch.ref) if o["kl_coef"] else None,
        torch.cat(batch.share) if proximal == "loglinear" else None,
    )
    positions = torch.cat([torch.arange(n) for n in batch.lengths])
    rows = mask.nonzero()[:, 0]
    got = packed_ppo_loss(
        model, torch.cat(batch.ids), positions, batch.lengths, batch.temperature, inputs, rows=rows, denominator=DENOMINATOR, **o
    )
    got.loss.backward()
    gradients = [{n: p.grad for n, p in m.named_parameters() if p.grad is not None} for m in (model, hf)]
    if sum(float(g.norm()) for g in gradients[1].values()) > 1e-9:  # else everything was clipped
        assert relative_difference(*gradients) < 1e-6
    if not (o["kl_coef"] and o["kl_estimator"] == "k1"):  # whose formula has the gradient of another value
        assert float(got.loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-6, abs=1e-9)
