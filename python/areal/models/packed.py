"""Causal attention over packed sequences, for training and prefill; nothing of a sequence reaches another.

On CUDA in half precision: flash-attn if it is installed, else torch's varlen attention. Elsewhere, and for what those kernels cannot do,
sequences of similar length share one dense call: q, k and v are gathered to [n, L, ...], where tokens behind a sequence's end are
copies of its last one. They are behind every real query, so causality alone hides them, and their own results are not gathered back:
attention is exact and the loss never sees them.
"""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from areal.models.prefix import SharedTokens

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
    """Causal attention within each of the packed sequences of ``lengths`` tokens; together they are the T tokens.

    With ``shared``, q, k, v and the result have its U computed tokens instead.
    """

    def __init__(self, lengths: Sequence[int], shared: SharedTokens | None = None) -> None:
        self.lengths = list(lengths)
        self._shared = shared
        self._indices: dict[tuple[torch.device, bool], _Indices] = {}
        self._hidden: dict[tuple[int, int | None, torch.device], Tensor] = {}
        self._cu_seqlens: dict[torch.device, Tensor] = {}

    def cu_seqlens_on(self, device: torch.device) -> Tensor:
        """int32 [n + 1]: where each sequence starts, and T."""
        if device not in self._cu_seqlens:
            self._cu_seqlens[device] = torch.tensor([0, *itertools.accumulate(self.lengths)], dtype=torch.int32).to(device)
        return self._cu_seqlens[device]

    def attend(self, layer_idx: int, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor:
        """q [T, heads, d], k [T, kv_heads, d], v [T, kv_heads, d_v] -> [T, heads, d_v]."""
        kernel = _kernel_for(q, v, spec)
        if self._shared is None and kernel is not None:
            return kernel(self, q, k, v, spec)
        if self._shared is None and self._is_even:
            return self._dense(_Bucket(len(self.lengths), self.lengths[0]), q, k, v, spec)
        indices = self._indices_on(q.device, in_buckets=kernel is None)
        q, k, v = (_Spread.apply(x, indices) for x in (q, k, v))
        if kernel is not None:
            return _Collect.apply(kernel(self, q, k, v, spec), indices)
        sizes = [b.n * b.length for b in self._plan[1]]
        pieces = zip(self._plan[1], q.split(sizes), k.split(sizes), v.split(sizes), strict=True)
        return _Collect.apply(torch.cat([self._dense(*piece, spec) for piece in pieces]), indices)

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

    def _indices_on(self, device: torch.device, *, in_buckets: bool) -> _Indices:
        """Between computed tokens and places: those of the buckets, or the packed tokens themselves."""
        if (device, in_buckets) not in self._indices:
            n = sum(self.lengths)
            spread, real = self._places() if in_buckets else (torch.arange(n), torch.ones(n, dtype=torch.bool))
            self._indices[device, in_buckets] = _make_indices(spread, real, self._shared, device)
        return self._indices[device, in_buckets]

    def _places(self) -> tuple[Tensor, Tensor]:
        """The packed token of every place of the buckets, and which places are real."""
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
        return torch.cat(spread), torch.cat(real)

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


@dataclass(frozen=True, slots=True)
class _Indices:
    """Between computed tokens (U) and places in attention (P >= U). One place of a token is its home, where its result is taken from."""

    spread: Tensor
    """int64 [P]: the token at each place."""
    home: Tensor
    """int64 [U]: each token's home."""
    is_home: Tensor
    """float [P, 1, 1]: 1 or 0."""
    copies: Tensor
    """Real places that are not home: a prompt in its other sequences."""
    copied: Tensor
    """The tokens there."""


def _make_indices(spread: Tensor, real: Tensor, shared: SharedTokens | None, device: torch.device) -> _Indices:
    if shared is not None:
        home_of_packed = torch.empty(len(shared.token_of), dtype=torch.long)
        home_of_packed[spread[real]] = real.nonzero().squeeze(1)
        home = home_of_packed[shared.computed.cpu()]
        spread = shared.token_of.cpu()[spread]
    else:
        home = torch.empty(int(spread.max()) + 1, dtype=torch.long)
        home[spread[real]] = real.nonzero().squeeze(1)
    is_home = torch.zeros(len(spread), dtype=torch.bool)
    is_home[home] = True
    copies = (real & ~is_home).nonzero().squeeze(1)
    return _Indices(*(x.to(device) for x in (spread, home, is_home.float().view(-1, 1, 1), copies, spread[copies])))


class _Spread(torch.autograd.Function):
    """[U, ...] -> [P, ...]. The gradient is a gather too: places that are not real get none, because nobody uses them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, indices: _Indices) -> Tensor:
        ctx.indices = indices
        return x.index_select(0, indices.spread)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        indices = ctx.indices
        grad = grads[0].index_select(0, indices.home)
        if len(indices.copies):
            grad.index_add_(0, indices.copied, grads[0].index_select(0, indices.copies))
        return grad, None


class _Collect(torch.autograd.Function):
    """[P, ...] -> [U, ...]: what is at the tokens' homes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, indices: _Indices) -> Tensor:
        ctx.indices = indices
        return x.index_select(0, indices.home)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        indices = ctx.indices
        return grads[0].index_select(0, indices.spread).mul_(indices.is_home.to(grads[0].dtype)), None


# -- CUDA -----------------------------------------------------------------------------------------------------------------------


_Kernel = Callable[["PackedContext", Tensor, Tensor, Tensor, "AttentionSpec"], Tensor]


def _kernel_for(q: Tensor, v: Tensor, spec: AttentionSpec) -> _Kernel | None:
    """A kernel for packed sequences; None on the CPU and for what none can do: float32, sinks, large or unequal head sizes."""
    if not q.is_cuda or q.dtype not in (torch.float16, torch.bfloat16) or spec.sinks is not None or not q.shape[2] == v.shape[2] <= 256:
        return None
    if importlib.util.find_spec("flash_attn") is not None:
        return _flash_attn
    if spec.softcap is None and torch.cuda.get_device_capability(q.device) >= (8, 0):
        return _torch_varlen
    return None


def _flash_attn(context: PackedContext, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    cu_seqlens, longest = context.cu_seqlens_on(q.device), max(context.lengths)
    window = (-1, -1) if spec.sliding_window is None else (spec.sliding_window - 1, 0)
    options = {"softmax_scale": spec.scaling, "causal": True, "window_size": window, "softcap": spec.softcap or 0.0}
    return flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, longest, longest, **options)


def _torch_varlen(context: PackedContext, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    cu_seqlens, longest = context.cu_seqlens_on(q.device), max(context.lengths)
    window = (-1, 0) if spec.sliding_window is None else (spec.sliding_window - 1, 0)
    options = {"scale": spec.scaling, "window_size": window, "enable_gqa": q.shape[1] != k.shape[1]}
    out = varlen_attn(q, k, v, cu_seqlens, cu_seqlens, longest, longest, **options)
    assert isinstance(out, Tensor)  # it is a tuple when return_aux is asked for
    return out
