"""ppo_loss as a function that is called: its errors, its entry in torch.library, threads and instruction sets, its Triton kernels' code."""

from __future__ import annotations

import contextlib
import copy
import sys

import pytest
import torch
from op_backends import backends
from ppo_cases import make_cuts, make_inputs
from triton_ptx import compile_to_ptx

from areal.ops import BackendUnavailable, ppo_loss
from areal.ops._dispatch import build_info, compiled_module, missing_cpp
from areal.ops.ppo_loss import STATISTICS

torch.set_num_threads(1)
needs_cpp = pytest.mark.skipif(missing_cpp() is not None, reason="areal._C is not built")
NAMES = ["logprobs", "proximal_logprobs", "behavior_logprobs", "advantages", "loss_mask"]


def floats(n=50, seed=0):
    return {k: v.float() if v.is_floating_point() else v for k, v in make_inputs(seed, n).items()}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("backend", ["torch", None])
def test_wrong_tensors(name, backend):
    x = floats()
    good = x[name]
    wrong = {
        "shape": [good[:-1], good.unsqueeze(0), torch.stack([good, good])],
        "int32|float16|float64": [good.to(torch.int32), good.half(), good.double()],
        "contiguous": [torch.stack([good, good], 1)[:, 0]],
        "meta": [good.to("meta")],
        "must be a tensor": [good.tolist(), None],
    }
    for message, values in wrong.items():
        for value in values:
            with pytest.raises(ValueError, match=message) as error:
                ppo_loss(**{**x, name: value}, eps_clip=0.2, denominator=1.0, backend=backend)
            # A first tensor that is longer or elsewhere makes it the others that do not fit.
            assert "ppo_loss: " in str(error.value)
            assert name in str(error.value) or name == "logprobs"


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("eps_clip", {"eps_clip": -0.1}),
        ("eps_clip", {"eps_clip": float("nan")}),
        ("eps_clip_higher", {"eps_clip_higher": -1.0}),
        ("c_clip", {"c_clip": 0.5}),
        ("behav_imp_weight_cap", {"behav_imp_weight_cap": -1.0}),
        ("behav_imp_weight_mode", {"behav_imp_weight_mode": "clip"}),
        ("behav_imp_weight_level", {"behav_imp_weight_level": "batch"}),
        ("behav_filter_cap", {"behav_filter_cap": 0.9}),
        ("behav_filter_level", {"behav_filter_level": "batch"}),
        ("behav_filter_side", {"behav_filter_side": "left"}),
        ("ratio_level", {"ratio_level": "batch"}),
        ("objective", {"objective": "reinforce"}),
        ("normalization", {"normalization": "mean"}),
        ("fixed_length", {"normalization": "fixed"}),
        ("fixed_length", {"normalization": "fixed", "fixed_length": 0.0}),
        ("fixed_length", {"fixed_length": 10.0}),
        ("denominator", {"denominator": 0.0}),
        ("denominator", {"denominator": torch.ones(1)}),
        ("denominator", {"denominator": torch.ones((), device="meta")}),
        ("cu_seqlens", {"normalization": "sequence"}),
        ("cu_seqlens", {"ratio_level": "sequence", "cu_seqlens": torch.tensor([0, 50])}),
        ("cu_seqlens", {"ratio_level": "sequence", "cu_seqlens": torch.tensor([], dtype=torch.int32)}),
        ("cu_seqlens", {"ratio_level": "sequence", "cu_seqlens": torch.tensor([0, 30, 20, 50], dtype=torch.int32)}),
        ("cu_seqlens", {"ratio_level": "sequence", "cu_seqlens": torch.tensor([0, 49], dtype=torch.int32)}),
        ("cu_seqlens", {"ratio_level": "sequence", "cu_seqlens": torch.tensor([-1, 50], dtype=torch.int32)}),
        ("entropy", {"entropy": torch.zeros(49)}),
        ("entropy", {"entropy": torch.zeros(50, dtype=torch.float64)}),
    ],
)
def test_wrong_options(name, options):
    with pytest.raises(ValueError, match=rf"ppo_loss: {name} "):
        ppo_loss(**floats(), **{"eps_clip": 0.2, "denominator": 1.0, **options})


def test_a_forced_backend_that_cannot_run():
    x = make_inputs(0, 10)
    with pytest.raises(BackendUnavailable, match="float32"):
        ppo_loss(**x, eps_clip=0.2, denominator=1.0, backend="cpp")
    with pytest.raises(ValueError, match="backend='numpy'"):
        ppo_loss(**x, eps_clip=0.2, denominator=1.0, backend="numpy")


def test_statistics_are_a_mapping():
    x = floats()
    loss, stats = ppo_loss(**x, eps_clip=0.2, denominator=5.0)
    assert list(stats) == list(STATISTICS[:-1])
    assert len(stats) == 12
    assert "entropy" not in stats
    assert stats["loss"] == loss
    assert {k: v.shape for k, v in dict(stats).items()} == dict.fromkeys(STATISTICS[:-1], torch.Size([]))
    assert all(v.dtype == torch.float32 and not v.requires_grad for v in stats.values())
    assert copy.deepcopy(stats)["ratio"] == stats["ratio"]
    with pytest.raises(KeyError):
        stats["entropy"]
    assert ppo_loss(**x, eps_clip=0.2, denominator=5.0, entropy=torch.ones(50))[1]["entropy"] == x["loss_mask"].sum()


@pytest.mark.parametrize(("backend", "device"), backends("torch", "cpp", "triton", "cuda"))
def test_loss_is_an_ordinary_tensor(backend, device, on_backend):
    """It may be changed in place, kept, and taken apart; only the log-probs and the entropy get gradients."""
    x = {k: v.to(device) for k, v in floats().items()}
    x = {k: v.clone().requires_grad_(v.is_floating_point()) for k, v in x.items()}
    entropy = torch.rand(50, device=device, requires_grad=True)
    options = {"eps_clip": 0.2, "denominator": 5.0, "entropy_coef": 0.1, "backend": backend}
    loss, _ = ppo_loss(**x, entropy=entropy, **options)
    loss /= 2
    loss += ppo_loss(**x, **options)[0] / 2
    loss.backward()
    assert [x[name].grad is None for name in NAMES] == [False, True, True, True, True]
    assert entropy.grad is not None
    with torch.no_grad():
        assert not ppo_loss(**x, **options)[0].requires_grad
    frozen = {k: v.detach() for k, v in x.items()}
    assert not ppo_loss(**frozen, **options)[0].requires_grad
    only = torch.rand(50, device=device, requires_grad=True)
    ppo_loss(**frozen, entropy=only, **options)[0].backward()
    torch.testing.assert_close(only.grad, -0.1 / 5.0 * x["loss_mask"].float())
    assert not ppo_loss(**frozen, entropy=only, **{**options, "entropy_coef": 0.0})[0].requires_grad or backend == "torch"


@needs_cpp
def test_no_second_derivative():
    x = floats()
    logprobs = x["logprobs"].requires_grad_()
    (gradient,) = torch.autograd.grad(ppo_loss(**x, eps_clip=0.2, denominator=5.0)[0], logprobs, create_graph=True)
    with pytest.raises(RuntimeError, match="does not require grad|once_differentiable"):
        gradient.sum().backward()


# torch.compile looks at what is built, not at the tests' module: CUDA kernels only on a GPU.
@pytest.mark.parametrize(("backend", "device"), backends("torch", "cpp", "triton") + backends("cuda")[1:])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_compiles_without_graph_break(level, backend, device, on_backend):
    x = {k: v.to(device) for k, v in floats().items()}
    options = {"eps_clip": 0.2, "denominator": 5.0, "ratio_level": level, "entropy_coef": 0.1, "backend": backend}
    options["cu_seqlens"] = torch.tensor([0, 20, 50], dtype=torch.int32, device=device)

    def step(logprobs, entropy, others):
        loss, stats = ppo_loss(logprobs * 1.0, *others, entropy=entropy, **options)
        return loss * 2.0, stats["ratio"] + stats["clipped"]

    results = []
    for function in step, torch.compile(step, fullgraph=True, backend="aot_eager"):
        logprobs, entropy = x["logprobs"].clone().requires_grad_(), torch.linspace(0, 1, 50, device=device).requires_grad_()
        loss, stat = function(logprobs, entropy, tuple(x.values())[1:])
        loss.backward()
        results.append((loss.detach(), stat, logprobs.grad, entropy.grad))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager)


@pytest.mark.parametrize(("backend", "device"), backends("cpp", "triton", "cuda"))
@pytest.mark.parametrize("flags", [2, 2 | 128, 2 | 128 | 256, 2 | 8 | 128])
def test_opcheck(flags, backend, device, on_backend):
    x = {k: v.to(device) for k, v in floats().items()}
    cuts = torch.tensor([0, 20, 50], dtype=torch.int32, device=device) if flags & 8 else None
    numbers = [0.8, 1.2, float("inf"), 2.0, 0.0, float("inf"), 0.1]
    arguments = (*x.values(), cuts, torch.rand(50, device=device), None, numbers, 0.25, flags, backend)
    torch.library.opcheck(torch.ops.areal.ppo_loss.default, arguments)


@needs_cpp
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_threads_do_not_change_a_bit(level):
    x = floats(100_000)
    options = {"eps_clip": 0.2, "denominator": 5.0, "ratio_level": level, "cu_seqlens": make_cuts(1, 100_000, 60), "backend": "cpp"}
    results = []
    for threads in 1, 2, 5:
        torch.set_num_threads(threads)
        logprobs = x["logprobs"].clone().requires_grad_()
        try:
            loss, stats = ppo_loss(logprobs, *list(x.values())[1:], **options)
        finally:
            torch.set_num_threads(1)
        loss.backward()
        results.append((loss.detach(), torch.stack(list(stats.values())), logprobs.grad))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@needs_cpp
@pytest.mark.parametrize("instruction_set", (build_info() or {"instruction_sets": []})["instruction_sets"])
@pytest.mark.parametrize("flags", [2, 1 | 2, 2 | 8 | 16 | 32 | 64])
def test_instruction_sets(instruction_set, flags):
    x, cuts = floats(1003), make_cuts(3, 1003, 7)
    entropy = torch.rand(1003)
    results = []
    for name in "baseline", instruction_set:
        loss, sums, gradient = torch.empty(()), torch.empty(len(STATISTICS)), torch.empty(1003)
        tensors = (*x.values(), cuts if flags & 8 else None, entropy, None, gradient, None, loss, sums)
        addresses = [0 if t is None else t.data_ptr() for t in tensors]
        numbers = (0.8, 1.2, 3.0, 1.2, 0.5, 2.0, 0.1)
        compiled_module().ppo_loss(addresses, 1003, len(cuts) - 1, numbers, 0.1, flags, 1, name)
        results.append((loss, sums, gradient))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("flags", [2, 1, 2 | 4])
def test_triton_kernel_for_a_gpu(flags):
    pytest.importorskip("triton")
    tensors = dict.fromkeys(["current", "proximal", "behavior", "advantages", "gradient", "partial"], "*fp32") | {"mask": "*u8"}
    numbers = ["scale", "lower", "upper", "c_clip", "weight_cap", "filter_lower", "filter_upper", "entropy_coef"]
    signature = {f"{name}_ptr": kind for name, kind in tensors.items()} | {"n_tokens": "i32"} | dict.fromkeys(numbers, "fp32")
    constants = {"FLAGS": flags, "BLOCK": 1024, "ROW": 16} | dict.fromkeys(["entropy_ptr", "denominator_ptr", "entropy_gradient_ptr"])
    ptx = compile_to_ptx("ppo_loss_triton", "ppo_tokens_kernel", signature, constants)
    assert ptx.count("ld.global.v4.b32") == 8  # four tensors, eight tokens a thread
    assert ptx.count("st.global.v4.b32") == 2
    if flags == 2:
        of_all = dict.fromkeys(["entropy_ptr", "denominator_ptr", "entropy_gradient_ptr"], "*fp32") | {"cu_seqlens_ptr": "*i32"}
        constants = {"FLAGS": 2 | 8 | 16 | 32 | 64, "BLOCK": 1024, "ROW": 16}
        compile_to_ptx("ppo_loss_triton", "ppo_sequences_kernel", signature | of_all, constants)


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_kernels_are_launched_on_the_device_of_the_tensors(backend, monkeypatch, cuda_on_host):
    """A launch goes to the current device, which need not be that of the tensors."""
    entered = []
    monkeypatch.setattr(
        sys.modules[ppo_loss.__module__], "on_device", lambda tensor: entered.append(tensor.device) or contextlib.nullcontext()
    )
    x = torch.randn(5)
    ppo_loss(x, x, x, x, torch.ones(5, dtype=torch.bool), eps_clip=0.2, denominator=5.0, backend=backend)
    assert entered == [x.device]
