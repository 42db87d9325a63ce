"""Building, loading and saving models: Hugging Face directories, or random weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PretrainedConfig, PreTrainedModel

from areal.models.attention import ATTENTION_NAME, AttentionContext


def load_model(path: str | Path, *, dtype: torch.dtype, device: torch.device | str = "cpu") -> PreTrainedModel:
    """The model of a Hugging Face directory, in eval mode, with areal's attention. ``UnsupportedModel`` if it would compute wrongly;
    ``ValueError`` if the checkpoint lacks some of its weights, which transformers would make up."""
    from areal.models.selfcheck import check_model

    check_model(AutoConfig.from_pretrained(path, local_files_only=True))
    model, report = AutoModelForCausalLM.from_pretrained(
        path, dtype=dtype, attn_implementation=ATTENTION_NAME, local_files_only=True, output_loading_info=True
    )
    if missing := sorted(report["missing_keys"]):
        raise ValueError(f"{path}: the checkpoint has no tensor '{missing[0]}'; give the folder of a whole model")
    return model.to(device).eval()


def empty_model(path: str | Path, *, dtype: torch.dtype) -> PreTrainedModel:
    """``load_model`` without the weights: parameters are on the meta device, tied as they should be, and buffers have values."""
    from areal.models.selfcheck import check_model

    config = AutoConfig.from_pretrained(path, local_files_only=True)
    check_model(config)
    with _parameters_on_meta():
        model = model_from_config(config, dtype=dtype)
    if (Path(path) / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(path, local_files_only=True)
    return model


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Modules made inside have parameters without memory. With ``torch.device("meta")`` buffers would have none either, and the rotary
    frequencies, which no checkpoint holds, would have to be computed again for every architecture in its own way."""
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and not param.is_meta:  # one that is on meta is being tied: it must stay itself
            param = nn.Parameter(param.to("meta"), param.requires_grad)
        register(module, name, param)

    nn.Module.register_parameter = register_on_meta  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def create_model(config: dict[str, Any], *, seed: int, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A model with random weights from a Hugging Face config given as a dict with ``model_type``."""
    torch.manual_seed(seed)
    keys = dict(config)
    hf_config = AutoConfig.for_model(keys.pop("model_type"), **keys)
    return model_from_config(hf_config, dtype=dtype)


def model_from_config(config: PretrainedConfig, *, dtype: torch.dtype) -> PreTrainedModel:
    """Random weights, areal's attention, eval mode."""
    # from_config(dtype=...), not .to(dtype), which would round the rotary frequencies too.
    return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=ATTENTION_NAME).eval()


def forward_hidden(model: PreTrainedModel, input_ids: Tensor, position_ids: Tensor, context: AttentionContext) -> Tensor:
    """Hidden states before the head: ids and positions [T] -> [T, hidden]."""
    out = model.base_model(
        input_ids=input_ids.unsqueeze(0), position_ids=position_ids.unsqueeze(0), use_cache=False, attention_context=context
    )
    return out.last_hidden_state[0]


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The stack of transformer layers. ``ValueError`` if the model has none that can be told."""
    n = model.config.get_text_config().num_hidden_layers
    lists = [m for m in model.base_model.modules() if isinstance(m, nn.ModuleList) and len(m) == n]
    names = set(model._no_split_modules or ())
    for layers in lists:
        if all(type(layer).__name__.removeprefix("FSDP") in names for layer in layers):  # sharding renames classes
            return layers
    raise ValueError(f"{type(model).__name__} has no list of {n} layers that areal can tell; use another model")


def save_model(template: PreTrainedModel, weights: Mapping[str, Tensor], folder: Path) -> None:
    """Writes ``weights`` (names of ``template.named_parameters()``, tied ones once) as a Hugging Face model into ``folder``.

    ``template`` gives the config and the names of the format on disk; its own weights are not looked at (it may be on the meta device).
    """
    missing = {name for name, _ in template.named_parameters()} - set(weights)
    if missing:
        raise ValueError(f"the weights to save lack '{min(missing)}'")
    template.save_pretrained(folder, state_dict=dict(weights))


def meta_template(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """The same architecture without storage, for ``save_model``."""
    with torch.device("meta"):
        template = AutoModelForCausalLM.from_config(model.config, dtype=dtype)
    template.generation_config = model.generation_config
    # What the checkpoint was converted from on loading; saving converts back.
    if (conversions := getattr(model, "_weight_conversions", None)) is not None:
        template._weight_conversions = conversions
    return template


def head(model: PreTrainedModel) -> nn.Linear:
    """The output projection (its weight is [vocabulary, hidden]); ``heads.head_of`` also has what else a head does."""
    return model.get_output_embeddings()
