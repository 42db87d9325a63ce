"""One rank of the trainer: packed forward and backward, optimizer steps, and the weights for others.

Every rank of a run makes the same calls in the same order; with more than one rank the methods that touch weights are collectives.
The policy's ``version`` is the one last published: a train step works on it, the next ``publish`` numbers its result.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from areal.algo.loss import sft_loss
from areal.config import ActorConfig, OptimizerConfig
from areal.models.checkpoint_names import CheckpointNames
from areal.trainer.gather import WeightGatherer
from areal.trainer.inputs import Inputs, to_device
from areal.trainer.mesh import RankMesh
from areal.trainer.model import RankModel
from areal.trainer.ppo import ppo_backward
from areal.trainer.sharding import full_tensor
from areal.trainer.step_stats import StepStats
from areal.types import Microbatch


class NonFiniteGradients(RuntimeError):
    """Too many train steps in a row had gradients with NaN or infinity."""


class RankMinibatch(NamedTuple):
    """This rank's part of a PPO mini-batch."""

    microbatches: list[Microbatch]
    denominator: float
    """Loss tokens of the whole mini-batch over all ranks."""


class TrainEngine:
    """A policy in training.

    Args:
        model_dir: Hugging Face model directory.
        config: the actor's configuration.
        temperature: that of the rollouts; log-probs are of softmax(logits / temperature).
        mesh: which rank this is, and where it computes; None = one on the CPU.
    """

    def __init__(
        self,
        model_dir: str | Path,
        config: ActorConfig,
        *,
        temperature: float = 1.0,
        mesh: RankMesh | None = None,
    ) -> None:
        self.config = config
        self.model_dir = Path(model_dir)
        self.mesh = mesh or RankMesh(torch.device("cpu"))
        self.version = 0
        self._temperature = temperature
        self.actor = RankModel(model_dir, self.mesh, getattr(torch, config.dtype), gradient_checkpointing=config.gradient_checkpointing)
        self.gatherer = WeightGatherer(self.actor.model, self.actor.dtype, self.mesh.rank, self.mesh.world_size)
        self._nonfinite_in_a_row = 0
        self.set_optimizer(config.optimizer)

    @property
    def device(self) -> torch.device:
        return self.mesh.device

    @property
    def model(self) -> PreTrainedModel:
        """The policy's."""
        return self.actor.model

    @property
    def template(self) -> PreTrainedModel:
        return self.actor.template

    @property
    def models(self) -> dict[str, RankModel]:
        """Every model that training changes: what a recover checkpoint holds."""
        return {"actor": self.actor}

    @property
    def counters(self) -> dict[str, int]:
        """What else a later step depends on."""
        return {"train_steps": self._train_steps, "nonfinite_in_a_row": self._nonfinite_in_a_row, "version": self.version}

    def set_counters(self, counters: Mapping[str, int]) -> None:
        self._train_steps, self._nonfinite_in_a_row = counters["train_steps"], counters["nonfinite_in_a_row"]
        self.version = counters["version"]

    def set_optimizer(self, config: OptimizerConfig) -> None:
        """A fresh optimizer; its state and the count of its steps start again."""
        self.actor.set_optimizer(config)
        self._train_steps = 0

    # -- steps ------------------------------------------------------------------------------------------------------------------

    def train_step(self, minibatches: Sequence[RankMinibatch]) -> dict[str, Any]:
        """One PPO step: an optimizer step for each mini-batch, in order.

        The proximal policy is the one at the start. For the first mini-batch that is still the current one, so its proximal log-probs
        are those of its training forward; only the others are computed beforehand. Returns statistics over all ranks: loss, n_tokens,
        clip_fraction (and its parts clip_high_fraction, clip_low_fraction), dual_clip_fraction, filtered_fraction, truncated_fraction,
        ratio_mean, importance_weight_mean, entropy, kl_proximal, kl_behaviour, grad_norm, lr_scale, skipped_nonfinite, version,
        logprob_drift {mean_abs, max_abs, n} (engine against trainer on tokens that this version sampled; None without such tokens), and
        this rank's spans [[kind, start, end]] in seconds
        since the epoch. ``NonFiniteGradients`` when too many steps in a row had to be skipped.
        """
        stats = StepStats(self.device)
        begin = time.time()
        prepared = [[self._put(mb) for mb in minibatch.microbatches] for minibatch in minibatches]
        proximal: list[list[Tensor]] = [[]]
        if self.config.recompute_logprob:
            proximal += [self.actor.frozen_logprobs(inputs, self._temperature) for inputs in prepared[1:]]
        recomputed = time.time()
        if len(minibatches) > 1 and self.config.recompute_logprob:
            stats.span("recompute", begin, recomputed)
        lr_scale = min(1.0, (self._train_steps + 1) / max(1, self.actor.optimizer_config.warmup_steps))
        for index, (minibatch, inputs) in enumerate(zip(minibatches, prepared, strict=True)):
            for turn, x in enumerate(inputs):
                if index == 0:
                    known = None
                else:
                    known = proximal[index][turn] if self.config.recompute_logprob else x.behavior_logprobs
                ppo_backward(self.actor, self.config, x, known, minibatch.denominator, self._temperature, stats)
            self._optimizer_step(lr_scale, stats)
        stats.span("training", recomputed, time.time())
        self._train_steps += 1
        return self._finish(stats, lr_scale, len(minibatches))

    def sft_step(self, minibatch: RankMinibatch, lr_scale: float = 1.0) -> dict[str, Any]:
        """One supervised step on the loss tokens, at temperature 1. Returns those statistics of ``train_step`` that apply."""
        stats = StepStats(self.device)
        begin = time.time()
        for microbatch in minibatch.microbatches:
            x = self._put(microbatch)
            logprobs, entropy = self.actor.logprobs(x, temperature=1.0)
            loss, sums = sft_loss(logprobs, x.loss_mask, denominator=minibatch.denominator)
            loss.backward()
            stats.add(sums)
            stats.add({"entropy": entropy.sum()})
        self._optimizer_step(lr_scale, stats)
        stats.span("training", begin, time.time())
        self._train_steps += 1
        return self._finish(stats, lr_scale, 1)

    def logprobs(self, microbatch: Microbatch) -> Tensor:
        """Log-probs of the loss tokens under the current weights, float32 [T] on the CPU; 0 elsewhere."""
        return self.actor.frozen_logprobs([self._put(microbatch)], self._temperature)[0].cpu()

    def _put(self, microbatch: Microbatch) -> Inputs:
        return to_device(microbatch, self.device, self.version)

    def _optimizer_step(self, lr_scale: float, stats: StepStats) -> None:
        step = self.actor.optimizer_step(lr_scale)
        stats.add_step(*step)
        self._nonfinite_in_a_row = 0 if step.finite else self._nonfinite_in_a_row + 1

    def _finish(self, stats: StepStats, lr_scale: float, n_minibatches: int) -> dict[str, Any]:
        if self._nonfinite_in_a_row > self.config.max_nonfinite_steps:
            raise NonFiniteGradients(
                f"{self._nonfinite_in_a_row} optimizer steps in a row had gradients that are not finite (actor.max_nonfinite_steps="
                f"{self.config.max_nonfinite_steps}); lower the learning rates, or look at the rewards and the log-prob drift in metrics.jsonl"
            )
        return {**stats.result(self.mesh.world_size, n_minibatches), "lr_scale": lr_scale, "version": self.version}

    # -- weights ----------------------------------------------------------------------------------------------------------------

    def manifest(self) -> list[tuple[str, tuple[int, ...], torch.dtype]]:
        """Name, shape and dtype of every tensor of ``weights``."""
        return [(name, tuple(p.shape), self.actor.dtype) for name, p in self.model.named_parameters()]

    def use_checkpoint_names(self) -> None:
        """From here on ``gatherer`` plans buckets of what a Hugging Face checkpoint holds. ``UnsupportedModel`` if it cannot."""
        names = CheckpointNames(self.template)
        self.gatherer = WeightGatherer(self.model, self.actor.dtype, self.mesh.rank, self.mesh.world_size, names)

    def weights(self) -> dict[str, Tensor] | None:
        """All parameters, whole, tied ones once, in the dtype of the config; a collective, None on ranks other than 0.

        The tensors may share memory with the parameters: read them before the next step.
        """
        result = {}
        for name, parameter in self.model.named_parameters():
            tensor = full_tensor(parameter)
            if self.mesh.rank == 0:
                result[name] = tensor.to(self.actor.dtype)
        return result if self.mesh.rank == 0 else None

    def snapshot(self) -> dict[str, Tensor] | None:
        """Copies of all parameters on the CPU; a collective, None on ranks other than 0."""
        weights = self.weights()
        return None if weights is None else {name: w.to("cpu", copy=True) for name, w in weights.items()}
