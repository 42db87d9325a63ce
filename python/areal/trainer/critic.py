"""A critic with layers of its own: a value model beside the policy, with its own optimizer, mini-batches and micro-batches."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from areal.algo.value_loss import value_loss
from areal.config import CriticConfig
from areal.models.value_head import ValueInputs
from areal.trainer.inputs import Inputs
from areal.trainer.mesh import RankMesh
from areal.trainer.model import RankModel
from areal.trainer.step_stats import StepStats


class ValueMinibatch(NamedTuple):
    """This rank's part of a mini-batch of the critic."""

    inputs: list[Inputs]
    denominator: float
    """Loss tokens of the whole mini-batch over all ranks."""


class Critic:
    """The value model on the ranks; with more than one rank the methods are collectives.

    Args:
        model_dir: Hugging Face model directory of the layers; the value head starts from zeros.
        dtype: as the actor's.
    """

    def __init__(self, model_dir: str | Path, config: CriticConfig, mesh: RankMesh, dtype: torch.dtype) -> None:
        self.config = config
        self.model_dir = Path(model_dir)
        self.model = RankModel(
            model_dir, mesh, dtype, gradient_checkpointing=config.gradient_checkpointing, offload=config.offload, head="values"
        )
        self.model.set_optimizer(config.optimizer)
        self.train_steps = 0
        self.nonfinite_in_a_row = 0
        self.skipped: list[int] = []
        """Mini-batches of the last train step that were skipped since the weights last changed."""

    def train_step(self, minibatches: Sequence[ValueMinibatch], of_step: StepStats) -> dict[str, Any]:
        """An optimizer step for each mini-batch, in order; what it costs goes into the meters of ``of_step``.

        Returns over all ranks: value_loss (per loss token), value_clip_fraction, critic_grad_norm, critic_skipped_nonfinite.
        """
        mesh = self.model.mesh
        stats = StepStats(mesh.device, counts=mesh.counts, meter=of_step.meter)
        lr_scale = min(1.0, (self.train_steps + 1) / max(1, self.config.optimizer.warmup_steps))
        self.skipped.clear()
        for index, minibatch in enumerate(minibatches):
            for x in minibatch.inputs:
                with stats.phase("forward"):
                    value_backward(self.model, self.config, x, minibatch.denominator, stats)
                of_step.add_flops(self.model.flops_of(x, training=True))
            with stats.phase("optimizer"):
                step = self.model.optimizer_step(lr_scale, stats.minibatch_loss)
            stats.add_step(*step)
            self.nonfinite_in_a_row = 0 if step.finite else self.nonfinite_in_a_row + 1
            self.skipped = [] if step.finite else [*self.skipped, index]
        self.train_steps += 1
        result = stats.result(mesh.world_size, len(minibatches))
        return {
            "value_loss": result["value_loss"],
            "value_clip_fraction": result["value_clip_fraction"],
            "critic_grad_norm": result["grad_norm"],
            "critic_skipped_nonfinite": result["skipped_nonfinite"],
        }


def value_backward(model: RankModel, config: CriticConfig, x: Inputs, denominator: float, stats: StepStats) -> None:
    """Adds to the gradients those of the value loss alone; ``denominator``: loss tokens of the mini-batch over all ranks."""
    old, returns = (t.index_select(0, x.rows) for t in _targets(x))
    values = model.values(x).index_select(0, x.rows)
    loss, sums = value_loss(values, old, returns, eps_clip=config.eps_clip, denominator=denominator)
    with stats.phase("backward"):
        loss.backward()
    stats.add({**sums, "loss": loss.detach(), "n_tokens": x.loss_mask.sum().float()})


def value_inputs(x: Inputs, critic: CriticConfig | None, denominator: float) -> ValueInputs | None:
    """What the actor's forward pass needs for a ``critic`` on its layers; None without one."""
    return None if critic is None else ValueInputs(*_targets(x), denominator, critic.eps_clip, critic.loss_coef)


def _targets(x: Inputs) -> tuple[Tensor, Tensor]:
    if x.values is None or x.returns is None:
        raise ValueError("a critic is trained on values and returns, which this micro-batch lacks: call score first and fill them in")
    return x.values, x.returns
