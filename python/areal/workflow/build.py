"""The workflow of a run: the user's own, or ``RLVRWorkflow`` with the reward function that the config names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

from areal.config import ConfigError, DatasetConfig, GRPOConfig
from areal.reward.address import is_service
from areal.reward.http import HTTPReward
from areal.workflow.base import RolloutWorkflow, import_object
from areal.workflow.rlvr import RLVRWorkflow


def build_workflow(
    config: GRPOConfig,
    tokenizer: Any,
    workflow: RolloutWorkflow | type | str | None = None,
    kwargs: Mapping[str, Any] | None = None,
    *,
    evaluation: bool = False,
) -> RolloutWorkflow:
    """An object with ``arun_episode``.

    Args:
        workflow: an object (taken as it is), a class or the import path of one (called with ``kwargs``), or None: ``RLVRWorkflow``.
        evaluation: the default workflow is for held-out prompts: with their sampling and their longest prompt.

    Raises:
        ConfigError: an import path that leads nowhere, or something that is not a workflow.
    """
    if workflow is None:
        gconfig = (evaluation and config.evaluator.gconfig) or config.gconfig
        dataset = config.held_out if evaluation else config.train_dataset
        return RLVRWorkflow(reward_function(config), gconfig, tokenizer, max_prompt_len=dataset.max_prompt_len)
    if isinstance(workflow, str):
        workflow = import_object("workflow", workflow)
    built = workflow(**(kwargs or {})) if isinstance(workflow, type) else workflow
    if not isinstance(built, RolloutWorkflow):
        raise ConfigError(f"the workflow {built!r} has no method arun_episode(engine, data)", "see RolloutWorkflow in areal.workflow.base")
    return built


def reward_function(config: GRPOConfig) -> Callable[..., Any]:
    """The function or service of ``reward_fn``, or the function that fits the data set."""
    if is_service(config.reward_fn):
        return HTTPReward(config.reward_fn, config.reward.timeout, config.reward.max_concurrent)
    if config.reward_fn:
        return cast(Callable[..., Any], import_object("reward_fn", config.reward_fn))
    return _default_reward(config.train_dataset)


def _default_reward(dataset: DatasetConfig) -> Callable[..., Any]:
    if dataset.type == "arithmetic":
        from areal.tasks.arithmetic import arithmetic_reward

        return arithmetic_reward
    from areal.reward.math import math_reward

    return math_reward
