"""One rank of the trainer: packed forward and backward, optimizer steps, and the weights for others.

Every rank of a run makes the same calls in the same order; with more than one rank the methods that touch weights are collectives.
The policy's ``version`` is the one last published: a train step works on it, the next ``publish`` numbers its result.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from areal.algo.loss import sft_loss
from areal.config import ActorConfig, CriticConfig, DPOConfig, OptimizerConfig, RefConfig
from areal.models.checkpoint_names import CheckpointNames
from areal.models.lora import base_parameters
from areal.trainer.checkpoint import SavedAdapter
from areal.trainer.critic import Critic, ValueMinibatch, value_inputs
from areal.trainer.dpo import dpo_backward
from areal.trainer.gather import WeightGatherer
from areal.trainer.inputs import Inputs, to_device
from areal.trainer.mesh import RankMesh
from areal.trainer.model import RankModel
from areal.trainer.ppo import ppo_backward, recomputes_proximal
from areal.trainer.sharding import full_tensor
from areal.trainer.step_stats import StepStats
from areal.types import Microbatch
from areal.weight_sync.adapter import AdapterInfo
from areal.weight_sync.stream import hash_tensors


class NonFiniteGradients(RuntimeError):
    """Too many train steps in a row had gradients with NaN or infinity."""


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
            self.reference = RankModel(ref.path or model_dir, self.mesh, dtype, frozen=True)
        self._made_from_actor = [
            model
            for model, section in ((self.critic and self.critic.model, critic), (self.reference, ref))
            if model is not None and section is not None and not section.path
        ]
        self.gatherer = self._gatherer()
        self._nonfinite_in_a_row = 0
        self.set_optimizer(config.optimizer)

    @property
    def models(self) -> dict[str, RankModel]:
        """Those that are trained, by name: what a checkpoint of the whole run holds."""
        return {"actor": self.actor} | ({} if self.critic is None else {"critic": self.critic.model})

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

    def set_optimizer(self, config: OptimizerConfig) -> None:
        """A fresh optimizer; its state and the count of its steps start again."""
        self.actor.set_optimizer(config)
        self._train_steps = 0

    # -- steps ------------------------------------------------------------------------------------------------------------------

    def score(self, minibatches: Sequence[Sequence[Microbatch]], critic: Sequence[Sequence[Microbatch]], logprobs: bool) -> dict[str, Any]:
        """What the models say of a batch before a train step: those of ref_logprobs, values and logprobs (if wanted) that this run has.

        Each is float32 [T] on the CPU for every micro-batch of every mini-batch, looked at in the loss tokens only; values are those of
        the micro-batches of ``critic`` where the critic has layers of its own. Also this rank's spans, as those of ``train_step``.
        """
        begin = time.time()

        def of_each(cut: Sequence[Sequence[Microbatch]], compute: Callable[[list[Inputs]], list[Tensor]]) -> list[list[Any]]:
            return [[t.cpu().numpy() for t in compute([self._put(mb) for mb in microbatches])] for microbatches in cut]

        result: dict[str, Any] = {}
        if self.reference is not None or self._base_is_reference:
            result["ref_logprobs"] = of_each(minibatches, lambda inputs: self._reference_logprobs(inputs, self._temperature))
        if self.critic is not None:
            result["values"] = of_each(critic, self.critic.model.frozen_values)
        elif self.shared_critic is not None:
            result["values"] = of_each(minibatches, self.actor.frozen_values)
        if logprobs:
            result["logprobs"] = of_each(minibatches, lambda inputs: self.actor.frozen_logprobs(inputs, self._temperature))
        return {**result, "spans": [["scoring", begin, time.time()]]}

    def train_step(self, minibatches: Sequence[RankMinibatch], critic: Sequence[RankMinibatch] = ()) -> dict[str, Any]:
        """One PPO step: an optimizer step for each mini-batch, in order.

        The proximal policy is the one at the start. For the first mini-batch that is still the current one, so its proximal log-probs
        are those of its training forward; only the others are computed beforehand, or interpolated (``prox_logp_method``). Returns
        statistics over all ranks: loss, n_tokens, clip_fraction (and its parts clip_high_fraction, clip_low_fraction),
        dual_clip_fraction, filtered_fraction, truncated_fraction, ratio_mean, importance_weight_mean, entropy, kl_proximal, kl_behaviour,
        kl_ref (with the KL in the loss), grad_norm, lr_scale, skipped_nonfinite, version, logprob_drift {mean_abs, max_abs, n} (engine
        against trainer on tokens that this version sampled; None without such tokens), and this rank's spans [[kind, start, end]] in
        seconds since the epoch. ``critic`` are the mini-batches of a critic with layers of its own; with a critic there are also
        value_loss and value_clip_fraction, and those of ``Critic.train_step``. ``NonFiniteGradients`` when too many steps in a row had
        to be skipped.
        """
        stats = StepStats(self.device)
        begin = time.time()
        prepared = [[self._put(mb) for mb in minibatch.microbatches] for minibatch in minibatches]
        proximal: list[list[Tensor]] = [[]]
        recomputes = recomputes_proximal(self.config)
        if recomputes:
            proximal += [self.actor.frozen_logprobs(inputs, self._temperature) for inputs in prepared[1:]]
        recomputed = time.time()
        if len(minibatches) > 1 and recomputes:
            stats.span("recompute", begin, recomputed)
        lr_scale = min(1.0, (self._train_steps + 1) / max(1, self.actor.optimizer_config.warmup_steps))
        for index, (minibatch, inputs) in enumerate(zip(minibatches, prepared, strict=True)):
            progress, denominator = index / len(minibatches), self._policy_denominator(minibatch)
            for turn, x in enumerate(inputs):
                known = proximal[index][turn] if recomputes and index else None
                values = value_inputs(x, self.shared_critic, minibatch.denominator)
                ppo_backward(self.actor, self.config, x, known, progress, denominator, self._temperature, stats, values)
            self._optimizer_step(lr_scale, stats)
        stats.span("training", recomputed, time.time())
        self._train_steps += 1
        result = self._finish(stats, lr_scale, len(minibatches))
        return result if self.critic is None else {**result, **self._train_critic(self.critic, critic, result["spans"])}

    def _train_critic(self, critic: Critic, minibatches: Sequence[RankMinibatch], spans: list[Any]) -> dict[str, Any]:
        begin = time.time()
        stats = critic.train_step([ValueMinibatch([self._put(mb) for mb in m.microbatches], m.denominator) for m in minibatches])
        spans.append(["training", begin, time.time()])
        if critic.nonfinite_in_a_row > self.config.max_nonfinite_steps:
            raise NonFiniteGradients(
                f"{critic.nonfinite_in_a_row} optimizer steps of the critic in a row had gradients that are not finite "
                f"(actor.max_nonfinite_steps={self.config.max_nonfinite_steps}); lower critic.optimizer.lr, or look at the rewards"
            )
        return stats

    def start_from_actor(self) -> None:
        """Reference and critic that have no path of their own take the actor's weights as they are now, after a warm-up."""
        for model in self._made_from_actor:
            model.copy_weights(self.actor)

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

    def dpo_step(self, minibatch: RankMinibatch, config: DPOConfig, lr_scale: float = 1.0) -> dict[str, Any]:
        """One step on preferences (see ``dpo``); the denominator is the number of pairs over all ranks.

        Returns those statistics of ``train_step`` that apply, and the means over pairs preference_accuracy, margin, chosen_reward and
        rejected_reward.
        """
        stats = StepStats(self.device)
        begin = time.time()
        inputs = [self._put(microbatch) for microbatch in minibatch.microbatches]
        references = self._reference_logprobs(inputs, temperature=1.0)
        recomputed = time.time()
        stats.span("recompute", begin, recomputed)
        for x, reference in zip(inputs, references, strict=True):
            dpo_backward(self.actor, config, x, reference, minibatch.denominator, stats)
        self._optimizer_step(lr_scale, stats)
        stats.span("training", recomputed, time.time())
        self._train_steps += 1
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
        return self.actor.frozen_logprobs([self._put(microbatch)], self._temperature)[0].cpu()

    def _put(self, microbatch: Microbatch) -> Inputs:
        return to_device(microbatch, self.device, self.version)

    def _policy_denominator(self, minibatch: RankMinibatch) -> float:
        if minibatch.policy_denominator is not None:
            return minibatch.policy_denominator
        if self.config.loss_normalization != "token":
            raise ValueError(
                f"actor.loss_normalization={self.config.loss_normalization} needs a policy_denominator with each mini-batch; "
                "make_train_batch gives it"
            )
        return minibatch.denominator

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

    def _gatherer(self, names: CheckpointNames | None = None) -> WeightGatherer:
        """Of the policy's weights as a model without adapters has them."""
        actor, mesh = self.actor, self.mesh
        return WeightGatherer(base_parameters(self.model), actor.dtype, mesh.rank, mesh.world_size, names, actor.adapters)

    def use_checkpoint_names(self) -> None:
        """From here on ``gatherer`` plans buckets of what a Hugging Face checkpoint holds. ``UnsupportedModel`` if it cannot."""
        self.gatherer = self._gatherer(CheckpointNames(self.template))

    def use_adapters_alone(self, bucket_bytes: int) -> AdapterInfo:
        """From here on ``gatherer`` has the factors of the adapters, by the names of peft's files, in float32; a collective.

        Returns what servers are to be told: how the product is scaled, and the hash of the weights that it is added to, as an embedded
        engine tells its own (on rank 0).
        """
        assert self.actor.adapters is not None
        whole = WeightGatherer(base_parameters(self.model), self.actor.dtype, self.mesh.rank, self.mesh.world_size)
        device = self.device if self.mesh.rank == 0 else None
        base = sum(hash_tensors(whole.gather, whole.bucket_plan(bucket_bytes), device).values()) & (2**64 - 1)
        self.gatherer = WeightGatherer(self.actor.adapters.parameters, torch.float32, self.mesh.rank, self.mesh.world_size)
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
        """Copies of ``weights`` on the CPU; a collective, None on ranks other than 0."""
        weights = self.weights()
        return None if weights is None else {name: w.to("cpu", copy=True) for name, w in weights.items()}
