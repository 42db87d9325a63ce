"""Fully asynchronous reinforcement learning for language models.

The names below are imported when they are first used, so that ``import areal`` costs nothing and needs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from areal.agent.workflow import AgentWorkflow as AgentWorkflow
    from areal.config import ConfigError as ConfigError
    from areal.config import GenerationConfig as GenerationConfig
    from areal.config import GenerationConfig as GenerationHyperparameters
    from areal.config import GRPOConfig as GRPOConfig
    from areal.config_load import load_expr_config as load_expr_config
    from areal.controller import PPOTrainer as PPOTrainer
    from areal.dpo import DPOTrainer as DPOTrainer
    from areal.reward.service import AsyncRewardWrapper as AsyncRewardWrapper
    from areal.sft import SFTTrainer as SFTTrainer
    from areal.tool_calls import ToolCall as ToolCall
    from areal.types import ModelRequest as ModelRequest
    from areal.types import ModelResponse as ModelResponse
    from areal.workflow.base import RolloutWorkflow as RolloutWorkflow
    from areal.workflow.multi_turn import MultiTurnWorkflow as MultiTurnWorkflow
    from areal.workflow.rlvr import RLVRWorkflow as RLVRWorkflow
    from areal.workflow.tool import ToolWorkflow as ToolWorkflow
    from areal.workflow.tools import Tool as Tool

_HOMES = {
    "AgentWorkflow": "areal.agent.workflow",
    "AsyncRewardWrapper": "areal.reward.service",
    "ConfigError": "areal.config",
    "DPOTrainer": "areal.dpo",
    "GRPOConfig": "areal.config",
    "GenerationConfig": "areal.config",
    "GenerationHyperparameters": "areal.config",
    "ModelRequest": "areal.types",
    "ModelResponse": "areal.types",
    "MultiTurnWorkflow": "areal.workflow.multi_turn",
    "PPOTrainer": "areal.controller",
    "RLVRWorkflow": "areal.workflow.rlvr",
    "RolloutWorkflow": "areal.workflow.base",
    "SFTTrainer": "areal.sft",
    "Tool": "areal.workflow.tools",
    "ToolCall": "areal.tool_calls",
    "ToolWorkflow": "areal.workflow.tool",
    "load_expr_config": "areal.config_load",
}
_NAMES_THERE = {"GenerationHyperparameters": "GenerationConfig"}  # AReaL's name for it

__all__ = [
    "AgentWorkflow",
    "AsyncRewardWrapper",
    "ConfigError",
    "DPOTrainer",
    "GRPOConfig",
    "GenerationConfig",
    "GenerationHyperparameters",
    "ModelRequest",
    "ModelResponse",
    "MultiTurnWorkflow",
    "PPOTrainer",
    "RLVRWorkflow",
    "RolloutWorkflow",
    "SFTTrainer",
    "Tool",
    "ToolCall",
    "ToolWorkflow",
    "__version__",
    "load_expr_config",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'areal' has no attribute '{name}'")
    value = getattr(importlib.import_module(home), _NAMES_THERE.get(name, name))
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
