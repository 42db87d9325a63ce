"""Which models areal computes correctly: some are refused by name, all others are tried out on a small random instance.

The attention function takes no mask, so a model whose layers need more than causality, a window, a soft cap or sinks would silently
compute something else; so would one whose head or positions do what areal does not know.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

_LAYER_TYPES = {"full_attention", "sliding_attention"}
_ROPE_BY_LENGTH = {"dynamic", "longrope"}
_LENGTHS = [70, 3, 41, 1, 40]
"""Longer than the small instance's window and original rope length."""
_TOLERANCE = 2e-3
"""In nats; right implementations differ by 1e-5, wrong ones by more than 1e-2 at the weights used here."""


class UnsupportedModel(ValueError):
    """A model that would be computed wrongly; the message says what about it."""


def check_model(config: PretrainedConfig) -> None:
    """``check_supported`` and ``self_check``."""
    check_supported(config)
    self_check(config)


def check_supported(config: PretrainedConfig) -> None:
    """Refuses by name what is known to go wrong. ``UnsupportedModel``."""
    text = config.get_text_config()
    name = f"model type '{text.model_type}'"
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModel(f"{name} is an encoder-decoder; only decoders are supported")
    if unknown := sorted(set(getattr(text, "layer_types", None) or ()) - _LAYER_TYPES):
        raise UnsupportedModel(f"{name} has layers of type '{unknown[0]}'; only {' and '.join(sorted(_LAYER_TYPES))} are supported")
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None) or MODEL_FOR_CAUSAL_LM_MAPPING.get(type(text), None)
    if model_class is None:
        raise UnsupportedModel(f"transformers has no causal language model for {name}")
    if not getattr(model_class, "_supports_attention_backend", False):
        raise UnsupportedModel(
            f"{name} does not let its attention be replaced (transformers' _supports_attention_backend), so it cannot run packed"
        )
    if text.model_type == "qwen2_moe" and getattr(text, "use_sliding_window", False):
        raise UnsupportedModel(f"{name} with use_sliding_window is not supported: its layers do not say which of them have the window")
    if lengthy := sorted(_rope_types(text) & _ROPE_BY_LENGTH):
        raise UnsupportedModel(f"{name} with rope type '{lengthy[0]}' is not supported: its frequencies depend on the length of the batch")


def _rope_types(config: PretrainedConfig) -> set[str]:
    found = set()
    for parameters in (getattr(config, "rope_parameters", None), getattr(config, "rope_scaling", None)):
        if isinstance(parameters, dict):
            nested = [p for p in parameters.values() if isinstance(p, dict)]  # one set for each type of layer
            found |= {str(p.get("rope_type", p.get("type", "default"))) for p in (nested or [parameters])}
    return found


def self_check(config: PretrainedConfig) -> None:
    """Compares packed log-probs with transformers' eager attention, a sequence at a time, on a small random model of this architecture.

    ``UnsupportedModel`` if they differ, and for a model that cannot be made small, which nobody then knows to be right.
    """
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            packed, eager = _instances(small_config(config))
            difference = _difference(packed, eager)
    except UnsupportedModel:
        raise
    except ValueError as error:  # also what areal's attention says about an argument that it does not know
        raise UnsupportedModel(f"model type '{config.model_type}' cannot run packed: {error}") from error
    except (RuntimeError, TypeError, AttributeError, KeyError, IndexError) as error:
        raise UnsupportedModel(
            f"model type '{config.model_type}' is not supported: it cannot be tried out, a small random instance of it fails with {error!r}"
        ) from error
    if not difference < _TOLERANCE:  # NaN is wrong too
        raise UnsupportedModel(
            f"model type '{config.model_type}' is not supported: on a small random instance areal's log-probs differ from transformers' "
            f"by {difference:.2g}, so its attention, positions or head do something that areal does not know"
        )


def small_config(config: PretrainedConfig) -> PretrainedConfig:
    """The same architecture with few, narrow layers, one or two of each type, and short windows."""
    small = copy.deepcopy(config.get_text_config())

    def reduce(key: str, limit: int) -> None:
        value = getattr(small, key, None)
        if isinstance(value, int) and not isinstance(value, bool) and value > limit:
            setattr(small, key, limit)

    if types := getattr(small, "layer_types", None):
        kept = list(dict.fromkeys(types))
        small.layer_types = kept if len(kept) > 1 else kept * min(2, len(types))
        small.num_hidden_layers = len(small.layer_types)
    else:
        reduce("num_hidden_layers", 2)
    _reduce_heads(small)
    for key, limit in _LIMITS.items():
        reduce(key, limit)
    for key in ("pad_token_id", "bos_token_id", "eos_token_id"):
        if hasattr(small, key):
            setattr(small, key, None if key == "pad_token_id" else 0)
    for parameters in (getattr(small, "rope_parameters", None), getattr(small, "rope_scaling", None)):
        for one in _parameter_sets(parameters):
            if "original_max_position_embeddings" in one:
                one["original_max_position_embeddings"] = 32
    return small


def _reduce_heads(small: PretrainedConfig) -> None:
    heads, latent = small.num_attention_heads, hasattr(small, "qk_rope_head_dim")
    kv_heads = getattr(small, "num_key_value_heads", None) or heads
    head_dim = getattr(small, "head_dim", None) or small.hidden_size // heads
    if not latent:
        head_dim = min(head_dim, 32)
    small.num_attention_heads = heads = min(heads, 4 if kv_heads < heads else 2)
    if getattr(small, "num_key_value_heads", None) is not None:
        small.num_key_value_heads = min(kv_heads, heads if latent else 2)
    if getattr(small, "head_dim", None) is not None and not latent:
        small.head_dim = head_dim
    small.hidden_size = heads * head_dim


_LIMITS = {
    "vocab_size": 97, "vocab_size_per_layer_input": 97, "intermediate_size": 64, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 8, "num_experts_per_tok": 2, "sliding_window": 9,
}  # fmt: skip


def _parameter_sets(parameters: Any) -> list[dict[str, Any]]:
    if not isinstance(parameters, dict):
        return []
    return [p for p in parameters.values() if isinstance(p, dict)] or [parameters]


def _instances(config: PretrainedConfig) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The same random weights with areal's and with eager attention; large ones, because with small ones no mistake shows."""
    from areal.models.loading import model_from_config

    packed = model_from_config(copy.deepcopy(config), dtype=torch.float32)
    for parameter in packed.parameters():
        if parameter.dim() >= 2:
            parameter.mul_(0.08 / parameter.std().clamp(min=1e-6) if parameter.std() < 0.08 else 1.0)
        else:
            parameter.add_(0.2 * torch.randn_like(parameter))
    eager = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.float32, attn_implementation="eager").eval()
    eager.load_state_dict(packed.state_dict())
    return packed, eager


def _difference(packed: PreTrainedModel, eager: PreTrainedModel) -> float:
    from areal.models.heads import packed_logprobs

    ids = torch.randint(1, packed.config.vocab_size, (sum(_LENGTHS),))
    positions = torch.cat([torch.arange(n) for n in _LENGTHS])
    got, _ = packed_logprobs(packed, ids, positions, _LENGTHS)
    expected = torch.cat([_eager_logprobs(eager, sequence) for sequence in ids.split(_LENGTHS)])
    return float((got - expected).abs().max())


def _eager_logprobs(model: PreTrainedModel, ids: Tensor) -> Tensor:
    log_p = torch.log_softmax(model(input_ids=ids[None], use_cache=False).logits[0].float(), -1)
    return torch.cat([torch.zeros(1), log_p[:-1].gather(1, ids[1:, None])[:, 0]])
