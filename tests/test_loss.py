"""The losses against formulas written out token by token in float64."""

import math

import pytest
import torch

from areal.algo.loss import ppo_loss, sft_loss

torch.set_num_threads(1)


def make_inputs(seed, n=400, spread=0.3, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)

    def noise(scale):
        return scale * torch.randn(n, generator=generator, dtype=torch.float64)

    proximal = -torch.rand(n, generator=generator, dtype=torch.float64) * 3
    mask = torch.rand(n, generator=generator) < 0.7
    values = {
        "logprobs": proximal + noise(spread),
        "proximal_logprobs": proximal,
        "behavior_logprobs": proximal + noise(spread),
        "advantages": noise(1.0),
    }
    return {name: value.to(dtype) for name, value in values.items()} | {"loss_mask": mask}


def token_loss(th, p, b, a, *, low, high, c_clip, weight_cap, filter_cap, decoupled):
    """Minus the objective of one token, in Python floats."""
    u = math.exp(th - (p if decoupled else b))
    w = math.exp(p - b) if decoupled else 1.0
    if filter_cap is not None and not 1 / filter_cap <= math.exp(p - b) <= filter_cap:
        return 0.0
    if weight_cap is not None:
        w = min(w, weight_cap)
    objective = min(u * a, min(max(u, 1 - low), 1 + high) * a)
    if c_clip is not None and a < 0:
        objective = max(objective, c_clip * a)
    return -w * objective


def numeric_loss(x, denominator, *, logprobs=None, eps_clip, eps_clip_higher=None, c_clip=None, behav_imp_weight_cap=None,
                 behav_filter_cap=None, decoupled=True):  # fmt: skip
    th = (x["logprobs"] if logprobs is None else logprobs).detach()
    options = {
        "low": eps_clip,
        "high": eps_clip if eps_clip_higher is None else eps_clip_higher,
        "c_clip": c_clip,
        "weight_cap": behav_imp_weight_cap,
        "filter_cap": behav_filter_cap,
        "decoupled": decoupled,
    }
    columns = (th, x["proximal_logprobs"], x["behavior_logprobs"], x["advantages"])
    per_token = [token_loss(*(float(c[t]) for c in columns), **options) if x["loss_mask"][t] else 0.0 for t in range(len(th))]
    return per_token, math.fsum(per_token) / denominator


VARIANTS = {
    "plain": {},
    "clip_higher": {"eps_clip_higher": 0.35},
    "dual_clip": {"c_clip": 1.3},
    "weight_cap": {"behav_imp_weight_cap": 1.1},
    "filter": {"behav_filter_cap": 1.25},
    "naive": {"decoupled": False},
    "naive_filter": {"decoupled": False, "behav_filter_cap": 1.25},
    "all": {"eps_clip_higher": 0.3, "c_clip": 1.4, "behav_imp_weight_cap": 1.2, "behav_filter_cap": 1.5},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("seed", [0, 1])
def test_value_and_gradient(variant, seed):
    x = make_inputs(seed)
    x["logprobs"].requires_grad_()
    options = {"eps_clip": 0.2, **VARIANTS[variant]}
    loss, _ = ppo_loss(**x, denominator=123.0, **options)
    _, expected = numeric_loss(x, 123.0, **options)
    assert float(loss) == pytest.approx(expected, rel=1e-12)

    loss.backward()
    h = 1e-6
    above, _ = numeric_loss(x, 123.0, logprobs=x["logprobs"].detach() + h, **options)
    below, _ = numeric_loss(x, 123.0, logprobs=x["logprobs"].detach() - h, **options)
    slopes = torch.tensor([(a - b) / (2 * h) / 123.0 for a, b in zip(above, below, strict=True)], dtype=torch.float64)
    torch.testing.assert_close(x["logprobs"].grad, slopes, rtol=1e-6, atol=1e-9)


def test_behaviour_equal_to_proximal_is_ppo():
    x = make_inputs(3)
    x["behavior_logprobs"] = x["proximal_logprobs"].clone()
    decoupled, _ = ppo_loss(**x, eps_clip=0.2, denominator=50.0)
    naive, _ = ppo_loss(**x, eps_clip=0.2, denominator=50.0, decoupled=False)
    assert torch.equal(decoupled, naive)


def test_decoupled_switch_needs_no_filter():
    x = make_inputs(4)
    assert ppo_loss(**x, eps_clip=0.2, denominator=50.0)[0] != ppo_loss(**x, eps_clip=0.2, denominator=50.0, decoupled=False)[0]


def test_masked_tokens_cannot_poison_the_gradient():
    x = make_inputs(5, dtype=torch.float32)
    for name in ("logprobs", "proximal_logprobs", "behavior_logprobs"):
        x[name] = x[name].masked_fill(~x["loss_mask"], {"logprobs": -torch.inf}.get(name, 50.0))
    x["logprobs"].requires_grad_()
    loss, sums = ppo_loss(**x, eps_clip=0.2, c_clip=3.0, denominator=1.0)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(x["logprobs"].grad).all()
    assert all(torch.isfinite(v) for v in sums.values())
    assert (x["logprobs"].grad[~x["loss_mask"]] == 0).all()


def test_huge_ratios_stay_finite():
    mask = torch.ones(4, dtype=torch.bool)
    logprobs = torch.tensor([0.0, 0.0, -500.0, -500.0], requires_grad=True)
    old = torch.tensor([-500.0, -500.0, 0.0, 0.0])
    loss, sums = ppo_loss(logprobs, old, old, torch.tensor([1.0, -1.0, 1.0, -1.0]), mask, eps_clip=0.2, denominator=4.0)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(logprobs.grad).all()
    assert torch.isfinite(sums["kl_proximal"])


def test_all_masked_is_zero():
    x = make_inputs(6)
    x["loss_mask"] = torch.zeros_like(x["loss_mask"])
    x["logprobs"].requires_grad_()
    loss, sums = ppo_loss(**x, eps_clip=0.2, denominator=1.0)
    loss.backward()
    assert loss == 0
    assert (x["logprobs"].grad == 0).all()
    assert all(v == 0 for v in sums.values())


def test_sums():
    x = make_inputs(7, n=2000)
    mask = x["loss_mask"]
    _, sums = ppo_loss(**x, eps_clip=0.2, denominator=1.0, behav_imp_weight_cap=1.2, behav_filter_cap=1.5)
    u = (x["logprobs"] - x["proximal_logprobs"]).exp()
    w = (x["proximal_logprobs"] - x["behavior_logprobs"]).exp()
    kept = mask & (w <= 1.5) & (w >= 1 / 1.5)
    outside = ((u > 1.2) & (x["advantages"] > 0)) | ((u < 0.8) & (x["advantages"] < 0))
    assert sums["n_tokens"] == mask.sum()
    assert sums["clipped"] == (outside & kept).sum()
    assert sums["filtered"] == (mask & ~kept).sum()
    assert sums["weight_truncated"] == (mask & (w > 1.2)).sum()
    torch.testing.assert_close(sums["ratio"], u[mask].sum())
    torch.testing.assert_close(sums["importance_weight"], w.clamp(max=1.2)[mask].sum())
    torch.testing.assert_close(sums["kl_behaviour"], (w - 1 - w.log())[mask].sum())


def test_cutting_does_not_change_the_loss():
    x = make_inputs(8)
    whole, _ = ppo_loss(**x, eps_clip=0.2, denominator=77.0)
    parts = [ppo_loss(**{k: v[i : i + 90] for k, v in x.items()}, eps_clip=0.2, denominator=77.0)[0] for i in range(0, 400, 90)]
    torch.testing.assert_close(torch.stack(parts).sum(), whole)


def test_sft_loss():
    logprobs = torch.tensor([-1.0, -2.0, -torch.inf, -4.0], requires_grad=True)
    loss, sums = sft_loss(logprobs, torch.tensor([True, False, False, True]), denominator=10.0)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(0.5)
    assert logprobs.grad.tolist() == pytest.approx([-0.1, 0, 0, -0.1])
    assert sums["n_tokens"] == 2
