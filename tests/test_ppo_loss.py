"""ppo_loss against its formulas written out in Python floats."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from op_backends import backends
from ppo_cases import expected, make_cuts, make_inputs

from areal.ops import ppo_loss
from areal.ops.ppo_loss import STATISTICS, ppo_parameters
from areal.ops.ppo_token import ppo_token_gradient

torch.set_num_threads(1)
ALL = backends("torch", "cpp", "triton", "cuda")

VARIANTS = {
    "plain": {},
    "clip_higher": {"eps_clip_higher": 0.35},
    "dual_clip": {"c_clip": 1.3},
    "weight_cap": {"behav_imp_weight_cap": 1.1},
    "weight_mask": {"behav_imp_weight_cap": 1.1, "behav_imp_weight_mode": "mask"},
    "weight_sequence": {"behav_imp_weight_cap": 1.1, "behav_imp_weight_level": "sequence"},
    "filter": {"behav_filter_cap": 1.25},
    "filter_sequence": {"behav_filter_cap": 1.1, "behav_filter_level": "sequence"},
    "filter_moved": {"behav_filter_cap": 1.1, "behav_filter_side": "advantage"},
    "filter_moved_sequence": {"behav_filter_cap": 1.05, "behav_filter_level": "sequence", "behav_filter_side": "advantage"},
    "filter_moved_gspo": {
        "behav_filter_cap": 1.05,
        "behav_filter_level": "sequence",
        "behav_filter_side": "advantage",
        "ratio_level": "sequence",
    },
    "filter_gspo": {"behav_filter_cap": 1.25, "ratio_level": "sequence"},
    "naive": {"decoupled": False},
    "naive_filter": {"decoupled": False, "behav_filter_cap": 1.25},
    "cispo": {"objective": "cispo", "eps_clip": 1.0, "eps_clip_higher": 0.2, "behav_imp_weight_cap": 1.5},
    "gspo": {"ratio_level": "sequence", "eps_clip": 0.03, "eps_clip_higher": 0.04, "decoupled": False, "normalization": "sequence"},
    "grpo": {"normalization": "sequence"},
    "dr_grpo": {"normalization": "fixed", "fixed_length": 70.0},
    "entropy": {"entropy_coef": 0.05, "normalization": "sequence"},
    "all": {"eps_clip_higher": 0.3, "c_clip": 1.4, "behav_imp_weight_cap": 1.2, "behav_filter_cap": 1.5},
}


def run(x, device="cpu", dtype=torch.float32, *, entropy=None, cu_seqlens=None, **options):
    """loss, statistics, gradient of the log-probs, gradient of the entropy, all on the CPU."""
    inputs = {name: value.to(device, dtype if value.is_floating_point() else None) for name, value in x.items()}
    inputs["logprobs"] = inputs["logprobs"].clone().requires_grad_()
    if entropy is not None:
        entropy = entropy.to(device, dtype, copy=True).requires_grad_()
    if cu_seqlens is not None:
        cu_seqlens = cu_seqlens.to(device)
    loss, stats = ppo_loss(**inputs, entropy=entropy, cu_seqlens=cu_seqlens, **options)
    (3.0 * loss).backward()
    of_entropy = None if entropy is None or entropy.grad is None else entropy.grad.cpu() / 3.0
    return loss.detach().cpu(), {k: v.cpu() for k, v in stats.items()}, inputs["logprobs"].grad.cpu() / 3.0, of_entropy


def check(x, want, got, rtol=2e-5, atol=1e-6):
    loss, stats, gradient, of_entropy = got
    scale = max(map(abs, want.gradient), default=0.0)
    torch.testing.assert_close(
        gradient.double(), torch.tensor(want.gradient, dtype=torch.float64), rtol=rtol, atol=max(atol * scale, 1e-30)
    )
    assert float(loss) == pytest.approx(want.loss, rel=rtol, abs=atol * max(1.0, scale * len(want.gradient)))
    if of_entropy is not None:
        torch.testing.assert_close(of_entropy.double(), torch.tensor(want.entropy_gradient, dtype=torch.float64), rtol=1e-6, atol=0)
    assert float(stats["loss"]) == float(loss.float())
    for name in stats:
        if name != "loss":
            assert float(stats[name]) == pytest.approx(want.sums.get(name, 0.0), rel=1e-5, abs=1e-4), name


@pytest.mark.parametrize(("backend", "device"), ALL)
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants(variant, backend, device, on_backend):
    x, cuts = make_inputs(1, 403), make_cuts(2, 403, 9)
    options = {"eps_clip": 0.2, "denominator": 123.0, "cu_seqlens": cuts, "entropy": torch.rand(403), **VARIANTS[variant]}
    want = expected(x, **options)
    assert want.margin > 1e-6
    check(x, want, run(x, device, backend=backend, **options))


@pytest.mark.parametrize(("backend", "device"), ALL)
@pytest.mark.parametrize(("variant", "n"), [("plain", 403), ("plain", 1024), ("gspo", 403), ("all", 17)])
def test_a_mask_of_floats_is_one_of_booleans(variant, n, backend, device, on_backend):
    x, cuts = make_inputs(11, n), make_cuts(12, n, 4)
    options = {"eps_clip": 0.2, "denominator": 50.0, "cu_seqlens": cuts, "backend": backend, **VARIANTS[variant]}
    loss, stats, gradient, _ = run(x, device, **options)
    floats, float_stats, float_gradient, _ = run({**x, "loss_mask": x["loss_mask"].double()}, device, **options)
    assert loss == floats and stats == float_stats and 0 < stats["n_tokens"] < n
    assert torch.equal(gradient, float_gradient)


@pytest.mark.parametrize("variant", VARIANTS)
def test_float64_is_exact(variant):
    x, cuts = make_inputs(3, 200), make_cuts(4, 200, 5)
    entropy = torch.rand(200, dtype=torch.float64)
    options = {"eps_clip": 0.2, "denominator": 123.0, "cu_seqlens": cuts, "entropy": entropy, **VARIANTS[variant]}
    check(x, expected(x, **options), run(x, dtype=torch.float64, **options), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradcheck(variant):
    x, cuts = make_inputs(5, 30), make_cuts(6, 30, 3)
    entropy = torch.rand(30, dtype=torch.float64, requires_grad=True)
    if VARIANTS[variant].get("objective") == "cispo":
        pytest.skip("its gradient is not that of its value")

    def loss(logprobs, entropy):
        options = {"eps_clip": 0.2, "entropy_coef": 0.1, **VARIANTS[variant]}
        return ppo_loss(**{**x, "logprobs": logprobs}, denominator=7.0, cu_seqlens=cuts, entropy=entropy, **options)[0]

    assert torch.autograd.gradcheck(loss, (x["logprobs"].requires_grad_(), entropy))


OPTIONS = st.fixed_dictionaries(
    {
        "eps_clip": st.sampled_from([0.0, 0.03, 0.2, 1.5]),
        "eps_clip_higher": st.sampled_from([None, 0.28]),
        "c_clip": st.sampled_from([None, 1.3, 3.0]),
        "ratio_level": st.sampled_from(["token", "sequence"]),
        "objective": st.sampled_from(["ppo", "cispo"]),
        "decoupled": st.booleans(),
        "behav_imp_weight_cap": st.sampled_from([None, 1.1, 5.0]),
        "behav_imp_weight_mode": st.sampled_from(["truncate", "mask"]),
        "behav_imp_weight_level": st.sampled_from(["token", "sequence"]),
        "behav_filter_cap": st.sampled_from([None, 1.05, 4.0]),
        "behav_filter_level": st.sampled_from(["token", "sequence"]),
        "behav_filter_side": st.sampled_from(["both", "advantage"]),
        "entropy_coef": st.sampled_from([0.0, 0.01]),
    }
)


@pytest.mark.parametrize(("backend", "device"), ALL)
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 10**6),
    n=st.one_of(st.integers(0, 40), st.sampled_from([255, 1023, 1024, 1025, 2500])),
    n_sequences=st.integers(1, 12),
    spread=st.sampled_from([0.1, 1.0, 15.0]),
    share=st.sampled_from([0.0, 0.6, 1.0]),
    norm=st.sampled_from([("token", None), ("sequence", None), ("fixed", 33.0)]),
    with_entropy=st.booleans(),
    options=OPTIONS,
)
def test_fuzz(backend, device, on_backend, seed, n, n_sequences, spread, share, norm, with_entropy, options):
    x, cuts = make_inputs(seed, n, spread, share), make_cuts(seed, n, n_sequences)
    entropy = torch.rand(n) if with_entropy else None
    options = {**options, "normalization": norm[0], "fixed_length": norm[1], "denominator": 17.0, "cu_seqlens": cuts, "entropy": entropy}
    want = expected(x, **options)
    assume(want.margin > 1e-5)
    got = run(x, device, backend=backend, **options)
    assert tuple(got[1]) == STATISTICS[: None if with_entropy else -1]
    _, stats, gradient, of_entropy = got
    # A log-ratio in float32 is good to some 1e-6 of its size, and so is its exp.
    tolerance = 2e-4 if spread > 1 or n > 1000 else 3e-5
    scale = max(map(abs, want.gradient), default=0.0)
    wanted = torch.tensor(want.gradient, dtype=torch.float64)
    torch.testing.assert_close(gradient.double(), wanted, rtol=tolerance, atol=max(1e-6 * scale, 1e-30))
    if of_entropy is not None:
        wanted = torch.tensor(want.entropy_gradient, dtype=torch.float64)
        torch.testing.assert_close(of_entropy.double(), wanted, rtol=1e-6, atol=0)
    for name in "n_tokens", "clipped_high", "clipped_low", "dual_clipped", "weight_truncated", "filtered":
        assert float(stats[name]) == want.sums.get(name, 0.0), name


@pytest.mark.parametrize(("backend", "device"), ALL)
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("n", [70_001])
def test_many_tokens(level, n, backend, device, on_backend):
    x, cuts = make_inputs(7, n), make_cuts(8, n, 40)
    options = {"eps_clip": 0.2, "c_clip": 3.0, "behav_imp_weight_cap": 2.0, "denominator": 5e4, "ratio_level": level, "cu_seqlens": cuts}
    loss, stats, gradient, _ = run(x, device, backend=backend, **options)
    want, sums, wanted, _ = run(x, dtype=torch.float64, **options)
    torch.testing.assert_close(gradient.double(), wanted, rtol=2e-4, atol=1e-6 * float(wanted.abs().max()))
    torch.testing.assert_close(loss.double(), want, rtol=1e-4, atol=1e-6)
    for name in sums:
        torch.testing.assert_close(stats[name], sums[name], rtol=1e-4, atol=2.0)


@pytest.mark.parametrize(("backend", "device"), ALL)
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_unaligned_views(level, backend, device, on_backend):
    """Tensors that start anywhere: no vector may be assumed to be aligned."""
    x, cuts = make_inputs(9, 130), make_cuts(10, 129, 4)
    inputs = {name: value.to(device, torch.float32 if value.is_floating_point() else None) for name, value in x.items()}
    options = {"eps_clip": 0.2, "denominator": 9.0, "ratio_level": level, "cu_seqlens": cuts.to(device)}
    views, copies = ({k: f(v) for k, v in inputs.items()} for f in (lambda v: v[1:], lambda v: v[1:].clone()))
    got = ppo_loss(**views, backend=backend, **options)[0], ppo_loss(**copies, backend=backend, **options)[0]
    torch.testing.assert_close(*got, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("backend", "device"), ALL)
@pytest.mark.parametrize("variant", ["plain", "cispo", "gspo", "all", "filter_sequence"])
def test_what_is_masked_cannot_leak(variant, backend, device, on_backend):
    x, cuts = make_inputs(11, 300), make_cuts(12, 300, 5)
    options = {"eps_clip": 0.2, "denominator": 9.0, "cu_seqlens": cuts, "entropy_coef": 0.1, "backend": backend, **VARIANTS[variant]}
    entropy = torch.rand(300)
    clean = run(x, device, entropy=entropy, **options)
    for poison in torch.nan, torch.inf, -torch.inf:
        dirty = {k: v if k == "loss_mask" else torch.where(x["loss_mask"], v, poison) for k, v in x.items()}
        got = run(dirty, device, entropy=torch.where(x["loss_mask"], entropy, poison), **options)
        for a, b in zip((got[0], *got[1].values(), *got[2:]), (clean[0], *clean[1].values(), *clean[2:]), strict=True):
            assert torch.equal(a, b)
    assert (clean[2][~x["loss_mask"]] == 0).all()


@pytest.mark.parametrize(("backend", "device"), ALL)
@pytest.mark.parametrize("variant", ["plain", "naive", "cispo", "gspo"])
def test_extreme_log_ratios(variant, backend, device, on_backend):
    far = [0.0, 1000.0, -1000.0, 25.0, -25.0]
    grid = torch.cartesian_prod(torch.tensor(far), torch.tensor(far), torch.tensor([1.0, -1.0])).double()
    x = {"logprobs": grid[:, 0], "proximal_logprobs": torch.zeros(50).double(), "behavior_logprobs": grid[:, 1], "advantages": grid[:, 2]}
    x = {**{k: v.contiguous() for k, v in x.items()}, "loss_mask": torch.ones(50, dtype=torch.bool)}
    options = {"eps_clip": 0.2, "denominator": 50.0, "cu_seqlens": torch.tensor([0, 20, 50], dtype=torch.int32), **VARIANTS[variant]}
    got = run(x, device, backend=backend, **options)
    check(x, expected(x, **options), got, rtol=1e-4)
    assert all(torch.isfinite(v).all() for v in (got[0], got[2], *got[1].values()))


@pytest.mark.parametrize(("backend", "device"), ALL)
def test_behaviour_of_probability_zero(backend, device, on_backend):
    x = make_inputs(13, 40)
    x["behavior_logprobs"][::3] = -torch.inf
    loss, _, gradient, _ = run(x, device, eps_clip=0.2, denominator=1.0, behav_imp_weight_cap=2.0, backend=backend)
    assert torch.isfinite(loss)
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize(("backend", "device"), ALL)
@pytest.mark.parametrize("name", ["logprobs", "proximal_logprobs", "behavior_logprobs", "advantages"])
def test_nan_in_a_loss_token_shows(name, backend, device, on_backend):
    x = make_inputs(14, 40)
    x[name][int(x["loss_mask"].nonzero()[0])] = torch.nan
    loss, _, gradient, _ = run(x, device, eps_clip=0.2, denominator=1.0, behav_imp_weight_cap=2.0, behav_filter_cap=3.0, backend=backend)
    assert loss.isnan()
    assert gradient.isnan().any()


@pytest.mark.parametrize(("backend", "device"), ALL)
def test_denominator_as_a_tensor(backend, device, on_backend):
    x = make_inputs(15, 90)
    number = run(x, device, eps_clip=0.2, denominator=41.0, backend=backend)
    for dtype in torch.float32, torch.int64, torch.float64:
        tensor = run(x, device, eps_clip=0.2, denominator=torch.tensor(41, dtype=dtype, device=device), backend=backend)
        torch.testing.assert_close(tensor[0], number[0], rtol=1e-6, atol=0)
        torch.testing.assert_close(tensor[2], number[2], rtol=1e-6, atol=1e-12)
        torch.testing.assert_close(tensor[1]["loss"], number[1]["loss"], rtol=1e-6, atol=0)


def test_cutting_does_not_change_the_loss():
    x = make_inputs(8, 400)
    whole = run(x, eps_clip=0.2, denominator=77.0)[0]
    parts = [run({k: v[i : i + 90] for k, v in x.items()}, eps_clip=0.2, denominator=77.0)[0] for i in range(0, 400, 90)]
    torch.testing.assert_close(torch.stack(parts).sum(), whole)


def test_behaviour_equal_to_proximal_is_ppo():
    x = make_inputs(3, 100)
    x["behavior_logprobs"] = x["proximal_logprobs"].clone()
    decoupled, naive = (run(x, eps_clip=0.2, denominator=50.0, decoupled=decoupled) for decoupled in (True, False))
    assert torch.equal(decoupled[0], naive[0])
    assert torch.equal(decoupled[2], naive[2])


@pytest.mark.parametrize(
    "variant", ["plain", "clip_higher", "dual_clip", "weight_cap", "weight_mask", "filter", "filter_moved", "naive", "cispo", "all"]
)
def test_token_gradient_is_that_of_the_loss(variant):
    x = make_inputs(16, 300)
    options = {"eps_clip": 0.2, **VARIANTS[variant]}
    gradient = run(x, dtype=torch.float64, denominator=11.0, **options)[2]
    of_tokens = ppo_token_gradient(ppo_parameters("test", **options), *list(x.values())[:4], x["loss_mask"] / 11.0)
    torch.testing.assert_close(of_tokens, gradient, rtol=1e-6, atol=1e-12)  # the loss weights are float32


@pytest.mark.parametrize(("backend", "device"), ALL)
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_a_filtered_token_without_probability_has_gradient_0(level, backend, device, on_backend):
    proximal = torch.tensor([-1.0, -float("inf"), -1.0, -2.0], device=device)
    logprobs = proximal.clone().requires_grad_()
    behavior = torch.full((4,), -1.5, device=device)
    options = {"ratio_level": level, "behav_filter_level": level, "behav_filter_cap": 2.0}
    cu_seqlens = torch.tensor([0, 2, 4], dtype=torch.int32, device=device)
    rest = proximal, behavior, torch.ones(4, device=device), torch.ones(4, dtype=torch.bool, device=device)
    loss, stats = ppo_loss(logprobs, *rest, eps_clip=0.2, denominator=4.0, cu_seqlens=cu_seqlens, backend=backend, **options)
    loss.backward()
    dropped = [1] if level == "token" else [0, 1]
    assert loss.isfinite() and int(stats["filtered"]) == len(dropped)
    assert logprobs.grad.isfinite().all()
    assert [i for i in range(4) if logprobs.grad[i] == 0.0] == dropped


@pytest.mark.parametrize(("backend", "device"), ALL)
def test_without_sequences_no_token_counts(backend, device, on_backend):
    x = make_inputs(1, 0 if device == "cpu" else 9)  # on the CPU sequences must cover all tokens
    options = {"eps_clip": 0.2, "denominator": 1.0, "normalization": "sequence", "backend": backend}
    loss, stats, gradient, _ = run(x, device, cu_seqlens=torch.zeros(1, dtype=torch.int32), **options)
    assert loss == 0 and stats["n_tokens"] == 0 and not gradient.any()


@pytest.mark.parametrize(("backend", "device"), ALL)
def test_a_sequence_whose_slope_is_nan_leaves_other_tokens_at_zero(backend, device, on_backend):
    x = make_inputs(1, 20)
    x["loss_mask"] = torch.arange(20) % 2 == 0
    x["advantages"][4] = torch.nan
    cuts = torch.tensor([0, 10, 20], dtype=torch.int32)
    _, _, gradient, _ = run(x, device, cu_seqlens=cuts, ratio_level="sequence", eps_clip=0.9, denominator=1.0, backend=backend)
    assert gradient[:10:2].isnan().all() and not gradient[1::2].any() and gradient[10:].isfinite().all()


def test_fake_tensors_anywhere_do_not_reach_the_kernel():
    from torch._subclasses.fake_tensor import FakeTensorMode

    x = make_inputs(1, 9)
    x = {name: value.float() if value.is_floating_point() else value for name, value in x.items()}
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        x["advantages"] = mode.from_tensor(x["advantages"])
    loss, _ = ppo_loss(**x, eps_clip=0.2, denominator=1.0)
    assert type(loss).__name__ == "FakeTensor"
