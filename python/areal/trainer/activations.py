"""How many bytes autograd keeps of a forward pass, counted on a model without storage."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from areal.models.attention import AttentionSpec
from areal.models.loading import forward_hidden

_TOKENS = 256


class _Attention(torch.autograd.Function):
    """Keeps what flash attention keeps: q, k, v, the result and a number for each query and head."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, score_width: int) -> Tensor:
        out = q.new_empty(q.shape[0], q.shape[1], v.shape[2])
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[0], q.shape[1], max(1, score_width)))
        return out


class _MetaContext:
    def __init__(self, score_width: int) -> None:
        self._score_width = score_width

    def attend(self, layer_idx: int, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor:
        return _Attention.apply(q, k, v, self._score_width)


def saved_bytes_per_token(model: PreTrainedModel, score_width: int = 0) -> float:
    """Bytes for each token that the layers, norms and embedding of ``model`` (on the meta device) keep for backward.

    ``score_width``: attention keeps as many weights for each query and head, where it is computed by two products. A model whose forward
    pass looks at values (the routing of some mixtures of experts) raises what torch raises then: ``RuntimeError``, ``NotImplementedError``.
    """
    storages: dict[int, Tensor] = {}
    owned = {p.untyped_storage()._cdata for p in [*model.parameters(), *model.buffers()]}

    def keep(tensor: Tensor) -> Tensor:
        key = tensor.untyped_storage()._cdata
        if key not in owned:
            storages[key] = tensor  # kept, so that no other storage gets its address
        return tensor

    ids = torch.zeros(_TOKENS, dtype=torch.int64, device="meta")
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        forward_hidden(model, ids, ids, _MetaContext(score_width))
    return sum(t.untyped_storage().nbytes() for t in storages.values()) / _TOKENS
