"""Episodes: from a row of the data set to a scored sample."""

from areal.workflow.base import EpisodeDropped, RolloutWorkflow, TrajectoryError, to_trajectories, to_trajectory
from areal.workflow.multi_turn import MultiTurnWorkflow
from areal.workflow.rlvr import RLVRWorkflow
from areal.workflow.tool import ToolWorkflow
from areal.workflow.tools import Tool, ToolCall, ToolFormat

__all__ = [
    "EpisodeDropped",
    "MultiTurnWorkflow",
    "RLVRWorkflow",
    "RolloutWorkflow",
    "Tool",
    "ToolCall",
    "ToolFormat",
    "ToolWorkflow",
    "TrajectoryError",
    "to_trajectories",
    "to_trajectory",
]
