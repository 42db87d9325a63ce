"""Held-out accuracy and length: any workflow, one episode a prompt, on the same rollout servers as training."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from areal.inference.client import RolloutClient
from areal.runner import DropCounter, run_episode
from areal.workflow.base import RolloutWorkflow


@dataclass(slots=True)
class SampleAnswer:
    prompt: str
    answer: str
    reward: float


@dataclass(slots=True)
class Evaluation:
    """``accuracy`` is the share of scored answers with a positive reward, ``length`` their mean number of generated tokens.

    An episode that failed is in ``failures`` by its cause and in neither of the means: a failure is not a wrong answer.
    """

    accuracy: float
    length: float
    reward: float
    n_scored: int
    failures: dict[str, int] = field(default_factory=dict)
    samples: list[SampleAnswer] = field(default_factory=list)
