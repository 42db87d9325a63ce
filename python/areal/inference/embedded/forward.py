"""The forward pass of the engine."""

from __future__ import annotations

from torch import Tensor
from transformers import PreTrainedModel

from areal.models.attention import AttentionContext
from areal.models.loading import forward_hidden, head


class Forward:
    def __init__(self, model: PreTrainedModel, *, fused: bool) -> None:
        self._model = model
        self._head = head(model)
        self.vocab_size = self._head.weight.shape[0]

    def hidden(self, ids: Tensor, positions: Tensor, context: AttentionContext) -> Tensor:
        """Hidden states before the head: ids and positions [T] -> [T, hidden]."""
        return forward_hidden(self._model, ids, positions, context)

    def logits(self, hidden: Tensor) -> Tensor:
        return self._head(hidden)
