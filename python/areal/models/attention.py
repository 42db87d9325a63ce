"""The one attention function that every model calls, for packed training and for generation over KV slots.

It is registered with transformers under the name ``areal``. What a layer's attention does is decided by the context object that
the caller hands to the model as keyword ``attention_context``: it reaches this function through the layers (no global, so
activation checkpointing recomputes with the same context).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import AttentionInterface

from areal.models.packed import PackedContext

__all__ = ["ATTENTION_NAME", "AttentionContext", "AttentionSpec", "PackedContext"]

ATTENTION_NAME = "areal"


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """What a layer asks for beyond q, k, v."""

    scaling: float
    sliding_window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None  # [heads], attention-sink logits (gpt_oss)


class AttentionContext(Protocol):
    def attend(self, layer_idx: int, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor:
        """q [T, heads, d], k and v [T, kv_heads, d] -> [T, heads, d_v]."""
        ...


# Keywords that some model passes and that change nothing for a causal, packed, dropout-free call.
_HARMLESS = {
    "position_ids", "use_cache", "cache_position", "is_causal", "output_attentions", "output_hidden_states", "return_dict",
    "past_key_values", "num_items_in_batch", "logits_to_keep", "position_embeddings",
}  # fmt: skip


def areal_attention(
    module: torch.nn.Module,
    query: Tensor,  # [1, heads, T, d]
    key: Tensor,  # [1, kv_heads, T, d]
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    attention_context: AttentionContext | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    if attention_context is None:
        raise ValueError("attention 'areal' needs the keyword attention_context in the model call")
    if attention_mask is not None:
        raise ValueError(f"{type(module).__name__} built an attention mask; attention 'areal' takes none")
    if dropout:
        raise ValueError(f"attention dropout {dropout} is not supported; set attention_dropout to 0 in the model's config")
    unknown = set(kwargs) - _HARMLESS
    if unknown:
        raise ValueError(f"{type(module).__name__} passes the attention keyword '{min(unknown)}', which attention 'areal' does not know")
    spec = AttentionSpec(scaling if scaling is not None else query.shape[-1] ** -0.5, sliding_window, softcap, s_aux)
    out = attention_context.attend(module.layer_idx, query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1), spec)
    return out.unsqueeze(0), None


AttentionInterface.register(ATTENTION_NAME, areal_attention)
