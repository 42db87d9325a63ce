"""The sections of the configuration about rows: where they come from, and the recipes that train on them without rollouts.

They are imported from ``areal.config``, as all others. Importing this module does not import torch.
"""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from areal.config_rollout import Section
from areal.config_trainer import OptimizerConfig


class DatasetConfig(Section):
    """Where prompts come from."""

    type: Literal["arithmetic", "jsonl", "huggingface", "given"] = "jsonl"
    """arithmetic is generated, jsonl a file, huggingface a data set of the `datasets` library, given the rows a script hands over."""
    path: str = ""
    """JSONL file, or the name or folder of a Hugging Face data set."""
    split: str = "train"
    """huggingface: which split."""
    prompt_key: str = "question"
    """Column with the prompt (a string, chat messages, or token ids)."""
    answer_key: str = "answer"
    """Column with the reference answer; it is given to the reward function like every other column."""
    chat_template: bool = True
    """Put the prompt through the tokenizer's chat template (if it has one)."""
    shuffle: bool = True
    """A new order every epoch, from the seed."""
    max_prompt_len: int = Field(1024, ge=1)
    """Tokens; a longer prompt is dropped and counted."""
    limit: int = Field(0, ge=0)
    """Use the first rows only; 0 = all."""
    min_terms: int = Field(3, ge=1)
    """arithmetic: fewest terms of a chain."""
    max_terms: int = Field(8, ge=1)
    """arithmetic: most terms of a chain (64 at most)."""
    terms: Literal["uniform", "log_uniform"] = "uniform"
    """arithmetic: how the number of terms is drawn; log_uniform has many short chains and a long tail."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.type in ("jsonl", "huggingface") and not self.path:
            raise ValueError(f"a data set of type '{self.type}' needs path")
        if self.max_terms < self.min_terms:
            raise ValueError(f"max_terms={self.max_terms} is smaller than min_terms={self.min_terms}; raise it")
        return self


class SFTConfig(Section):
    """Supervised training on demonstrations (rows with a prompt and an answer)."""

    dataset: DatasetConfig | None = None
    """Demonstrations; null = those of train_dataset (the arithmetic task brings its own)."""
    batch_size: int = Field(32, ge=1)
    """Demonstrations per step."""
    total_steps: int = Field(1400, ge=1)
    """Optimizer steps at most."""
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    lr_end: float = Field(0.15, ge=0, le=1)
    """The rates fall linearly to this share of their start over total_steps."""
    eval_every: int = Field(50, ge=1)
    """Steps between two checks of stop_at_accuracy."""
    stop_at_accuracy: float | None = Field(None, gt=0, le=1)
    """When generated answers (forced_prefix first) reach this accuracy, cool down and stop; null = run all steps."""
    eval_samples: int = Field(192, ge=1)
    """Prompts of one check."""
    forced_prefix: str = ""
    """Text that evaluation answers must begin with: 'thinking' answers only (arithmetic fills in its own)."""
    cooldown_steps: int = Field(150, ge=1)
    """Steps from the moment that accuracy is reached to the end."""
    cooldown_lr_end: float = Field(0.05, ge=0, le=1)
    """The rates fall linearly to this share of their start during the cool-down."""


class DPOConfig(Section):
    """Direct preference optimisation (arXiv 2305.18290) on pairs of answers, by actor.optimizer."""

    beta: float = Field(0.1, gt=0)
    """Scale of the implicit reward beta * log(actor / reference): the larger, the closer the actor stays to the reference."""
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """Share of the pairs that are taken to be the wrong way round."""
    batch_size: int = Field(32, ge=1)
    """Pairs per step."""
    total_steps: int = Field(500, ge=1)
    """Optimizer steps."""
    lr_end: float = Field(0.1, ge=0, le=1)
    """The rates fall linearly to this share of their start."""
