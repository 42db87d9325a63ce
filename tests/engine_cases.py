"""Tiny random models and the reference that engine tests compare with."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from areal.inference.embedded.request import Answer, GenerateRequest, SamplingParams
from areal.models.loading import create_model

EOS = 1
_COMMON: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 61,
    "max_position_embeddings": 256,
    "eos_token_id": EOS,
    "bos_token_id": 0,
    "pad_token_id": 0,
}
_GQA = {**_COMMON, "num_key_value_heads": 2}
_GEMMA = {**_GQA, "head_dim": 16, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
MODELS: dict[str, dict[str, Any]] = {
    "qwen2": {**_GQA, "model_type": "qwen2", "tie_word_embeddings": True},
    "qwen2-window": {
        **_GQA,
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "qwen3": {**_GQA, "model_type": "qwen3", "head_dim": 16},
    "llama": {**_GQA, "model_type": "llama", "attention_bias": True, "mlp_bias": True, "rope_parameters": _LLAMA3_ROPE},
    "mistral": {**_GQA, "model_type": "mistral", "sliding_window": 8},
    "gemma2": {**_GEMMA, "model_type": "gemma2", "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0},
    "gemma3": {**_GEMMA, "model_type": "gemma3_text"},
    "gpt_neox": {**_COMMON, "model_type": "gpt_neox", "rotary_pct": 0.5},
}


def build(name: str, seed: int = 0) -> PreTrainedModel:
    """The model with weights larger than those of a fresh one, so that its answers depend on what it reads."""
    model = create_model(MODELS[name], seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.15)
    return model


def requests(n: int, *, seed: int = 0, group: int = 3, prompt: tuple[int, int] = (1, 30), answer: tuple[int, int] = (1, 40), **params: Any):
    """n requests, ``group`` of them for each prompt, of random lengths."""
    rng = random.Random(seed)
    made, ids = [], []
    for i in range(n):
        if i % group == 0:
            ids = [rng.randrange(2, 61) for _ in range(rng.randint(*prompt))]
        sampling = SamplingParams(max_new_tokens=rng.randint(*answer), sampling_seed=seed * 1000 + i, ignore_eos=True, **params)
        made.append(GenerateRequest(ids, sampling, rid=str(i)))
    return made


def eager_logprobs(model: PreTrainedModel, answer: Answer, temperature: float = 1.0) -> Tensor:
    """log_softmax(logits / temperature) of the answer's tokens by one plain forward of transformers' eager attention."""
    prompt = answer.request.input_ids
    ids = torch.tensor([prompt + answer.output_ids.tolist()])
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            logprobs = torch.log_softmax(model(ids, use_cache=False).logits[0].float() / temperature, dim=-1)
    finally:
        model.set_attn_implementation(before)
    return logprobs[len(prompt) - 1 : -1].gather(1, ids[0, len(prompt) :, None]).squeeze(1)


def worst_error(model: PreTrainedModel, answers: list[Answer], temperature: float = 1.0) -> float:
    return max((eager_logprobs(model, a, temperature) - torch.from_numpy(a.logprobs)).abs().max().item() for a in answers)
