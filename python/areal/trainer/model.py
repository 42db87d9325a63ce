"""A model on the ranks: loaded, sharded, called with packed sequences, and stepped by its optimizer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from areal.config import LoraConfig, OptimizerConfig
from areal.models.loading import decoder_layers, load_model, meta_template
from areal.models.lora import Adapters, add_adapters, base_parameters
from areal.models.value_head import add_value_head
from areal.trainer.inputs import Inputs
from areal.trainer.mesh import RankMesh
from areal.trainer.optimizer import PolicyOptimizer
from areal.trainer.sharding import add_head_methods, full_tensor, local_part, shard_model


class OptimizerStep(NamedTuple):
    grad_norm: float
    """Before clipping, over all ranks and parameters."""
    finite: bool
    """False: the step was left out."""


class RankModel:
    """This rank's part of a model; with more than one rank the methods are collectives.

    Args:
        model_dir: Hugging Face model directory.
        dtype: of parameters in products, and of activations; master weights and gradients are float32.
        gradient_checkpointing: recompute activations in backward, layer by layer.
        head: what it says of a token: its log-prob, the value of the state before it, or both.
        frozen: never trained; its parameters are kept in ``dtype``.
        lora: train adapters only.
        seed: of what is not in ``model_dir``.
    """

    def __init__(
        self,
        model_dir: str | Path,
        mesh: RankMesh,
        dtype: torch.dtype,
        *,
        gradient_checkpointing: bool = False,
        head: Literal["logprobs", "values", "both"] = "logprobs",
        frozen: bool = False,
        lora: LoraConfig | None = None,
        seed: int = 0,
    ) -> None:
        self.mesh = mesh
        self.dtype = dtype
        # In bfloat16 FSDP keeps the float32 master weights, on one rank too.
        self.sharded = mesh.world_size > 1 or dtype != torch.float32
        self.model = load_model(model_dir, dtype=dtype if frozen else torch.float32)
        self.template = meta_template(self.model, dtype)
        if lora is not None:
            add_adapters(self.model, lora, dtype)
        if head != "logprobs":
            add_value_head(self.model, keep_lm_head=head == "both")
        if frozen:
            self.model.requires_grad_(False)
        if gradient_checkpointing:
            self._checkpoint_layers()
        add_head_methods(self.model)
        if self.sharded:
            shard_model(self.model, mesh.shard_mesh(), dtype)
        self.model.to(mesh.device)
        self.adapters = None if lora is None else Adapters(self.model, lora, seed)
        self._optimizer: PolicyOptimizer | None = None

    def _checkpoint_layers(self) -> None:
        enable = (
            getattr(self.model, "activation_checkpointing_enable", None) or self.model.gradient_checkpointing_enable
        )  # new name in 5.20
        enable({"use_reentrant": False})
        for layer in decoder_layers(self.model):
            layer.training = True  # the layer itself asks for it; what is inside (dropout) stays in eval mode

    def set_optimizer(self, config: OptimizerConfig) -> None:
        """A fresh optimizer, with empty state."""
        self._optimizer = PolicyOptimizer(self.model, config)
        self.optimizer_config = config

    def logprobs(self, x: Inputs, temperature: float) -> tuple[Tensor, Tensor]:
        """Log-probs and entropies [T] of the loss tokens, 0 elsewhere."""
        return self.model.packed_logprobs(x.input_ids, x.position_ids, x.lengths, temperature, rows=x.rows, shared=x.shared)

    def frozen_logprobs(self, inputs: Sequence[Inputs], temperature: float) -> list[Tensor]:
        """The log-probs of ``logprobs`` for every micro-batch, without gradients."""
        with torch.no_grad():
            result = [self.logprobs(x, temperature)[0] for x in inputs]
        self.reshard()
        return result

    @contextmanager
    def without_adapters(self) -> Iterator[None]:
        """Inside it is the model that training began with: the reference of a run that trains adapters. Forwards without gradients only."""
        assert self.adapters is not None, "the model has no adapters"
        with self.adapters.off():
            yield

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Each weight of the policy, whole, by its name in a model without adapters, whose products are added; a collective.

        A tensor may share memory with its parameter.
        """
        for name, parameter in base_parameters(self.model).items():
            weight = full_tensor(parameter)
            yield name, weight if self.adapters is None else self.adapters.added_to(name, weight, whole=True)

    def values(self, x: Inputs) -> Tensor:
        """What the states before the loss tokens are worth, float32 [T], 0 elsewhere."""
        return self.model.packed_values(x.input_ids, x.position_ids, x.lengths, rows=x.rows, shared=x.shared)

    def frozen_values(self, inputs: Sequence[Inputs]) -> list[Tensor]:
        """``values`` of every micro-batch, without gradients."""
        with torch.no_grad():
            result = [self.values(x) for x in inputs]
        self.reshard()
        return result

    def copy_weights(self, other: RankModel) -> None:
        """Takes the parameters of ``other``, a model of the same shape on the same ranks, but those of heads that one of both lacks.

        Adapters of ``other`` are added to them; a model that takes weights has none.
        """
        for model in (self, other):
            model.reshard()
        mine, theirs = (base_parameters(model.model) for model in (self, other))
        if strange := mine.keys() - theirs.keys():
            raise ValueError(
                f"the actor has no parameter '{min(strange)}' to copy; give this model a path of its own (ref.path, critic.path)"
            )
        with torch.no_grad():
            for name, parameter in mine.items():
                weight = local_part(theirs[name])
                local_part(parameter).copy_(weight if other.adapters is None else other.adapters.added_to(name, weight))

    def reshard(self) -> None:
        """After forwards without gradients: the root stays unsharded then, and would not see the next optimizer step."""
        if self.sharded:
            self.model.reshard()

    def optimizer_step(self, lr_scale: float) -> OptimizerStep:
        """Clips and steps, or leaves the step out when a gradient is not finite; gradients are gone afterwards."""
        assert self._optimizer is not None
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        norm = float(full_tensor(torch.nn.utils.clip_grad_norm_(parameters, self.optimizer_config.gradient_clipping)))
        finite = norm < float("inf")  # false for NaN too
        if finite:
            self._optimizer.step(lr_scale)
        self.model.zero_grad(set_to_none=True)
        return OptimizerStep(norm, finite)
