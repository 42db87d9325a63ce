"""Episodes: from a row of the data set to a scored sample."""

from areal.workflow.base import EpisodeDropped, RolloutWorkflow, TrajectoryError, to_trajectories, to_trajectory
from areal.workflow.rlvr import RLVRWorkflow

__all__ = ["EpisodeDropped", "RLVRWorkflow", "RolloutWorkflow", "TrajectoryError", "to_trajectories", "to_trajectory"]
