"""K/V of the running sequences: one slot each, grown together; and the two attention contexts that use it.

Row i of a decode batch is slot i, so decoding reads a view of the cache. Entry [slot, :, p] belongs to the token at position p.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from areal.models.attention import AttentionSpec, PackedContext
from areal.models.loading import forward_hidden
from areal.ops.decode_attention import decode_attention, runs_compiled

SHORT_PROMPT = 128
"""Tokens: up to this length the compiled attention beats a packed prefill on the CPU."""
_CAPACITY_QUANTUM = 64
_SPAN_QUANTUM = 16
"""Decode attention covers a multiple of this many positions."""
_DETERMINISTIC_SPAN_QUANTUM = 64
"""In deterministic mode: whole blocks of every vectorised reduction."""
_MIN_BUCKET_SPAN = 64
_MIN_ROWS = 4
"""Fewer rows than this take other code paths in the BLAS, whose last bits differ (deterministic mode)."""


@dataclass(slots=True)
class _ShapeProbe:
    """Records what each layer caches: (kv heads, d of K), (kv heads, d of V)."""

    shapes: dict[int, tuple[tuple[int, int], tuple[int, int]]] = field(default_factory=dict)
    plain: bool = True
    """Whether every layer's attention is one that ``ops.decode_attention`` does."""

    def attend(self, layer_idx: int, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor:
        self.shapes[layer_idx] = (k.shape[1], k.shape[2]), (v.shape[1], v.shape[2])
        self.plain &= spec.sinks is None and q.shape[2] == k.shape[2] == v.shape[2]
        return q.new_zeros(q.shape[0], q.shape[1], v.shape[2])


class KVCache:
    """K and V of every layer as [n_slots, kv_heads, capacity, d] views of as few tensors as possible."""

    def __init__(self, model: PreTrainedModel, n_slots: int, max_context: int) -> None:
        probe = _ShapeProbe()
        parameter = next(model.parameters())
        ids = torch.zeros(2, dtype=torch.long, device=parameter.device)
        forward_hidden(model, ids, torch.arange(2, device=parameter.device), probe)
        self._shapes = probe.shapes
        self.device = parameter.device
        self._options = {"dtype": parameter.dtype, "device": parameter.device}
        self.compiled = probe.plain and all(runs_compiled(parameter.new_empty(0, k_shape[1])) for k_shape, _ in probe.shapes.values())
        """Whether attention over the slots runs compiled."""
        self.n_slots = n_slots
        self.max_context = max_context
        self.capacity = 0
        self.k: dict[int, Tensor] = {}
        self.v: dict[int, Tensor] = {}
        self._storage: dict[tuple[int, int], Tensor] = {}
        self.reserve(min(256, max_context))

    def reserve(self, length: int) -> None:
        """Makes room for positions below ``length`` in every slot, keeping what is there."""
        if length <= self.capacity:
            return
        capacity = min(_round_up(self.max_context, _CAPACITY_QUANTUM), max(_CAPACITY_QUANTUM, 1 << (length - 1).bit_length()))
        wanted: dict[tuple[int, int], list[tuple[str, int]]] = {}
        for layer, (k_shape, v_shape) in self._shapes.items():
            wanted.setdefault(k_shape, []).append(("k", layer))
            wanted.setdefault(v_shape, []).append(("v", layer))
        for (heads, d), entries in wanted.items():
            # Zeros, not garbage: masked positions enter a product with weight 0, and 0 * NaN is NaN.
            grown = torch.zeros(len(entries), self.n_slots, heads, capacity, d, **self._options)
            old = self._storage.pop((heads, d), None)
            if old is not None:
                grown[:, :, :, : self.capacity] = old
            self._storage[heads, d] = grown
            for index, (kind, layer) in enumerate(entries):
                (self.k if kind == "k" else self.v)[layer] = grown[index]
        self.capacity = capacity

    def copy(self, source: int, targets: list[int], length: int) -> None:
        """Copies positions below ``length`` of one slot to others."""
        for storage in self._storage.values():
            if len(targets) == 1:
                storage[:, targets[0], :, :length] = storage[:, source, :, :length]
            else:
                storage[:, targets, :, :length] = storage[:, source, :, :length].unsqueeze(1)


class PrefillContext:
    """Packed causal attention over whole sequences that also stores their K/V, position 0 first."""

    def __init__(self, cache: KVCache, slots: list[int], lengths: list[int]) -> None:
        self._cache = cache
        self._packed = PackedContext(lengths)
        # The compiled op goes token by token: no match for matrix products on long prompts, nor for a GPU's.
        self._compiled = cache.compiled and cache.device.type == "cpu" and max(lengths) <= SHORT_PROMPT
        self._slots, self.positions = (x.to(cache.device) for x in slots_and_positions(slots, lengths))
        self._lengths = self.positions + 1

    def attend(self, layer_idx: int, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor:
        k_cache, v_cache = self._cache.k[layer_idx], self._cache.v[layer_idx]
        if self._compiled:
            return store_and_attend(q, k, v, k_cache, v_cache, self._slots, self._lengths, spec)
        k_cache[self._slots, :, self.positions] = k
        v_cache[self._slots, :, self.positions] = v
        return self._packed.attend(layer_idx, q, k, v, spec)


def store_and_attend(
    q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor | None, lengths: Tensor, spec: AttentionSpec
) -> Tensor:
    """``ops.decode_attention`` as a layer asks for it: k and v are stored first."""
    q, k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (q, k, v))
    window, softcap = spec.sliding_window, spec.softcap
    return decode_attention(q, k_cache, v_cache, slots, lengths, scaling=spec.scaling, window=window, softcap=softcap, new_k=k, new_v=v)


def slots_and_positions(slots: list[int], lengths: list[int]) -> tuple[Tensor, Tensor]:
    """int64 [T] each: where the tokens of whole sequences go."""
    counts = torch.tensor(lengths)
    ends = counts.cumsum(0)
    total = int(ends[-1])
    positions = torch.arange(total) - torch.repeat_interleave(ends - counts, counts, output_size=total)
    return torch.repeat_interleave(torch.tensor(slots), counts, output_size=total), positions


class DecodeContext:
    """Attention of one new token per row over the rows' slots, which it stores first.

    Compiled where ``ops.decode_attention`` is (on a GPU; on the CPU in float32 and bfloat16). Else by dense products over all rows; rows
    whose lengths differ widely are then split into length buckets, since a row costs as much as the longest of its bucket. In
    deterministic mode a row's bucket follows from its own length alone, so its result does not depend on the other rows.
    """

    def __init__(
        self, cache: KVCache, positions: Tensor, lengths: list[int], slots: Tensor | None = None, *, deterministic: bool = False
    ) -> None:
        """
        Args:
            positions: int64 [R] on the cache's device, where each row's new token goes.
            lengths: the same of rows that are slots, plus 1, on the host; only read where not compiled.
            slots: int64 [R] on that device, each row's slot; None = row r is slot r. Compiled only: rows may then share a slot, as a prompt's tokens do.
        """
        assert slots is None or cache.compiled
        self._cache = cache
        self._positions = positions
        self._seen = positions + 1
        self._slots = slots
        self._lengths = lengths
        self._deterministic = deterministic

    @cached_property
    def _rows(self) -> Tensor:
        return torch.arange(len(self._lengths), device=self._positions.device)

    @cached_property
    def _buckets(self) -> list[_Bucket]:
        device = self._positions.device
        return [
            _Bucket(None if rows is None else torch.tensor(rows, device=device), span, self._positions)
            for rows, span in _plan_buckets(self._lengths, self._cache.capacity, self._deterministic)
        ]

    def attend(self, layer_idx: int, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor:
        k_cache, v_cache = self._cache.k[layer_idx], self._cache.v[layer_idx]
        if self._cache.compiled:
            return store_and_attend(q, k, v, k_cache, v_cache, self._slots, self._seen, spec)
        k_cache[self._rows, :, self._positions] = k
        v_cache[self._rows, :, self._positions] = v
        n = q.shape[0]
        if self._buckets[0].rows is None:
            return self._buckets[0].attend(q, k_cache[:n], v_cache[:n], spec)
        out = q.new_empty(n, q.shape[1], v.shape[2])
        for bucket in self._buckets:
            rows, span = bucket.rows, bucket.span
            out[rows] = bucket.attend(q[rows], k_cache[:, :, :span][rows], v_cache[:, :, :span][rows], spec)
        return out


class _Bucket:
    """Rows (None: all) that attend over positions below ``span``."""

    def __init__(self, rows: Tensor | None, span: int, positions: Tensor) -> None:
        self.rows = rows
        self.span = span
        self._positions = positions if rows is None else positions[rows]
        self._masks: dict[tuple[int | None, int, torch.dtype], Tensor] = {}

    def mask(self, window: int | None, repeats: int, dtype: torch.dtype) -> Tensor:
        """Additive mask [n * repeats, 1, span]: -inf on positions after the row's own, or before its window."""
        key = (window, repeats, dtype)
        if key not in self._masks:
            at = torch.arange(self.span, device=self._positions.device)
            hidden = at > self._positions.unsqueeze(1)
            if window is not None:
                hidden |= at <= self._positions.unsqueeze(1) - window
            mask = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, -torch.inf)
            self._masks[key] = mask.repeat_interleave(repeats, 0).unsqueeze(1) if repeats > 1 else mask.unsqueeze(1)
        return self._masks[key]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor:
        """q [n, heads, d]; k, v [n, kv_heads, >= span, d]. Query heads that share a K/V head become rows of one product."""
        n, heads, d = q.shape
        kv_heads = k.shape[1]
        q = q.reshape(n, kv_heads, heads // kv_heads, d)
        k, v = k[:, :, : self.span], v[:, :, : self.span]
        if q.is_cuda and spec.softcap is None and spec.sinks is None:
            mask = self.mask(spec.sliding_window, 1, q.dtype).unsqueeze(1)
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=spec.scaling).reshape(n, heads, -1)
        mask = self.mask(spec.sliding_window, kv_heads, q.dtype)
        q, k, v = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
        if spec.softcap is None:
            scores = torch.baddbmm(mask, q, k.transpose(1, 2), alpha=spec.scaling)
        else:
            scores = torch.bmm(q, k.transpose(1, 2)) * (spec.scaling / spec.softcap)
            scores = scores.tanh_().mul_(spec.softcap).add_(mask)
        if spec.sinks is None:
            weights = torch.softmax(scores, dim=-1)
        else:
            sinks = spec.sinks.to(scores.dtype).view(kv_heads, -1, 1).repeat(n, 1, 1)
            weights = torch.softmax(torch.cat([scores, sinks], dim=-1), dim=-1)[..., :-1]
        return torch.bmm(weights, v).view(n, heads, -1)


def _plan_buckets(lengths: list[int], capacity: int, deterministic: bool) -> list[tuple[list[int] | None, int]]:
    """[(rows, span)]; rows None = all of them in one bucket."""
    longest = min(capacity, _round_up(max(lengths), _SPAN_QUANTUM))
    if deterministic:
        spans = [min(capacity, _round_up(n, _DETERMINISTIC_SPAN_QUANTUM)) for n in lengths]
        longest = max(spans)
    else:
        # A split copies the K/V that it reads, so it must save more than half of the reading.
        if 2 * sum(lengths) >= longest * len(lengths):
            return [(None, longest)]
        spans = [min(longest, max(_MIN_BUCKET_SPAN, 1 << (n - 1).bit_length())) for n in lengths]
    by_span: dict[int, list[int]] = {}
    for row, span in enumerate(spans):
        by_span.setdefault(span, []).append(row)
    if len(by_span) == 1:
        return [(None, longest)]
    if deterministic:
        # Repeated rows write the same result twice.
        by_span = {span: rows + rows[:1] * (_MIN_ROWS - len(rows)) for span, rows in by_span.items()}
    return [(rows, span) for span, rows in by_span.items()]


def _round_up(n: int, to: int) -> int:
    return -(-n // to) * to
