"""What a run of `areal train` goes on from.

A checkpoint of step i is written when version i has been published. Groups that were not trained on by then are generated again, from the
same rows under the same numbers: admission restarts at ``i * B``, so eta means the same as before, and with eta = 0 and
``deterministic: true`` the run goes on bit for bit as if nothing had happened.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from areal.config import ConfigError, GRPOConfig
from areal.metrics import RunTotals
from areal.random_state import set_random_state
from areal.recover import WAY_OUT, Recovery, SavedState, fixed_of_rows, look_up

if TYPE_CHECKING:
    from areal.buffer import TrajectoryBuffer
    from areal.cluster import Cluster
    from areal.group_filter import GroupFilter
    from areal.runner import Runner

_FIXED = ("actor.optimizer.type", "critic", "critic.path", "critic.shared", "critic.optimizer.type")


@dataclass(kw_only=True)
class TrainState(SavedState):
    command: ClassVar[str] = "areal train"
    pickled: ClassVar[tuple[str, ...]] = ("data", "pending")

    totals: dict[str, Any]
    tokens_generated: int
    busy_seconds: float
    reward_failures: dict[str, int]
    filter: dict[str, float]
    n_masked_tokens: int
    next_group: int
    n_rows: int
    """Rows that were read from the data set."""
    data: Any = None
    """Of the data set's ``state_dict``; None where it has none."""
    pending: list[tuple[int, dict[str, Any]]] = field(default_factory=list)
    """Group numbers and rows of the groups that were not trained on yet."""

    @classmethod
    def is_over(cls, summary: Mapping[str, Any], config: GRPOConfig) -> bool:
        return summary.get("train_steps", config.total_train_steps) >= config.total_train_steps

    @classmethod
    def planned(cls, config: GRPOConfig) -> tuple[str, int]:
        return "total_train_steps", config.total_train_steps

    @classmethod
    def fixed(cls, config: GRPOConfig) -> tuple[str, ...]:
        return (*fixed_of_rows("train_dataset"), *_FIXED)

    def check(self, config: GRPOConfig, folder: Path) -> None:
        _check_reference(self, config, folder)
        super().check(config, folder)

    def place(self, rows: Any) -> None:
        """Takes a data set to where it was: by its own ``load_state_dict``, else by reading over as many rows as were read then."""
        if self.data is not None and hasattr(rows, "load_state_dict"):
            rows.load_state_dict(self.data)
            return
        for n in range(self.n_rows):
            if next(rows, None) is None:
                raise ConfigError(
                    f"train_dataset ended after {n} rows, but the run that goes on has read {self.n_rows}", "give the same rows"
                )


def _check_reference(state: TrainState, config: GRPOConfig, folder: Path) -> None:
    """A reference model that the warm-up made is part of the state, and nothing else can make it again."""
    if not config.uses_ref or config.ref.path:
        return
    warmed_up = state.config.get("warmup") is not None
    if (config.warmup is not None) != warmed_up:
        raise ConfigError(
            f"warmup is {'given' if config.warmup else 'null'}, but the run that would go on in {folder} began with{'' if warmed_up else 'out'} "
            "one, after which the reference model of actor.kl_ctl is taken",
            f"leave warmup as it was, set ref.path, or {WAY_OUT}",
        )
    if warmed_up and not (look_up(state.config, "actor.kl_ctl") and not look_up(state.config, "ref.path")):
        raise ConfigError(
            f"actor.kl_ctl={config.actor.kl_ctl:g} needs the reference model that the warm-up made, and the run that would go on in {folder} "
            "did not keep one",
            f"set ref.path, or {WAY_OUT}",
        )


class TrainRecovery(Recovery):
    """``resume`` before the first step, ``save`` after a step that is due."""

    def __init__(
        self, cluster: Cluster, runner: Runner, buffer: TrajectoryBuffer, totals: RunTotals, group_filter: GroupFilter, started: float
    ) -> None:
        """``started``: of the whole run, as ``time.monotonic()``."""
        super().__init__(cluster)
        self._runner = runner
        self._buffer = buffer
        self._totals = totals
        self._filter = group_filter
        self._started, self._begin = started, time.monotonic() - totals.seconds_rl

    def resume(self, state: TrainState) -> None:
        """Runner, counters and random numbers as they were."""
        cluster = self._cluster
        self._runner.resume(state.next_group, state.n_rows, state.pending)
        self._buffer.n_masked_tokens = state.n_masked_tokens
        self._filter.load_state_dict(state.filter)
        cluster.drops.restore(state.drops)
        cluster.rewards.counters.failures.update(state.reward_failures)
        cluster.meter.tokens_generated += state.tokens_generated
        cluster.meter.busy_seconds += state.busy_seconds
        set_random_state(state.random)

    def _state(self, step: int) -> TrainState:
        cluster, rows = self._cluster, self._cluster.train_dataset
        totals = asdict(self._totals) | {"seconds_rl": self.seconds(), "seconds_total": time.monotonic() - self._started}
        next_group, n_rows, unfinished = self._runner.position()
        untrained = unfinished | {group.group_id: group.data for group in self._buffer.finished()}
        return TrainState(
            **self._common(step),
            totals=totals,
            tokens_generated=cluster.meter.tokens_generated,
            busy_seconds=cluster.meter.busy_seconds,
            reward_failures=dict(cluster.rewards.counters.failures),
            filter=self._filter.state_dict(),
            n_masked_tokens=self._buffer.n_masked_tokens,
            next_group=next_group,
            n_rows=n_rows,
            data=rows.state_dict() if hasattr(rows, "state_dict") else None,
            pending=sorted(untrained.items(), key=lambda item: item[0]),
        )

    def seconds(self) -> float:
        """Of reinforcement learning, those before the run was cut off included."""
        return time.monotonic() - self._begin
