"""A model on the ranks: loaded, sharded, called with packed sequences, and stepped by its optimizer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from areal.config import LoraConfig, OptimizerConfig
from areal.models.loading import decoder_layers, empty_model, load_model, meta_template
from areal.models.lora import Adapters, add_adapters, base_parameters
from areal.models.value_head import add_value_head
from areal.trainer.inputs import Inputs
from areal.trainer.mesh import RankMesh
from areal.trainer.meters import ModelFlops
from areal.trainer.optimizer import PolicyOptimizer
from areal.trainer.shard_loading import allocate_shards, fill_shards, persistent_buffers
from areal.trainer.sharding import add_head_methods, full_tensor, local_part, shard_model


class OptimizerStep(NamedTuple):
    grad_norm: float
    """Before clipping, over all ranks and parameters."""
    finite: bool
    """False: the step was left out, on all ranks."""


class RankModel:
    """This rank's part of a model; with more than one rank the methods are collectives.

    Args:
        model_dir: Hugging Face model directory.
        dtype: of parameters in products, and of activations; master weights and gradients are float32.
        gradient_checkpointing: recompute activations in backward, layer by layer.
        offload: keep this rank's parameters, gradients and optimizer state in host memory.
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
        offload: bool = False,
        head: Literal["logprobs", "values", "both"] = "logprobs",
        frozen: bool = False,
        lora: LoraConfig | None = None,
        seed: int = 0,
    ) -> None:
        self.mesh = mesh
        self.dtype = dtype
        # In bfloat16 FSDP keeps the float32 master weights, on one rank too.
        self.sharded = mesh.world_size > 1 or dtype != torch.float32 or offload
        self.model = (empty_model if self.sharded else load_model)(model_dir, dtype=dtype if frozen else torch.float32)
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
            shard_model(self.model, mesh.shard_mesh(), dtype, offload=offload)
            allocate_shards(self.model, torch.device("cpu") if offload else mesh.device)
            fill_shards(base_parameters(self.model) | persistent_buffers(self.model), self.template, Path(model_dir))
        else:
            self.model.to(mesh.device)
        self.adapters = None if lora is None else Adapters(self.model, lora, seed)
        self._optimizer: PolicyOptimizer | None = None
        self._flops = ModelFlops(self.model)

    def flops_of(self, x: Inputs, *, training: bool, head: bool = True) -> float:
        """This rank's share of the model FLOPs of a micro-batch, forward or with backward; ``head``: whether log-probs are computed."""
        return self._flops.of(x, training=training, head=head) / self.mesh.layout.context

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
        """Log-probs and entropies [T] of the loss tokens, 0 elsewhere; the same on all context ranks, with gradients of own rows."""
        return self.model.packed_logprobs(x.input_ids, x.position_ids, x.lengths, temperature, rows=x.rows, shared=x.shared, part=x.part)

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

    def weights(self, *, merged: bool = True) -> Iterator[tuple[str, Tensor]]:
        """Each weight of the policy, whole, by its name in a model without adapters, whose products are added if ``merged``; a collective.

        A tensor may share memory with its parameter.
        """
        for name, parameter in base_parameters(self.model).items():
            weight = full_tensor(parameter)
            yield name, weight if self.adapters is None or not merged else self.adapters.added_to(name, weight, whole=True)

    def values(self, x: Inputs) -> Tensor:
        """What the states before the loss tokens are worth, float32 [T], 0 elsewhere."""
        return self.model.packed_values(x.input_ids, x.position_ids, x.lengths, rows=x.rows, shared=x.shared, part=x.part)

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

    def optimizer_step(self, lr_scale: float, loss: Tensor | None = None) -> OptimizerStep:
        """Clips and steps, or leaves the step out when a gradient is not finite; gradients are gone afterwards.

        ``loss``: this rank's part of it, or nothing on all ranks. One that is not finite on any rank leaves the step out too: its gradients
        may be finite there, and are finite elsewhere.
        """
        assert self._optimizer is not None
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        grad_norm = full_tensor(torch.nn.utils.clip_grad_norm_(parameters, self.optimizer_config.gradient_clipping))
        lost = torch.zeros_like(grad_norm) if loss is None else (~loss.detach().isfinite()).float()
        if self.mesh.world_size > 1 and loss is not None:
            torch.distributed.all_reduce(lost)
        norm, n_lost = torch.stack([grad_norm, lost.to(grad_norm)]).tolist()  # waits for the device once
        finite = norm < float("inf") and n_lost == 0  # false for NaN too
        if finite:
            self._optimizer.step(lr_scale)
        self.model.zero_grad(set_to_none=True)
        return OptimizerStep(norm, finite)
