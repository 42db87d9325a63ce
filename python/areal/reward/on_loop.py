"""Async reward functions: they share the controller's event loop, so none of them may hold it, or outlive its time.

Who waits on whom: a score waits for one of ``max_concurrent`` slots, then for its function, ``timeout`` seconds at most. A function that
goes on when it is cancelled is left behind: its score fails in time, and its slot is free.
"""

from __future__ import annotations

import asyncio
import logging
import time
import types
from collections.abc import Callable, Coroutine, Generator
from typing import Any

from areal.reward.counters import Score
from areal.reward.process import RewardFailure, RewardServiceError
from areal.reward.worker import BadScore, check_score, describe_error

log = logging.getLogger(__name__)
_HELD_SECONDS = 0.25  # with the event loop in one's hands: long enough to be no scheduling noise
_OWN_DEADLINE_GRACE = 1.0
_CLOSE_SECONDS = 2.0


class LoopScorer:
    """Runs async reward functions, ``max_concurrent`` at once."""

    def __init__(self, max_concurrent: int) -> None:
        self._slots = asyncio.Semaphore(max_concurrent)
        self._tasks: set[asyncio.Task[float]] = set()
        self._told: set[str] = set()
        self._closed = False

    async def score(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], timeout: float, score: Score
    ) -> float:
        """
        Raises:
            RewardFailure: it raised, took too long, or returned something else than a finite number.
        """
        async with self._slots:
            score.started()
            task = asyncio.get_running_loop().create_task(self._run(function, args, kwargs))
            self._tasks.add(task)
            task.add_done_callback(self._forget)
            try:  # HTTPReward ends by itself, and then says why there was no answer
                grace = _OWN_DEADLINE_GRACE if getattr(function, "keeps_deadline", False) else 0.0
                await asyncio.wait((task,), timeout=timeout + grace)
            finally:
                in_time = task.done()
                task.cancel()
        if self._closed:
            raise RewardServiceError("the reward service was closed")
        if not in_time:
            raise RewardFailure("reward_timeout", f"the reward function did not return within {timeout:g} s")
        if task.cancelled():
            raise RewardFailure("reward_raised", "CancelledError: what the reward function waited for was cancelled")
        return task.result()

    async def _run(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
        try:
            return check_score(await self._timed(function, function(*args, **kwargs)))
        except BadScore as error:
            raise RewardFailure("reward_bad_value", str(error)) from error
        except (RewardFailure, RewardServiceError):
            raise
        except (Exception, SystemExit) as error:  # boundary to the user's code: whatever it raises is one failed score
            raise RewardFailure("reward_raised", describe_error(error)) from error

    @types.coroutine
    def _timed(self, function: Callable[..., Any], coroutine: Coroutine[Any, Any, Any]) -> Generator[Any, Any, Any]:
        """The coroutine, with a look at the clock from one of its waits to the next."""
        resume: Callable[[Any], Any] = coroutine.send
        value: Any = None
        while True:
            begin = time.perf_counter()
            try:
                waits_for = resume(value)
            except StopIteration as end:
                return end.value
            finally:
                if (seconds := time.perf_counter() - begin) > _HELD_SECONDS:
                    self._tell(function, seconds)
            try:
                value = yield waits_for
                resume = coroutine.send
            except BaseException as error:  # for the coroutine, which may handle it: cancellations above all
                resume, value = coroutine.throw, error

    def _tell(self, function: Callable[..., Any], seconds: float) -> None:
        name = getattr(function, "__qualname__", type(function).__name__)
        if name not in self._told:
            self._told.add(name)
            log.warning(
                "the async reward function %s held the event loop for %.2f s, in which nothing else could run; await what takes time, or "
                "make it a plain function: that runs in a worker process",
                name,
                seconds,
            )

    def _forget(self, task: asyncio.Task[float]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # of one that nobody waits for any more

    async def close(self) -> None:
        """Cancels what runs; scores still awaited fail."""
        self._closed = True
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            _, left = await asyncio.wait(self._tasks, timeout=_CLOSE_SECONDS)
            if left:
                log.warning("%d async reward functions were cancelled, and still run %g s later", len(left), _CLOSE_SECONDS)
