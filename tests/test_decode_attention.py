"""decode_attention against a float64 softmax written out, row by row."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from areal.ops._dispatch import build_info, compiled_module, missing_cpp
from areal.ops.decode_attention import decode_attention

torch.set_num_threads(1)
BACKENDS = ["torch", pytest.param("cpp", marks=pytest.mark.skipif(missing_cpp() is not None, reason="areal._C is not built"))]


def case(seed: int, rows: int, kv_heads: int, group: int, d: int, capacity: int, n_slots: int | None = None, scale: float = 1.0):
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(rows, kv_heads * group, d, generator=g) * scale
    k, v = torch.randn(rows, kv_heads, d, generator=g), torch.randn(rows, kv_heads, d, generator=g)
    n_slots = n_slots or rows + 1
    caches = [torch.full((n_slots, kv_heads, capacity, d), torch.nan) for _ in range(2)]
    if n_slots > rows:  # one row a slot: everything before it is there
        slots, positions = None, torch.randint(0, capacity, (rows,), generator=g)
        for cache in caches:
            for row, position in enumerate(positions.tolist()):
                cache[row, :, :position] = torch.randn(kv_heads, position, d, generator=g)
    else:  # whole prompts
        slots, positions = torch.arange(rows) % n_slots, torch.arange(rows) // n_slots
    return q, k, v, *caches, positions, slots


def reference(
    q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, positions: Tensor, slots: Tensor | None, scaling: float, window
):
    k_cache, v_cache = k_cache.double(), v_cache.double()
    where = list(range(len(q))) if slots is None else slots.tolist()
    for row, slot in enumerate(where):
        k_cache[slot, :, positions[row]], v_cache[slot, :, positions[row]] = k[row].double(), v[row].double()
    out = torch.zeros(q.shape, dtype=torch.float64)
    group = q.shape[1] // k.shape[1]
    for row, slot in enumerate(where):
        last = int(positions[row]) + 1
        first = 0 if window is None else max(0, last - window)
        for head in range(q.shape[1]):
            weights = torch.softmax(k_cache[slot, head // group, first:last] @ q[row, head].double() * scaling, 0)
            out[row, head] = weights @ v_cache[slot, head // group, first:last]
    return out


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    rows=st.integers(0, 9),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 4),
    d=st.sampled_from([1, 7, 8, 16, 17, 24, 32, 40, 64, 80, 128]),
    capacity=st.integers(1, 70),
    window=st.sampled_from([None, 1, 8, 100]),
)
def test_equals_the_formula(
    backend: str, seed: int, rows: int, kv_heads: int, group: int, d: int, capacity: int, window: int | None
) -> None:
    inputs = case(seed, rows, kv_heads, group, d, capacity)
    expected = reference(*inputs, 0.3, window)
    got = decode_attention(*inputs, scaling=0.3, window=window, backend=backend)
    assert got.dtype == torch.float32 and (got - expected).abs().max() < 3e-6 if rows else got.shape == expected.shape
    for row, position in enumerate(inputs[5].tolist()):
        assert torch.equal(inputs[3][row, :, position], inputs[1][row]) and torch.equal(inputs[4][row, :, position], inputs[2][row])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("window", [None, 5])
def test_rows_of_one_slot_see_those_before_them(backend: str, window: int | None) -> None:
    inputs = case(3, 40, 2, 2, 24, 16, n_slots=4)
    expected = reference(*inputs, 0.2, window)
    assert (decode_attention(*inputs, scaling=0.2, window=window, backend=backend) - expected).abs().max() < 2e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_scores_neither_overflow_nor_vanish(backend: str) -> None:
    inputs = case(4, 6, 2, 2, 32, 60, scale=300.0)
    expected = reference(*inputs, 1.0, None)
    got = decode_attention(*inputs, scaling=1.0, backend=backend)
    assert got.isfinite().all() and (got - expected).abs().max() < 1e-3  # scores of thousands have an absolute error of 1e-4


@pytest.mark.skipif(missing_cpp() is not None, reason="areal._C is not built")
def test_every_instruction_set_and_thread_count(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = case(5, 64, 2, 4, 64, 600)
    expected = reference(*inputs, 0.1, None)
    module, results = compiled_module(), {}
    original = module.decode_attention
    for name in build_info()["instruction_sets"]:
        for threads in (1, 3):
            monkeypatch.setattr(module, "decode_attention", lambda *a, name=name, threads=threads: original(*a[:3], threads, name))
            results[name, threads] = decode_attention(*inputs, scaling=0.1, backend="cpp")
            assert (results[name, threads] - expected).abs().max() < 3e-6
        assert torch.equal(results[name, 1], results[name, 3])


@pytest.mark.skipif(missing_cpp() is not None, reason="areal._C is not built")
def test_a_row_does_not_depend_on_the_others() -> None:
    q, k, v, k_cache, v_cache, positions, _ = case(6, 9, 2, 2, 24, 50)
    together = decode_attention(q, k, v, k_cache, v_cache, positions, scaling=0.2, backend="cpp")
    for row in range(9):
        one = slice(row, row + 1)
        slot = torch.tensor([row])
        alone = decode_attention(q[one], k[one], v[one], k_cache, v_cache, positions[one], slot, scaling=0.2, backend="cpp")
        assert torch.equal(alone[0], together[row])


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"positions": torch.tensor([0, 20])}, r"positions must lie in \[0, 20\)"),
        ({"positions": torch.tensor([-1, 0])}, "positions must lie"),
        ({"slots": torch.tensor([0, 3])}, r"slots must lie in \[0, 3\)"),
        ({"positions": torch.tensor([0.0, 1.0])}, "must be int64"),
        ({"k": torch.zeros(2, 3, 8)}, "do not fit together"),
        ({"v_cache": torch.zeros(3, 2, 21, 8)}, "do not fit k"),
        ({"v_cache": torch.zeros(3, 2, 8, 20).transpose(2, 3)}, "contiguous"),
        ({"q": torch.zeros(2, 4, 8).double()}, "one dtype"),
    ],
)
def test_wrong_arguments_are_refused(change: dict[str, Tensor], sentence: str) -> None:
    names = ["q", "k", "v", "k_cache", "v_cache", "positions", "slots"]
    arguments = dict(zip(names, case(7, 2, 2, 2, 8, 20), strict=True)) | change
    with pytest.raises(ValueError, match=sentence):
        decode_attention(**arguments, scaling=1.0)
