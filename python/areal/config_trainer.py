"""The sections of the configuration about the side that trains: models on the ranks, optimizers, objectives.

They are imported from ``areal.config``, as all others. Importing this module does not import torch.
"""

from __future__ import annotations

import re
from typing import Any, Literal, NamedTuple, Self

from pydantic import Field, model_validator

from areal.config_rollout import ConfigError, Section


class TrainerLayout(NamedTuple):
    """``fsdp:d4r2c2``: 8 ranks; 4 of them see different data, as 2 replicas of 2 shards, and each of these 4 is 2 that share long sequences."""

    data: int
    """Data-parallel ranks: each gets other micro-batches."""
    replicas: int = 1
    """Copies of the parameters (HSDP); each is sharded over all other ranks. It divides ``data``."""
    context: int = 1
    """Ranks that share the tokens of a micro-batch (Ulysses sequence parallelism)."""

    @property
    def world_size(self) -> int:
        return self.data * self.context


def parse_trainer_backend(value: str) -> TrainerLayout:
    """``ConfigError`` for anything but fsdp:dN with rR and cC, in this order, where they are wanted."""
    engine, _, layout = value.partition(":")
    if engine != "fsdp":
        raise ConfigError(f"actor.backend='{value}': the backend '{engine}' is not known here", "use fsdp:dN")
    sizes = re.fullmatch(r"d([1-9]\d*)(?:r([1-9]\d*))?(?:c([1-9]\d*))?", layout)
    if sizes is None:
        raise ConfigError(
            f"actor.backend='{value}': '{layout}' is not a layout of fsdp",
            "use fsdp:dN, fsdp:dNrR (R replicas) or fsdp:dNcC (C ranks share a sequence)",
        )
    result = TrainerLayout(int(sizes[1]), int(sizes[2] or 1), int(sizes[3] or 1))
    if result.data % result.replicas:
        raise ConfigError(
            f"actor.backend='{value}': {result.data} data-parallel ranks cannot be {result.replicas} replicas of equal size",
            f"use fsdp:d{result.replicas * max(1, result.data // result.replicas)}r{result.replicas}",
        )
    return result


class OptimizerConfig(Section):
    """AdamW, or Muon on the matrices of the layers with AdamW on the rest."""

    type: Literal["adamw", "muon"] = "adamw"
    """adamw, or muon for the matrices inside the layers (AdamW for the rest)."""
    lr: float = Field(2e-5, gt=0)
    """AdamW's learning rate."""
    muon_lr: float = Field(1e-3, gt=0)
    """Muon's learning rate (type: muon)."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decay of the two moments."""
    eps: float = Field(1e-5, gt=0)
    """AdamW's eps."""
    weight_decay: float = Field(0.05, ge=0)
    """Decoupled, per unit of learning rate."""
    gradient_clipping: float = Field(1.0, gt=0)
    """Largest global gradient norm."""
    warmup_steps: int = Field(0, ge=0)
    """Train steps of linear warm-up to the constant rate."""


class MicrobatchConfig(Section):
    """How a batch is cut into forward passes."""

    max_tokens_per_mb: int = Field(16384, ge=1)
    """Tokens of a packed micro-batch at most."""


class NormConfig(Section):
    """x -> (x - mean) / (std + eps), over a group or the batch."""

    mean_level: Literal["group", "batch", "leave_one_out", "none"] = "group"
    """What the mean is taken over; leave_one_out: the others of the group (RLOO); none subtracts nothing."""
    std_level: Literal["group", "batch", "none"] = "group"
    """What the standard deviation is taken over; none divides by nothing."""
    eps: float = Field(1e-5, gt=0)
    """Added to the standard deviation."""


class LoraConfig(Section):
    """Low-rank adapters (through ``peft``): only they are trained."""

    rank: int = Field(16, ge=1)
    """Rank of the two factors."""
    alpha: float = Field(32.0, gt=0)
    """The product of the factors is multiplied by alpha / rank."""
    target_modules: list[str] | Literal["all-linear"] = "all-linear"
    """Modules that get an adapter, by the ends of their names; all-linear: every linear layer but the head."""
    sync: Literal["merged", "adapter"] = "merged"
    """What goes to the rollout servers: whole weights with the adapter added, or the adapter alone."""


class TrainEngineConfig(Section):
    """A model on the trainer's ranks."""

    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    mb_spec: MicrobatchConfig = Field(default_factory=MicrobatchConfig)
    gradient_checkpointing: bool = False
    """Recompute activations in backward, layer by layer."""
    offload: bool = False
    """Keep parameters, gradients and optimizer state in host memory, and bring a layer to the GPU when it is used."""


class RefConfig(Section):
    """The reference model of the KL penalty (actor.kl_ctl above 0): frozen, on the actor's ranks."""

    path: str = ""
    """Hugging Face model directory; empty = the actor as it was when reinforcement learning began."""
    offload: bool = False
    """As actor.offload."""


class CriticConfig(TrainEngineConfig):
    """The value model of PPO, on the actor's ranks."""

    path: str = ""
    """Hugging Face model directory, whose layers get a head of one value a token; empty = the actor when reinforcement learning begins."""
    shared: bool = False
    """A value head on the actor's own layers instead of a model of its own."""
    loss_coef: float = Field(0.5, gt=0)
    """shared: the value loss is added to the policy's times this."""
    eps_clip: float | None = Field(0.2, gt=0)
    """Value clipping: the loss is the larger of those of the value and of the value clipped to this range around the old one; null = off."""
    ppo_n_minibatches: int = Field(1, ge=1)
    """Optimizer steps per batch."""


class ActorConfig(TrainEngineConfig):
    """The policy and how it is trained."""

    path: str = ""
    """Hugging Face model directory."""
    init_from_scratch: dict[str, Any] | None = None
    """Instead of path: a Hugging Face config (model_type and its keys) to be started from random weights."""
    backend: str = "fsdp:d1"
    """fsdp:dN = N data-parallel ranks; dNrR: R replicas, each sharded over N / R ranks (HSDP); dNcC: N times C ranks, C share a sequence."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Weights and activations, on both sides."""
    device: str = "auto"
    """auto, cpu or cuda (rank r uses device r)."""
    threads: int = Field(1, ge=1)
    """CPU threads of one rank."""
    lora: LoraConfig | None = None
    """Train low-rank adapters only; null = all parameters."""
    ppo_n_minibatches: int = Field(1, ge=1)
    """Optimizer steps per batch."""
    objective: Literal["ppo", "cispo"] = "ppo"
    """ppo: the clipped ratio; cispo: the clipped ratio as a constant weight of the log-prob."""
    importance_sampling_level: Literal["token", "sequence"] = "token"
    """The ratio current / proximal is that of a token, or the geometric mean over its sequence (GSPO)."""
    loss_normalization: Literal["token", "sequence", "fixed"] = "token"
    """Every token counts 1 (DAPO), every sequence (GRPO), or every token 1 / gconfig.max_new_tokens of a sequence (Dr. GRPO)."""
    entropy_coef: float = Field(0.0, ge=0)
    """Weight of the entropy bonus."""
    kl_ctl: float = Field(0.0, ge=0)
    """Weight of the KL penalty to the reference model (ref); 0 = none."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """Of a token's KL, from x = log-prob of the actor - of ref: k1 = x, k2 = x^2 / 2, k3 = exp(-x) - 1 + x; docs/algorithms.md has their
    gradients."""
    kl_in: Literal["loss", "reward"] = "loss"
    """Where the penalty is: added to the loss, or taken off the reward of each token."""
    discount: float = Field(1.0, gt=0, le=1)
    """gamma: what a later reward is worth, per token."""
    gae_lambda: float = Field(1.0, ge=0, le=1)
    """lambda of GAE (critic)."""
    eps_clip: float = Field(0.2, gt=0)
    """Clip range of the ratio current / proximal, [1 - eps_clip, 1 + eps_clip]; 1 and more (cispo): no lower end."""
    eps_clip_higher: float | None = Field(None, gt=0)
    """Upper clip range; none = eps_clip (clip-higher of DAPO)."""
    c_clip: float | None = Field(None, gt=1)
    """Dual clip: bound on the ratio where the advantage is negative; none = off."""
    use_decoupled_loss: bool = True
    """Proximal policy = the weights before the step; false = naive PPO against the behaviour policy."""
    recompute_logprob: bool = True
    """Have proximal log-probs, by prox_logp_method; false = those of the behaviour policy. Needed by the decoupled loss."""
    prox_logp_method: Literal["recompute", "loglinear"] = "recompute"
    """The proximal log-probs of the second and later mini-batches: recomputed when the batch arrives, or interpolated between behaviour and
    current ones by the version's age (no forward pass)."""
    behav_imp_weight_cap: float | None = Field(None, gt=1)
    """Bound on the weight proximal / behaviour; none = off."""
    behav_imp_weight_mode: Literal["truncate", "mask"] = "truncate"
    """A weight above its cap becomes the cap (truncated importance sampling), or 0 (masked)."""
    behav_imp_weight_level: Literal["token", "sequence"] = "token"
    """The weight of a token, or the product over its sequence."""
    behav_filter_cap: float | None = Field(1.4, gt=1)
    """Mask tokens whose proximal / behaviour ratio leaves [1/cap, cap], by behav_filter_side; none = off. Naive PPO has no such ratio."""
    behav_filter_level: Literal["token", "sequence"] = "token"
    """Mask single tokens, or whole sequences by the geometric mean of their ratios."""
    behav_filter_side: Literal["advantage", "both"] = "advantage"
    """advantage: mask above the range only where the advantage is positive, and below it only where it is negative, so that what pulls a
    policy back that went too far stays; both: mask all that is outside."""
    reward_scaling: float = 1.0
    """r -> (r + reward_bias) * reward_scaling."""
    reward_bias: float = 0.0
    """Added to every reward before it is scaled."""
    overlong_reward_penalty: bool = False
    """DAPO: a longer answer than gconfig.max_new_tokens - overlong_tokens earns less, linearly down to overlong_penalty_factor less."""
    overlong_tokens: int = Field(0, ge=0)
    """The last tokens of gconfig.max_new_tokens, in which the penalty grows."""
    overlong_penalty_factor: float = Field(1.0, gt=0)
    """What an answer of gconfig.max_new_tokens earns less."""
    mask_truncated: bool = False
    """Do not train on sequences whose answer was cut off by its length (overlong filtering of DAPO); they count in reward_norm."""
    reward_norm: NormConfig | None = Field(default_factory=NormConfig)
    """Normalisation of rewards into advantages; null = none."""
    adv_norm: NormConfig | None = None
    """Normalisation of the advantages over the loss tokens."""
    max_nonfinite_steps: int = Field(3, ge=0)
    """Optimizer steps in a row that may be skipped because loss or gradients are not finite; one more ends the run and is dumped."""
    step_timeout: float = Field(1800.0, gt=0)
    """Seconds one train step may take."""

    @property
    def kl_in_reward(self) -> bool:
        """Whether tokens get less reward where they leave the reference model."""
        return self.kl_ctl > 0 and self.kl_in == "reward"

    @model_validator(mode="after")
    def _check(self) -> Self:
        if bool(self.path) == (self.init_from_scratch is not None):
            raise ValueError("give either actor.path (a model directory) or actor.init_from_scratch (a model config), not both or neither")
        if self.use_decoupled_loss and not self.recompute_logprob:
            raise ValueError("use_decoupled_loss needs recompute_logprob: true (or set use_decoupled_loss: false)")
        if self.adv_norm is not None and {"group", "leave_one_out"} & {self.adv_norm.mean_level, self.adv_norm.std_level}:
            raise ValueError("adv_norm works on the batch; set its mean_level and std_level to 'batch' or 'none'")
        return self
