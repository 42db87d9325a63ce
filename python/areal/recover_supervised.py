"""What a run of `areal sft` or `areal dpo` goes on from: with ``deterministic: true`` bit for bit as if nothing had happened."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from areal.config import GRPOConfig
from areal.recover import Recovery, SavedState, fixed_of_rows

if TYPE_CHECKING:
    from areal.cluster import Cluster


@dataclass(kw_only=True)
class SupervisedState(SavedState):
    recipe: ClassVar[str]
    """The section of the config that says how to train."""
    own_key: ClassVar[str]
    """Of the summaries, only this command's has it."""

    result: dict[str, Any]
    """The run's result so far."""
    rows: dict[str, Any]
    """``Demonstrations.state_dict`` before the first row that was not trained on."""
    seconds_total: float
    progress: dict[str, Any]
    """What else the loop knows."""

    @classmethod
    def is_over(cls, summary: Mapping[str, Any], config: GRPOConfig) -> bool:
        return cls.own_key not in summary or summary.get("reached", False) or summary["steps"] >= cls.planned(config)[1]

    @classmethod
    def planned(cls, config: GRPOConfig) -> tuple[str, int]:
        return f"{cls.recipe}.total_steps", getattr(config, cls.recipe).total_steps

    def n_steps(self, config: GRPOConfig) -> int:
        """Steps in all, as far as is known."""
        return self.planned(config)[1]


@dataclass(kw_only=True)
class SFTState(SupervisedState):
    command: ClassVar[str] = "areal sft"
    recipe: ClassVar[str] = "warmup"
    own_key: ClassVar[str] = "reached"
    steps_are_of_warmup: ClassVar[bool] = True

    @property
    def _cooling_since(self) -> int | None:
        return self.progress["schedule"]["cooling_since"]

    @classmethod
    def fixed(cls, config: GRPOConfig) -> tuple[str, ...]:
        assert config.warmup is not None
        rows = "train_dataset" if config.warmup.dataset is None else "warmup.dataset"
        return ("warmup.dataset", *fixed_of_rows(rows), "warmup.optimizer.type")

    def check(self, config: GRPOConfig, folder: Path) -> None:
        if self._cooling_since is None:  # a cool-down may go past total_steps
            super().check(config, folder)

    def n_steps(self, config: GRPOConfig) -> int:
        assert config.warmup is not None
        return super().n_steps(config) if self._cooling_since is None else self._cooling_since + config.warmup.cooldown_steps


@dataclass(kw_only=True)
class DPOState(SupervisedState):
    command: ClassVar[str] = "areal dpo"
    recipe: ClassVar[str] = "dpo"
    own_key: ClassVar[str] = "pairs"

    @classmethod
    def fixed(cls, config: GRPOConfig) -> tuple[str, ...]:
        return (*fixed_of_rows("train_dataset"), "actor.optimizer.type", "ref.path")


class SupervisedRecovery(Recovery):
    """Set ``own`` before ``save``."""

    def __init__(self, cluster: Cluster, kind: type[SupervisedState]) -> None:
        super().__init__(cluster)
        self._kind = kind
        self.own: dict[str, Any] = {}
        """The fields that a ``SupervisedState`` has beyond every command's."""

    def _state(self, step: int) -> SupervisedState:
        return self._kind(**self._common(step), **self.own)
