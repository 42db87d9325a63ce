"""The workflow of a run: the user's own, or ``RLVRWorkflow`` with the reward function that the config names."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any, cast

from areal.config import ConfigError, DatasetConfig, GenerationConfig, GRPOConfig
from areal.workflow.base import RolloutWorkflow
from areal.workflow.rlvr import RLVRWorkflow


def build_workflow(
    config: GRPOConfig,
    tokenizer: Any,
    workflow: RolloutWorkflow | type | str | None = None,
    kwargs: Mapping[str, Any] | None = None,
    *,
    gconfig: GenerationConfig | None = None,
) -> RolloutWorkflow:
    """An object with ``arun_episode``.

    Args:
        workflow: an object (taken as it is), a class or the import path of one (called with ``kwargs``), or None: ``RLVRWorkflow``.
        gconfig: sampling of the default workflow; None = the config's.

    Raises:
        ConfigError: an import path that leads nowhere, or something that is not a workflow.
    """
    if workflow is None:
        return RLVRWorkflow(
            reward_function(config), gconfig or config.gconfig, tokenizer, max_prompt_len=config.train_dataset.max_prompt_len
        )
    if isinstance(workflow, str):
        workflow = import_object("workflow", workflow)
    built = workflow(**(kwargs or {})) if isinstance(workflow, type) else workflow
    if not isinstance(built, RolloutWorkflow):
        raise ConfigError(f"the workflow {built!r} has no method arun_episode(engine, data)", "see RolloutWorkflow in areal.workflow.base")
    return built


def reward_function(config: GRPOConfig) -> Callable[..., Any]:
    """The function of ``reward_fn``, or the one that fits the data set."""
    if config.reward_fn:
        return cast(Callable[..., Any], import_object("reward_fn", config.reward_fn))
    return _default_reward(config.train_dataset)


def _default_reward(dataset: DatasetConfig) -> Callable[..., Any]:
    if dataset.type == "arithmetic":
        from areal.tasks.arithmetic import arithmetic_reward

        return arithmetic_reward
    from areal.reward.math import math_reward

    return math_reward


def import_object(key: str, path: str) -> Any:
    """``package.module:name`` (or with a dot for the colon)."""
    module, _, name = path.partition(":") if ":" in path else path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"{key}='{path}' cannot be imported ({error})", "write package.module:name of something that can") from error
