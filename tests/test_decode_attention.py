"""decode_attention against a float64 softmax written out, row by row."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from op_backends import backends
from torch import Tensor
from triton_ptx import compile_to_ptx

from areal.ops import decode_attention
from areal.ops._dispatch import BackendUnavailable, build_info, compiled_module, missing_cpp
from areal.ops.decode_attention import runs_compiled

needs_cpp = pytest.mark.skipif(missing_cpp() is not None, reason="areal._C is not built")
ALL = pytest.mark.parametrize(("backend", "device"), backends("torch", "cpp", "triton"))
FUZZ = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def case(
    seed: int, rows: int, kv_heads: int, group: int, d: int, capacity: int, *, shared: int = 0, scale: float = 1.0, least: int = 0
) -> dict[str, Any]:
    """Ragged rows whose last position is not yet in the caches; NaN wherever nothing was written. ``shared`` slots hold whole prompts."""
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(rows, kv_heads * group, d, generator=g) * scale
    new_k, new_v = (torch.randn(rows, kv_heads, d, generator=g) for _ in range(2))
    n_slots = shared or rows + 2
    k_cache, v_cache = (torch.full((n_slots, kv_heads, capacity, d), torch.nan) for _ in range(2))
    if shared:
        slots, lengths = torch.arange(rows) % shared, torch.arange(rows) // shared + 1
    else:
        slots = torch.randperm(n_slots, generator=g)[:rows]
        lengths = torch.randint(least, capacity + 1, (rows,), generator=g)
        for slot, length in zip(slots.tolist(), lengths.tolist(), strict=True):
            for cache in k_cache, v_cache:
                cache[slot, :, : max(0, length - 1)] = torch.randn(kv_heads, max(0, length - 1), d, generator=g)
    return {"q": q, "k_cache": k_cache, "v_cache": v_cache, "slots": slots, "lengths": lengths, "new_k": new_k, "new_v": new_v}


def moved(inputs: dict[str, Any], device: str, dtype: torch.dtype | None = None) -> dict[str, Any]:
    def move(x: Any) -> Any:
        return x.to(device, dtype if x.is_floating_point() else None, copy=True) if isinstance(x, Tensor) else x

    return {name: move(value) for name, value in inputs.items()}


def expected(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor | None, lengths: Tensor, *, scaling: float | None = None,
    window: int | None = None, softcap: float | None = None, new_k: Tensor | None = None, new_v: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """float64 [rows, heads, d]."""
    k_cache, v_cache = k_cache.double(), v_cache.double()
    where = list(range(len(q))) if slots is None else slots.tolist()
    if new_k is not None and new_v is not None:
        for row, slot in enumerate(where):
            if lengths[row]:
                k_cache[slot, :, lengths[row] - 1], v_cache[slot, :, lengths[row] - 1] = new_k[row].double(), new_v[row].double()
    out = torch.zeros(q.shape, dtype=torch.float64)
    group = q.shape[1] // k_cache.shape[1]
    for row, slot in enumerate(where):
        end = int(lengths[row])
        seen = slice(0 if window is None else max(0, end - window), end)
        for head in range(q.shape[1]) if end else ():
            scores = k_cache[slot, head // group, seen] @ q[row, head].double() * (q.shape[2] ** -0.5 if scaling is None else scaling)
            scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
            out[row, head] = torch.softmax(scores, 0) @ v_cache[slot, head // group, seen]
    return out


def error(got: Tensor, inputs: dict[str, Any], **options: Any) -> float:
    wanted = expected(**inputs, **options)
    assert got.shape == wanted.shape and got.dtype == inputs["q"].dtype and got.is_contiguous()
    return float((got.cpu() - wanted).abs().max()) if got.numel() else 0.0


@ALL
@FUZZ
@given(
    seed=st.integers(0, 10**6),
    rows=st.integers(0, 6),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 7),
    d=st.sampled_from([1, 7, 8, 16, 17, 24, 32, 40, 64, 80, 128]),
    capacity=st.integers(1, 140),
    window=st.sampled_from([None, 1, 8, 70, 1000]),
    softcap=st.sampled_from([None, 0.5, 30.0]),
    scaling=st.sampled_from([None, 0.3]),
    stores=st.booleans(),
)
def test_equals_the_formula(
    on_backend: tuple[str, str], seed: int, rows: int, kv_heads: int, group: int, d: int, capacity: int, stores: bool, **options: Any
) -> None:
    backend, device = on_backend
    inputs = case(seed, rows, kv_heads, group, d, capacity)
    if not stores:
        inputs["lengths"] = (inputs["lengths"] - 1).clamp(min=0)
        inputs["new_k"] = inputs["new_v"] = None
    on_device = moved(inputs, device)
    got = decode_attention(**on_device, **options, backend=backend)
    assert error(got, inputs, **options) < 4e-6
    for cache, new in ("k_cache", "new_k"), ("v_cache", "new_v"):
        if stores:
            for row, (slot, length) in enumerate(zip(inputs["slots"].tolist(), inputs["lengths"].tolist(), strict=True)):
                if length:
                    inputs[cache][slot, :, length - 1] = inputs[new][row]
        torch.testing.assert_close(on_device[cache].cpu(), inputs[cache], rtol=0, atol=0, equal_nan=True)


@ALL
@pytest.mark.parametrize("options", [{}, {"window": 300}, {"window": 700, "softcap": 20.0}])
def test_long_rows(on_backend: tuple[str, str], options: dict[str, Any]) -> None:
    """Several splits of a row on a GPU, also windows that begin inside of one."""
    backend, device = on_backend
    inputs = case(1, 5, 1, 3, 16, 1100)
    inputs["lengths"] = torch.tensor([1100, 0, 257, 256, 900])
    inputs["k_cache"], inputs["v_cache"] = (torch.randn(inputs["k_cache"].shape) for _ in range(2))
    assert error(decode_attention(**moved(inputs, device), **options, backend=backend), inputs, **options) < 4e-6


@ALL
def test_rows_of_one_slot_see_those_before_them(on_backend: tuple[str, str]) -> None:
    backend, device = on_backend
    inputs = case(3, 40, 2, 2, 24, 16, shared=4)
    assert error(decode_attention(**moved(inputs, device), window=5, backend=backend), inputs, window=5) < 4e-6


@ALL
def test_row_r_is_in_slot_r_by_default(on_backend: tuple[str, str]) -> None:
    backend, device = on_backend
    inputs = case(4, 5, 2, 2, 16, 30)
    inputs["slots"] = torch.arange(5)
    inputs["k_cache"].nan_to_num_(0.5), inputs["v_cache"].nan_to_num_(-0.5)
    inputs["slots"] = None
    assert error(decode_attention(**moved(inputs, device), backend=backend), inputs) < 4e-6


@ALL
def test_large_scores_neither_overflow_nor_vanish(on_backend: tuple[str, str]) -> None:
    backend, device = on_backend
    inputs = case(5, 6, 2, 2, 32, 60, scale=300.0)
    got = decode_attention(**moved(inputs, device), scaling=1.0, backend=backend)
    assert got.isfinite().all()
    assert error(got, inputs, scaling=1.0) < 1e-3  # scores of thousands have an absolute error of 1e-4


@ALL
def test_views_of_one_product(on_backend: tuple[str, str]) -> None:
    """q, new_k and new_v as an engine has them: parts of the rows of a matrix; and heads apart from each other."""
    backend, device = on_backend
    inputs = case(6, 7, 2, 3, 16, 20)
    strided = moved(inputs, device)
    qkv = torch.cat([strided["q"], strided["new_k"], strided["new_v"]], dim=1)
    strided["q"], strided["new_k"] = qkv[:, :6], qkv[:, 6:8]
    strided["new_v"] = strided["new_v"].transpose(0, 1).contiguous().transpose(0, 1)
    got = decode_attention(**strided, backend=backend)
    assert torch.equal(got, decode_attention(**moved(inputs, device), backend=backend))


@pytest.mark.parametrize(("backend", "device"), backends("torch", "cpp", "triton"))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(on_backend: tuple[str, str], dtype: torch.dtype) -> None:
    """Inputs rounded to the dtype, exact products: only the result is rounded again (on a GPU the weights are, too)."""
    backend, device = on_backend
    inputs = moved(case(7, 6, 2, 3, 40, 90), "cpu", dtype)
    unfit = {"cpp": (torch.float16, torch.float64), "triton": (torch.float64,) if device == "cuda" else (dtype,)}
    if dtype in unfit.get(backend, ()):
        with pytest.raises(BackendUnavailable, match="backend .* was asked for, but .*(takes float32|interpreter)"):
            decode_attention(**moved(inputs, device), backend=backend)
        return
    got = decode_attention(**moved(inputs, device), backend=backend)
    assert error(got, inputs) < {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float64: 1e-12}[dtype]


@needs_cpp
@pytest.mark.parametrize("options", [{}, {"softcap": 5.0}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("group", [1, 2, 7])
def test_every_instruction_set_and_thread_count(
    group: int, dtype: torch.dtype, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = moved(case(8, 20, 2, group, 72, 700), "cpu", dtype)
    wanted, module, results = expected(**inputs, **options), compiled_module(), {}
    original = module.decode_attention
    for name in build_info()["instruction_sets"]:
        for threads in (1, 3):
            monkeypatch.setattr(module, "decode_attention", lambda *a, name=name, threads=threads: original(*a[:4], threads, name))
            results[name, threads] = decode_attention(**inputs, **options, backend="cpp")
            rounding = 0.0 if dtype == torch.float32 else 2**-8
            torch.testing.assert_close(results[name, threads].double(), wanted, rtol=rounding, atol=4e-6)
        assert torch.equal(results[name, 1], results[name, 3])


@needs_cpp
def test_a_row_does_not_depend_on_the_others() -> None:
    inputs = case(9, 9, 2, 2, 24, 150, least=1)
    together = decode_attention(**inputs, backend="cpp")
    for row in range(9):
        alone = {name: value if "cache" in name else value[row : row + 1] for name, value in inputs.items()}
        assert torch.equal(decode_attention(**alone, backend="cpp")[0], together[row])


@ALL
@pytest.mark.parametrize("stores", [False, True])
def test_compiles_without_a_graph_break(on_backend: tuple[str, str], stores: bool) -> None:
    backend, device = on_backend
    inputs = case(10, 4, 2, 2, 16, 20, least=1)
    for cache in inputs["k_cache"], inputs["v_cache"]:
        cache.nan_to_num_(0.5)
    if not stores:
        inputs["new_k"] = inputs["new_v"] = None
    on_device, again = moved(inputs, device), moved(inputs, device)
    compiled = torch.compile(lambda **a: decode_attention(**a, window=7, backend=backend) * 2, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(**on_device), decode_attention(**again, window=7, backend=backend) * 2)
    assert torch.equal(on_device["k_cache"], again["k_cache"]) and torch.equal(on_device["v_cache"], again["v_cache"])


@pytest.mark.parametrize("backend", ["torch", pytest.param("cpp", marks=needs_cpp)])
def test_registration(backend: str) -> None:
    inputs = case(11, 4, 2, 2, 16, 20, least=1)
    for cache in inputs["k_cache"], inputs["v_cache"]:
        cache.nan_to_num_(0.5)
    new = inputs.pop("new_k"), inputs.pop("new_v")
    torch.library.opcheck(torch.ops.areal.decode_attention, (*inputs.values(), 0.3, 5, None, backend))
    inputs["slots"] = None
    torch.library.opcheck(torch.ops.areal.decode_attention_store, (*inputs.values(), *new, 0.3, None, 20.0, backend))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"lengths": torch.tensor([0, 21])}, r"lengths must lie in \[0, 20\]"),
        ({"lengths": torch.tensor([-1, 0])}, "lengths must lie"),
        ({"lengths": torch.tensor([0.0, 1.0])}, "lengths is float32; it must be int64"),
        ({"lengths": torch.tensor([1])}, "lengths has the shape"),
        ({"slots": torch.tensor([0, 4])}, r"slots must lie in \[0, 4\)"),
        ({"slots": torch.tensor([0, 4], dtype=torch.int32)}, "slots is int32"),
        ({"slots": None, "k_cache": torch.zeros(1, 2, 20, 8), "v_cache": torch.zeros(1, 2, 20, 8)}, "2 rows need as many slots"),
        ({"q": torch.zeros(2, 4)}, r"q has the shape \[2, 4\]"),
        ({"q": [0.0]}, "q is a list"),
        ({"new_k": [0.0]}, "new_k is a list"),
        ({"q": torch.zeros(2, 3, 8)}, "multiple of the 2 of k_cache"),
        ({"q": torch.zeros(2, 8, 4).transpose(1, 2)}, "q is not contiguous"),
        ({"q": torch.zeros(2, 4, 8).double()}, "k_cache is float32; it must be float64"),
        ({"q": torch.zeros(2, 4, 8, dtype=torch.int64)}, "q is torch.int64"),
        ({"new_k": torch.zeros(2, 3, 8)}, "new_k has the shape"),
        ({"new_k": torch.zeros(2, 2, 8).bfloat16()}, "new_k is torch.bfloat16"),
        ({"new_v": None}, "new_k and new_v must be given together"),
        ({"new_v": torch.zeros(2, 2, 8, device="meta")}, "new_v is on meta"),
        ({"v_cache": torch.zeros(4, 2, 21, 8)}, "v_cache has the shape"),
        ({"v_cache": torch.zeros(4, 2, 8, 20).transpose(2, 3)}, "v_cache is not contiguous"),
        ({"q": torch.zeros(2, 4, 8, requires_grad=True)}, "no gradient"),
        ({"window": 0}, "window is 0"),
        ({"softcap": -1.0}, "softcap is -1.0"),
    ],
)
@pytest.mark.parametrize("backend", ["torch", pytest.param("cpp", marks=needs_cpp)])
def test_wrong_arguments_are_refused(backend: str, change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=f"decode_attention: .*{sentence}"):
        decode_attention(**case(12, 2, 2, 2, 8, 20) | change, backend=backend)


@needs_cpp
def test_what_runs_compiled_on_this_cpu() -> None:
    assert runs_compiled(torch.zeros(8)) and runs_compiled(torch.zeros(8).bfloat16()) and not runs_compiled(torch.zeros(8).half())


def _attend_ptx(dtype: str, d: int, **more: Any) -> str:
    pointers = dict.fromkeys(("q", "k_cache", "v_cache", "out"), f"*{dtype}") | dict.fromkeys(("partial", "statistics"), "*fp32")
    indices = dict.fromkeys(("slots", "lengths"), "*i64") | dict.fromkeys(("q_row", "q_head", "capacity", "n_splits", "window"), "i32")
    constants = {
        "GROUP": 7,
        "BLOCK_G": 16,
        "KV_HEADS": 4,
        "D": d,
        "BLOCK_D": max(16, 1 << (d - 1).bit_length()),
        "BLOCK_N": 64,
        "SPLIT": 1024,
    }
    constants |= {"STAGES": 3, "HAS_SLOTS": True, "WINDOW": False, "SOFTCAP": False, "DIRECT": False} | more
    floats = {"scaling": "fp32", "softcap": "fp32"}
    return compile_to_ptx(
        "decode_attention_triton", "attend_kernel", pointers | indices | floats, constants, multiples_of_16=("q_row", "q_head", "capacity")
    )


def test_the_gpu_kernel_copies_ahead_and_uses_tensor_cores() -> None:
    """Compiled for sm_90: K and V by asynchronous copies of 16 bytes, several blocks under way, and products on tensor cores."""
    ptx = _attend_ptx("bf16", 128)
    copies = re.findall(r"cp\.async\.c[ag]\.shared\.global .*", ptx)
    assert copies and all(re.search(r"cp\.async\.cg.* 0x10,", copy) for copy in copies)
    assert re.search(r"cp\.async\.wait_group\s+[1-9]", ptx), "waits for all that is under way"
    assert "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32" in ptx
    assert "ld.global.v4.b32" in ptx and "st.global.v4.b32" in ptx  # the query, and the partial results


def test_the_other_gpu_kernels_compile() -> None:
    ptx = compile_to_ptx(
        "decode_attention_triton",
        "combine_kernel",
        {"partial": "*fp32", "statistics": "*fp32", "lengths": "*i64", "out": "*bf16", "n_splits": "i32", "window": "i32"},
        {"HEADS": 28, "D": 128, "BLOCK_D": 128, "SPLIT": 1024, "WINDOW": True},
    )
    assert "ld.global" in ptx
    new = dict.fromkeys(("new_k", "new_v", "k_cache", "v_cache"), "*bf16") | dict.fromkeys(("slots", "lengths"), "*i64")
    strides = dict.fromkeys(("k_row", "k_head", "v_row", "v_head", "capacity"), "i32")
    constants = {"KV_HEADS": 4, "D": 128, "BLOCK_D": 128, "HAS_SLOTS": False}
    assert "st.global" in compile_to_ptx("decode_attention_triton", "store_kernel", new | strides, constants)
