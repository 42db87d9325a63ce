"""Sequence parallelism by all-to-all (Ulysses, arXiv 2309.14509): context ranks hold slices of a micro-batch's tokens, and attention sees
all tokens of some heads.

Each context rank runs the layers on its slice. Around attention tokens are exchanged for heads and back, so whatever computes packed
sequences on one rank does it here too. The slices are contiguous and may differ by one token; nothing is padded. A loss token belongs to
the rank that holds the hidden state from which it is predicted. Gradients of parameters are sums over ranks, as for data parallelism.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from areal.models.attention import AttentionContext, AttentionSpec


@dataclass(frozen=True)
class ContextPart:
    """What one context rank has of a micro-batch, of which all of them know the token ids."""

    group: dist.ProcessGroup
    index: int
    """Of this rank in ``group``."""
    sizes: list[int]
    """Computed tokens of each rank, in order; none is 0."""
    rows: Tensor
    """int64: the loss tokens that are predicted from this rank's hidden states."""

    @cached_property
    def begin(self) -> int:
        return sum(self.sizes[: self.index])

    @cached_property
    def end(self) -> int:
        return self.begin + self.sizes[self.index]

    def whole(self, x: Tensor) -> Tensor:
        """The sum over the context ranks of what is 0 outside of each one's own rows: the same on all of them.

        Every rank computes the same loss from it; in backward each takes the gradient of its own rows, so the loss counts once.
        """
        return _Whole.apply(x, self.group)

    def whole_sums(self, sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Scalars that are sums over own rows, without gradient, summed over the context ranks."""
        stacked = torch.stack([value.detach().float() for value in sums.values()])
        dist.all_reduce(stacked, group=self.group)
        return dict(zip(sums, stacked.unbind(), strict=True))


def slice_sizes(n_tokens: int, n_ranks: int) -> list[int]:
    """Slices that differ by one token at most."""
    return [n_tokens * (i + 1) // n_ranks - n_tokens * i // n_ranks for i in range(n_ranks)]


class _Whole(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        result = x.clone()
        dist.all_reduce(result, group=group)
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class _AllToAll(torch.autograd.Function):
    """Rows [sum(sent), ...] -> [sum(received), ...]: ``sent[i]`` of them, in order, go to rank i, ``received[i]`` come from it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.back = received, sent, group
        return _exchange(x, sent, received, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return _exchange(grads[0], *ctx.back), None, None, None


def _exchange(x: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
    out = x.new_empty(sum(received), *x.shape[1:])
    dist.all_to_all_single(out, x.contiguous(), received, sent, group=group)
    return out


class UlyssesContext:
    """Attention of a slice: ``inner`` attends over all tokens with this rank's share of the heads."""

    def __init__(self, inner: AttentionContext, part: ContextPart) -> None:
        self._inner = inner
        self._part = part

    def attend(self, layer_idx: int, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor:
        """q [slice, heads, d], k [slice, kv_heads, d], v [slice, kv_heads, d_v] -> [slice, heads, d_v]."""
        part, n_ranks = self._part, len(self._part.sizes)
        heads, own = q.shape[1], part.sizes[part.index]
        if heads % n_ranks:
            raise ValueError(heads_sentence(heads, n_ranks))
        # Fewer K/V heads than ranks, or a number that the ranks do not divide: each is sent to all ranks whose queries look at it.
        copies = math.lcm(k.shape[1], n_ranks) // k.shape[1]
        if copies > 1:
            k, v = k.repeat_interleave(copies, 1), v.repeat_interleave(copies, 1)
        # One exchange for all three: [slice, heads, d] -> [ranks * slice, numbers of a token for a rank].
        for_ranks = [x.reshape(own, n_ranks, -1).transpose(0, 1) for x in (q, k, v)]
        widths = [x.shape[2] for x in for_ranks]
        sent = torch.cat(for_ranks, dim=2).flatten(0, 1)
        received = _AllToAll.apply(sent, [own] * n_ranks, part.sizes, part.group)
        q, k, v = (x.unflatten(1, (-1, whole.shape[2])) for x, whole in zip(received.split(widths, dim=1), (q, k, v), strict=True))
        if spec.sinks is not None:
            spec = replace(spec, sinks=spec.sinks.chunk(n_ranks)[part.index])
        out = self._inner.attend(layer_idx, q, k, v, spec)
        back = _AllToAll.apply(out.flatten(1), part.sizes, [own] * n_ranks, part.group)
        return back.unflatten(0, (n_ranks, own)).transpose(0, 1).reshape(own, heads, -1)


def heads_sentence(heads: int, n_ranks: int) -> str:
    return f"{heads} attention heads cannot be shared by {n_ranks} context ranks equally"
