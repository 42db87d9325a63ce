"""Attention of one query a row over the K/V slots of the rows' sequences: what a decoding step does in every layer.

    s_p = scaling * q[r, h] . K[slot[r], h // group, p],  with a soft cap c: c * tanh(s_p / c)
    out[r, h] = sum_p softmax_p(s) V[slot[r], h // group, p],  p in [max(0, length[r] - window), length[r])

``cpp`` (CPU; float32 and bfloat16) and ``triton`` (GPU) read each row's own positions and nothing else, once for all query heads that
share a K/V head. ``torch``, the reference, is a dense product over all positions. The soft cap is Gemma 2's (arXiv:2408.00118, section 2).
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from areal.ops._dispatch import backend_for, compiled_module, triton_kernels
from areal.ops._registration import check_tensor, define_op, on_device

_OP = "decode_attention"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_CPP_DTYPES = (torch.float32, torch.bfloat16)
_TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_TRITON_LARGEST_D = 256


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor | None,
    lengths: Tensor,
    *,
    scaling: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    new_k: Tensor | None = None,
    new_v: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attention of row r over the first ``lengths[r]`` positions of its slot. No gradient.

    With ``new_k`` and ``new_v`` those of every row are stored at position ``lengths - 1`` before any row attends. Several rows may share
    a slot, so rows may be one new token of each sequence, or all tokens of a prompt, or both. Cache entries that no row sees are not
    read. On the CPU a row's result does not depend, bit for bit, on the other rows or the number of threads (backend ``cpp``).

    Args:
        q: [rows, heads, d]; rows and heads may be strided. float32, bfloat16, float16 or, for ``torch``, float64; all others are the same.
        k_cache, v_cache: contiguous [slots, kv_heads, capacity, d]; heads is a multiple of kv_heads. Written where new_k is given.
        slots: int64 [rows], in [0, slots); None = row r is in slot r.
        lengths: int64 [rows], in [0, capacity]: positions that the row sees, its own included. A row of length 0 stores nothing and
            gives 0. Checked on the CPU; on a GPU that would wait for the device, so there the caller answers for slots and lengths.
        scaling: of the scores; None = d ** -0.5.
        window: the row sees the last ``window`` of its positions; None = all.
        softcap: scores become softcap * tanh(score / softcap); None = they stay.
        new_k, new_v: [rows, kv_heads, d], strided as q may be; both or neither.
        backend: ``cpp``, ``triton`` or ``torch``; None = the best one for the device and dtype.

    Returns:
        [rows, heads, d], contiguous, of q's dtype.

    Raises:
        ValueError: arguments that do not fit, by name; BackendUnavailable: a forced backend that cannot run here.
    """
    _check(q, k_cache, v_cache, slots, lengths, new_k, new_v)
    for name, limit in ("window", window), ("softcap", softcap):
        if limit is not None and not limit > 0:
            raise ValueError(f"{_OP}: {name} is {limit}; it must be positive, or None for none")
    options = (q.shape[2] ** -0.5 if scaling is None else scaling, window, softcap, backend)
    if new_k is None or new_v is None:
        return _attend(q, k_cache, v_cache, slots, lengths, *options)
    return _store_and_attend(q, k_cache, v_cache, slots, lengths, new_k, new_v, *options)


def runs_compiled(tensor: Tensor) -> bool:
    """Whether ``decode_attention`` of such tensors (device, dtype, d = last dimension) runs as a kernel, not as dense products."""
    return _backend(tensor, None) != "torch"


def _backend(q: Tensor, forced: str | None) -> str:
    return backend_for(_OP, q.device, forced, has=("cpp", "triton", "torch"), unfit=_unfit(q.dtype, q.shape[-1], q.is_cuda))


@functools.cache
def _unfit(dtype: torch.dtype, d: int, on_cuda: bool) -> tuple[tuple[str, str], ...]:
    unfit = []
    if dtype not in _CPP_DTYPES:
        unfit.append(("cpp", f"it takes float32 or bfloat16, not {dtype}"))
    if dtype not in _TRITON_DTYPES:
        unfit.append(("triton", f"it takes float32, bfloat16 or float16, not {dtype}"))
    elif dtype != torch.float32 and not on_cuda:
        unfit.append(("triton", f"Triton's interpreter computes {dtype} wrongly"))
    elif d > _TRITON_LARGEST_D:
        unfit.append(("triton", f"it takes heads of at most {_TRITON_LARGEST_D}, not {d}"))
    return tuple(unfit)


def _check(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor | None, lengths: Tensor, new_k: Tensor | None, new_v: Tensor | None
) -> None:
    if not isinstance(q, Tensor) or q.dim() != 3:
        found = f"has the shape {list(q.shape)}" if isinstance(q, Tensor) else f"is a {type(q).__name__}"
        raise ValueError(f"{_OP}: q {found}; it must be a tensor [rows, heads, d]")
    rows, heads, d = q.shape
    _check_rows("q", q, (rows, heads, d), q)
    check_tensor(_OP, "k_cache", k_cache, (None, None, None, d), (q.dtype,), q.device)
    check_tensor(_OP, "v_cache", v_cache, tuple(k_cache.shape), (q.dtype,), q.device)
    check_tensor(_OP, "lengths", lengths, (rows,), (torch.int64,), q.device)
    n_slots, kv_heads = k_cache.shape[:2]
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"{_OP}: q has {heads} heads; they must be a multiple of the {kv_heads} of k_cache")
    if slots is not None:
        check_tensor(_OP, "slots", slots, (rows,), (torch.int64,), q.device)
    elif n_slots < rows:
        raise ValueError(f"{_OP}: slots is None, so the {rows} rows need as many slots, but k_cache has {n_slots}")
    if (new_k is None) != (new_v is None):
        raise ValueError(f"{_OP}: new_k and new_v must be given together")
    if new_k is not None and new_v is not None:
        _check_rows("new_k", new_k, (rows, kv_heads, d), q)
        _check_rows("new_v", new_v, (rows, kv_heads, d), q)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (q, k_cache, v_cache, new_k, new_v)):
        raise ValueError(f"{_OP}: it has no gradient; call it under torch.no_grad()")


def _check_rows(name: str, tensor: Tensor, shape: tuple[int, ...], q: Tensor) -> None:
    """As ``check_tensor``, but rows and heads may be strided: they often are views of one product."""
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{_OP}: {name} is a {type(tensor).__name__}; it must be a tensor")
    if tensor.dtype not in _DTYPES or tensor.dtype != q.dtype:
        wanted = "float32, bfloat16, float16 or float64" if tensor is q else f"{q.dtype}, like q"
        raise ValueError(f"{_OP}: {name} is {tensor.dtype}; it must be {wanted}")
    if tensor.shape != shape:
        raise ValueError(f"{_OP}: {name} has the shape {list(tensor.shape)}; it must be {list(shape)}")
    if tensor.device != q.device:
        raise ValueError(f"{_OP}: {name} is on {tensor.device}; it must be on {q.device}, like q")
    if tensor.stride(2) != 1 and shape[2] > 1:
        raise ValueError(f"{_OP}: {name} is not contiguous in its last dimension; call .contiguous() on it")


def _run(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor | None,
    lengths: Tensor,
    new_k: Tensor | None,
    new_v: Tensor | None,
    scaling: float,
    window: int | None,
    softcap: float | None,
    backend: str | None,
) -> Tensor:
    match _backend(q, backend):
        case "cpp":
            run = _cpp
        case "triton":
            run = _triton
        case _:
            run = _torch
    return run(q, k_cache, v_cache, slots, lengths, new_k, new_v, scaling, window, softcap)


def _run_pure(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor | None,
    lengths: Tensor,
    scaling: float,
    window: int | None,
    softcap: float | None,
    backend: str | None,
) -> Tensor:
    return _run(q, k_cache, v_cache, slots, lengths, None, None, scaling, window, softcap, backend)


def _fake(q: Tensor, *_: object) -> Tensor:
    return q.new_empty(q.shape)


_OPTIONS = "float scaling, int? window, float? softcap, str? backend"
_attend = define_op(
    f"decode_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor? slots, Tensor lengths, {_OPTIONS}) -> Tensor", _run_pure, _fake
)
_store_and_attend = define_op(
    "decode_attention_store(Tensor q, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor? slots, Tensor lengths, "
    f"Tensor new_k, Tensor new_v, {_OPTIONS}) -> Tensor",
    _run,
    _fake,
)


def _cpp(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor | None,
    lengths: Tensor,
    new_k: Tensor | None,
    new_v: Tensor | None,
    scaling: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    module = compiled_module()
    assert module is not None
    queries = q.float()
    out = torch.empty(q.shape, dtype=torch.float32)
    rows, heads, d = q.shape
    n_slots, kv_heads, capacity, _ = k_cache.shape
    strides, new_addresses = [*queries.stride()[:2], 0, 0, 0, 0], (0, 0)
    if new_k is not None and new_v is not None:
        strides[2:] = *new_k.stride()[:2], *new_v.stride()[:2]
        new_addresses = new_k.data_ptr(), new_v.data_ptr()
    sizes = [rows, heads, kv_heads, n_slots, capacity, d, *strides, window or 0, q.dtype == torch.bfloat16]
    addresses = [queries.data_ptr(), k_cache.data_ptr(), v_cache.data_ptr(), lengths.data_ptr()]
    addresses += [0 if slots is None else slots.data_ptr(), *new_addresses, out.data_ptr()]
    module.decode_attention(addresses, sizes, scaling, softcap or 0.0, torch.get_num_threads())
    return out.to(q.dtype)


def _check_ranges(slots: Tensor | None, lengths: Tensor, n_slots: int, capacity: int) -> None:
    """What the compiled path checks too; on the CPU only."""
    if lengths.is_cuda or not len(lengths):
        return
    low, high = lengths.aminmax()
    if low < 0 or high > capacity:
        raise ValueError(f"{_OP}: lengths must lie in [0, {capacity}], the caches' capacity")
    if slots is not None and not 0 <= int(slots.min()) <= int(slots.max()) < n_slots:
        raise ValueError(f"{_OP}: slots must lie in [0, {n_slots})")


def _triton(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor | None,
    lengths: Tensor,
    new_k: Tensor | None,
    new_v: Tensor | None,
    scaling: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    _check_ranges(slots, lengths, k_cache.shape[0], k_cache.shape[2])
    kernels = triton_kernels(_OP)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    with on_device(q):
        kernels.launch(q, k_cache, v_cache, slots, lengths, new_k, new_v, out, scaling, window, softcap)
    return out


def _torch(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor | None,
    lengths: Tensor,
    new_k: Tensor | None,
    new_v: Tensor | None,
    scaling: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    rows, heads, d = q.shape
    _check_ranges(slots, lengths, k_cache.shape[0], k_cache.shape[2])
    if not rows:
        return torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if slots is None:
        slots = torch.arange(rows, device=q.device)
    if new_k is not None and new_v is not None:
        storing = lengths > 0
        at = slots[storing], slice(None), lengths[storing] - 1
        k_cache[at], v_cache[at] = new_k[storing], new_v[storing]
    kv_heads, span = k_cache.shape[1], int(lengths.max())
    exact = torch.promote_types(q.dtype, torch.float32)
    at_S = torch.arange(span, device=q.device)
    hidden_RS = at_S >= lengths.unsqueeze(1)
    if window is not None:
        hidden_RS |= at_S < lengths.unsqueeze(1) - window
    k, v = (cache[:, :, :span][slots].to(exact) for cache in (k_cache, v_cache))
    scores = q.to(exact).reshape(rows, kv_heads, heads // kv_heads, d) @ k.transpose(2, 3) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    # A row that sees nothing has the softmax NaN; what lies behind a row's end was never written, and 0 * NaN is NaN.
    mask = hidden_RS[:, None, None]
    weights = torch.softmax(scores.masked_fill(mask, -torch.inf), dim=-1).masked_fill(mask, 0.0)
    return (weights @ v.masked_fill(hidden_RS[:, None, :, None], 0.0)).reshape(rows, heads, d).to(q.dtype)
