"""One rank of the trainer: packed forward and backward, optimizer steps, and the weights for others.

Every rank of a run makes the same calls in the same order; with more than one rank the methods that touch weights are collectives.
The policy's ``version`` is the one last published: a train step works on it, the next ``publish`` numbers its result.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from areal.config import ActorConfig, CriticConfig, DPOConfig, OptimizerConfig, RefConfig
from areal.models.checkpoint_names import CheckpointNames
from areal.models.lora import base_parameters
from areal.trainer.checkpoint import SavedAdapter
from areal.trainer.critic import Critic, ValueMinibatch, value_inputs
from areal.trainer.dpo import dpo_backward
from areal.trainer.failed_step import FailedMinibatch, NonFiniteGradients, failed_minibatch
from areal.trainer.gather import WeightGatherer
from areal.trainer.inputs import Inputs, to_device
from areal.trainer.mesh import RankMesh
from areal.trainer.meters import matmul_peak
from areal.trainer.model import RankModel
from areal.trainer.ppo import policy_denominator, ppo_backward, recomputes_proximal
from areal.trainer.scoring import score_each
from areal.trainer.sft import sft_backward
from areal.trainer.shard_loading import persistent_buffers
from areal.trainer.sharding import full_tensor
from areal.trainer.step_stats import StepStats
from areal.types import Microbatch
from areal.weight_sync.adapter import AdapterInfo
from areal.weight_sync.stream import hash_tensors


class RankMinibatch(NamedTuple):
    """This rank's part of a PPO mini-batch."""

    microbatches: list[Microbatch]
    denominator: float
    """Loss tokens of the whole mini-batch over all ranks."""
    policy_denominator: float | None = None
    """What the policy's loss is divided by; None: the loss tokens."""


class TrainEngine:
    """A policy in training.

    Args:
        model_dir: Hugging Face model directory.
        config: the actor's configuration.
        temperature: that of the rollouts; log-probs are of softmax(logits / temperature).
        mesh: which rank this is, and where it computes; None = one on the CPU.
        critic: a value model, of its own or on the actor's layers.
        ref: a frozen reference model.
        seed: of weights that are not in ``model_dir``: adapters.
        warms_up: the actor is trained before the reference is taken (``start_from_actor``).
    """

    def __init__(
        self,
        model_dir: str | Path,
        config: ActorConfig,
        *,
        temperature: float = 1.0,
        mesh: RankMesh | None = None,
        critic: CriticConfig | None = None,
        ref: RefConfig | None = None,
        seed: int = 0,
        warms_up: bool = False,
    ) -> None:
        self.config = config
        self.model_dir = Path(model_dir)
        self.mesh = mesh or RankMesh(torch.device("cpu"))
        self.version = 0
        self._temperature = temperature
        dtype = getattr(torch, config.dtype)
        self.shared_critic = critic if critic is not None and critic.shared else None
        self.actor = RankModel(
            model_dir,
            self.mesh,
            dtype,
            gradient_checkpointing=config.gradient_checkpointing,
            offload=config.offload,
            head="both" if self.shared_critic else "logprobs",
            lora=config.lora,
            seed=seed,
        )
        self.critic: Critic | None = None
        if critic is not None and not critic.shared:
            self.critic = Critic(critic.path or model_dir, critic, self.mesh, dtype)
        self.reference: RankModel | None = None
        self._base_is_reference = ref is not None and not ref.path and config.lora is not None and not warms_up
        if ref is not None and not self._base_is_reference:
            self.reference = RankModel(ref.path or model_dir, self.mesh, dtype, offload=ref.offload, frozen=True)
        self._keeps_ref = ref is not None and not ref.path and warms_up
        self._made_from_actor = [
            model
            for model, section in ((self.critic and self.critic.model, critic), (self.reference, ref))
            if model is not None and section is not None and not section.path
        ]
        self.gatherer = self._gatherer()
        self._peak_flops = matmul_peak(self.mesh.device, dtype)
        self._opened: StepStats | None = None
        self.nonfinite_in_a_row = 0
        self._failed: list[FailedMinibatch] = []
        self.set_optimizer(config.optimizer)

    @property
    def models(self) -> dict[str, RankModel]:
        """What a checkpoint of the whole run holds, by name: those that are trained, and a reference that a warm-up made."""
        models = {"actor": self.actor}
        if self.critic is not None:
            models["critic"] = self.critic.model
        if self.reference is not None and self._keeps_ref:
            models["ref"] = self.reference
        return models

    @property
    def device(self) -> torch.device:
        return self.mesh.device

    @property
    def model(self) -> PreTrainedModel:
        """The policy's."""
        return self.actor.model

    @property
    def temperature(self) -> float:
        return self._temperature

    @property
    def template(self) -> PreTrainedModel:
        return self.actor.template

    def set_optimizer(self, config: OptimizerConfig) -> None:
        """A fresh optimizer; its state and the count of its steps start again."""
        self.actor.set_optimizer(config)
        self.train_steps = 0

    # -- steps ------------------------------------------------------------------------------------------------------------------

    def score(self, minibatches: Sequence[Sequence[Microbatch]], critic: Sequence[Sequence[Microbatch]], logprobs: bool) -> dict[str, Any]:
        """What the models say of a batch before a train step: those of ref_logprobs, values and logprobs (if wanted) that this run has.

        Each is float32 [T] on the CPU for every micro-batch of every mini-batch, looked at in the loss tokens only; values are those of
        the micro-batches of ``critic`` where the critic has layers of its own. Also this rank's spans, as those of ``train_step``.
        """
        begin = time.time()
        stats = self._opened = StepStats(self.device, counts=self.mesh.counts)  # the train step's: what is done here belongs to it

        def of_each(model: RankModel, compute: Callable[[list[Inputs]], list[Tensor]], cut: Sequence[Sequence[Microbatch]]) -> list[Any]:
            return score_each(cut, self._put, model, compute, stats)

        result: dict[str, Any] = {}
        if self.reference is not None or self._base_is_reference:
            of_reference = partial(self._reference_logprobs, temperature=self._temperature)
            result["ref_logprobs"] = of_each(self.reference or self.actor, of_reference, minibatches)
        if self.critic is not None:
            result["values"] = of_each(self.critic.model, self.critic.model.frozen_values, critic)
        elif self.shared_critic is not None:
            result["values"] = of_each(self.actor, self.actor.frozen_values, minibatches)
        if logprobs:
            result["logprobs"] = of_each(self.actor, partial(self.actor.frozen_logprobs, temperature=self._temperature), minibatches)
        return {**result, "spans": [["scoring", begin, time.time()]]}

    def train_step(self, minibatches: Sequence[RankMinibatch], critic: Sequence[RankMinibatch] = ()) -> dict[str, Any]:
        """One PPO step: an optimizer step for each mini-batch, in order.

        The proximal policy is the one at the start. For the first mini-batch that is still the current one, so its proximal log-probs
        are those of its training forward; only the others are computed beforehand, or interpolated (``prox_logp_method``). Returns
        statistics over all ranks: loss, n_tokens, clip_fraction (and its parts clip_high_fraction, clip_low_fraction),
        dual_clip_fraction, filtered_fraction, truncated_fraction, ratio_mean, importance_weight_mean, entropy, kl_proximal, kl_behaviour,
        kl_ref (with the KL in the loss), grad_norm, lr_scale, skipped_nonfinite, version, logprob_drift {mean_abs, max_abs, n} (engine
        against trainer on tokens that this version sampled; None without such tokens), meters {model_flops, peak_flops_per_s, seconds
        and peak_mb by phase; since ``score`` if that was called before}, and this rank's spans [[kind, start, end]] in seconds since the
        epoch. ``critic`` are the mini-batches of a critic with layers of its own; with a critic there are also value_loss and
        value_clip_fraction, and those of ``Critic.train_step``. ``NonFiniteGradients`` on all ranks when too many steps in a row had to
        be skipped.
        """
        stats, self._opened = self._opened or StepStats(self.device, counts=self.mesh.counts), None
        begin = time.time()
        prepared = [[self._put(mb) for mb in minibatch.microbatches] for minibatch in minibatches]
        proximal: list[list[Tensor]] = [[]]
        recomputes = recomputes_proximal(self.config)
        if recomputes:
            with stats.phase("recompute"):
                proximal += [self._proximal_logprobs(inputs, stats) for inputs in prepared[1:]]
        recomputed = time.time()
        if len(minibatches) > 1 and recomputes:
            stats.span("recompute", begin, recomputed)
        lr_scale = min(1.0, (self.train_steps + 1) / max(1, self.actor.optimizer_config.warmup_steps))
        self._failed.clear()
        for index, (minibatch, inputs) in enumerate(zip(minibatches, prepared, strict=True)):
            progress = index / len(minibatches)
            known = proximal[index] if recomputes and index else [None] * len(inputs)
            for x, of_x in zip(inputs, known, strict=True):
                self.backward(x, of_x, progress, minibatch, stats)
            self._optimizer_step(lr_scale, stats)
            self._remember_failure(minibatch, known, progress)
        stats.span("training", recomputed, time.time())
        self.train_steps += 1
        self._check_finite("ppo")
        of_critic = {} if self.critic is None else self._train_critic(self.critic, critic, stats)
        return {**self._finish(stats, lr_scale, len(minibatches)), **of_critic}

    def _proximal_logprobs(self, inputs: Sequence[Inputs], stats: StepStats) -> list[Tensor]:
        """Those of the actor as it is now, computed unless the micro-batches came with them."""
        known = [x.proximal_logprobs for x in inputs if x.proximal_logprobs is not None]
        if len(known) == len(inputs):
            return known
        stats.add_flops(sum(self.actor.flops_of(x, training=False) for x in inputs))
        return self.actor.frozen_logprobs(inputs, self._temperature)

    def _train_critic(self, critic: Critic, minibatches: Sequence[RankMinibatch], of_step: StepStats) -> dict[str, Any]:
        begin = time.time()
        inputs = [ValueMinibatch([self._put(mb) for mb in m.microbatches], m.denominator) for m in minibatches]
        stats = critic.train_step(inputs, of_step)
        of_step.span("training", begin, time.time())
        if critic.nonfinite_in_a_row > self.config.max_nonfinite_steps:
            skipped = [minibatches[index] for index in critic.skipped]
            raise NonFiniteGradients(
                f"{critic.nonfinite_in_a_row} optimizer steps of the critic in a row had gradients that are not finite "
                f"(actor.max_nonfinite_steps={self.config.max_nonfinite_steps}); lower critic.optimizer.lr, or look at the rewards",
                "critic",
                [failed_minibatch(m, [None] * len(m.microbatches)) for m in skipped],
            )
        return stats

    def start_from_actor(self) -> None:
        """Reference and critic that have no path of their own take the actor's weights as they are now, after a warm-up."""
        for model in self._made_from_actor:
            model.copy_weights(self.actor)

    def sft_step(self, minibatch: RankMinibatch, lr_scale: float = 1.0) -> dict[str, Any]:
        """One supervised step on the loss tokens, at temperature 1. Returns those statistics of ``train_step`` that apply."""
        stats = StepStats(self.device, counts=self.mesh.counts)
        begin = time.time()
        self._failed.clear()
        for microbatch in minibatch.microbatches:
            sft_backward(self.actor, self._put(microbatch), minibatch.denominator, stats)
        self._optimizer_step(lr_scale, stats)
        self._remember_failure(minibatch, [None] * len(minibatch.microbatches))
        stats.span("training", begin, time.time())
        self.train_steps += 1
        self._check_finite("sft")
        return self._finish(stats, lr_scale, 1)

    def backward(self, x: Inputs, proximal: Tensor | None, progress: float, minibatch: RankMinibatch, stats: StepStats) -> None:
        """Adds the gradients of the policy's loss of one micro-batch of ``minibatch``; the arguments are those of ``ppo_backward``."""
        values = value_inputs(x, self.shared_critic, minibatch.denominator)
        denominator = policy_denominator(self.config, minibatch.policy_denominator, minibatch.denominator)
        with stats.phase("forward"):  # the head's gradients are made there too
            ppo_backward(self.actor, self.config, x, proximal, progress, denominator, self._temperature, stats, values)
        stats.add_flops(self.actor.flops_of(x, training=True))

    def dpo_step(self, minibatch: RankMinibatch, config: DPOConfig, lr_scale: float = 1.0) -> dict[str, Any]:
        """One step on preferences (see ``dpo``); the denominator is the number of pairs over all ranks.

        Returns those statistics of ``train_step`` that apply, and the means over pairs preference_accuracy, margin, chosen_reward and
        rejected_reward.
        """
        stats = StepStats(self.device, counts=self.mesh.counts)
        begin = time.time()
        inputs = [self._put(microbatch) for microbatch in minibatch.microbatches]
        with stats.phase("recompute"):
            references = self._reference_logprobs(inputs, temperature=1.0)
        stats.add_flops(sum(self.actor.flops_of(x, training=False) for x in inputs))
        recomputed = time.time()
        stats.span("recompute", begin, recomputed)
        self._failed.clear()
        for x, reference in zip(inputs, references, strict=True):
            dpo_backward(self.actor, config, x, reference, minibatch.denominator, stats)
        self._optimizer_step(lr_scale, stats)
        self._remember_failure(minibatch, references)
        stats.span("training", recomputed, time.time())
        self.train_steps += 1
        self._check_finite("dpo", config)
        return self._finish(stats, lr_scale, 1)

    def _reference_logprobs(self, inputs: Sequence[Inputs], temperature: float) -> list[Tensor]:
        """Of the reference model, or of the actor without its adapters, which is the model that it began as."""
        if self.reference is not None:
            return self.reference.frozen_logprobs(inputs, temperature)
        assert self._base_is_reference, "there is no reference model"
        with self.actor.without_adapters():
            return self.actor.frozen_logprobs(inputs, temperature)

    def logprobs(self, microbatch: Microbatch) -> Tensor:
        """Log-probs of the loss tokens under the current weights, float32 [T] on the CPU; 0 elsewhere."""
        return self.actor.frozen_logprobs([self._put(microbatch)], self._temperature)[0][: microbatch.n_tokens].cpu()

    def _put(self, microbatch: Microbatch) -> Inputs:
        return to_device(microbatch, self.device, self.version, self.mesh)

    def _optimizer_step(self, lr_scale: float, stats: StepStats) -> None:
        with stats.phase("optimizer"):
            step = self.actor.optimizer_step(lr_scale, stats.minibatch_loss)
        stats.add_step(*step)
        self.nonfinite_in_a_row = 0 if step.finite else self.nonfinite_in_a_row + 1

    def _remember_failure(self, minibatch: RankMinibatch, known: Sequence[Tensor | None], progress: float = 0.0) -> None:
        """What was skipped since the weights last changed, for a replay."""
        if self.nonfinite_in_a_row:
            self._failed.append(failed_minibatch(minibatch, known, progress))
        else:
            self._failed.clear()

    def _check_finite(self, kind: Literal["ppo", "sft", "dpo"], preferences: DPOConfig | None = None) -> None:
        if self.nonfinite_in_a_row > self.config.max_nonfinite_steps:
            raise NonFiniteGradients(
                f"{self.nonfinite_in_a_row} optimizer steps in a row had a loss or gradients that are not finite (actor.max_nonfinite_steps="
                f"{self.config.max_nonfinite_steps}); lower the learning rates, or look at the rewards and the log-prob drift in metrics.jsonl",
                kind,
                list(self._failed),
                preferences,
            )

    def _finish(self, stats: StepStats, lr_scale: float, n_minibatches: int) -> dict[str, Any]:
        result = stats.result(self.mesh.world_size, n_minibatches, self._peak_flops)
        return {**result, "lr_scale": lr_scale, "version": self.version}

    # -- weights ----------------------------------------------------------------------------------------------------------------

    def _gatherer(self, names: CheckpointNames | None = None) -> WeightGatherer:
        """Of the policy's weights as a model without adapters has them."""
        actor, mesh = self.actor, self.mesh
        return WeightGatherer(base_parameters(self.model), actor.dtype, mesh.rank, mesh.world_size, names, actor.adapters, self.device)

    def use_checkpoint_names(self) -> None:
        """From here on ``gatherer`` plans buckets of what a Hugging Face checkpoint holds. ``UnsupportedModel`` if it cannot."""
        self.gatherer = self._gatherer(CheckpointNames(self.template))

    def use_adapters_alone(self, bucket_bytes: int) -> AdapterInfo:
        """From here on ``gatherer`` has the factors of the adapters, by the names of peft's files, in float32; a collective.

        Returns what servers are to be told: how the product is scaled, and the hash of the weights that it is added to, as an embedded
        engine tells its own (on rank 0).
        """
        assert self.actor.adapters is not None
        rank, world_size = self.mesh.rank, self.mesh.world_size
        whole = WeightGatherer(base_parameters(self.model), self.actor.dtype, rank, world_size, device=self.device)
        device = self.device if self.mesh.rank == 0 else None
        base = sum(hash_tensors(whole.gather, whole.bucket_plan(bucket_bytes), device).values()) & (2**64 - 1)
        self.gatherer = WeightGatherer(self.actor.adapters.parameters, torch.float32, rank, world_size, device=self.device)
        return AdapterInfo(self.actor.adapters.describe(str(self.model_dir.absolute())), f"{base:016x}")

    def weights(self) -> dict[str, Tensor] | None:
        """All weights, whole, tied ones once, adapters added, in the dtype of the config; a collective, None on ranks other than 0.

        The tensors may share memory with the parameters: read them before the next step.
        """
        result = {}
        for name, tensor in self.actor.weights():
            if self.mesh.rank == 0:
                result[name] = tensor.to(self.actor.dtype)
        return result if self.mesh.rank == 0 else None

    def adapter_snapshot(self) -> SavedAdapter | None:
        """Copies of the adapters' factors on the CPU, float32; a collective, None on ranks other than 0 and without adapters."""
        if self.actor.adapters is None:
            return None
        whole = {name: full_tensor(p) for name, p in self.actor.adapters.parameters.items()}
        if self.mesh.rank != 0:
            return None
        factors = {name: w.to("cpu", torch.float32, copy=True) for name, w in whole.items()}
        return SavedAdapter(factors, AdapterInfo(self.actor.adapters.describe(str(self.model_dir.absolute())), ""))

    def snapshot(self) -> dict[str, Tensor] | None:
        """Copies on the CPU of all that a checkpoint holds: ``weights``, and buffers that are not trained; a collective, None on ranks other
        than 0."""
        weights = self.weights()
        if weights is None:
            return None
        return {name: w.detach().to("cpu", copy=True) for name, w in (weights | persistent_buffers(self.model)).items()}
