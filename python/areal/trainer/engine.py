"""One rank of the trainer: packed forward and backward, optimizer steps, and the weights for others.

Every rank of a run makes the same calls in the same order; with more than one rank the methods that touch weights are collectives.
The policy's ``version`` is the one last published: a train step works on it, the next ``publish`` numbers its result.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from areal.algo.loss import sft_loss
from areal.config import ActorConfig, OptimizerConfig
from areal.models.checkpoint_names import CheckpointNames
from areal.models.heads import PPOInputs
from areal.models.loading import decoder_layers, load_model, meta_template
from areal.models.prefix import SharedTokens, find_shared_prompts
from areal.trainer.gather import WeightGatherer
from areal.trainer.optimizer import PolicyOptimizer
from areal.trainer.sharding import add_head_methods, full_tensor, shard_model
from areal.trainer.step_stats import StepStats
from areal.types import Microbatch


class NonFiniteGradients(RuntimeError):
    """Too many train steps in a row had gradients with NaN or infinity."""


class RankMinibatch(NamedTuple):
    """This rank's part of a PPO mini-batch."""

    microbatches: list[Microbatch]
    denominator: float
    """Loss tokens of the whole mini-batch over all ranks."""


@dataclass(slots=True)
class _Inputs:
    """A micro-batch on the device."""

    input_ids: Tensor
    position_ids: Tensor
    lengths: list[int]
    shared: SharedTokens | None
    rows: Tensor
    loss_mask: Tensor
    behavior_logprobs: Tensor
    advantages: Tensor
    fresh: Tensor
    """Loss tokens that the current version sampled."""


class TrainEngine:
    """A policy in training.

    Args:
        model_dir: Hugging Face model directory.
        config: the actor's configuration.
        temperature: that of the rollouts; log-probs are of softmax(logits / temperature).
        rank, world_size: with more than one rank, ``torch.distributed`` must be initialised.
        device: where this rank computes.
    """

    def __init__(
        self,
        model_dir: str | Path,
        config: ActorConfig,
        *,
        temperature: float = 1.0,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str = "cpu",
    ) -> None:
        self.config = config
        self.model_dir = Path(model_dir)
        self.rank = rank
        self.world_size = world_size
        self.device = torch.device(device)
        self.version = 0
        self._temperature = temperature
        self._dtype = getattr(torch, config.dtype)
        # In bfloat16 FSDP keeps the float32 master weights, on one rank too.
        self._sharded = world_size > 1 or self._dtype != torch.float32
        self.model = load_model(model_dir, dtype=torch.float32)
        self.template = meta_template(self.model, self._dtype)
        if config.gradient_checkpointing:
            self._checkpoint_layers()
        add_head_methods(self.model)
        if self._sharded:
            shard_model(self.model, init_device_mesh(self.device.type, (world_size,)), self._dtype)
        self.model.to(self.device)
        self.gatherer = WeightGatherer(self.model, self._dtype, rank, world_size)
        self._nonfinite_in_a_row = 0
        self.set_optimizer(config.optimizer)

    def _checkpoint_layers(self) -> None:
        enable = (
            getattr(self.model, "activation_checkpointing_enable", None) or self.model.gradient_checkpointing_enable
        )  # new name in 5.20
        enable({"use_reentrant": False})
        for layer in decoder_layers(self.model):
            layer.training = True  # the layer itself asks for it; what is inside (dropout) stays in eval mode

    def set_optimizer(self, config: OptimizerConfig) -> None:
        """A fresh optimizer; its state and the count of its steps start again."""
        self._optimizer = PolicyOptimizer(self.model, config)
        self._optimizer_config = config
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
        prepared = [[self._to_device(mb) for mb in minibatch.microbatches] for minibatch in minibatches]
        proximal: list[list[Tensor]] = [[]]
        if self.config.recompute_logprob:
            proximal += [self._recompute(inputs) for inputs in prepared[1:]]
        recomputed = time.time()
        if len(minibatches) > 1 and self.config.recompute_logprob:
            stats.span("recompute", begin, recomputed)
        lr_scale = min(1.0, (self._train_steps + 1) / max(1, self._optimizer_config.warmup_steps))
        for index, (minibatch, inputs) in enumerate(zip(minibatches, prepared, strict=True)):
            for turn, x in enumerate(inputs):
                if index == 0:
                    known = None
                else:
                    known = proximal[index][turn] if self.config.recompute_logprob else x.behavior_logprobs
                self._ppo_backward(x, known, minibatch.denominator, stats)
            self._optimizer_step(lr_scale, stats)
        stats.span("training", recomputed, time.time())
        self._train_steps += 1
        return self._finish(stats, lr_scale, len(minibatches))

    def sft_step(self, minibatch: RankMinibatch, lr_scale: float = 1.0) -> dict[str, Any]:
        """One supervised step on the loss tokens, at temperature 1. Returns those statistics of ``train_step`` that apply."""
        stats = StepStats(self.device)
        begin = time.time()
        for microbatch in minibatch.microbatches:
            x = self._to_device(microbatch)
            logprobs, entropy = self._forward(x, temperature=1.0)
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
        return self._recompute([self._to_device(microbatch)])[0].cpu()

    def _ppo_backward(self, x: _Inputs, proximal: Tensor | None, denominator: float, stats: StepStats) -> None:
        """``proximal`` None: the current policy still is the proximal one."""
        config = self.config
        result = self.model.packed_ppo_loss(
            x.input_ids,
            x.position_ids,
            x.lengths,
            self._temperature,
            PPOInputs(proximal, x.behavior_logprobs, x.advantages),
            rows=x.rows,
            denominator=denominator,
            shared=x.shared,
            eps_clip=config.eps_clip,
            eps_clip_higher=config.eps_clip_higher,
            c_clip=config.c_clip,
            behav_imp_weight_cap=config.behav_imp_weight_cap,
            behav_filter_cap=config.behav_filter_cap,
            decoupled=config.use_decoupled_loss,
        )
        result.loss.backward()
        if proximal is None:
            stats.add_drift(result.logprobs, x.behavior_logprobs, x.fresh)
        elif config.recompute_logprob:
            stats.add_drift(proximal, x.behavior_logprobs, x.fresh)
        stats.add(result.stats)

    def _forward(self, x: _Inputs, temperature: float) -> tuple[Tensor, Tensor]:
        return self.model.packed_logprobs(x.input_ids, x.position_ids, x.lengths, temperature, rows=x.rows, shared=x.shared)

    def _recompute(self, inputs: Sequence[_Inputs]) -> list[Tensor]:
        with torch.no_grad():
            logprobs = [self._forward(x, self._temperature)[0] for x in inputs]
        if self._sharded:
            # The root stays unsharded after a forward without gradient, and would not see the next optimizer step.
            self.model.reshard()
        return logprobs

    def _to_device(self, mb: Microbatch) -> _Inputs:
        def put(array: Any) -> Tensor:
            return torch.from_numpy(array).to(self.device, non_blocking=True)

        return _Inputs(
            input_ids=put(mb.input_ids),
            position_ids=put(mb.position_ids),
            lengths=(mb.cu_seqlens[1:] - mb.cu_seqlens[:-1]).tolist(),
            shared=find_shared_prompts(mb.input_ids, mb.cu_seqlens, mb.loss_mask, self.device),
            rows=put(mb.loss_mask.nonzero()[0]),
            loss_mask=put(mb.loss_mask),
            behavior_logprobs=put(mb.logprobs),
            advantages=put(mb.advantages),
            fresh=put(mb.loss_mask & (mb.versions == self.version)),
        )

    def _optimizer_step(self, lr_scale: float, stats: StepStats) -> None:
        """Clips and steps, or skips the step when a gradient is not finite; gradients are gone afterwards."""
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        norm = float(full_tensor(torch.nn.utils.clip_grad_norm_(parameters, self._optimizer_config.gradient_clipping)))
        finite = norm < float("inf")  # false for NaN too
        stats.add_step(norm, finite)
        if finite:
            self._optimizer.step(lr_scale)
            self._nonfinite_in_a_row = 0
        else:
            self._nonfinite_in_a_row += 1
        self.model.zero_grad(set_to_none=True)

    def _finish(self, stats: StepStats, lr_scale: float, n_minibatches: int) -> dict[str, Any]:
        if self._nonfinite_in_a_row > self.config.max_nonfinite_steps:
            raise NonFiniteGradients(
                f"{self._nonfinite_in_a_row} optimizer steps in a row had gradients that are not finite (actor.max_nonfinite_steps="
                f"{self.config.max_nonfinite_steps}); lower the learning rates, or look at the rewards and the log-prob drift in metrics.jsonl"
            )
        return {**stats.result(self.world_size, n_minibatches), "lr_scale": lr_scale, "version": self.version}

    # -- weights ----------------------------------------------------------------------------------------------------------------

    def manifest(self) -> list[tuple[str, tuple[int, ...], torch.dtype]]:
        """Name, shape and dtype of every tensor of ``weights``."""
        return [(name, tuple(p.shape), self._dtype) for name, p in self.model.named_parameters()]

    def use_checkpoint_names(self) -> None:
        """From here on ``gatherer`` plans buckets of what a Hugging Face checkpoint holds. ``UnsupportedModel`` if it cannot."""
        names = CheckpointNames(self.template)
        self.gatherer = WeightGatherer(self.model, self._dtype, self.rank, self.world_size, names)

    def weights(self) -> dict[str, Tensor] | None:
        """All parameters, whole, tied ones once, in the dtype of the config; a collective, None on ranks other than 0.

        The tensors may share memory with the parameters: read them before the next step.
        """
        result = {}
        for name, parameter in self.model.named_parameters():
            tensor = full_tensor(parameter)
            if self.rank == 0:
                result[name] = tensor.to(self._dtype)
        return result if self.rank == 0 else None

    def snapshot(self) -> dict[str, Tensor] | None:
        """Copies of all parameters on the CPU; a collective, None on ranks other than 0."""
        weights = self.weights()
        return None if weights is None else {name: w.to("cpu", copy=True) for name, w in weights.items()}
