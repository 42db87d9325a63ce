"""One tree of configuration classes; YAML files and ``key=value`` overrides build it, nothing changes it afterwards.

Every key has one default, here; ``config_load.py`` reads files and overrides, ``config_check.py`` looks across keys.
Errors are one sentence naming the key and the way out (``ConfigError``). Importing this module does not import torch.
"""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import BaseModel, Field, model_validator

from areal.config_data import DatasetConfig, DPOConfig, SFTConfig
from areal.config_rollout import (
    ConfigError,
    RolloutConfig,
    RolloutLayout,
    Section,
    SGLangConfig,
    WeightSyncConfig,
    parse_rollout_backend,
)
from areal.config_trainer import (
    ActorConfig,
    CriticConfig,
    LoraConfig,
    MicrobatchConfig,
    NormConfig,
    OptimizerConfig,
    RefConfig,
    TrainerLayout,
    parse_trainer_backend,
)

__all__ = [
    "ActorConfig",
    "ConfigError",
    "CriticConfig",
    "DPOConfig",
    "DatasetConfig",
    "EvaluatorConfig",
    "GRPOConfig",
    "GenerationConfig",
    "LoraConfig",
    "MicrobatchConfig",
    "NormConfig",
    "OptimizerConfig",
    "RecoverConfig",
    "RefConfig",
    "RewardConfig",
    "RolloutConfig",
    "RolloutLayout",
    "SFTConfig",
    "SGLangConfig",
    "SaverConfig",
    "StatsLoggerConfig",
    "TrainerLayout",
    "WeightSyncConfig",
    "drift_bound",
    "parse_rollout_backend",
    "parse_trainer_backend",
]


class GenerationConfig(Section):
    """How answers are sampled."""

    n_samples: int = Field(1, ge=1)
    """Samples per prompt: the size of a group."""
    max_new_tokens: int = Field(512, ge=1)
    """Longest answer, in tokens."""
    min_new_tokens: int = Field(0, ge=0)
    """End-of-sequence and stop tokens are not sampled before this many tokens."""
    temperature: float = Field(1.0, ge=0.0)
    """Divides the logits; 0 is greedy."""
    top_p: float = Field(1.0, gt=0.0, le=1.0)
    """Nucleus sampling; below 1 only in evaluation (training needs the untruncated distribution)."""
    top_k: int = Field(0, ge=0)
    """Sample from the k likeliest tokens, 0 = off; only in evaluation."""
    stop: list[str] = Field(default_factory=list)
    """Strings that end an answer."""
    stop_token_ids: list[int] = Field(default_factory=list)
    """Tokens that end an answer, besides the model's end-of-sequence token."""
    ignore_eos: bool = False
    """Go on after end-of-sequence, up to max_new_tokens."""

    def new_with_stop_and_pad_token_ids(self, tokenizer: Any) -> Self:
        """A copy that also stops at the tokenizer's end-of-sequence and padding tokens."""
        extra = [i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None and i not in self.stop_token_ids]
        return self.new(stop_token_ids=[*self.stop_token_ids, *dict.fromkeys(extra)])

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(f"min_new_tokens={self.min_new_tokens} is larger than max_new_tokens={self.max_new_tokens}; lower it")
        return self


class SaverConfig(Section):
    """Checkpoints."""

    every_steps: int = Field(0, ge=0)
    """Train steps between Hugging Face checkpoints; 0 = only at the end."""
    keep: int = Field(2, ge=1)
    """How many step checkpoints are kept."""


class RecoverConfig(Section):
    """Resuming a run that was cut off."""

    mode: Literal["off", "auto", "required"] = "auto"
    """auto: go on from the newest recover checkpoint of the trial if there is one; required: it must be there; off: always start anew."""
    every_steps: int = Field(0, ge=0)
    """Train steps between recover checkpoints; 0 = none."""
    keep: int = Field(2, ge=1)
    """How many of them are kept; where the newest is damaged, the one before it is taken."""


class EvaluatorConfig(Section):
    """Accuracy on held-out prompts."""

    every_steps: int = Field(0, ge=0)
    """Train steps between evaluations; 0 = only before and after."""
    n_prompts: int = Field(512, ge=0)
    """Held-out prompts; 0 = no evaluation."""
    max_concurrent: int = Field(0, ge=0)
    """Episodes that an evaluation has in flight while training goes on; 0 = a quarter of rollout.max_running_requests of all servers."""
    gconfig: GenerationConfig | None = None
    """Sampling in evaluation; what it does not give is as in training, but n_samples (samples a prompt, for pass@k) is 1."""

    @property
    def n_samples(self) -> int:
        """Samples of a held-out prompt."""
        return self.gconfig.n_samples if self.gconfig is not None else 1

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.gconfig is not None and self.n_samples > 1 and self.gconfig.temperature == 0:
            raise ValueError(
                f"gconfig.temperature=0 gives the same answer all gconfig.n_samples={self.n_samples} times; set one of them to 1"
            )
        return self


def drift_bound(configured: float | None, dtype: str, update_mode: str) -> float:
    """The bound in force; infinite where there is none."""
    if configured is not None:
        return configured
    if update_mode == "in_place":
        return float("inf")
    return 1e-4 if dtype == "float32" else 0.05


class StatsLoggerConfig(Section):
    """What a run writes down."""

    fileroot: str = "runs"
    """Runs go to fileroot/experiment_name/trial_name."""
    tensorboard: bool = True
    """Write event files for TensorBoard."""
    dump_trajectories: bool = False
    """Write every consumed batch as JSONL."""
    logprob_drift_bound: float | None = Field(None, gt=0)
    """Warn when engine and trainer log-probs of the same version differ by more than this; null = 1e-4 in float32, 0.05 in
    bfloat16, no warning with update_mode in_place (K/V of mixed versions cannot be recomputed)."""


class RewardConfig(Section):
    """Scoring of answers."""

    workers: int = Field(1, ge=1)
    """Processes that score answers."""
    timeout: float = Field(15.0, gt=0)
    """Seconds per score; a longer one drops the group and is counted."""
    max_concurrent: int = Field(256, ge=1)
    """Async scores, those of an HTTP service included, that run at once; further ones wait."""
    isolation: Literal["auto", "namespaces", "rlimit"] = "auto"
    """How programs are confined that areal.reward.code scores; auto takes the strongest that the machine has, a named one is demanded."""


class GRPOConfig(Section):
    """A whole run."""

    experiment_name: str = Field("areal", pattern=r"^[A-Za-z0-9._-]+$")
    """First folder of the run under stats_logger.fileroot."""
    trial_name: str = Field("trial", pattern=r"^[A-Za-z0-9._-]+$")
    """Second folder of the run."""
    seed: int = 0
    """Of weights, data order and sampling."""
    deterministic: bool = False
    """Bit-for-bit repeatable (embedded engine on the CPU, one thread a process)."""
    total_train_steps: int = Field(100, ge=1)
    """Train steps of reinforcement learning."""
    reward_fn: str = ""
    """Import path of the reward function, package.module:name, or address of a service, http://host:port/score; empty = the data set's."""
    workflow: str = ""
    """Import path of the workflow, package.module:Name; empty = one answer to one prompt (RLVRWorkflow)."""
    workflow_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Arguments of the workflow's class; reward_fn, gconfig, tokenizer, max_prompt_len, max_context and isolation are those of the run where
    it takes them and they are not given."""
    rollout: RolloutConfig = Field(default_factory=RolloutConfig)
    sglang: SGLangConfig = Field(default_factory=SGLangConfig)
    weight_sync: WeightSyncConfig = Field(default_factory=WeightSyncConfig)
    gconfig: GenerationConfig = Field(default_factory=GenerationConfig)
    actor: ActorConfig
    ref: RefConfig = Field(default_factory=RefConfig)
    critic: CriticConfig | None = None
    """Learns what a state is worth, for advantages by GAE (PPO); null = none."""
    train_dataset: DatasetConfig
    valid_dataset: DatasetConfig | None = None
    """Held-out prompts; null = the arithmetic task's own held-out split, or no evaluation."""
    reward: RewardConfig = Field(default_factory=RewardConfig)
    warmup: SFTConfig | None = None
    """Supervised training before reinforcement learning, or all of it (areal sft); null = none."""
    dpo: DPOConfig | None = None
    """Training on preferences instead of reinforcement learning (areal dpo)."""
    saver: SaverConfig = Field(default_factory=SaverConfig)
    recover: RecoverConfig = Field(default_factory=RecoverConfig)
    evaluator: EvaluatorConfig = Field(default_factory=EvaluatorConfig)
    stats_logger: StatsLoggerConfig = Field(default_factory=StatsLoggerConfig)

    @property
    def layout(self) -> RolloutLayout:
        """Which servers ``rollout.backend`` means."""
        return parse_rollout_backend(self.rollout.backend)

    @property
    def trainer_layout(self) -> TrainerLayout:
        """Which ranks ``actor.backend`` means."""
        return parse_trainer_backend(self.actor.backend)

    @property
    def uses_ref(self) -> bool:
        """Whether there is a reference model."""
        return self.actor.kl_ctl > 0 or self.dpo is not None

    @property
    def sample_budget(self) -> tuple[str, int]:
        """The key that bounds a training sample, and its tokens: every model must have a micro-batch that takes it."""
        sections = {"actor": self.actor} | ({} if self.critic is None or self.critic.shared else {"critic": self.critic})
        budgets = {f"{name}.mb_spec.max_tokens_per_mb": section.mb_spec.max_tokens_per_mb for name, section in sections.items()}
        return min(budgets.items(), key=lambda item: item[1])

    @property
    def update_mode(self) -> Literal["abort", "retract", "in_place"]:
        """``rollout.update_mode`` with auto resolved."""
        mode = self.rollout.update_mode
        return mode if mode != "auto" else "abort" if self.layout.engine == "sglang" else "retract"

    @property
    def transport(self) -> Literal["shm", "broadcast", "disk", "tensor"]:
        """``weight_sync.transport`` with auto resolved."""
        transport = self.weight_sync.transport
        if transport != "auto":
            return transport
        if self.rollout.colocate:
            return "tensor"
        return "shm" if self.layout.engine == "embedded" and not self.rollout.urls else "broadcast"

    @property
    def held_out(self) -> DatasetConfig:
        """The data set of held-out prompts; the arithmetic task has its own split of ``train_dataset``."""
        return self.valid_dataset or self.train_dataset

    @model_validator(mode="before")
    @classmethod
    def _complete_evaluation(cls, tree: Any) -> Any:
        """Evaluation samples as training does, but for the keys that ``evaluator.gconfig`` gives."""
        if not isinstance(tree, dict):
            return tree
        evaluator = _given(tree.get("evaluator"))
        if evaluator.get("gconfig") is None:
            return tree
        training = {key: value for key, value in _given(tree.get("gconfig")).items() if key in GenerationConfig.model_fields}
        gconfig = {**training, "n_samples": 1, **_given(evaluator["gconfig"])}
        return {**tree, "evaluator": {**evaluator, "gconfig": gconfig}}


def _given(section: Any) -> dict[str, Any]:
    """The keys of a section that were given, whether it is a mapping or built already."""
    if isinstance(section, BaseModel):
        return section.model_dump(exclude_unset=True)
    return dict(section) if isinstance(section, dict) else {}
