"""linear_ppo_loss against the formula in float64, on whole logits and differentiated by autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from op_backends import backends
from test_linear_logprob_entropy import count_products, leaves, norm_error
from torch import Tensor
from triton_ptx import compile_to_ptx

from areal.ops import linear_logprob_entropy, linear_ppo_loss, ppo_loss
from areal.ops._dispatch import build_info, compiled_module, missing_cpp

BACKENDS = backends("torch", "cpp", "triton")
# numpy's, in Triton's interpreter, which the other values of a tl.where do not concern
pytestmark = [pytest.mark.timeout(120), pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")]


def inputs(
    seed: int, tokens: int, width: int, vocabulary: int, dtype: torch.dtype, device: str, temperature: float = 1.0
) -> dict[str, Any]:
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, width, generator=g, dtype=torch.float64).to(dtype)
    weight = (2 * torch.randn(vocabulary, width, generator=g, dtype=torch.float64) / width**0.5).to(dtype)
    targets = torch.randint(0, vocabulary, (tokens,), generator=g)
    log_p = torch.log_softmax(hidden.double() @ weight.double().t() / temperature, -1)
    current = log_p.gather(1, targets.unsqueeze(1)).squeeze(1)
    kind = torch.float64 if dtype == torch.float64 else torch.float32
    proximal = current + 0.3 * torch.randn(tokens, generator=g, dtype=torch.float64)
    behavior = proximal + 0.3 * torch.randn(tokens, generator=g, dtype=torch.float64)
    advantages = torch.randn(tokens, generator=g, dtype=torch.float64)
    mask = torch.rand(tokens, generator=g) < 0.7
    per_token = {"proximal_logprobs": proximal, "behavior_logprobs": behavior, "advantages": advantages}
    tensors = {"hidden": hidden, "weight": weight, "targets": targets, **{k: x.to(kind) for k, x in per_token.items()}, "loss_mask": mask}
    return {name: x.to(device) for name, x in tensors.items()}


def reference(x: dict[str, Any], temperature: float, **o: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, log-probs, entropies, token by token as the definition has it."""
    log_p = torch.log_softmax(x["hidden"] @ x["weight"].t() / temperature, -1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    current = log_p.gather(1, x["targets"].unsqueeze(1)).squeeze(1)
    behavior, advantages, mask = x["behavior_logprobs"].double(), x["advantages"].double(), x["loss_mask"]
    proximal = current.detach() if x["proximal_logprobs"] is None else x["proximal_logprobs"].double()
    stale = (proximal - behavior).clamp(-20, 20).exp()
    decoupled = o.get("decoupled", True)
    ratio = (current - (proximal if decoupled else behavior)).clamp(-20, 20).exp()
    higher = o.get("eps_clip_higher") or o["eps_clip"]
    clipped = ratio.clamp(1 - o["eps_clip"], 1 + higher)
    if o.get("objective") == "cispo":
        term = clipped.detach() * advantages * current
    else:
        term = torch.minimum(ratio * advantages, clipped * advantages)
        if o.get("c_clip"):
            term = torch.where(advantages < 0, torch.maximum(term, o["c_clip"] * advantages), term)
    w = stale if decoupled else torch.ones_like(stale)
    if cap := o.get("behav_imp_weight_cap"):
        w = torch.where(w > cap, 0.0 if o.get("behav_imp_weight_mode") == "mask" else cap, w)
    if cap := o.get("behav_filter_cap"):
        both = o.get("behav_filter_side", "both") == "both"
        dropped = (stale > cap) & ((advantages > 0) | both) | (stale < 1 / cap) & ((advantages < 0) | both)
        term = torch.where(dropped, 0.0, term)
    m = mask.double()
    if o.get("normalization") == "fixed":
        m = m / o["fixed_length"]
    if o.get("normalization") == "sequence":
        m = torch.cat([part / part.sum().clamp(min=1) for part in m.split(o["cu_seqlens"].diff().tolist())])
    loss = -(m * w * term).sum() - o.get("entropy_coef", 0.0) * (m * entropy).sum()
    return loss / o["denominator"], current, entropy


def compare(backend: str | None, x: dict[str, Any], temperature: float, budget: int | None, tolerance: float, **options: Any) -> None:
    options = {"eps_clip": 0.2, "denominator": 37.0, **options}
    h64, w64 = leaves(x["hidden"], x["weight"], dtype=torch.float64)
    loss, logprobs, entropy = reference({**x, "hidden": h64, "weight": w64}, temperature, **options)
    (3 * loss).backward()
    h, w = leaves(x["hidden"], x["weight"])
    got = linear_ppo_loss(**{**x, "hidden": h, "weight": w}, temperature=temperature, memory_budget=budget, backend=backend, **options)
    (3 * got.loss).backward()
    torch.testing.assert_close(got.loss.detach().double(), loss.detach(), rtol=20 * tolerance, atol=20 * tolerance)
    torch.testing.assert_close(got.logprobs.double(), logprobs.detach(), rtol=0, atol=20 * tolerance)
    torch.testing.assert_close(got.entropy.double(), entropy.detach(), rtol=0, atol=20 * tolerance)
    assert not any(t.requires_grad for t in (got.logprobs, got.entropy, *got.stats.values()))
    assert torch.equal(got.stats["loss"], got.loss.detach().float())
    assert norm_error(h.grad, h64.grad, 1e-9) < tolerance
    assert norm_error(w.grad, w64.grad, 1e-9) < tolerance


SWITCHES: dict[str, dict[str, Any]] = {
    "plain": {},
    "clip-higher": {"eps_clip": 0.1, "eps_clip_higher": 0.4},
    "dual": {"c_clip": 1.3},
    "cispo": {"objective": "cispo", "eps_clip": 1.0, "eps_clip_higher": 0.3},
    "naive": {"decoupled": False},
    "truncate": {"behav_imp_weight_cap": 1.1},
    "mask": {"behav_imp_weight_cap": 1.1, "behav_imp_weight_mode": "mask"},
    "filter": {"behav_filter_cap": 1.2},
    "filter-moved": {"behav_filter_cap": 1.1, "behav_filter_side": "advantage"},
    "entropy": {"entropy_coef": 0.05},
    "dr-grpo": {"normalization": "fixed", "fixed_length": 8.0},
    "grpo": {"normalization": "sequence", "cu_seqlens": torch.tensor([0, 9, 9, 10, 26], dtype=torch.int32)},
    "all": {"c_clip": 1.5, "eps_clip_higher": 0.3, "behav_imp_weight_cap": 1.5, "behav_filter_cap": 2.0, "entropy_coef": 0.02},
}


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
@pytest.mark.parametrize("name", SWITCHES)
def test_every_switch(on_backend: tuple[str, str], name: str) -> None:
    backend, device = on_backend
    options = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in SWITCHES[name].items()}
    x = inputs(1, 26, 16, 50, torch.float32, device, 0.8)
    compare(backend, x, 0.8, 1, 5e-6, **options)
    compare(backend, {**x, "proximal_logprobs": None}, 0.8, None, 5e-6, **options)


@pytest.mark.parametrize("name", SWITCHES)
def test_every_switch_in_float64(name: str) -> None:
    x = inputs(2, 26, 16, 50, torch.float64, "cpu")
    compare(None, x, 1.0, 1, 1e-11, **SWITCHES[name])
    compare(None, {**x, "proximal_logprobs": None}, 1.0, None, 1e-11, **SWITCHES[name])


def test_gradcheck() -> None:
    x = inputs(3, 6, 4, 9, torch.float64, "cpu")
    leaves = x.pop("hidden").requires_grad_(), x.pop("weight").requires_grad_()

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        return linear_ppo_loss(hidden, weight, **x, eps_clip=0.2, denominator=4.0, entropy_coef=0.3, temperature=0.8).loss

    assert torch.autograd.gradcheck(loss, leaves)


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
@pytest.mark.parametrize(("tokens", "vocabulary"), [(1, 1), (3, 9), (129, 300), (5, 1025), (2, 4500)])
def test_shapes(on_backend: tuple[str, str], tokens: int, vocabulary: int) -> None:
    backend, device = on_backend
    x = inputs(3, tokens, 24, vocabulary, torch.float32, device)
    compare(backend, {**x, "loss_mask": torch.ones_like(x["loss_mask"])}, 1.0, 1, 5e-6, entropy_coef=0.1)


@pytest.mark.parametrize(("backend", "device"), backends("torch", "cpp"))
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 10**6),
    tokens=st.integers(0, 300),
    width=st.integers(4, 40),
    vocabulary=st.integers(3, 300),
    temperature=st.sampled_from([0.5, 1.0, 2.5]),
    budget=st.sampled_from([1, 200_000, None]),
    on_policy=st.booleans(),
    name=st.sampled_from(sorted(SWITCHES.keys() - {"grpo"})),
)
def test_any_shape(
    on_backend: tuple[str, str], seed: int, tokens: int, width: int, vocabulary: int, temperature: float, budget: int | None, on_policy: bool, name: str
) -> None:  # fmt: skip
    backend, device = on_backend
    x = inputs(seed, tokens, width, vocabulary, torch.float32, device, temperature)
    if on_policy:
        x["proximal_logprobs"] = None
    compare(backend, x, temperature, budget, 1e-4, **SWITCHES[name])


@pytest.mark.parametrize(("backend", "device"), backends("torch", "cpp"))
def test_more_tokens_than_16_bits_can_count(on_backend: tuple[str, str]) -> None:
    backend, device = on_backend
    compare(backend, inputs(4, 70_001, 4, 9, torch.float32, device), 1.0, 1 << 20, 2e-5)


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_all_masked_and_nan_outside_of_the_mask(on_backend: tuple[str, str]) -> None:
    backend, device = on_backend
    x = inputs(5, 40, 8, 30, torch.float32, device)
    x["hidden"][~x["loss_mask"]] *= 1e38  # their logits overflow
    h, w = leaves(x["hidden"], x["weight"])
    for mask in torch.zeros_like(x["loss_mask"]), x["loss_mask"]:
        for name in "proximal_logprobs", "behavior_logprobs", "advantages":
            x[name] = torch.where(mask, x[name], torch.nan)
        h.grad = w.grad = None
        loss, stats, _, _ = linear_ppo_loss(
            **{**x, "hidden": h, "weight": w, "loss_mask": mask}, eps_clip=0.2, denominator=10.0, entropy_coef=0.1, backend=backend
        )
        loss.backward()
        assert loss.isfinite()
        assert all(value.isfinite() for value in stats.values())
        assert torch.equal(h.grad.any(1), mask)
        assert w.grad.isfinite().all()
        assert bool(w.grad.any()) == bool(mask.any())
        x = inputs(5, 40, 8, 30, torch.float32, device)


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_extreme_log_ratios(on_backend: tuple[str, str]) -> None:
    backend, device = on_backend
    x = inputs(6, 6, 8, 30, torch.float32, device)
    x["loss_mask"][:] = True
    x["proximal_logprobs"][:4] = torch.tensor([1000.0, -1000.0, 0.0, -3.0])
    x["behavior_logprobs"][:4] = torch.tensor([0.0, -3.0, -1000.0, -torch.inf])
    compare(backend, x, 1.0, None, 1e-5, behav_imp_weight_cap=5.0)


@pytest.mark.parametrize(("backend", "device"), [p for p in BACKENDS if "triton" not in p.values or "cuda" in p.values])
def test_bfloat16(on_backend: tuple[str, str]) -> None:
    """Gradients of a bfloat16 head; over many chunks the sum of d(weight) is rounded once."""
    backend, device = on_backend
    x = inputs(7, 1500, 64, 500, torch.bfloat16, device)
    # On policy nothing sits at a clip boundary, which a rounded log-prob could cross.
    x["proximal_logprobs"] = None
    h64, w64 = leaves(x["hidden"], x["weight"], dtype=torch.float64)
    options = {"eps_clip": 0.2, "denominator": 1000.0}
    reference({**x, "hidden": h64, "weight": w64}, 1.0, **options)[0].backward()
    errors = []
    for budget in (1, None):
        h, w = leaves(x["hidden"], x["weight"])
        linear_ppo_loss(**{**x, "hidden": h, "weight": w}, backend=backend, memory_budget=budget, **options).loss.backward()
        assert h.grad.dtype == w.grad.dtype == torch.bfloat16
        errors.append(norm_error(w.grad, w64.grad))
        assert norm_error(h.grad, h64.grad) < 0.02
    assert max(errors) < 0.02
    assert errors[0] < 1.1 * errors[1]


@pytest.mark.parametrize(
    ("hidden_grad", "weight_grad", "products"), [(True, True, 3), (True, False, 2), (False, True, 2), (False, False, 1)]
)
def test_products(monkeypatch: pytest.MonkeyPatch, hidden_grad: bool, weight_grad: bool, products: int) -> None:
    calls = count_products(monkeypatch)
    x = inputs(8, 50, 8, 30, torch.float32, "cpu")
    x["hidden"].requires_grad_(hidden_grad)
    x["weight"].requires_grad_(weight_grad)
    loss = linear_ppo_loss(**x, eps_clip=0.2, denominator=10.0).loss
    if hidden_grad or weight_grad:
        loss.backward()
    assert len(calls) == products
    calls.clear()
    with torch.no_grad():
        assert not linear_ppo_loss(**x, eps_clip=0.2, denominator=10.0).loss.requires_grad
    assert len(calls) == 1


def test_equals_its_parts() -> None:
    """The same numbers as linear_logprob_entropy followed by ppo_loss; a batch cut in two adds up, with a denominator on the device."""
    x = inputs(9, 200, 16, 60, torch.float32, "cpu")
    options: dict[str, Any] = {"eps_clip": 0.2, "c_clip": 3.0, "behav_imp_weight_cap": 2.0, "entropy_coef": 0.01}
    (h, w), (h2, w2), (h3, w3) = (leaves(x["hidden"], x["weight"]) for _ in range(3))
    whole = linear_ppo_loss(**{**x, "hidden": h, "weight": w}, denominator=50.0, **options)
    whole.loss.backward()
    logprobs, entropy = linear_logprob_entropy(h2, w2, x["targets"])
    rest = [x[name] for name in ("proximal_logprobs", "behavior_logprobs", "advantages", "loss_mask")]
    loss, stats = ppo_loss(logprobs, *rest, denominator=50.0, entropy=entropy, **options)
    loss.backward()
    for part in slice(0, 77), slice(77, 200):
        cut = {name: t[part] for name, t in x.items() if name not in ("hidden", "weight")}
        linear_ppo_loss(h3[part], w3, **cut, denominator=torch.tensor(50.0), **options).loss.backward()
    assert whole.stats.keys() == stats.keys()
    for name, value in stats.items():
        torch.testing.assert_close(whole.stats[name], value, rtol=1e-5, atol=1e-5, msg=name)
    for other in (h2, w2), (h3, w3):
        assert norm_error(h.grad, other[0].grad) < 1e-6
        assert norm_error(w.grad, other[1].grad) < 1e-6


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("backend", ["torch", pytest.param("cpp", marks=pytest.mark.skipif(bool(missing_cpp()), reason="needs areal._C"))])
def test_old_policies_and_advantages_are_constants(backend: Any) -> None:
    x = inputs(7, 12, 8, 30, torch.float32, "cpu")
    hidden, weight = leaves(x.pop("hidden"), x.pop("weight"))
    names = "proximal_logprobs", "behavior_logprobs", "advantages"
    for name in names:
        x[name].requires_grad_()
    denominator = torch.tensor(9.0, requires_grad=True)
    got = linear_ppo_loss(hidden, weight, **x, eps_clip=0.2, denominator=denominator, entropy_coef=0.1, backend=backend)
    assert not got.logprobs.requires_grad and not got.entropy.requires_grad
    got.loss.backward()
    assert hidden.grad is not None and denominator.grad is None and all(x[name].grad is None for name in names)


def test_on_policy_ratios_are_exactly_one() -> None:
    x = inputs(10, 100, 16, 60, torch.float32, "cpu")
    stats = linear_ppo_loss(**{**x, "proximal_logprobs": None}, eps_clip=0.2, denominator=50.0).stats
    assert stats["ratio"] == stats["n_tokens"] == x["loss_mask"].sum()
    assert stats["kl_proximal"] == 0


def test_backward_twice_and_frozen_inputs() -> None:
    x = inputs(11, 40, 8, 30, torch.float32, "cpu")
    h, w = leaves(x["hidden"], x["weight"])
    loss = linear_ppo_loss(**{**x, "hidden": h, "weight": w}, eps_clip=0.2, denominator=10.0).loss
    first = torch.autograd.grad(loss, (h, w), retain_graph=True)
    for one, two in zip(first, torch.autograd.grad(loss, (h, w)), strict=True):
        assert torch.equal(one, two)


@pytest.mark.skipif(missing_cpp() is not None, reason="areal._C is not built")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_instruction_set_and_thread_count(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    x = inputs(12, 200, 16, 3003, dtype, "cpu")
    h64, w64 = leaves(x["hidden"], x["weight"], dtype=torch.float64)
    options = {"eps_clip": 0.2, "denominator": 37.0, "entropy_coef": 0.01, "decoupled": False}
    reference({**x, "hidden": h64, "weight": w64}, 1.0, **options)[0].backward()
    module, results = compiled_module(), {}
    original = module.linear_ppo_rows
    for name in build_info()["instruction_sets"]:
        for threads in (1, 3):
            monkeypatch.setattr(module, "linear_ppo_rows", lambda *a, name=name, threads=threads: original(*a[:-1], threads, name))
            h, w = leaves(x["hidden"], x["weight"])
            got = linear_ppo_loss(**{**x, "hidden": h, "weight": w}, backend="cpp", **options)
            got.loss.backward()
            results[name, threads] = [got.logprobs, got.entropy, h.grad, w.grad]
            if dtype == torch.float32:
                assert norm_error(w.grad, w64.grad) < 5e-6
        for one, three in zip(results[name, 1], results[name, 3], strict=True):
            assert torch.equal(one, three)


def test_compiles_without_a_break() -> None:
    x = inputs(13, 40, 8, 30, torch.float32, "cpu")

    def run(h: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        result = linear_ppo_loss(**{**x, "hidden": torch.tanh(h), "weight": w}, eps_clip=0.2, denominator=10.0, entropy_coef=0.1)
        return result.loss, result.stats["ratio"]

    want, got = leaves(x["hidden"], x["weight"]), leaves(x["hidden"], x["weight"])
    expected, ratio = run(*want)
    expected.backward()
    loss, compiled_ratio = torch.compile(run, backend="aot_eager", fullgraph=True)(*got)
    loss.backward()
    torch.testing.assert_close((loss, compiled_ratio), (expected, ratio))
    for one, two in zip(got, want, strict=True):
        torch.testing.assert_close(one.grad, two.grad)


def test_registration() -> None:
    x = inputs(14, 12, 8, 30, torch.float32, "cpu")
    per_token = [x["behavior_logprobs"], x["advantages"], x["loss_mask"].float()]
    parameters = [0.8, 1.2, float("inf"), float("inf"), 0.0, float("inf"), 0.0, 1.0, 0.0, 0.0]
    for proximal in x["proximal_logprobs"], None:
        for needs in (True, True), (True, False), (False, False):
            arguments = x["hidden"], x["weight"], x["targets"], proximal, per_token, parameters, [0.9, 0.1], 1 << 20, *needs, "torch"
            torch.library.opcheck(torch.ops.areal.linear_ppo_loss.default, arguments)


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("element", ["*bf16", "*fp32"])
def test_triton_moves_16_bytes_at_a_time(element: str, gradients: bool) -> None:
    pytest.importorskip("triton")
    vectors = "proximal", "behavior", "advantages", "loss_weights", "logprobs", "entropies"
    scalars = "inverse_temperature", "entropy_coef", "lower", "upper", "c_clip", "weight_cap", "filter_lower", "filter_upper"
    signature = {"logits": element, "targets": "*i64", **dict.fromkeys(vectors, "*fp32"), "n": "i32", **dict.fromkeys(scalars, "fp32")}
    switches = {
        "CISPO": False,
        "DECOUPLED": True,
        "MASK_WEIGHTS": False,
        "FILTER_BY_ADVANTAGE": False,
        "ON_POLICY": False,
        "GRADIENTS": gradients,
        "BLOCK": 8192,
    }
    ptx = compile_to_ptx("linear_ppo_loss_triton", "linear_ppo_kernel", signature, switches, multiples_of_16=("n",), num_warps=16)
    accesses = 8192 * (2 if element == "*bf16" else 4) // (16 * 32) // 16  # of one thread to a block
    passes = 2 if gradients else 1
    assert ptx.count("ld.global.v4.b32") == 2 * accesses * passes  # the main loop, and the masked end
    assert ptx.count("st.global.v4.b32") == (4 * accesses if gradients else 0)  # the gradient, or zeros
    assert ptx.count("ld.global.b16") <= 1, "the target's logit"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"ratio_level": "sequence"}, "ratio_level is 'sequence'.*call linear_logprob_entropy and ppo_loss"),
        ({"behav_imp_weight_level": "sequence"}, "behav_imp_weight_level is 'sequence'"),
        ({"behav_filter_level": "sequence"}, "behav_filter_level is 'sequence'"),
        ({"objective": "gspo"}, "objective is 'gspo'"),
        ({"eps_clip": -0.1}, "eps_clip is -0.1"),
        ({"normalization": "mean"}, "normalization is 'mean'"),
        ({"normalization": "sequence"}, "needs cu_seqlens"),
        ({"normalization": "sequence", "cu_seqlens": [0, 4]}, "cu_seqlens is a list"),
        ({"normalization": "sequence", "cu_seqlens": torch.tensor([0, 4])}, "cu_seqlens is int64; it must be int32"),
        ({"normalization": "sequence", "cu_seqlens": torch.zeros(1, 2, dtype=torch.int32)}, "cu_seqlens has the shape"),
        ({"denominator": 0}, "denominator is 0"),
        ({"denominator": torch.ones(1)}, "denominator has the shape"),
        ({"fixed_length": 8}, "fixed_length is 8"),
        ({"normalization": "fixed"}, "fixed_length is None"),
        ({"fixed_length": 8.0}, "fixed_length is 8.0"),
        ({"normalization": "sequence", "cu_seqlens": torch.tensor([0, 4])}, "cu_seqlens is int64"),
        ({"denominator": 0.0}, "denominator is 0.0"),
        ({"denominator": torch.ones(2)}, r"denominator has the shape \[2\]"),
        ({"proximal_logprobs": torch.zeros(3)}, "proximal_logprobs has the shape"),
        ({"behavior_logprobs": torch.zeros(4).double()}, "behavior_logprobs is float64"),
        ({"advantages": torch.zeros(8)[::2]}, "advantages is not contiguous"),
        ({"loss_mask": torch.ones(4).double()}, "loss_mask is float64; it must be bool or float32"),
        ({"weight": torch.zeros(5, 3)}, "weight has the shape"),
        ({"targets": torch.full((4,), 30)}, "targets has values"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"memory_budget": -1}, "memory_budget is -1"),
        ({"memory_budget": 1e9}, "memory_budget is 1000000000.0"),
        ({"backend": "cuda"}, "has the backends"),
    ],
)
def test_wrong_arguments_are_refused(change: dict[str, Any], sentence: str) -> None:
    x = inputs(15, 4, 8, 30, torch.float32, "cpu")
    with pytest.raises(ValueError, match=sentence) as error:
        linear_ppo_loss(**{**x, "eps_clip": 0.2, "denominator": 10.0, **change})
    assert "linear_ppo_loss" in str(error.value)
