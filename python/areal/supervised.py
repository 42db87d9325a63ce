"""A run without reinforcement learning, around its loop: checks, folder, ranks, checkpoints, summary. ``SFTTrainer`` and ``DPOTrainer`` fill it."""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import Coroutine, Mapping
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar

from areal.config import GRPOConfig

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

R = TypeVar("R", bound="DataclassInstance")


class SupervisedTrainer(ABC, Generic[R]):
    """``with ...Trainer(config) as trainer: result = trainer.train()``; the result is the checkpoint ``run_folder/checkpoints/final``.

    Args:
        train_dataset: a sequence of rows in place of those of the config.
        with_rollout: start rollout servers too.
    """

    _takes_preferences = False
    """Whether the ranks need the reference model of ``config.dpo``."""

    def __init__(self, config: GRPOConfig, train_dataset: Any = None, *, with_rollout: bool = False) -> None:
        from areal.cluster import Cluster

        self.config = config
        self._with_rollout = with_rollout
        # no model is loaded that is not asked
        alone = config.new(critic=None, actor=config.actor.new(kl_ctl=0.0), dpo=config.dpo if self._takes_preferences else None)
        self._cluster = Cluster(alone, train_dataset, with_rollout=with_rollout)
        self._given = [] if train_dataset is None else ["train_dataset"]
        self._asyncio = asyncio.Runner()

    @abstractmethod
    def _check(self) -> None:
        """``ConfigError`` for what cannot work, before anything is started."""

    @abstractmethod
    async def _learn(self) -> R:
        """The loop; afterwards the weights are the result."""

    @abstractmethod
    def _line(self, result: R) -> str:
        """The result in a line for people, without what was dropped."""

    def __enter__(self) -> Self:
        self._check()
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
        begin, cluster = time.monotonic(), self._cluster
        async with asyncio.TaskGroup() as self._tasks:
            watching = self._tasks.create_task(cluster.watch() if self._with_rollout else asyncio.sleep(0))
            result = await self._learn()
            await cluster.save("final")
            watching.cancel()
        totals = {**asdict(result), "seconds_total": time.monotonic() - begin}
        cluster.stats.summary(totals)
        cluster.display.finish_supervised(f"{self._line(result)}; dropped {_dropped(totals)}")
        return result

    def _stepped(self, step: int, total: int) -> None:
        """A checkpoint every ``saver.every_steps``, beside the loop; ``step`` counts finished steps."""
        every = self.config.saver.every_steps
        if every and step % every == 0 and step < total:
            self._tasks.create_task(self._cluster.save_step(step), name=f"checkpoint {step}")


def _dropped(totals: Mapping[str, Any]) -> str:
    return ", ".join(f"{n} {cause.replace('_', ' ')}" for cause, n in totals["dropped"].items() if n) or "nothing"
