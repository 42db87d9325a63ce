"""What `areal sft` and `areal dpo` need of a configuration: what concerns rollouts is not looked at."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from areal.config import ConfigError, DatasetConfig, GRPOConfig
from areal.config_check import check_config, check_device_name, check_machine, check_model_dir, check_trainer_gpus
from areal.config_check_trainer import check_heads, check_offload, check_peft, check_same_vocabulary


def check_sft_config(config: GRPOConfig) -> None:
    """``ConfigError``; all that `areal train` checks where rollout servers judge the answers."""
    if config.warmup is None:
        raise ConfigError("supervised training needs its recipe under the key 'warmup'", "add warmup: {total_steps: ...}")
    if config.warmup.stop_at_accuracy is not None:
        return check_config(config.new(dpo=None))
    _check_trainer(config)
    _check_prompts("warmup.dataset" if config.warmup.dataset else "train_dataset", config.warmup.dataset or config.train_dataset, config)


def check_dpo_config(config: GRPOConfig) -> None:
    """``ConfigError``."""
    if config.dpo is None:
        raise ConfigError("training on preferences needs its recipe under the key 'dpo'", "add dpo: {beta: 0.1, total_steps: ...}")
    if config.train_dataset.type == "arithmetic":
        raise ConfigError(
            "train_dataset.type=arithmetic has no preferences",
            "set train_dataset.type=jsonl and the path of rows {prompt, chosen, rejected}",
        )
    if config.warmup is not None:
        raise ConfigError(
            "warmup is not a part of `areal dpo`", "run `areal sft` first, and give its checkpoint as actor.path; remove warmup"
        )
    _check_trainer(config)
    _check_prompts("train_dataset", config.train_dataset, config)
    batch, n_ranks = config.dpo.batch_size, config.trainer_layout.data
    if batch < n_ranks:
        raise ConfigError(
            f"dpo.batch_size={batch} pairs are fewer than the {n_ranks} ranks of actor.backend='{config.actor.backend}'",
            f"set dpo.batch_size={n_ranks} or more",
        )


def check_sft_machine(config: GRPOConfig, given: Collection[str] = ()) -> None:
    """``ConfigError`` for a model, data file or GPU that is not there; ``given`` names the data sets whose rows are there already."""
    assert config.warmup is not None
    if config.warmup.stop_at_accuracy is not None:
        return check_machine(config, given)
    if config.warmup.dataset is not None:
        _check_machine(config, "warmup.dataset", config.warmup.dataset, given)
    else:
        _check_machine(config, "train_dataset", config.train_dataset, given)


def check_dpo_machine(config: GRPOConfig, given: Collection[str] = ()) -> None:
    """As ``check_sft_machine``."""
    if config.ref.path:
        check_heads(config, check_model_dir("ref.path", config.ref.path), "ref.path")
        if config.actor.path:
            check_same_vocabulary("ref.path", config.ref.path, config.actor.path)
    _check_machine(config, "train_dataset", config.train_dataset, given)


def _check_trainer(config: GRPOConfig) -> None:
    check_device_name("actor.device", config.actor.device)
    if config.actor.init_from_scratch is not None:
        check_heads(config, config.actor.init_from_scratch, "actor.init_from_scratch")
    if config.actor.lora is not None and not config.actor.lora.target_modules:
        raise ConfigError("actor.lora.target_modules is empty, so nothing would be trained", "set actor.lora.target_modules=all-linear")
    if config.deterministic and config.actor.threads != 1:
        raise ConfigError(
            f"deterministic=true needs actor.threads=1, not {config.actor.threads}", "set actor.threads=1, or deterministic=false"
        )


def _check_prompts(key: str, dataset: DatasetConfig, config: GRPOConfig) -> None:
    capacity = config.actor.mb_spec.max_tokens_per_mb
    if dataset.max_prompt_len > capacity:
        raise ConfigError(
            f"{key}.max_prompt_len={dataset.max_prompt_len} does not fit into actor.mb_spec.max_tokens_per_mb={capacity}",
            f"set actor.mb_spec.max_tokens_per_mb={2 * dataset.max_prompt_len} or more, or lower {key}.max_prompt_len",
        )


def _check_machine(config: GRPOConfig, key: str, dataset: DatasetConfig, given: Collection[str]) -> None:
    check_trainer_gpus(config)
    check_offload(config)
    check_peft(config)
    if config.actor.path:
        check_heads(config, check_model_dir("actor.path", config.actor.path), "actor.path")
    if dataset.type == "jsonl" and key not in given and not Path(dataset.path).expanduser().is_file():
        raise ConfigError(f"{key}.path: there is no file '{dataset.path}'", f"give {key}.path=FILE; relative paths start at {Path.cwd()}")
