"""What a run of `areal sft` or `areal dpo` goes on from: with ``deterministic: true`` bit for bit as if nothing had happened."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from areal.config import GRPOConfig
from areal.recover import Recovery, SavedState, fixed_of_rows

if TYPE_CHECKING:
    from areal.cluster import Cluster


@dataclass(kw_only=True)
class SupervisedState(SavedState):
    result: dict[str, Any]
    """The run's result so far."""
    rows: dict[str, Any]
    """``Demonstrations.state_dict`` before the first row that was not trained on."""
    seconds_total: float
    progress: dict[str, Any]
    """What else the loop knows."""

    def n_steps(self, config: GRPOConfig) -> int:
        """Steps in all, as far as is known."""
        return self.planned(config)[1]


@dataclass(kw_only=True)
class SFTState(SupervisedState):
    command: ClassVar[str] = "areal sft"
    steps_are_of_warmup: ClassVar[bool] = True

    @classmethod
    def is_over(cls, summary: Mapping[str, Any], config: GRPOConfig) -> bool:
        wanted = cls.planned(config)[1]
        return "reached" not in summary or summary["reached"] or summary["steps"] >= wanted

    @classmethod
    def planned(cls, config: GRPOConfig) -> tuple[str, int]:
        assert config.warmup is not None
        return "warmup.total_steps", config.warmup.total_steps

    @classmethod
    def fixed(cls, config: GRPOConfig) -> tuple[str, ...]:
        assert config.warmup is not None
        rows = "train_dataset" if config.warmup.dataset is None else "warmup.dataset"
        return ("warmup.dataset", *fixed_of_rows(rows), "warmup.optimizer.type")

    def check(self, config: GRPOConfig, folder: Path) -> None:
        if not self.result["reached"]:  # the cool-down may go past total_steps
            super().check(config, folder)

    def n_steps(self, config: GRPOConfig) -> int:
        assert config.warmup is not None
        since = self.progress["schedule"]["cooling_since"]
        return super().n_steps(config) if since is None else since + config.warmup.cooldown_steps


@dataclass(kw_only=True)
class DPOState(SupervisedState):
    command: ClassVar[str] = "areal dpo"

    @classmethod
    def is_over(cls, summary: Mapping[str, Any], config: GRPOConfig) -> bool:
        wanted = cls.planned(config)[1]
        return "pairs" not in summary or summary["steps"] >= wanted

    @classmethod
    def planned(cls, config: GRPOConfig) -> tuple[str, int]:
        assert config.dpo is not None
        return "dpo.total_steps", config.dpo.total_steps

    @classmethod
    def fixed(cls, config: GRPOConfig) -> tuple[str, ...]:
        return (*fixed_of_rows("train_dataset"), "actor.optimizer.type", "ref.path")


class SupervisedRecovery(Recovery):
    """``state`` makes the state of the step that has just been done, of the fields that every command has."""

    def __init__(self, cluster: Cluster, state: Callable[[dict[str, Any]], SupervisedState]) -> None:
        super().__init__(cluster)
        self._make = state

    def _state(self, step: int) -> SupervisedState:
        return self._make(self._common(step))
