"""A model on the ranks: loaded, sharded, called with packed sequences, and stepped by its optimizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from areal.config import OptimizerConfig
from areal.models.loading import decoder_layers, load_model, meta_template
from areal.trainer.inputs import Inputs
from areal.trainer.mesh import RankMesh
from areal.trainer.optimizer import PolicyOptimizer
from areal.trainer.sharding import add_head_methods, full_tensor, shard_model


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
    """

    def __init__(self, model_dir: str | Path, mesh: RankMesh, dtype: torch.dtype, *, gradient_checkpointing: bool = False) -> None:
        self.mesh = mesh
        self.dtype = dtype
        # In bfloat16 FSDP keeps the float32 master weights, on one rank too.
        self.sharded = mesh.world_size > 1 or dtype != torch.float32
        self.model = load_model(model_dir, dtype=torch.float32)
        self.template = meta_template(self.model, dtype)
        if gradient_checkpointing:
            self._checkpoint_layers()
        add_head_methods(self.model)
        if self.sharded:
            shard_model(self.model, mesh.shard_mesh(), dtype)
        self.model.to(mesh.device)
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

    def optimizer_state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """What the optimizer remembers of a parameter, by name; sharded as the parameter is, or a scalar."""
        return {} if self._optimizer is None else dict(self._optimizer.state_of(parameter))

    def set_optimizer_state(self, parameter: nn.Parameter, state: Mapping[str, Tensor]) -> None:
        """As ``optimizer_state`` gave it; no state is a parameter that was never stepped."""
        if self._optimizer is not None:
            remembered = self._optimizer.state_of(parameter)
            remembered.clear()
            remembered.update(state)

    def logprobs(self, x: Inputs, temperature: float) -> tuple[Tensor, Tensor]:
        """Log-probs and entropies [T] of the loss tokens, 0 elsewhere."""
        return self.model.packed_logprobs(x.input_ids, x.position_ids, x.lengths, temperature, rows=x.rows, shared=x.shared)

    def frozen_logprobs(self, inputs: Sequence[Inputs], temperature: float) -> list[Tensor]:
        """The log-probs of ``logprobs`` for every micro-batch, without gradients."""
        with torch.no_grad():
            result = [self.logprobs(x, temperature)[0] for x in inputs]
        self.reshard()
        return result

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
