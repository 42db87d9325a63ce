"""The workflow of a run: the user's own, the one that the config names, or ``RLVRWorkflow``; and the reward function that goes with it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, cast

from areal.config import ConfigError, DatasetConfig, GRPOConfig
from areal.reward.address import is_service
from areal.reward.http import HTTPReward
from areal.run_folder import model_config
from areal.workflow.arguments import check_arguments
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
        workflow: an object (taken as it is), a class or the import path of one (called with ``kwargs``), or None: that of the config.
            One with ``run`` and no ``arun_episode``, or a function, is an agent: ``AgentWorkflow`` goes around it.
        evaluation: the workflow of the config is for held-out prompts: with their sampling and their longest prompt.

    Raises:
        ConfigError: an import path that leads nowhere, arguments that its class does not take, or something that is not a workflow.
    """
    if workflow is None:
        workflow, kwargs = config_workflow(config)
        check_arguments(workflow, kwargs, "workflow_kwargs")
        kwargs = _of_the_run(config, tokenizer, workflow, evaluation) | kwargs
    elif isinstance(workflow, str):
        workflow = import_object("workflow", workflow)
    if kwargs and not isinstance(workflow, type):
        raise ConfigError(
            f"workflow_kwargs were given, but the workflow {workflow!r} is not a class",
            "leave them out; an agent's options are those of workflow: areal.agent:AgentWorkflow",
        )
    try:
        built = workflow(**(kwargs or {})) if isinstance(workflow, type) else workflow
    except ConfigError:
        raise
    except (TypeError, ValueError) as error:
        raise ConfigError(f"the workflow {workflow!r} cannot be made: {error}", "correct workflow_kwargs") from error
    if not isinstance(built, RolloutWorkflow) and (callable(getattr(built, "run", None)) or inspect.isfunction(built)):
        from areal.agent import AgentWorkflow

        built = AgentWorkflow(built, **_of_the_run(config, tokenizer, AgentWorkflow, evaluation))
    if not isinstance(built, RolloutWorkflow):
        raise ConfigError(f"the workflow {built!r} has no method arun_episode(engine, data)", "see RolloutWorkflow in areal.workflow.base")
    return built


def for_held_out(config: GRPOConfig, workflow: RolloutWorkflow) -> RolloutWorkflow:
    """The workflow of training on held-out prompts: itself, but an agent with the evaluator's sampling."""
    from areal.agent import AgentWorkflow

    return workflow.for_evaluation(config.evaluator.gconfig) if isinstance(workflow, AgentWorkflow) else workflow


def config_workflow(config: GRPOConfig) -> tuple[Any, dict[str, Any]]:
    """What the key ``workflow`` names (an object or a class), and the arguments given for it."""
    if config.workflow:
        return import_object("workflow", config.workflow), config.workflow_kwargs
    return RLVRWorkflow, config.workflow_kwargs


def _of_the_run(config: GRPOConfig, tokenizer: Any, workflow: Any, evaluation: bool) -> dict[str, Any]:
    """The arguments that a workflow's class takes and the run has: it need not be told them again."""
    if not isinstance(workflow, type):
        return {}
    takes = inspect.signature(workflow).parameters
    dataset = config.held_out if evaluation else config.train_dataset
    has = {
        "gconfig": (evaluation and config.evaluator.gconfig) or config.gconfig,
        "tokenizer": tokenizer,
        "max_prompt_len": dataset.max_prompt_len,
        "isolation": config.reward.isolation,
        "max_context": _longest_context(config, evaluation),
        "training": not evaluation,
    }
    if "reward_fn" in takes and "reward_fn" not in config.workflow_kwargs:
        has["reward_fn"] = reward_function(config)
    return {name: value for name, value in has.items() if name in takes}


def _longest_context(config: GRPOConfig, evaluation: bool) -> int:
    """Tokens of the longest sequence that the servers, and unless it is for ``evaluation`` the trainer, can take; 0 = not known."""
    limits = [config.rollout.max_context, model_config(config).get("max_position_embeddings")]
    if not evaluation:
        limits.append(config.sample_budget[1])
    return min((limit for limit in limits if isinstance(limit, int) and limit > 0), default=0)


def reward_function(config: GRPOConfig) -> Callable[..., Any]:
    """The function or service of ``reward_fn``, or the function that fits the data set; one for code has the run's isolation."""
    if is_service(config.reward_fn):
        return HTTPReward(config.reward_fn, config.reward.timeout, config.reward.max_concurrent)
    if config.reward_fn:
        from areal.reward.code import CodeReward

        function = import_object("reward_fn", config.reward_fn)
        return function.within(config.reward) if isinstance(function, CodeReward) else cast(Callable[..., Any], function)
    return _default_reward(config.train_dataset)


def _default_reward(dataset: DatasetConfig) -> Callable[..., Any]:
    if dataset.type == "arithmetic":
        from areal.tasks.arithmetic import arithmetic_reward

        return arithmetic_reward
    from areal.reward.math import math_reward

    return math_reward
