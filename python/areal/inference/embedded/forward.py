"""The engine's forward pass: the Hugging Face model's own, or a fused one for the families whose layer is Llama's.

Prefill, decode and K/V recompute all go through here; only the attention context differs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from areal.models.attention import AttentionContext, AttentionSpec
from areal.models.heads import head_of
from areal.models.loading import forward_hidden, head

_LLAMA_FAMILY = {"llama", "mistral", "qwen2", "qwen3"}
_TABLE_QUANTUM = 1024


class Forward:
    """Hidden states and logits of one model.

    For Llama-like models the projections of q, k, v and of gate and up are each one product: their parameters become views of one
    tensor, so that weights written into the parameters are the fused ones too.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._head = head_of(model)
        self._fused = _FusedLlama(model) if model.config.model_type in _LLAMA_FAMILY and model.config.hidden_act == "silu" else None
        self.vocab_size: int = head(model).weight.shape[0]

    def hidden(self, ids: Tensor, positions: Tensor, context: AttentionContext) -> Tensor:
        """Hidden states before the head: ids and positions [T] -> [T, hidden]."""
        if self._fused is not None:
            return self._fused(ids, positions, context)
        return forward_hidden(self._model, ids, positions, context)

    def logits(self, hidden: Tensor) -> Tensor:
        """[n, hidden] -> [n, vocabulary]."""
        return self._head.logits(hidden)


@dataclass(slots=True)
class _Layer:
    module: Any
    spec: AttentionSpec
    qkv: Tensor  # [(heads + 2 kv_heads) * d, hidden]
    qkv_bias: Tensor | None
    gate_up: Tensor  # [2 * intermediate, hidden]
    gate_up_bias: Tensor | None


class _FusedLlama:
    def __init__(self, model: PreTrainedModel) -> None:
        config = model.config
        self._body: Any = model.model
        body = self._body
        self._heads = config.num_attention_heads
        self._kv_heads = config.num_key_value_heads
        self._d = body.layers[0].self_attn.head_dim
        self._layers = [_fuse(layer) for layer in body.layers]
        # F.rms_norm rounds once where the module rounds twice: the same in float32 only.
        self._exact_norm = next(model.parameters()).dtype == torch.float32
        self._cos = self._sin = torch.empty(0)

    def __call__(self, ids: Tensor, positions: Tensor, context: AttentionContext) -> Tensor:
        n, heads, kv_heads, d = ids.shape[0], self._heads, self._kv_heads, self._d
        n_qk = (heads + kv_heads) * d
        x = F.embedding(ids, self._body.embed_tokens.weight)
        cos, sin = self._rotation(positions)
        for index, layer in enumerate(self._layers):
            attention, mlp = layer.module.self_attn, layer.module.mlp
            qkv = F.linear(self._norm(layer.module.input_layernorm, x), layer.qkv, layer.qkv_bias)
            qk = qkv[:, :n_qk].view(n, heads + kv_heads, d)
            if hasattr(attention, "q_norm"):
                qk = torch.cat([self._norm(attention.q_norm, qk[:, :heads]), self._norm(attention.k_norm, qk[:, heads:])], dim=1)
            qk = torch.addcmul(qk * cos, qk.roll(d // 2, -1), sin)
            v = qkv[:, n_qk:].view(n, kv_heads, d)
            out = context.attend(index, qk[:, :heads], qk[:, heads:], v, layer.spec)
            x = _add_linear(x, out.reshape(n, heads * d), attention.o_proj)
            gate_up = F.linear(self._norm(layer.module.post_attention_layernorm, x), layer.gate_up, layer.gate_up_bias)
            gate, up = gate_up.chunk(2, dim=-1)
            x = _add_linear(x, F.silu(gate) * up, mlp.down_proj)
        return self._norm(self._body.norm, x)

    def _norm(self, norm: Any, x: Tensor) -> Tensor:
        return F.rms_norm(x, norm.weight.shape, norm.weight, norm.variance_epsilon) if self._exact_norm else norm(x)

    def _rotation(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin [T, 1, d] of the rotary embedding; sin's first half is negated, so that rolling x by d/2 rotates it."""
        needed = int(positions.max()) + 1
        if needed > self._cos.shape[0]:
            table = torch.arange(-(-needed // _TABLE_QUANTUM) * _TABLE_QUANTUM, device=positions.device).unsqueeze(0)
            cos, sin = self._body.rotary_emb(self._body.embed_tokens.weight, table)
            self._cos = cos[0].unsqueeze(1)
            self._sin = torch.cat([-sin[0, :, : self._d // 2], sin[0, :, self._d // 2 :]], dim=-1).unsqueeze(1)
        return self._cos[positions], self._sin[positions]


def _add_linear(x: Tensor, y: Tensor, linear: nn.Linear) -> Tensor:
    out = torch.addmm(x, y, linear.weight.t())
    return out if linear.bias is None else out.add_(linear.bias)


def _fuse(layer: Any) -> _Layer:
    attention, mlp = layer.self_attn, layer.mlp
    qkv, qkv_bias = _stack([attention.q_proj, attention.k_proj, attention.v_proj])
    gate_up, gate_up_bias = _stack([mlp.gate_proj, mlp.up_proj])
    window = getattr(attention, "sliding_window", None)
    if window is None and attention.config.model_type == "mistral":
        window = attention.config.sliding_window
    return _Layer(layer, AttentionSpec(attention.scaling, window), qkv, qkv_bias, gate_up, gate_up_bias)


def _stack(linears: list[nn.Linear]) -> tuple[Tensor, Tensor | None]:
    """One weight and bias for linear maps of the same input, of which theirs become views."""
    sizes = [linear.out_features for linear in linears]
    weight = torch.cat([linear.weight.data for linear in linears])
    for linear, part in zip(linears, weight.split(sizes), strict=True):
        linear.weight.data = part
    if linears[0].bias is None:
        return weight, None
    bias = torch.cat([linear.bias.data for linear in linears])
    for linear, part in zip(linears, bias.split(sizes), strict=True):
        linear.bias.data = part
    return weight, bias
