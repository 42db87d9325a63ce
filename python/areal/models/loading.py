"""Building and loading models: from a Hugging Face directory, or from random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from areal.models.attention import ATTENTION_NAME, AttentionContext


def load_model(path: str | Path, *, dtype: torch.dtype, device: torch.device | str = "cpu") -> PreTrainedModel:
    """The model of a Hugging Face directory, in eval mode, with areal's attention."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation=ATTENTION_NAME, local_files_only=True)
    return model.to(device).eval()


def create_model(config: dict[str, Any], *, seed: int, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A model with random weights from a Hugging Face config given as a dict with ``model_type``."""
    torch.manual_seed(seed)
    keys = dict(config)
    hf_config = AutoConfig.for_model(keys.pop("model_type"), **keys)
    return AutoModelForCausalLM.from_config(hf_config, dtype=dtype, attn_implementation=ATTENTION_NAME).eval()


def forward_hidden(model: PreTrainedModel, input_ids: Tensor, position_ids: Tensor, context: AttentionContext) -> Tensor:
    """Hidden states before the head: ids and positions [T] -> [T, hidden]."""
    out = model.model(input_ids=input_ids.unsqueeze(0), position_ids=position_ids.unsqueeze(0), use_cache=False, attention_context=context)
    return out.last_hidden_state[0]


def head(model: PreTrainedModel) -> nn.Linear:
    """The output projection (its weight is [vocabulary, hidden])."""
    return model.get_output_embeddings()
