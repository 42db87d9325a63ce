"""A micro-batch on the device of a rank."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from areal.models.prefix import SharedTokens, find_shared_prompts
from areal.models.ulysses import ContextPart, slice_sizes
from areal.trainer.mesh import RankMesh
from areal.types import Microbatch


@dataclass(slots=True)
class Inputs:
    """Tensors are [T] unless noted, and whole on every context rank."""

    input_ids: Tensor
    position_ids: Tensor
    lengths: list[int]
    """Tokens of each sequence."""
    shared: SharedTokens | None
    rows: Tensor
    """The indices of the loss tokens."""
    loss_mask: Tensor
    behavior_logprobs: Tensor
    advantages: Tensor
    fresh: Tensor
    """Loss tokens that the current version sampled."""
    age: Tensor
    """float32: how many versions before the current one a loss token was sampled."""
    part: ContextPart | None = None
    """What this rank computes, if it shares the micro-batch with others."""
    ref_logprobs: Tensor | None = None
    proximal_logprobs: Tensor | None = None
    values: Tensor | None = None
    """Where a critic is trained: what it said before the train step, and what it should have said."""
    returns: Tensor | None = None


def to_device(mb: Microbatch, device: torch.device, version: int, mesh: RankMesh | None = None) -> Inputs:
    """``version``: the policy's, of which tokens are ``fresh``. Context ranks of ``mesh`` share the micro-batch; one that has fewer tokens
    than they are gets a sequence without loss tokens, so that each has one to compute."""
    n_ranks = 1 if mesh is None else mesh.layout.context
    if mb.n_tokens < n_ranks:
        mb = _with_another(mb, n_ranks - mb.n_tokens)

    def put(array: Any) -> Tensor:
        return torch.from_numpy(array).to(device, non_blocking=True)

    shared = find_shared_prompts(mb.input_ids, mb.cu_seqlens, mb.loss_mask, device)
    if shared is not None and len(shared.computed) < n_ranks:
        shared = None
    rows = put(mb.loss_mask.nonzero()[0])
    return Inputs(
        input_ids=put(mb.input_ids),
        position_ids=put(mb.position_ids),
        lengths=(mb.cu_seqlens[1:] - mb.cu_seqlens[:-1]).tolist(),
        shared=shared,
        rows=rows,
        loss_mask=put(mb.loss_mask),
        behavior_logprobs=put(mb.logprobs),
        advantages=put(mb.advantages),
        fresh=put(mb.loss_mask & (mb.versions == version)),
        age=put(np.where(mb.loss_mask, version - mb.versions, 0).astype(np.float32)),
        ref_logprobs=None if mb.ref_logprobs is None else put(mb.ref_logprobs),
        part=None if mesh is None else _part(mesh, mb.n_tokens, rows, shared),
        proximal_logprobs=None if mb.proximal_logprobs is None else put(mb.proximal_logprobs),
        values=None if mb.values is None else put(mb.values),
        returns=None if mb.returns is None else put(mb.returns),
    )


def _part(mesh: RankMesh, n_tokens: int, rows: Tensor, shared: SharedTokens | None) -> ContextPart | None:
    group = mesh.context_group()
    if group is None:
        return None
    sizes = slice_sizes(n_tokens if shared is None else len(shared.computed), mesh.layout.context)
    part = ContextPart(group, mesh.context_index, sizes, rows)
    before = rows - 1 if shared is None else shared.token_of[rows - 1]
    return replace(part, rows=rows[(before >= part.begin) & (before < part.end)])


def _with_another(mb: Microbatch, n: int) -> Microbatch:
    """``mb`` and a sequence of ``n`` tokens that nothing is learned from."""
    packed = {f.name: array for f in fields(mb) if isinstance(array := getattr(mb, f.name), np.ndarray) and len(array) == mb.n_tokens}
    longer = {name: np.concatenate([array, np.zeros(n, array.dtype)]) for name, array in packed.items() if name != "cu_seqlens"}
    longer["position_ids"][-n:] = np.arange(n)
    return replace(mb, **longer, cu_seqlens=np.append(mb.cu_seqlens, np.int32(mb.n_tokens + n)))
