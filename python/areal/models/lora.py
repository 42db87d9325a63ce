"""Low-rank adapters (LoRA, arXiv 2106.09685) on the linear layers of a model: y = W x + scale * B (A x), scale = alpha / rank.

The layers are ``peft``'s, put into the model in place, so that to everything else it stays the model it was; only A [rank, in] and B [out, rank]
have gradients. A parameter ``q_proj.weight`` becomes ``q_proj.base_layer.weight``: what leaves the trainer goes by the names of the model without
adapters (``base_parameters``) or by those of peft's own files (``adapter_parameters``).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from areal.config import LoraConfig
from areal.models.value_head import policy_parameters

_IN_FILES = "base_model.model."
"""What peft's files have before the name of a module."""
_ADAPTER = "default"


class AdapterPair(NamedTuple):
    """The factors of one weight W [out, in]."""

    up: Tensor
    """B [out, rank]; zero at the start."""
    down: Tensor
    """A [rank, in]."""


def add_adapters(model: PreTrainedModel, config: LoraConfig, dtype: torch.dtype) -> None:
    """Puts adapters into ``model``, before it is sharded; everything else is frozen, and kept in ``dtype``, because no optimizer adds to it.

    ``ValueError`` where ``target_modules`` are none of the model's linear layers, or its head.
    """
    from peft import inject_adapter_in_model

    _check_targets(model, config)
    inject_adapter_in_model(peft_config(config), model)
    for name, parameter in policy_parameters(model).items():
        parameter.requires_grad_(is_adapter(name))
        if not parameter.requires_grad and parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)


def peft_config(config: LoraConfig, base: str | None = None) -> Any:
    """As peft describes such an adapter; ``base``: the folder of the model that it belongs to."""
    import peft

    targets = config.target_modules
    return peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]  # a fraction of a number works as well
        target_modules=targets if isinstance(targets, str) else list(targets),
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
    )


def _check_targets(model: PreTrainedModel, config: LoraConfig) -> None:
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    head = next((name for name, module in linear.items() if module is model.get_output_embeddings()), None)
    ends = sorted({name.rpartition(".")[2] for name in linear if name != head})
    known = f"{type(model).__name__} has {', '.join(ends) or 'none'}"
    if config.target_modules == "all-linear":
        if not ends:
            raise ValueError(f"actor.lora: {type(model).__name__} has no linear layers that adapters could be put on; set actor.lora=null")
        return
    for target in config.target_modules:
        matched = [name for name, _ in model.named_modules() if name == target or name.endswith(f".{target}")]
        if head in matched:
            raise ValueError(f"actor.lora.target_modules: '{target}' is the output head, which stays as it is; {known}")
        if not matched or any(name not in linear for name in matched):
            raise ValueError(f"actor.lora.target_modules: '{target}' is not the name of linear layers; {known}")


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name is a factor of an adapter."""
    return ".lora_A." in name or ".lora_B." in name


def base_parameters(model: nn.Module) -> dict[str, Tensor]:
    """The policy's parameters but those of adapters, by the names that they have without adapters; tied ones once."""
    return {name.replace(".base_layer.", "."): p for name, p in policy_parameters(model).items() if not is_adapter(name)}


def adapter_parameters(model: nn.Module) -> dict[str, Tensor]:
    """The factors of the adapters, by their names in a file of peft."""
    return {_IN_FILES + name.replace(f".{_ADAPTER}.", "."): p for name, p in model.named_parameters() if is_adapter(name)}


def pairs_by_weight(adapter: Mapping[str, Tensor]) -> dict[str, AdapterPair]:
    """Tensors of an adapter (peft's names) by the name of the weight that their product is added to. ``ValueError`` for any others."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in adapter.items():
        module, _, factor = name.removeprefix(_IN_FILES).removesuffix(".weight").rpartition(".")
        if not module or factor not in ("lora_A", "lora_B") or not name.endswith(".weight"):
            raise ValueError(f"'{name}' is no factor of a plain LoRA adapter")
        found.setdefault(f"{module}.weight", {})[factor] = tensor
    for name, factors in found.items():
        if len(factors) != 2:
            raise ValueError(f"the adapter has only one of the two factors of '{name}'")
    return {name: AdapterPair(factors["lora_B"], factors["lora_A"]) for name, factors in found.items()}


def with_product(weight: Tensor, pair: AdapterPair, scale: float) -> Tensor:
    """W + scale * B A in float32; with the same rows of W and B these rows of it."""
    return torch.addmm(weight.float(), pair.up.float(), pair.down.float(), alpha=scale)


class Adapters:
    """The adapters of a model on this rank, once it is sharded.

    Args:
        seed: of the start of A, which must be the same on all ranks. It is drawn as a whole, so it does not depend on their number.
    """

    def __init__(self, model: PreTrainedModel, config: LoraConfig, seed: int) -> None:
        from peft.tuners.lora import LoraLayer

        self._config = config
        self.scale = config.alpha / config.rank
        self.parameters = adapter_parameters(model)
        self.pairs = pairs_by_weight(self.parameters)
        self._layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
        self._start(seed)

    @torch.no_grad()
    def _start(self, seed: int) -> None:
        """As peft starts them: A by Kaiming's rule for a linear layer, B zero."""
        generator = torch.Generator().manual_seed(seed)
        for pair in self.pairs.values():
            whole = torch.empty(pair.down.shape)
            nn.init.kaiming_uniform_(whole, a=math.sqrt(5), generator=generator)
            _own_rows(pair.down).copy_(_own_rows(pair.down, of=whole))
            _own_rows(pair.up).zero_()

    @torch.no_grad()
    def load(self, factors: Mapping[str, Tensor]) -> None:
        """Takes whole factors, by the names of peft's files."""
        for name, parameter in self.parameters.items():
            _own_rows(parameter).copy_(_own_rows(parameter, of=factors[name]))

    def added_to(self, name: str, weight: Tensor, *, whole: bool = False) -> Tensor:
        """``weight``, the rows of the weight ``name`` that this rank holds, or all of it, with the product added if it has an adapter.

        A collective then: W and B are cut alike, but all of A is needed.
        """
        if (pair := self.pairs.get(name)) is None:
            return weight
        up, down = pair.up.detach(), pair.down.detach()
        if isinstance(up, DTensor):
            up = up.full_tensor() if whole else up.to_local()
        down = down.full_tensor() if isinstance(down, DTensor) else down
        return with_product(weight, AdapterPair(up.to(weight.device), down.to(weight.device)), self.scale)

    def describe(self, base: str) -> dict[str, Any]:
        """What peft's adapter_config.json is to say; ``base``: the folder of the model that they belong to."""
        ends = sorted({name.split(".")[-2] for name in self.pairs})  # whoever reads it need not know what all-linear means
        whole = peft_config(self._config.new(target_modules=ends), base).to_dict()
        whole.pop("runtime_config", None)
        return json.loads(json.dumps(whole, default=sorted))

    @contextmanager
    def off(self) -> Iterator[None]:
        """Inside the model computes what it would without adapters; for forward passes without gradients."""
        # Not enable_adapters(False), which changes requires_grad as well, and FSDP keeps its own idea of that.
        for layer in self._layers:
            layer._disable_adapters = True
        try:
            yield
        finally:
            for layer in self._layers:
                layer._disable_adapters = False


def _own_rows(parameter: Tensor, of: Tensor | None = None) -> Tensor:
    """The rows that this rank holds of ``parameter``, or the same ones of a whole tensor."""
    if not isinstance(parameter, DTensor):
        return parameter if of is None else of
    local = parameter.to_local()
    if of is None:
        return local
    mesh = parameter.device_mesh
    begin = -(-len(of) // mesh.size(-1)) * mesh.get_local_rank(mesh.ndim - 1)
    return of[begin : begin + len(local)]
