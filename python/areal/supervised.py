"""A run without reinforcement learning, around its loop: checks, folder, ranks, checkpoints, summary. ``SFTTrainer`` and ``DPOTrainer`` fill it."""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Coroutine, Mapping
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Protocol, Self, TypeVar, cast

from areal.config import GRPOConfig, OptimizerConfig
from areal.data import PromptDataset
from areal.random_state import set_random_state
from areal.recover import find_resumable
from areal.recover_files import what_is_done
from areal.recover_supervised import SupervisedRecovery, SupervisedState

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    class SupervisedResult(DataclassInstance, Protocol):
        """What a loop returns, and summary.json holds."""

        dropped: dict[str, int]


R = TypeVar("R", bound="SupervisedResult")
S = TypeVar("S", bound=SupervisedState)


class SupervisedTrainer(ABC, Generic[R, S]):
    """``with ...Trainer(config) as trainer: result = trainer.train()``; the result is the checkpoint ``run_folder/checkpoints/final``.

    Args:
        train_dataset: a sequence of rows in place of those of the config.
        with_rollout: start rollout servers too.
    """

    _state: ClassVar[type[SupervisedState]]
    """What a run that was cut off goes on from."""
    _takes_preferences = False
    """Whether the ranks need the reference model of ``config.dpo``."""

    def __init__(self, config: GRPOConfig, train_dataset: Any = None, *, with_rollout: bool = False) -> None:
        from areal.cluster import Cluster

        self.config = config
        self._with_rollout = with_rollout
        # no model is loaded that is not asked
        alone = config.new(critic=None, actor=config.actor.new(kl_ctl=0.0), dpo=config.dpo if self._takes_preferences else None)
        self._cluster = Cluster(alone, train_dataset, with_rollout=with_rollout, find_resumed=self._find_resumed)
        self._given = [] if train_dataset is None else ["train_dataset"]
        self._asyncio = asyncio.Runner()
        self._resumed: S | None = None

    @abstractmethod
    def _check(self) -> PromptDataset:
        """``ConfigError`` for what cannot work, before anything is started; the rows that will be trained on."""

    @property
    @abstractmethod
    def _optimizer(self) -> OptimizerConfig:
        """That of the loop."""

    @abstractmethod
    async def _learn(self, resumed: S | None) -> R:
        """The loop, with ``_stepped`` after each step; afterwards the weights are the result. What the ranks hold is ``resumed``'s already."""

    @abstractmethod
    def _line(self, result: R) -> str:
        """The result in a line for people, without what was dropped."""

    def _find_resumed(self) -> SupervisedState | None:
        self._resumed = cast("S | None", find_resumable(self._cluster.config, self._state))
        if self._resumed is not None:
            self._rows.load_state_dict(self._resumed.rows["rows"])  # other rows are told before anything is started
        return self._resumed

    def __enter__(self) -> Self:
        self._rows = self._check()
        self._asyncio.__enter__()
        try:
            self._in_loop(self._cluster.open())
        except BaseException:  # also Ctrl-C while starting: what was started must end
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            self._in_loop(self._cluster.close())
        finally:
            self._asyncio.close()

    @property
    def run_folder(self) -> Path:
        return self._cluster.run_folder

    def train(self) -> R:
        """Runs the recipe, and writes the checkpoint and ``summary.json``."""
        return self._in_loop(self._train())

    def _in_loop(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        from areal.cluster import first_error

        try:
            return self._asyncio.run(coroutine)
        except BaseExceptionGroup as group:
            raise first_error(group) from group

    async def _train(self) -> R:
        cluster, resumed = self._cluster, self._resumed
        self._begin = time.monotonic()
        self._recovery = SupervisedRecovery(cluster, self._state)
        async with asyncio.TaskGroup() as self._tasks:
            watching = self._tasks.create_task(cluster.watch() if self._with_rollout else asyncio.sleep(0))
            if resumed is not None:
                self._begin -= resumed.seconds_total
                await self._restore(resumed)
            result = await self._learn(resumed)
            await cluster.save("final")
            watching.cancel()
        result.dropped = dict(sorted((Counter(result.dropped) + Counter(cluster.drops.totals)).items()))
        totals = {**asdict(result), "seconds_total": self._seconds()}
        cluster.stats.summary(totals)
        cluster.display.finish_supervised(f"{self._line(result)}; dropped {_dropped(totals)}")
        return result

    async def _restore(self, state: SupervisedState) -> None:
        """Ranks, counters and random numbers as they were; the loop places its rows itself."""
        cluster = self._cluster
        await cluster.trainer.set_optimizer(self._optimizer)
        await cluster.trainer.restore(state.folder)
        cluster.drops.restore(state.drops)
        set_random_state(state.random)
        if "checkpoint" not in what_is_done(self.run_folder, state.step):  # of the weights as they are now, before the next step
            self._save_if_due(state.step, state.n_steps(self.config))

    async def _stepped(self, step: int, total: int, state: dict[str, Any]) -> None:
        """What is due when ``step`` steps are done; ``state``: the fields of the recover state that the loop knows."""
        self._save_if_due(step, total)
        if self._recovery.is_due(step):
            self._recovery.own = {**state, "seconds_total": self._seconds()}
            await self._recovery.save(self._tasks, step)

    def _save_if_due(self, step: int, total: int) -> None:
        """A checkpoint every ``saver.every_steps``, beside the loop."""
        every = self.config.saver.every_steps
        if every and step % every == 0 and step < total:
            self._tasks.create_task(self._cluster.save_step(step), name=f"checkpoint {step}")

    def _seconds(self) -> float:
        return time.monotonic() - self._begin


def _dropped(totals: Mapping[str, Any]) -> str:
    return ", ".join(f"{n} {cause.replace('_', ' ')}" for cause, n in totals["dropped"].items() if n) or "nothing"
