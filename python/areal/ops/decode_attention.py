"""Attention of one new token per sequence over its own K/V slot: what a decode step of the embedded engine does in every layer.

    out[r, h] = softmax_p( scaling * q[r, h] . K[r, h // group, p] ) . V[r, h // group, :],   p in (position[r] - window, position[r]]

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
    *,
    scaling: float,
    window: int | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """Stores k and v of row r at ``[r, :, positions[r]]`` of the caches and attends. No gradient.

    Args:
        q: [rows, heads, d]; rows may be strided.
        k, v: [rows, kv_heads, d]; heads is a multiple of kv_heads.
        k_cache, v_cache: contiguous [slots, kv_heads, capacity, d] with slots >= rows; row r uses slot r.
        positions: int64 [rows], in [0, capacity).
        window: a row sees this many positions, its own included; None = all.
        backend: ``cpp`` or ``torch``; None = cpp where it can.

    Returns:
        [rows, heads, d]

    Raises:
        ValueError: shapes, dtypes or devices that do not fit; BackendUnavailable: cpp was asked for and is not built.
    """
    _check(q, k, v, k_cache, v_cache, positions)
    missing = missing_cpp() or _not_for_cpp(q)
    if choose_backend("decode_attention", {"cpp": missing, "torch": None}, backend) == "cpp":
        return _cpp(q, k, v, k_cache, v_cache, positions, scaling, window or 0)
    return _torch(q, k, v, k_cache, v_cache, positions, scaling, window)


def cpp_can(tensor: Tensor) -> bool:
    """Whether ``decode_attention`` of tensors like this one would run compiled."""
    missing = missing_cpp() or _not_for_cpp(tensor)
    return choose_backend("decode_attention", {"cpp": missing, "torch": None}) == "cpp"


def _not_for_cpp(q: Tensor) -> str | None:
    return None if q.device.type == "cpu" and q.dtype == torch.float32 else f"it takes float32 on the CPU, not {q.dtype} on {q.device}"


def _check(q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, positions: Tensor) -> None:
    rows, heads, d = q.shape
    kv_heads = k.shape[1]
    if k.shape != (rows, kv_heads, d) or v.shape != k.shape or heads % kv_heads:
        raise ValueError(f"decode_attention: q {list(q.shape)}, k {list(k.shape)} and v {list(v.shape)} do not fit together")
    slots, cache_heads, _, cache_d = k_cache.shape
    if v_cache.shape != k_cache.shape or slots < rows or cache_heads != kv_heads or cache_d != d:
        raise ValueError(f"decode_attention: caches {list(k_cache.shape)} and {list(v_cache.shape)} do not fit k {list(k.shape)}")
    if not (k_cache.is_contiguous() and v_cache.is_contiguous()):
        raise ValueError("decode_attention: the caches must be contiguous")
    if positions.shape != (rows,) or positions.dtype != torch.int64:
        raise ValueError(f"decode_attention: positions must be int64 [{rows}], not {positions.dtype} {list(positions.shape)}")
    if len({t.dtype for t in (q, k, v, k_cache, v_cache)}) > 1:
        raise ValueError("decode_attention: q, k, v and the caches must have one dtype")


def _cpp(
    q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, positions: Tensor, scaling: float, window: int
) -> Tensor:
    rows, heads, d = q.shape
    q, k, v = (t if t.stride(2) == 1 and t.stride(1) == d else t.contiguous() for t in (q, k, v))
    positions = positions.contiguous()
    out = torch.empty(rows, heads, d)
    capacity = k_cache.shape[2]
    if rows and not 0 <= int(positions.min()) <= int(positions.max()) < capacity:
        raise ValueError(f"decode_attention: positions must lie in [0, {capacity})")
    addresses = [t.data_ptr() for t in (q, k, v, k_cache, v_cache, positions, out)]
    sizes = [rows, heads, k.shape[1], capacity, d, q.stride(0), k.stride(0), v.stride(0), window]
    compiled_module().decode_attention(addresses, sizes, scaling, torch.get_num_threads())
    return out


def _torch(
    q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, positions: Tensor, scaling: float, window: int | None
) -> Tensor:
    rows, heads, d = q.shape
    kv_heads = k.shape[1]
    if not rows:
        return torch.empty_like(q)
    index = torch.arange(rows, device=q.device)
    k_cache[index, :, positions] = k
    v_cache[index, :, positions] = v
    span = int(positions.max()) + 1
    at = torch.arange(span, device=q.device)
    hidden = at > positions.unsqueeze(1)
    if window is not None:
        hidden |= at <= positions.unsqueeze(1) - window
    scores = q.reshape(rows, kv_heads, heads // kv_heads, d) @ k_cache[:rows, :, :span].transpose(2, 3) * scaling
    weights = torch.softmax(scores.masked_fill(hidden[:, None, None], -torch.inf), dim=-1)
    # Entries behind a row's end were never written: 0 * NaN is NaN.
    values = v_cache[:rows, :, :span].masked_fill(hidden[:, None, :, None], 0.0)
    return (weights @ values).reshape(rows, heads, d)
