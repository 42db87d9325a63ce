"""linear_logprob_entropy against float64 softmax of whole logits, differentiated by autograd."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from op_backends import backends
from torch import Tensor

from areal.ops import BackendUnavailable, linear_logprob_entropy
from areal.ops._linear_chunks import chunk_tokens

BACKENDS = backends("torch", "cpp", "triton", "cuda")
# numpy's, in Triton's interpreter, which the other values of a tl.where do not concern
pytestmark = [pytest.mark.timeout(120), pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")]


def inputs(seed: int, tokens: int, width: int, vocabulary: int, dtype: torch.dtype, device: str, scale: float = 1.0):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, width, generator=g, dtype=torch.float64) * scale
    weight = torch.randn(vocabulary, width, generator=g, dtype=torch.float64) / width**0.5
    targets = torch.randint(0, vocabulary, (tokens,), generator=g)
    return hidden.to(dtype).to(device), weight.to(dtype).to(device), targets.to(device)


def reference(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    log_p = torch.log_softmax(hidden @ weight.t() / temperature, -1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    return log_p.gather(1, targets.unsqueeze(1)).squeeze(1), entropy


def leaves(*tensors: Tensor, dtype: torch.dtype | None = None) -> list[Tensor]:
    return [x.detach().clone().to(dtype or x.dtype).requires_grad_() for x in tensors]


def norm_error(got: Tensor, want: Tensor, least: float = 1e-12) -> float:
    """Relative to ``want`` or, where a saturated softmax leaves rounding alone of its gradient, to ``least``."""
    return float((got.double() - want.double()).norm() / want.double().norm().clamp(min=least))


def compare(backend: str | None, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, budget: int | None, tolerance: float):
    g = torch.Generator().manual_seed(1)
    g_logprobs, g_entropy = (torch.randn(len(hidden), generator=g).to(hidden.device) for _ in range(2))
    h64, w64 = leaves(hidden, weight, dtype=torch.float64)
    want = reference(h64, w64, targets, temperature)
    torch.autograd.backward(want, (g_logprobs.double(), g_entropy.double()))
    h, w = leaves(hidden, weight)
    got = linear_logprob_entropy(h, w, targets, temperature, memory_budget=budget, backend=backend)
    torch.autograd.backward(got, (g_logprobs.to(got[0].dtype), g_entropy.to(got[0].dtype)))
    for x, y in zip(got, want, strict=True):
        assert x.dtype == (torch.float64 if hidden.dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(x.double(), y, rtol=0, atol=10 * tolerance)
    assert h.grad.dtype == hidden.dtype
    assert w.grad.dtype == weight.dtype
    assert norm_error(h.grad, h64.grad, 0.1 / temperature * float(weight.norm()) + 1e-12) < tolerance
    assert norm_error(w.grad, w64.grad, 0.1 / temperature * float(hidden.norm()) + 1e-12) < tolerance


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
@pytest.mark.parametrize(("tokens", "vocabulary"), [(1, 1), (5, 7), (129, 40), (9, 1000), (3, 4099)])
def test_equals_the_formula(on_backend: tuple[str, str], tokens: int, vocabulary: int) -> None:
    backend, device = on_backend
    compare(backend, *inputs(0, tokens, 24, vocabulary, torch.float32, device), 0.7, 1, 5e-6)


@pytest.mark.parametrize(("backend", "device"), backends("torch", "cpp"))
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 10**6),
    tokens=st.integers(0, 400),
    width=st.integers(1, 40),
    vocabulary=st.integers(2, 300),
    temperature=st.sampled_from([0.3, 1.0, 2.5]),
    budget=st.sampled_from([1, 200_000, None]),
    scale=st.sampled_from([0.1, 3.0, 30.0]),
)
def test_any_shape(
    on_backend: tuple[str, str], seed: int, tokens: int, width: int, vocabulary: int, temperature: float, budget: int | None, scale: float
) -> None:
    backend, device = on_backend
    # Errors grow with the logits: float32 keeps 7 digits of them.
    compare(backend, *inputs(seed, tokens, width, vocabulary, torch.float32, device, scale), temperature, budget, 3e-6 * max(10, scale / temperature))  # fmt: skip


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_logits_far_below_the_range_of_exp(on_backend: tuple[str, str]) -> None:
    backend, device = on_backend
    hidden, weight, targets = inputs(2, 20, 16, 300, torch.float32, device, scale=1000.0)
    for x in linear_logprob_entropy(*leaves(hidden, weight), targets, backend=backend):
        assert x.isfinite().all()
    logprobs, entropy = linear_logprob_entropy(hidden, weight, targets, backend=backend)
    want, want_entropy = reference(hidden.double(), weight.double(), targets, 1.0)
    torch.testing.assert_close(logprobs.double(), want, rtol=3e-6, atol=1e-3)
    torch.testing.assert_close(entropy.double(), want_entropy, rtol=0, atol=1e-2)


def test_gradcheck() -> None:
    hidden, weight, targets = inputs(3, 140, 3, 5, torch.float64, "cpu")
    few = hidden[:6].clone().requires_grad_(), weight.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda h, w: linear_logprob_entropy(h, w, targets[:6], 0.8), few)
    compare(None, hidden, weight, targets, 1.3, 1, 1e-12)


@pytest.mark.parametrize(("backend", "device"), backends("torch", "cpp"))
def test_more_tokens_than_16_bits_can_count(on_backend: tuple[str, str]) -> None:
    backend, device = on_backend
    compare(backend, *inputs(4, 70_001, 4, 9, torch.float32, device), 1.0, 1 << 20, 5e-6)


@pytest.mark.parametrize(("backend", "device"), backends("torch", "cpp"))
@pytest.mark.parametrize(("dtype", "digits"), [(torch.bfloat16, 8), (torch.float16, 11)])
def test_error_of_16_bit_logits(on_backend: tuple[str, str], dtype: torch.dtype, digits: int) -> None:
    """Rounding the logits moves a log-prob by no more than the target's rounding and the largest rounding of all."""
    backend, device = on_backend
    if backend == "cpp" and dtype == torch.float16:
        pytest.skip("cpp takes float32 and bfloat16")
    temperature = 0.5
    hidden, weight, targets = inputs(5, 300, 64, 1003, dtype, device, scale=4.0)
    logits = hidden.float() @ weight.float().t()
    want, want_entropy = reference(hidden.double(), weight.double(), targets, temperature)
    logprobs, entropy = linear_logprob_entropy(hidden, weight, targets, temperature, memory_budget=1 << 18, backend=backend)
    at_target = logits.gather(1, targets.unsqueeze(1)).squeeze(1).abs()
    bound = 2.0**-digits * (at_target + logits.abs().amax(-1)) / temperature + 1e-4
    assert ((logprobs - want).abs() <= bound).all()
    assert (logprobs - want).mean().abs() < 0.1 * bound.mean(), "errors must not go in one direction"
    assert (entropy - want_entropy).abs().max() < 0.15
    h64, w64 = leaves(hidden, weight, dtype=torch.float64)
    reference(h64, w64, targets, temperature)[0].sum().backward()
    h, w = leaves(hidden, weight)
    linear_logprob_entropy(h, w, targets, temperature, memory_budget=1 << 18, backend=backend)[0].sum().backward()
    assert norm_error(h.grad, h64.grad) < 8 * 2.0**-digits
    assert norm_error(w.grad, w64.grad) < 8 * 2.0**-digits


@pytest.mark.parametrize(
    ("hidden_grad", "weight_grad", "products"), [(True, True, 4), (True, False, 3), (False, True, 3), (False, False, 1)]
)
def test_products(monkeypatch: pytest.MonkeyPatch, hidden_grad: bool, weight_grad: bool, products: int) -> None:
    calls = count_products(monkeypatch)
    hidden, weight, targets = inputs(6, 50, 8, 30, torch.float32, "cpu")
    logprobs, _ = linear_logprob_entropy(hidden.requires_grad_(hidden_grad), weight.requires_grad_(weight_grad), targets)
    if hidden_grad or weight_grad:
        logprobs.sum().backward()
    assert len(calls) == products
    assert (hidden.grad is not None, weight.grad is not None) == (hidden_grad, weight_grad)


def count_products(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    calls: list[str] = []
    for name in ("mm", "addmm"):
        original = getattr(torch, name)

        def counted(*args, original=original, name=name, **kwargs):
            calls.append(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(torch, name, counted)
    return calls


def test_tied_weight_gets_both_gradients() -> None:
    _, weight, targets = inputs(7, 60, 8, 30, torch.float64, "cpu")
    ids = targets.roll(1)
    ours, theirs = leaves(weight, weight)
    linear_logprob_entropy(torch.tanh(ours[ids]), ours, targets)[0].sum().backward()
    reference(torch.tanh(theirs[ids]), theirs, targets, 1.0)[0].sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_no_second_derivative() -> None:
    hidden, weight, targets = inputs(8, 20, 8, 30, torch.float32, "cpu")
    h, w = leaves(hidden, weight)
    (first,) = torch.autograd.grad(linear_logprob_entropy(h, w, targets)[0].square().sum(), h, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_backward_twice() -> None:
    hidden, weight, targets = inputs(8, 200, 8, 30, torch.float32, "cpu")
    h, w = leaves(hidden, weight)
    loss = linear_logprob_entropy(h, w, targets, memory_budget=1)[1].sum()
    first = torch.autograd.grad(loss, (h, w), retain_graph=True)
    for x, y in zip(first, torch.autograd.grad(loss, (h, w)), strict=True):
        assert torch.equal(x, y)


def test_compiles_without_a_break() -> None:
    hidden, weight, targets = inputs(9, 40, 8, 30, torch.float32, "cpu")

    def loss(h: Tensor, w: Tensor) -> Tensor:
        logprobs, entropy = linear_logprob_entropy(torch.tanh(h), w, targets, 0.9)
        return (logprobs - 0.1 * entropy).sum()

    want, got = leaves(hidden, weight), leaves(hidden, weight)
    loss(*want).backward()
    torch.compile(loss, backend="aot_eager", fullgraph=True)(*got).backward()
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x.grad, y.grad)


def test_registration() -> None:
    hidden, weight, targets = inputs(10, 12, 8, 30, torch.float32, "cpu")
    torch.library.opcheck(torch.ops.areal.linear_logprob_entropy.default, (hidden, weight, targets, 0.9, 1 << 20, "torch"))
    scores = [torch.rand(12), torch.rand(2, 12)]
    arguments = (hidden, weight, targets, scores, [torch.rand(12), torch.rand(12)], 0.9, 1 << 20)
    for needs in (True, True), (True, False), (False, True):
        torch.library.opcheck(torch.ops.areal.linear_logprob_entropy_backward.default, (*arguments, *needs, "torch"))


def test_chunks_fit_the_budget_and_are_even() -> None:
    assert chunk_tokens(16384, 151936, 2, 5 << 28) == 4096
    assert chunk_tokens(1000, 1000, 4, 1 << 30) == 1000
    assert chunk_tokens(1000, 1000, 4, 1) == 128
    assert chunk_tokens(0, 1000, 4, 1) == 1
    for tokens in range(1, 3000, 7):
        size = chunk_tokens(tokens, 1000, 4, 4000 * 700)
        assert size <= 700
        assert -(-tokens // size) <= -(-tokens // 640), "no more chunks than needed"


class Sharded(torch.Tensor):
    def full_tensor(self) -> None:
        raise AssertionError


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"hidden": torch.zeros(3, 4, 1)}, "hidden has the shape"),
        ({"hidden": torch.zeros(4, 3).t()}, "hidden is not contiguous"),
        ({"hidden": torch.zeros(3, 4, dtype=torch.int64)}, "hidden is int64; it must be float32"),
        ({"weight": torch.zeros(5, 3)}, r"weight has the shape \[5, 3\]; it must be \[any, 4\]"),
        ({"weight": torch.zeros(5, 4).double()}, "weight is float64; it must be float32"),
        ({"weight": torch.zeros(4, 5).t()}, "weight is not contiguous"),
        ({"weight": torch.zeros(0, 4)}, "at least one row"),
        ({"weight": torch.zeros(5, 4, device="meta")}, "weight is on meta"),
        ({"weight": torch.zeros(5, 4).as_subclass(Sharded)}, "sharded DTensor"),
        ({"targets": torch.zeros(4, dtype=torch.int64)}, "targets has the shape"),
        ({"targets": torch.zeros(3, dtype=torch.int32)}, "targets is int32"),
        ({"targets": torch.tensor([0, 5, 1])}, r"targets has values from 0 to 5; they must lie in \[0, 5\)"),
        ({"targets": torch.tensor([0, -1, 1])}, "targets has values from -1"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"memory_budget": 0}, "memory_budget is 0"),
        ({"backend": "fast"}, "has the backends"),
    ],
)
def test_wrong_arguments_are_refused(change: dict[str, object], sentence: str) -> None:
    arguments = {"hidden": torch.zeros(3, 4), "weight": torch.zeros(5, 4), "targets": torch.zeros(3, dtype=torch.int64), **change}
    with pytest.raises(ValueError, match=f"linear_logprob_entropy.*{sentence}"):
        linear_logprob_entropy(**arguments)


def test_a_backend_that_cannot_run_is_an_error() -> None:
    with pytest.raises(BackendUnavailable, match="float32 and bfloat16"):
        linear_logprob_entropy(torch.zeros(3, 4).half(), torch.zeros(5, 4).half(), torch.zeros(3, dtype=torch.int64), backend="cpp")
