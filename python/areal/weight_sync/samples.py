"""The first rows of some tensors, for a check of servers that cannot hash what they hold."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from areal.weight_sync.stream import BucketPlan, TensorSpec

_SAMPLES = 8
_SAMPLE_ROWS = 2
_SAMPLE_NUMEL = 2**18


def sample_tensors(
    gather: Callable[[BucketPlan, Tensor | None], None], buckets: Sequence[BucketPlan], turn: int, device: torch.device | None
) -> dict[str, np.ndarray]:
    """The first rows, in float32, of small tensors of one bucket, another one at every turn: a collective, with ``device`` None on ranks other than 0."""
    sampled = {bucket: [spec for spec in bucket.tensors if _is_sampled(spec)] for bucket in buckets}
    candidates = [bucket for bucket, specs in sampled.items() if specs]
    if not candidates:
        return {}
    bucket = candidates[turn % len(candidates)]
    data = None if device is None else torch.empty(bucket.nbytes, dtype=torch.uint8, device=device)
    gather(bucket, data)
    if data is None:
        return {}
    specs = sampled[bucket]
    step = -(-len(specs) // _SAMPLES)
    return {spec.name: spec.view(data)[:_SAMPLE_ROWS].float().cpu().numpy() for spec in specs[turn % step :: step]}


def _is_sampled(spec: TensorSpec) -> bool:
    """SGLang makes Python numbers of a whole tensor to give its first rows, and looks for k and v elsewhere if heads have a size of their own."""
    return 0 < torch.Size(spec.shape).numel() <= _SAMPLE_NUMEL and not any(part in spec.name for part in (".k_proj.", ".v_proj."))
