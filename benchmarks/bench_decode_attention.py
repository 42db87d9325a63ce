"""decode_attention reads each row's own K and V once; masked SDPA over the padded slots, what there is in torch, reads all of them.

CPU: 64 slots, 4 heads on 2 K/V heads, lengths spread evenly from 16 to 900, and equal ones; the caches have room for 1024. GPU: 256 slots,
Qwen2-7B's heads, lognormal lengths up to 32k, bfloat16; the limit is the bytes of K and V that the rows see.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from areal.ops import decode_attention
from benchmarks.op_bench import Bytes, Case, Rival

SLOTS = 64
SDPA = "sdpa padded"


def cases(device: str, backends: Sequence[str]) -> Iterator[Case]:
    if device == "cuda":
        yield from gpu_cases(backends)
        return
    ragged = torch.linspace(16, 900, SLOTS).long()[torch.randperm(SLOTS, generator=torch.Generator().manual_seed(0))]
    for d in (24, 64, 128):
        yield cpu_case("lengths 16 to 900", d, ragged, 3.0, backends)
        for length in (64, 300, 900):
            yield cpu_case(f"lengths {length}", d, torch.full((SLOTS,), length), 1.0, backends)


def cpu_case(label: str, d: int, lengths: Tensor, factor: float, backends: Sequence[str]) -> Case:
    q = torch.randn(SLOTS, 4, d)
    k_cache, v_cache = (torch.randn(SLOTS, 2, 1024, d) for _ in range(2))
    variants = attention_variants(q, k_cache, v_cache, lengths, [b for b in backends if b in ("torch", "cpp")])
    variants[SDPA] = padded_sdpa(q, k_cache, v_cache, lengths)
    return Case(label, int(lengths.sum()), variants, close, "torch", Rival(SDPA, factor), factor, phase=f"d {d}")


def gpu_cases(backends: Sequence[str]) -> Iterator[Case]:
    rows, heads, kv_heads, d, capacity = 256, 28, 4, 128, 32768
    generator = torch.Generator().manual_seed(0)
    k_cache, v_cache = (torch.randn(rows, kv_heads, capacity, d, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    q = torch.randn(rows, heads, d, device="cuda", dtype=torch.bfloat16)
    for median in (512, 2048, 8192):
        lengths = (median * torch.randn(rows, generator=generator).exp()).clamp(16, capacity).long().cuda()
        n_bytes = int(lengths.sum()) * kv_heads * d * 2 * k_cache.element_size()
        # The dense `torch` would need float32 copies of whole slots: SDPA is the reference.
        variants = attention_variants(q, k_cache, v_cache, lengths, [b for b in backends if b == "triton"])
        variants[SDPA] = padded_sdpa(q, k_cache, v_cache, lengths)
        yield Case(f"lognormal lengths, median {median}", n_bytes, variants, close, SDPA, Bytes(n_bytes), 0.8)


def attention_variants(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, backends: Sequence[str]
) -> dict[str, Callable[[], object]]:
    return {b: partial(decode_attention, q, k_cache, v_cache, None, lengths, backend=b) for b in backends}


def padded_sdpa(q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor) -> Callable[[], object]:
    """SDPA over all slots up to the longest row; the heads of a group are rows of one query, which is faster than enable_gqa. Equal
    lengths need no mask."""
    rows, heads, d = q.shape
    kv_heads, longest = k_cache.shape[1], int(lengths.max())
    mask = None
    if int(lengths.min()) < longest:
        longest = min(k_cache.shape[2], -(-longest // 16) * 16)  # what the GPU's kernels want of a mask
        hidden = torch.arange(longest, device=q.device) >= lengths.unsqueeze(1)
        mask = torch.zeros(hidden.shape, dtype=q.dtype, device=q.device).masked_fill_(hidden, -torch.inf)[:, None, None]
    k, v = k_cache[:, :, :longest], v_cache[:, :, :longest]
    folded = q.view(rows, kv_heads, heads // kv_heads, d)
    return lambda: F.scaled_dot_product_attention(folded, k, v, attn_mask=mask).reshape(rows, heads, d)


def close(result: object, expected: object) -> None:
    """In bfloat16 by the norm of each head's result: averages over thousands of values are so small that 0 would be close to them."""
    if expected.dtype != torch.bfloat16:
        return torch.testing.assert_close(result, expected)
    error = ((result.float() - expected.float()).norm(dim=-1) / expected.float().norm(dim=-1)).max().item()
    assert error < 3e-2, f"differs by {error:.2g} of a head's norm"
