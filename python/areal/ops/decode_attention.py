"""Attention of new tokens over the K/V slots of their sequences: what a step of the embedded engine does in every layer.

    out[r, h] = sum_p softmax_p( scaling * q[r, h] . K[slot[r], h // group, p] ) V[slot[r], h // group, p],
    p in (position[r] - window, position[r]]

``cpp`` (CPU, float32) reads each row's own positions and nothing else; a dense product over the slots reads all of them up to the
longest row's end. ``torch`` is that dense product.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from areal.ops._dispatch import choose_backend, compiled_module, missing_cpp

Backend = Literal["cpp", "torch"]


def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    positions: Tensor,
    slots: Tensor | None = None,
    *,
    scaling: float,
    window: int | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """Stores k and v of every row r at ``[slots[r], :, positions[r]]`` of the caches, then attends. No gradient.

    So rows may be one new token of each sequence, or all tokens of a prompt, or both.

    Args:
        q: [rows, heads, d]; rows may be strided.
        k, v: [rows, kv_heads, d]; heads is a multiple of kv_heads.
        k_cache, v_cache: contiguous [slots, kv_heads, capacity, d].
        positions: int64 [rows], in [0, capacity).
        slots: int64 [rows], in [0, slots); None = row r is in slot r.
        window: a row sees this many positions, its own included; None = all.
        backend: ``cpp`` or ``torch``; None = cpp where it can.

    Returns:
        [rows, heads, d]

    Raises:
        ValueError: shapes, dtypes or devices that do not fit; BackendUnavailable: cpp was asked for and is not built.
    """
    _check(q, k, v, k_cache, v_cache, positions, slots)
    missing = missing_cpp() or _not_for_cpp(q)
    if choose_backend("decode_attention", {"cpp": missing, "torch": None}, backend) == "cpp":
        return _cpp(q, k, v, k_cache, v_cache, positions, slots, scaling, window or 0)
    return _torch(q, k, v, k_cache, v_cache, positions, slots, scaling, window)


def cpp_can(tensor: Tensor) -> bool:
    """Whether ``decode_attention`` of tensors like this one would run compiled."""
    missing = missing_cpp() or _not_for_cpp(tensor)
    return choose_backend("decode_attention", {"cpp": missing, "torch": None}) == "cpp"


def _not_for_cpp(q: Tensor) -> str | None:
    return None if q.device.type == "cpu" and q.dtype == torch.float32 else f"it takes float32 on the CPU, not {q.dtype} on {q.device}"


def _check(q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, positions: Tensor, slots: Tensor | None) -> None:
    rows, heads, d = q.shape
    kv_heads = k.shape[1]
    if k.shape != (rows, kv_heads, d) or v.shape != k.shape or heads % kv_heads:
        raise ValueError(f"decode_attention: q {list(q.shape)}, k {list(k.shape)} and v {list(v.shape)} do not fit together")
    n_slots, cache_heads, capacity, cache_d = k_cache.shape
    if v_cache.shape != k_cache.shape or cache_heads != kv_heads or cache_d != d:
        raise ValueError(f"decode_attention: caches {list(k_cache.shape)} and {list(v_cache.shape)} do not fit k {list(k.shape)}")
    if not (k_cache.is_contiguous() and v_cache.is_contiguous()):
        raise ValueError("decode_attention: the caches must be contiguous")
    if not q.dtype == k.dtype == v.dtype == k_cache.dtype == v_cache.dtype:
        raise ValueError("decode_attention: q, k, v and the caches must have one dtype")
    for name, index, end in ("positions", positions, capacity), ("slots", slots, n_slots):
        if index is None:
            if n_slots < rows:
                raise ValueError(f"decode_attention: {rows} rows need as many slots, not {n_slots}")
            continue
        if index.shape != (rows,) or index.dtype != torch.int64:
            raise ValueError(f"decode_attention: {name} must be int64 [{rows}], not {index.dtype} {list(index.shape)}")
        if rows and not index.is_cuda:
            low, high = index.aminmax()
            if low < 0 or high >= end:
                raise ValueError(f"decode_attention: {name} must lie in [0, {end})")


def _cpp(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    positions: Tensor,
    slots: Tensor | None,
    scaling: float,
    window: int,
) -> Tensor:
    rows, heads, d = q.shape
    q, k, v = (t if t.stride(2) == 1 and t.stride(1) == d else t.contiguous() for t in (q, k, v))
    positions = positions.contiguous()
    slots = None if slots is None else slots.contiguous()
    out = torch.empty(rows, heads, d)
    addresses = [t.data_ptr() for t in (q, k, v, k_cache, v_cache, positions)]
    addresses += [0 if slots is None else slots.data_ptr(), out.data_ptr()]
    sizes = [rows, heads, k.shape[1], k_cache.shape[2], d, q.stride(0), k.stride(0), v.stride(0), window]
    module = compiled_module()
    assert module is not None
    module.decode_attention(addresses, sizes, scaling, torch.get_num_threads())
    return out


def _torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    positions: Tensor,
    slots: Tensor | None,
    scaling: float,
    window: int | None,
) -> Tensor:
    rows, heads, d = q.shape
    kv_heads = k.shape[1]
    if not rows:
        return torch.empty_like(q)
    if slots is None:
        slots = torch.arange(rows, device=q.device)
    k_cache[slots, :, positions] = k
    v_cache[slots, :, positions] = v
    span = int(positions.max()) + 1
    at = torch.arange(span, device=q.device)
    hidden = at > positions.unsqueeze(1)
    if window is not None:
        hidden |= at <= positions.unsqueeze(1) - window
    scores = q.reshape(rows, kv_heads, heads // kv_heads, d) @ k_cache[:, :, :span][slots].transpose(2, 3) * scaling
    weights = torch.softmax(scores.masked_fill(hidden[:, None, None], -torch.inf), dim=-1)
    # Entries behind a row's end were never written: 0 * NaN is NaN.
    values = v_cache[:, :, :span][slots].masked_fill(hidden[:, None, :, None], 0.0)
    return (weights @ values).reshape(rows, heads, d)
