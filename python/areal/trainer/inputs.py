"""A micro-batch on the device of a rank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from areal.models.prefix import SharedTokens, find_shared_prompts
from areal.types import Microbatch


@dataclass(slots=True)
class Inputs:
    """Tensors are [T] unless noted."""

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
    ref_logprobs: Tensor | None = None
    values: Tensor | None = None
    """Where a critic is trained: what it said before the train step, and what it should have said."""
    returns: Tensor | None = None


def to_device(mb: Microbatch, device: torch.device, version: int) -> Inputs:
    """``version``: the policy's, of which tokens are ``fresh``."""

    def put(array: Any) -> Tensor:
        return torch.from_numpy(array).to(device, non_blocking=True)

    return Inputs(
        input_ids=put(mb.input_ids),
        position_ids=put(mb.position_ids),
        lengths=(mb.cu_seqlens[1:] - mb.cu_seqlens[:-1]).tolist(),
        shared=find_shared_prompts(mb.input_ids, mb.cu_seqlens, mb.loss_mask, device),
        rows=put(mb.loss_mask.nonzero()[0]),
        loss_mask=put(mb.loss_mask),
        behavior_logprobs=put(mb.logprobs),
        advantages=put(mb.advantages),
        fresh=put(mb.loss_mask & (mb.versions == version)),
        age=put(np.where(mb.loss_mask, version - mb.versions, 0).astype(np.float32)),
        ref_logprobs=None if mb.ref_logprobs is None else put(mb.ref_logprobs),
        values=None if mb.values is None else put(mb.values),
        returns=None if mb.returns is None else put(mb.returns),
    )
