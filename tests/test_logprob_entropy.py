"""logprob_entropy: every backend against the formula in float64, gradients too; in place; what is refused; the compiled code."""

from __future__ import annotations

import functools
import math
import re

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from op_backends import backends
from torch import Tensor
from triton_ptx import compile_to_ptx

from areal.ops import BackendUnavailable, logprob_entropy
from areal.ops._dispatch import build_info, compiled_module, missing_cpp
from areal.ops.logprob_entropy import _backward_inplace_op, _backward_op, _forward_op

needs_cpp = pytest.mark.skipif(missing_cpp() is not None, reason=str(missing_cpp()))
# numpy's, in Triton's interpreter, which the other values of a tl.where or tl.maximum do not concern
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
ALL = backends("torch", "cpp", "triton", "cuda")
COMPILED = backends("cpp", "triton", "cuda")
TOLERANCE = {torch.float32: 4e-7, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}  # half a unit in the last place, and a bit


def by_formula(logits: Tensor, targets: Tensor, temperature: float, g_logprob: Tensor, g_entropy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs, entropies and gradient in float64; rows of finite numbers and -inf, not -inf alone."""
    x = logits.double().cpu() / temperature
    x = x - x.amax(-1, keepdim=True)
    e = x.exp()
    log_p = x - e.sum(-1, keepdim=True).log()
    p = e / e.sum(-1, keepdim=True)
    information = torch.where(p > 0, log_p, 0.0)
    entropy = -(p * information).sum(-1)
    rows = torch.arange(len(x))
    g_logprob, g_entropy = (g.double().cpu().unsqueeze(1) for g in (g_logprob, g_entropy))
    gradient = -p * (g_logprob + g_entropy * (information + entropy.unsqueeze(1)))
    gradient[rows, targets.cpu()] += g_logprob.squeeze(1)
    return log_p[rows, targets.cpu()], entropy, gradient / temperature


def run(logits: Tensor, targets: Tensor, temperature: float, gradients: tuple[Tensor, Tensor], backend: str, inplace: bool = False):
    leaf = logits.detach().requires_grad_()
    z = leaf.clone() if inplace else leaf
    logprobs, entropy = logprob_entropy(z, targets, temperature, backend=backend, inplace_backward=inplace)
    assert logprobs.dtype == entropy.dtype == torch.float32 and logprobs.shape == entropy.shape == targets.shape
    (gradient,) = torch.autograd.grad((logprobs, entropy), leaf, gradients)
    assert gradient.dtype == logits.dtype
    return logprobs, entropy, gradient


def check(logits: Tensor, targets: Tensor, temperature: float, backend: str, inplace: bool = False) -> None:
    g = torch.Generator().manual_seed(len(targets))
    gradients = tuple(torch.randn(len(targets), generator=g).to(logits.device) for _ in range(2))
    logprobs, entropy, gradient = (x.detach().cpu() for x in run(logits, targets, temperature, gradients, backend, inplace))
    want_logprobs, want_entropy, want_gradient = by_formula(logits, targets, temperature, *gradients)
    finite = want_logprobs.isfinite()
    assert torch.equal(logprobs.isfinite(), finite)
    torch.testing.assert_close(logprobs[finite].double(), want_logprobs[finite], rtol=3e-6, atol=3e-6)
    torch.testing.assert_close(entropy.double(), want_entropy, rtol=3e-6, atol=6e-6)
    scale = (gradients[0].abs() + gradients[1].abs() * (1 + math.log(logits.shape[1]))).double().cpu().unsqueeze(1) / temperature
    error = (gradient.double() - want_gradient).abs() - TOLERANCE[logits.dtype] * want_gradient.abs()
    # Values that float16 cannot hold as normal numbers lose more than half a unit.
    floor = 6e-8 if logits.dtype == torch.float16 else 0.0
    assert (error <= 4e-6 * scale + floor).all(), error.max()


def example(rows: int, n: int, seed: int = 0, scale: float = 3.0, dtype: torch.dtype = torch.float32, device: str = "cpu", offset: int = 0):
    """Logits that start ``offset`` elements into an allocation."""
    g = torch.Generator().manual_seed(seed)
    memory = (torch.randn(rows * n + offset, generator=g) * scale).to(device, dtype)
    return memory[offset:].view(rows, n), torch.randint(0, n, (rows,), generator=g).to(device)


@pytest.mark.parametrize(("backend", "device"), ALL)
@pytest.mark.parametrize(("rows", "n"), [(1, 1), (3, 2), (9, 7), (17, 257), (5, 2048), (3, 2049), (2, 6007), (1, 33000)])
def test_equals_the_formula(on_backend: tuple[str, str], rows: int, n: int) -> None:
    backend, device = on_backend
    check(*example(rows, n, seed=n, device=device), 0.7, backend)


@pytest.mark.parametrize(("backend", "device"), ALL)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 10**6),
    rows=st.integers(0, 12),
    n=st.one_of(st.integers(1, 40), st.integers(200, 300), st.integers(2000, 2500)),
    temperature=st.floats(0.05, 20.0),
    scale=st.sampled_from([0.0, 1.0, 30.0]),
    masked=st.floats(0.0, 0.9),
    offset=st.integers(0, 7),
    inplace=st.booleans(),
)
def test_any_shape(on_backend, seed: int, rows: int, n: int, temperature: float, scale: float, masked: float, offset: int, inplace: bool):
    backend, device = on_backend
    logits, targets = example(rows, n, seed, scale, device=device, offset=offset)
    away = torch.rand(rows, n, generator=torch.Generator().manual_seed(seed)) < masked
    away[:, seed % n] = False
    logits.masked_fill_(away.to(device), -math.inf)
    check(logits, targets, temperature, backend, inplace)


@pytest.mark.parametrize(("backend", "device"), ALL)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "n", "offset"), [(9, 7, 0), (4, 1000, 3), (2, 4099, 1), (2, 4096, 0)])
def test_half_precision(on_backend: tuple[str, str], dtype: torch.dtype, rows: int, n: int, offset: int) -> None:
    backend, device = on_backend
    if backend == "triton" and device == "cpu":
        pytest.skip("Triton's interpreter truncates where a GPU rounds")
    if backend == "cpp" and dtype == torch.float16:
        pytest.skip("not in C++")
    for inplace in (False, True):
        check(*example(rows, n, n, 4.0, dtype, device, offset), 1.3, backend, inplace)


@pytest.mark.parametrize(("backend", "device"), ALL)
@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_extreme_logits(on_backend: tuple[str, str], temperature: float) -> None:
    backend, device = on_backend
    lowest = torch.finfo(torch.float32).min
    n = 9000  # several blocks of every backend
    z = torch.randn(7, n)
    targets = torch.full((7,), 5000)
    z[0] -= 1e4  # all far below -88
    z[1] = -500.0  # all equal
    z[2, :8999] = -math.inf  # one element is left, in the last block, and the target is not it
    z[3, 1:] = -math.inf  # the same in the first block, and it is the target
    targets[3] = 0
    z[4, :] = lowest  # masked the other way; differences overflow when they are divided by the temperature
    z[4, 4000:6000] = torch.randn(2000)
    z[5, 5000] = 2000.0  # p = 1 to the last bit
    z[6] = torch.linspace(-3e4, 3e4, n)
    check(z.to(device), targets.to(device), temperature, backend)


@pytest.mark.parametrize(("backend", "device"), ALL)
def test_gradient_at_minus_infinity(on_backend: tuple[str, str]) -> None:
    backend, device = on_backend
    z = torch.tensor([[0.0, -math.inf, 1.0], [-math.inf, 2.0, -math.inf]], device=device)
    ones = torch.ones(2, device=device)
    logprobs, entropy, gradient = run(z, torch.tensor([1, 1], device=device), 0.5, (ones, ones), backend)
    assert logprobs.tolist() == [-math.inf, 0.0] and entropy[1] == 0.0
    assert gradient[0, 1] == 2.0 and not gradient[1].any()  # the target's one, over the temperature


@pytest.mark.parametrize(("backend", "device"), ALL)
@pytest.mark.parametrize("where", [0, 3, 2500, 5002])
def test_nan_and_infinity_show(on_backend: tuple[str, str], where: int) -> None:
    backend, device = on_backend
    z, targets = example(4, 5003)
    z[0, where], z[1, where], z[2] = math.nan, math.inf, -math.inf
    logprobs, entropy, gradient = run(z.to(device), targets.to(device), 1.0, (torch.ones(4, device=device),) * 2, backend)
    assert logprobs[:3].isnan().all() and entropy[:3].isnan().all() and gradient[0].isnan().any()
    assert logprobs[3].isfinite() and entropy[3].isfinite() and gradient[3].isfinite().all()


@pytest.mark.parametrize(("backend", "device"), [*backends("torch", "cpp"), *(p for p in backends("triton", "cuda") if "gpu" in p.id)])
def test_many_tokens(on_backend: tuple[str, str]) -> None:
    backend, device = on_backend
    check(*example(65_545, 5, device=device), 1.0, backend)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_more_than_two_to_the_31_logits(backend: str) -> None:
    n, rows = 151_936, 2**31 // 151_936 + 3
    logits = torch.zeros(rows, n, dtype=torch.bfloat16, device="cuda")
    logits[-1] = torch.randn(n, device="cuda")
    targets = torch.full((rows,), n - 1, device="cuda")
    ones = torch.ones(rows, device="cuda")
    logprobs, entropy, gradient = run(logits, targets, 1.0, (ones, ones), backend)
    want = by_formula(logits[-2:], targets[-2:], 1.0, ones[-2:], ones[-2:])
    torch.testing.assert_close(logprobs[-2:].double().cpu(), want[0])
    torch.testing.assert_close(entropy[-2:].double().cpu(), want[1])
    torch.testing.assert_close(gradient[-2:].double().cpu(), want[2], rtol=2.0**-8, atol=1e-6)


@pytest.mark.parametrize(("backend", "device"), backends("cuda"))
def test_both_ways_to_spread_a_row(on_backend: tuple[str, str]) -> None:
    # Above this width, a few rows get larger blocks forward and several of them backward.
    backend, device = on_backend
    check(*example(2, 17_001, device=device, offset=1), 1.0, backend, inplace=True)
    check(*example(40, 17_001, device=device), 1.0, backend)


def test_reference_gradient_is_that_of_the_function() -> None:
    logits, targets = example(4, 6)
    for temperature in (1.0, 0.4):
        function = functools.partial(logprob_entropy, targets=targets, temperature=temperature)
        assert torch.autograd.gradcheck(function, logits.double().requires_grad_())
    assert function(logits.double())[0].dtype == torch.float64


@needs_cpp
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_instruction_set_and_thread_count(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    module, results = compiled_module(), {}
    logits, targets = example(97, 6001, dtype=dtype)
    gradients = torch.randn(97), torch.randn(97)
    forward, backward = module.logprob_entropy, module.logprob_entropy_gradient
    for name in build_info()["instruction_sets"]:
        for threads in (1, 3):
            monkeypatch.setattr(module, "logprob_entropy", lambda *a, i=name, t=threads: forward(*a[:-1], t, i))
            monkeypatch.setattr(module, "logprob_entropy_gradient", lambda *a, i=name, t=threads: backward(*a[:-1], t, i))
            check(logits, targets, 0.8, "cpp")
            results[threads] = run(logits, targets, 0.8, gradients, "cpp")
        assert all(torch.equal(a, b) for a, b in zip(results[1], results[3], strict=True))


@needs_cpp
def test_gradients_of_one_result_alone() -> None:
    logits, targets = example(6, 50)
    for chosen in (0, 1):
        got = [
            torch.autograd.grad(logprob_entropy(z, targets, 0.7, backend=backend)[chosen].sum(), z)[0]
            for backend in ("torch", "cpp")
            if (z := logits.clone().requires_grad_()) is not None
        ]
        torch.testing.assert_close(*got, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("backend", "device"), COMPILED)
def test_in_place(on_backend: tuple[str, str]) -> None:
    backend, device = on_backend
    hidden, weight = torch.randn(6, 8, device=device), torch.randn(8, 300, device=device, requires_grad=True)
    targets = torch.randint(0, 300, (6,), device=device)

    def loss(inplace: bool) -> tuple[Tensor, Tensor]:
        logits = hidden @ weight
        logprobs, entropy = logprob_entropy(logits, targets, 0.7, backend=backend, inplace_backward=inplace)
        return logits, (logprobs - 0.1 * entropy).sum()

    (expected,) = torch.autograd.grad(loss(False)[1], weight)
    logits, scalar = loss(True)
    before, address = logits.detach().clone(), logits.data_ptr()
    gradients = []
    logits.register_hook(lambda gradient: gradients.append(gradient.data_ptr()))
    (got,) = torch.autograd.grad(scalar, weight, retain_graph=True)
    assert torch.equal(got, expected)
    assert gradients == [address] and not torch.equal(logits, before)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        scalar.backward()
    # Another operation that saved the logits, and whose backward pass comes later.
    logits = hidden @ weight
    square = (logits * logits).sum()
    logprobs, _ = logprob_entropy(logits, targets, backend=backend, inplace_backward=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (square + logprobs.sum()).backward()
    with pytest.raises(ValueError, match="logits, which is a leaf"):
        logprob_entropy(weight, torch.zeros(8, dtype=torch.int64, device=device), backend=backend, inplace_backward=True)
    with pytest.raises(ValueError, match="a view of one"):
        view = weight.view(16, 150)
        logprob_entropy(view, torch.zeros(16, dtype=torch.int64, device=device), backend=backend, inplace_backward=True)


@pytest.mark.parametrize(("backend", "device"), COMPILED)
def test_logits_that_changed_before_backward_are_noticed(on_backend: tuple[str, str]) -> None:
    backend, device = on_backend
    logits, targets = example(3, 9, device=device)
    logits = logits.requires_grad_() * 1.0
    logprobs, _ = logprob_entropy(logits, targets, backend=backend)
    with torch.no_grad():
        logits += 1.0
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logprobs.sum().backward()


@needs_cpp
def test_targets_out_of_range_are_refused_on_the_cpu() -> None:
    with pytest.raises(ValueError, match=r"logprob_entropy: targets\[1\] is 5; it must lie in \[0, 5\)"):
        logprob_entropy(torch.zeros(2, 5), torch.tensor([4, 5]), backend="cpp")


@pytest.mark.parametrize(("backend", "device"), backends("triton", "cuda"))
def test_targets_out_of_range_give_nan_on_a_gpu(on_backend: tuple[str, str]) -> None:
    backend, device = on_backend
    logprobs, entropy = logprob_entropy(torch.zeros(3, 5, device=device), torch.tensor([-1, 5, 2], device=device), backend=backend)
    assert logprobs.isnan().tolist() == [True, True, False] and entropy.isfinite().all()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"logits": torch.zeros(5, 4).t()}, "logits is not contiguous"),
        ({"logits": torch.zeros(4, 5, dtype=torch.int32)}, "logits is int32; it must be float32 or bfloat16 or float16"),
        ({"logits": torch.zeros(4)}, r"logits has the shape \[4\]"),
        ({"logits": torch.zeros(4, 0)}, "at least one column"),
        ({"targets": torch.zeros(3, dtype=torch.int64)}, r"targets has the shape \[3\]; it must be \[4\]"),
        ({"targets": torch.zeros(4, dtype=torch.int32)}, "targets is int32; it must be int64"),
        ({"targets": torch.zeros(4, dtype=torch.int64, device="meta")}, "targets is on meta"),
        ({"targets": [0, 0, 0, 0]}, "targets is a list"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"temperature": math.inf}, "temperature is inf"),
        ({"backend": "numpy"}, "has the backends"),
    ],
)
def test_wrong_arguments_are_refused(change: dict[str, object], sentence: str) -> None:
    arguments = {"logits": torch.zeros(4, 5), "targets": torch.zeros(4, dtype=torch.int64), **change}
    with pytest.raises(ValueError, match=sentence):
        logprob_entropy(**arguments)


def test_forced_backends_that_do_not_take_the_dtype() -> None:
    targets = torch.zeros(2, dtype=torch.int64)
    for dtype in (torch.float16, torch.float64):
        with pytest.raises(BackendUnavailable):
            logprob_entropy(torch.zeros(2, 3, dtype=dtype), targets, backend="cpp")
        assert logprob_entropy(torch.zeros(2, 3, dtype=dtype), targets)[1].isfinite().all()


@pytest.mark.parametrize(("backend", "device"), [*backends("torch"), *COMPILED])
def test_no_graph_break(on_backend: tuple[str, str]) -> None:
    backend, device = on_backend
    logits, targets = example(4, 30, device=device)

    def loss(z: Tensor, inplace: bool) -> Tensor:
        logprobs, entropy = logprob_entropy(z * 2.0, targets, 0.7, backend=backend, inplace_backward=inplace)
        return (logprobs - 0.1 * entropy).sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    leaf = logits.requires_grad_()
    for inplace in (False, True):
        expected, got = (torch.autograd.grad(f(leaf, inplace), leaf)[0] for f in (loss, compiled))
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(("backend", "device"), COMPILED)
def test_registration(on_backend: tuple[str, str]) -> None:
    backend, device = on_backend
    logits, targets = example(3, 11, device=device)
    torch.library.opcheck(_forward_op, (logits, targets, 0.7, backend))
    _, entropy, statistics = _forward_op(logits, targets, 0.7, backend)
    gradients = torch.randn(3, device=device), torch.randn(3, device=device)
    for op in (_backward_op, _backward_inplace_op):
        torch.library.opcheck(op, (logits.clone(), targets, entropy, statistics, *gradients, 0.7, backend))


@pytest.mark.parametrize("element", ["*bf16", "*fp32"])
@pytest.mark.parametrize("kernel", ["logprob_entropy_kernel", "gradient_kernel"])
def test_triton_compiles_to_wide_loads_and_stores(element: str, kernel: str) -> None:
    pytest.importorskip("triton")
    forward = ["logprobs", "entropies", "maxima", "log_sums"]
    floats = forward if kernel == "logprob_entropy_kernel" else [*forward[1:], "grad_logprobs", "grad_entropies"]
    signature = {"logits": element, "targets": "*i64", **dict.fromkeys(floats, "*fp32"), "n": "i32", "inverse_temperature": "fp32"}
    if kernel == "gradient_kernel":
        signature["out"] = element
    ptx = compile_to_ptx("logprob_entropy_triton", kernel, signature, {"BLOCK": 8192}, multiples_of_16=("n",), num_warps=16)
    bytes_a_thread = 8192 * (2 if element == "*bf16" else 4) // (16 * 32)
    assert ptx.count("ld.global.v4.b32") >= 2 * bytes_a_thread // 16  # the main loop, and the masked end
    if kernel == "gradient_kernel":
        assert ptx.count("st.global.v4.b32") >= 2 * bytes_a_thread // 16
    assert not re.search(r"(ld|st)\.global\.b16.*\n.*(ld|st)\.global\.b16", ptx)
