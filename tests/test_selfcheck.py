"""Models that are refused, and the check that finds what no list names."""

import time

import pytest
import torch
from test_models import ARCHITECTURES
from test_models import small_config as config_keys
from transformers import AutoConfig

from areal.models import heads
from areal.models.loading import create_model, load_model
from areal.models.packed import PackedContext
from areal.models.selfcheck import UnsupportedModel, check_supported, self_check, small_config

torch.set_num_threads(1)


def config_of(model_type, **keys):
    return AutoConfig.for_model(model_type, **keys)


REFUSED = {
    "llama4_text": ({}, "chunked_attention"),
    "qwen3_next": ({}, "linear_attention"),
    "qwen2_moe": ({"use_sliding_window": True, "sliding_window": 8}, "use_sliding_window"),
    "llama": ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "dynamic"),
    "mamba": ({}, "layers of type"),
    "bloom": ({}, "_supports_attention_backend"),
    "t5": ({}, "encoder-decoder"),
    "clip": ({}, "no causal language model"),
}


@pytest.mark.parametrize("model_type", REFUSED)
def test_refused_by_name(model_type):
    keys, reason = REFUSED[model_type]
    with pytest.raises(UnsupportedModel, match=reason):
        check_supported(config_of(model_type, **keys))


def test_rope_of_each_layer_type_is_looked_at():
    config = config_of("gemma3_text")
    config.rope_parameters["full_attention"] = {"rope_type": "longrope", "rope_theta": 1e4}
    with pytest.raises(UnsupportedModel, match="longrope"):
        check_supported(config)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_supported_models_pass(name):
    model_type, keys = (config := config_keys(name)).pop("model_type"), config
    config = config_of(model_type, **keys)
    check_supported(config)
    self_check(config)


@pytest.mark.parametrize(
    "model_type", ["qwen2", "qwen3", "llama", "mistral", "gemma2", "gemma3_text", "olmo2", "phi3", "qwen3_moe", "gpt_oss", "granite"]
)
def test_full_size_configs_are_made_small(model_type):
    begin = time.monotonic()
    self_check(config_of(model_type))
    n = sum(p.numel() for p in create_model_from(small_config(config_of(model_type))).parameters())
    assert n < 20_000_000
    assert time.monotonic() - begin < 60


def test_what_cannot_be_tried_out_is_refused():
    with pytest.raises(UnsupportedModel, match="'ministral' is not supported: it cannot be tried out"):
        self_check(config_of("ministral", head_dim=None))


def create_model_from(config):
    from areal.models.loading import model_from_config

    return model_from_config(config, dtype=torch.float32)


@pytest.mark.parametrize("name", ["mistral", "gemma2", "gpt_oss"])
def test_wrong_attention_is_found(name, monkeypatch):
    """What would happen if the window, the soft cap or the sinks were forgotten."""
    import dataclasses

    original = PackedContext.attend
    for field in {"mistral": ["sliding_window"], "gemma2": ["softcap", "sliding_window"], "gpt_oss": ["sinks"]}[name]:
        monkeypatch.setattr(
            PackedContext,
            "attend",
            lambda self, layer, q, k, v, spec, field=field: original(self, layer, q, k, v, dataclasses.replace(spec, **{field: None})),
        )
        keys = config_keys(name)
        with pytest.raises(UnsupportedModel, match="differ"):
            self_check(config_of(keys.pop("model_type"), **keys))


@pytest.mark.parametrize("name", ["gemma2", "granite", "cohere"])
def test_wrong_head_is_found(name, monkeypatch):
    # A head that is taken for a plain product, because what else it does is not known.
    monkeypatch.setattr(heads, "head_of", lambda model: heads.Head(model.get_output_embeddings()))
    keys = config_keys(name)
    with pytest.raises(UnsupportedModel, match="differ"):
        self_check(config_of(keys.pop("model_type"), **keys))


def test_loading_checks(tmp_path, monkeypatch):
    create_model(
        {**config_keys("llama"), "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, seed=0
    ).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModel, match="dynamic"):
        load_model(tmp_path, dtype=torch.float32)


def test_random_state_is_left_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    self_check(config_of("qwen2"))
    assert torch.equal(torch.rand(3), expected)
