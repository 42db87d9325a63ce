"""Causal attention over packed sequences, for training and prefill; nothing of a sequence reaches another.

On CUDA in half precision: flash-attn if it is installed, else torch's varlen attention. Elsewhere, and for what those kernels cannot do,
sequences of similar length share one dense call: q, k and v are gathered to [n, L, ...], where tokens behind a sequence's end are
copies of its last one. They are behind every real query, so causality alone hides them, and their own results are not gathered back:
attention is exact and the loss never sees them.
"""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from areal.models.attention import AttentionSpec

_BMM_LENGTH = 128
"""Up to this length two products and a softmax beat the CPU's flash attention (13.5 against 15.5 ms on 128 x 45 tokens, with backward)."""
_SCORES = 1 << 23
"""Elements of a score matrix at most, where scores are materialised."""


@dataclass(frozen=True, slots=True)
class _Bucket:
    n: int
    length: int


class PackedContext:
    """Causal attention within each of the packed sequences of ``lengths`` tokens; together they are the T tokens."""

    def __init__(self, lengths: Sequence[int]) -> None:
        self.lengths = list(lengths)
        self._indices: dict[torch.device, tuple[Tensor, Tensor, Tensor]] = {}
        self._hidden: dict[tuple[int, int | None, torch.device], Tensor] = {}
        self._cu_seqlens: dict[torch.device, Tensor] = {}

    def cu_seqlens_on(self, device: torch.device) -> Tensor:
        """int32 [n + 1]: where each sequence starts, and T."""
        if device not in self._cu_seqlens:
            self._cu_seqlens[device] = torch.tensor([0, *itertools.accumulate(self.lengths)], dtype=torch.int32).to(device)
        return self._cu_seqlens[device]

    def attend(self, layer_idx: int, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor:
        """q [T, heads, d], k [T, kv_heads, d], v [T, kv_heads, d_v] -> [T, heads, d_v]."""
        if q.is_cuda and (out := _varlen(self, q, k, v, spec)) is not None:
            return out
        if self._is_even:
            n, length = len(self.lengths), self.lengths[0]
            return self._dense(_Bucket(n, length), q, k, v, spec)
        spread, back, real = self._indices_on(q.device)
        sizes = [b.n * b.length for b in self._plan[1]]
        parts = (_Spread.apply(x, spread, back).split(sizes) for x in (q, k, v))
        outputs = [self._dense(bucket, *part, spec) for bucket, *part in zip(self._plan[1], *parts, strict=True)]
        return _Collect.apply(torch.cat(outputs), spread, back, real)

    @cached_property
    def _is_even(self) -> bool:
        return min(self.lengths) == max(self.lengths)

    @cached_property
    def _plan(self) -> tuple[list[int], list[_Bucket]]:
        """Sequences longest first, and how they are cut into buckets: at most an eighth of a bucket's tokens, or 4, are not real."""
        order = sorted(range(len(self.lengths)), key=lambda i: -self.lengths[i])
        buckets: list[_Bucket] = []
        n = 0
        longest = self.lengths[order[0]]
        for i in order:
            if self.lengths[i] < min(longest * 7 // 8, longest - 4):
                buckets.append(_Bucket(n, longest))
                n, longest = 0, self.lengths[i]
            n += 1
        return order, [*buckets, _Bucket(n, longest)]

    def _indices_on(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """``spread`` [padded]: the packed token of each place; ``back`` [T]: each token's place; ``real`` [padded, 1, 1]: 1 or 0."""
        if device not in self._indices:
            order, buckets = self._plan
            lengths = torch.tensor(self.lengths)
            starts = torch.cumsum(lengths, 0) - lengths
            spread, real, done = [], [], 0
            for bucket in buckets:
                rows = torch.tensor(order[done : done + bucket.n])
                done += bucket.n
                column = torch.arange(bucket.length)
                last = lengths[rows].unsqueeze(1) - 1
                spread.append((starts[rows].unsqueeze(1) + torch.minimum(column, last)).flatten())
                real.append((column <= last).flatten())
            all_spread, all_real = torch.cat(spread), torch.cat(real)
            back = torch.empty(int(lengths.sum()), dtype=torch.long)
            back[all_spread[all_real]] = all_real.nonzero().squeeze(1)
            self._indices[device] = tuple(x.to(device) for x in (all_spread, back, all_real.float().view(-1, 1, 1)))
        return self._indices[device]

    # -- one bucket -------------------------------------------------------------------------------------------------------------

    def _dense(self, bucket: _Bucket, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor:
        """q, k, v [n * length, heads, d] -> [n * length, heads, d_v]."""
        n, length, heads = bucket.n, bucket.length, q.shape[1]
        q, k, v = (x.reshape(n, length, x.shape[1], x.shape[2]).transpose(1, 2) for x in (q, k, v))
        window = spec.sliding_window if spec.sliding_window is not None and spec.sliding_window < length else None
        per_sequence = heads * length * length
        needs_scores = spec.softcap is not None or spec.sinks is not None
        if needs_scores or (not q.is_cuda and length <= _BMM_LENGTH and n * per_sequence <= _SCORES):
            hidden = self._hidden_on(length, window, q.device)
            at_once = max(1, _SCORES // per_sequence)
            pieces = zip(q.split(at_once), k.split(at_once), v.split(at_once), strict=True)
            out = torch.cat([_scored_attention(*piece, hidden, spec) for piece in pieces])
        else:
            mask = None if window is None else ~self._hidden_on(length, window, q.device)
            gqa = q.shape[1] != k.shape[1]
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=spec.scaling, enable_gqa=gqa)
        return out.transpose(1, 2).reshape(n * length, heads, v.shape[3])

    def _hidden_on(self, length: int, window: int | None, device: torch.device) -> Tensor:
        """bool [length, length]: which keys a query does not see."""
        key = (length, window, device)
        if key not in self._hidden:
            ones = torch.ones(length, length, dtype=torch.bool, device=device)
            hidden = ones.triu(1)
            self._hidden[key] = hidden if window is None else hidden | ones.tril(-window)
        return self._hidden[key]


def _scored_attention(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor, spec: AttentionSpec) -> Tensor:
    """q [n, heads, L, d], k, v [n, kv_heads, L, d], hidden [L, L] -> [n, heads, L, d_v]. Heads that share K and V are one product."""
    n, heads, length, d = q.shape
    kv_heads = k.shape[1]
    rows = heads // kv_heads * length
    q = q.reshape(n * kv_heads, rows, d)
    k, v = k.reshape(n * kv_heads, length, d), v.reshape(n * kv_heads, length, v.shape[3])
    bias = torch.zeros_like(hidden, dtype=q.dtype).masked_fill_(hidden, -torch.inf).repeat(heads // kv_heads, 1)
    if spec.softcap is None:
        scores = torch.baddbmm(bias, q, k.transpose(1, 2), alpha=spec.scaling)
    else:
        scores = torch.bmm(q, k.transpose(1, 2)) * (spec.scaling / spec.softcap)
        scores = scores.tanh() * spec.softcap + bias
    if spec.sinks is None:
        weights = torch.softmax(scores, dim=-1)
    else:
        sinks = spec.sinks.to(scores.dtype).view(kv_heads, -1, 1).expand(-1, -1, length).reshape(kv_heads, rows, 1)
        weights = torch.softmax(torch.cat([scores, sinks.repeat(n, 1, 1)], dim=-1), dim=-1)[..., :-1]
    return torch.bmm(weights, v).view(n, heads, length, v.shape[2])


class _Spread(torch.autograd.Function):
    """[T, ...] -> [padded, ...]. The gradient is a gather too: places that are not real get none, because nobody uses them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, spread: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(back)
        return x.index_select(0, spread)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0].index_select(0, ctx.saved_tensors[0]), None, None


class _Collect(torch.autograd.Function):
    """[padded, ...] -> [T, ...]: the inverse on real places."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, spread: Tensor, back: Tensor, real: Tensor) -> Tensor:
        ctx.save_for_backward(spread, real)
        return x.index_select(0, back)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        spread, real = ctx.saved_tensors
        return grads[0].index_select(0, spread).mul_(real.to(grads[0].dtype)), None, None, None


# -- CUDA -----------------------------------------------------------------------------------------------------------------------


def _varlen(context: PackedContext, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor | None:
    """The packed kernels; None for what they cannot do: float32, sinks, large or unequal head sizes."""
    if q.dtype not in (torch.float16, torch.bfloat16) or spec.sinks is not None or not q.shape[2] == v.shape[2] <= 256:
        return None
    longest = max(context.lengths)
    window = (-1, 0) if spec.sliding_window is None else (spec.sliding_window - 1, 0)
    cu_seqlens = context.cu_seqlens_on(q.device)
    if importlib.util.find_spec("flash_attn") is not None:
        from flash_attn import flash_attn_varlen_func

        left = window[0]
        return flash_attn_varlen_func(
            q, k, v, cu_seqlens, cu_seqlens, longest, longest,
            softmax_scale=spec.scaling, causal=True, window_size=(left, 0 if left >= 0 else -1), softcap=spec.softcap or 0.0,
        )  # fmt: skip
    if spec.softcap is not None or torch.cuda.get_device_capability(q.device) < (8, 0):
        return None
    from torch.nn.attention.varlen import varlen_attn

    gqa = {"enable_gqa": True} if q.shape[1] != k.shape[1] else {}
    return varlen_attn(q, k, v, cu_seqlens, cu_seqlens, longest, longest, scale=spec.scaling, window_size=window, **gqa)
