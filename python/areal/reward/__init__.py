"""Scoring of finished answers."""

from areal.reward.service import (
    AsyncRewardWrapper,
    RewardFailure,
    RewardService,
    RewardServiceError,
)

__all__ = ["AsyncRewardWrapper", "RewardFailure", "RewardService", "RewardServiceError"]
