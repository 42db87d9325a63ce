"""Scores answers in worker processes, in parallel with everything else, and never turns a failed score into a number.

Who waits on whom: ``RewardService.score`` waits in a queue for a free worker, then for that worker, at most ``timeout`` seconds
of its running; a worker over that time is killed and replaced. Nothing waits longer than the scores queued before it may take.

Why not a ProcessPool: its threads cost 0.28 ms of the controller a call, this 0.03 to 0.09 ms (600 scores/s are usual beside everything
else), and it cannot tell which of several calls sent together hung or killed the worker.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import math
import pickle
import shutil
import tempfile
import time
import weakref
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from areal.reward.process import Job, RewardFailure, RewardProcess, fail
from areal.reward.worker import BadScore, check_score, describe_error

_MAX_FAILED_STARTS = 3
_PIPELINE_SECONDS = 0.002  # scores expected to be shorter than this together are sent to a worker at once
_PIPELINE_DEPTH = 16
_MERGE_GAP = 0.010
_ARGUMENTS = frozenset(("prompt", "completions", "prompt_ids", "completion_ids"))


class RewardServiceError(RuntimeError):
    """No score can be had at all: workers do not start, or the function cannot be sent to them."""


class RewardService:
    """A pool of scoring processes, shared by all ``AsyncRewardWrapper`` of the event loop in which it was entered.

    Args:
        workers: processes.
        timeout: seconds a score may run, unless a call says otherwise.
        log_dir: where the workers' output goes; None = a temporary folder, removed at the end.
    """

    def __init__(self, workers: int = 1, timeout: float = 15.0, log_dir: Path | None = None) -> None:
        self.timeout = timeout
        self._temporary = Path(tempfile.mkdtemp(prefix="areal-reward-")) if log_dir is None else None
        self.log_dir = log_dir or self._temporary or Path()
        self._n_workers = workers
        self._workers: list[RewardProcess] = []
        self._queue: deque[Job] = deque()
        self._failed_starts = 0
        self._started = 0
        self._seconds = 1.0  # moving average of a score; pessimistic until measured
        self._dispatch_planned = False
        self._closed = False
        self._starting: set[asyncio.Task[None]] = set()
        self._broken = ""
        self._loop: asyncio.AbstractEventLoop | None = None
        self._active = 0
        self._spans: list[list[float]] = []

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        _SERVICES[self._loop] = self
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Ends the workers; scores still awaited fail. Returns when no process is left."""
        if self._closed:
            return
        self._closed = True
        if self._loop is not None and _SERVICES.get(self._loop) is self:
            del _SERVICES[self._loop]
        self._break("the reward service was closed")
        for task in self._starting:
            task.cancel()
        for worker in self._workers:
            worker.kill()
        self._workers.clear()
        await asyncio.gather(*self._starting, return_exceptions=True)
        if self._temporary is not None:
            shutil.rmtree(self._temporary, ignore_errors=True)

    async def score(
        self,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        timeout: float | None = None,
        *,
        on_loop: bool | None = None,
    ) -> float:
        """``function(*args, **kwargs)`` as a finite float; a coroutine function runs on this loop, any other in a worker.

        Raises:
            RewardFailure: this score failed, see its cause.
            RewardServiceError: no score can be had.
        """
        self._active += 1
        if self._active == 1:
            now = time.time()
            if not self._spans or now - self._spans[-1][1] > _MERGE_GAP:
                self._spans.append([now, now])
        try:
            seconds = self.timeout if timeout is None else timeout
            if is_async(function) if on_loop is None else on_loop:
                return await _score_on_loop(function, args, kwargs, seconds)
            return await self._run_in_worker(function, args, kwargs, seconds)
        finally:
            self._active -= 1
            if self._spans:
                self._spans[-1][1] = time.time()

    async def call(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], timeout: float | None = None) -> Any:
        """``function(*args, **kwargs)``, called in a worker, as a JSON value; what JSON does not know comes as its text.

        Raises:
            RewardFailure: it raised, hung, killed its process or returned too much.
            RewardServiceError: nothing can be called.
        """
        seconds = self.timeout if timeout is None else timeout
        return json.loads(await self._run_in_worker(function, args, kwargs, seconds, wants_json=True))

    def drain_spans(self) -> list[tuple[str, float, float]]:
        """("reward", begin, end) in time.time() seconds of the times at which scores were being had, since the last call."""
        done = [("reward", a, b) for a, b in self._spans if b > a]
        self._spans = [[time.time(), time.time()]] if self._active else []
        return done

    async def _run_in_worker(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], timeout: float, *, wants_json: bool = False
    ) -> Any:
        if self._broken:
            raise RewardServiceError(self._broken)
        try:
            payload = pickle.dumps((function, args, kwargs), protocol=pickle.HIGHEST_PROTOCOL)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            name = getattr(function, "__qualname__", repr(function))
            raise RewardServiceError(
                f"the {'function' if wants_json else 'reward function'} {name} or its arguments cannot be sent to a worker process ({error}); "
                "define it at the top level of a module, or make it async"
            ) from error
        job = Job(str(getattr(function, "__module__", "")), payload, asyncio.get_running_loop().create_future(), timeout, wants_json)
        self._queue.append(job)
        if not self._dispatch_planned:  # calls of the same tick are dealt out together
            self._dispatch_planned = True
            asyncio.get_running_loop().call_soon(self._dispatch)
        return await job.future

    def _dispatch(self) -> None:
        self._dispatch_planned = False
        if self._closed:
            return
        while self._queue and self._queue[0].future.done():  # the caller was cancelled
            self._queue.popleft()
        if self._queue:
            self._start_missing()
        for worker in self._workers:
            if not worker.ready or not self._queue:
                continue
            share = math.ceil(len(self._queue) / len(self._workers))
            depth = min(
                _PIPELINE_DEPTH,
                share,
                max(1, int(_PIPELINE_SECONDS / max(self._seconds, 1e-6))),
            )
            while self._queue and len(worker.jobs) < depth:
                job = self._queue.popleft()
                if not job.future.done():
                    worker.send(job)

    def worker_free(self, seconds: float | None) -> None:
        """A worker is ready (None), or answered, its last score having taken ``seconds``."""
        if seconds is None:
            self._failed_starts = 0
        else:  # up at once, down slowly: a slow score must not have others sent behind it
            self._seconds = max(seconds, 0.9 * self._seconds + 0.1 * seconds)
        self._dispatch()

    def _start_missing(self) -> None:
        while len(self._workers) < self._n_workers and not self._broken:
            self._started += 1
            try:
                worker = RewardProcess(self, f"reward {self._started}")
            except (
                OSError,
                RuntimeError,
            ) as error:  # runs in a callback: nobody would hear of it
                self._break(f"a reward worker could not be started: {error}")
                return
            self._workers.append(worker)
            task = asyncio.get_running_loop().create_task(worker.connect())
            self._starting.add(task)
            task.add_done_callback(self._starting.discard)

    def worker_lost(self, worker: RewardProcess, start_failure: str | None) -> None:
        """Kill what is left of it; its unstarted jobs go back to the head of the queue; replace it."""
        self._workers.remove(worker)
        self._queue.extendleft(reversed(worker.jobs))
        worker.jobs.clear()
        worker.kill()
        if start_failure is not None:
            self._failed_starts += 1
            if self._failed_starts >= _MAX_FAILED_STARTS:
                self._break(f"{start_failure}, {self._failed_starts} times in a row: {worker.process.describe_death()}")
                return
        self._dispatch()

    def _break(self, reason: str) -> None:
        self._broken = reason
        for job in [
            *self._queue,
            *(job for worker in self._workers for job in worker.jobs),
        ]:
            fail(job, RewardServiceError(reason))
        self._queue.clear()


_SERVICES: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, RewardService] = weakref.WeakKeyDictionary()


def shared_service() -> RewardService:
    """The service entered in the running loop, or a new one with the defaults."""
    loop = asyncio.get_running_loop()
    service = _SERVICES.get(loop)
    if service is None:
        service = RewardService()
        service._loop = loop
        _SERVICES[loop] = service
    return service


def is_async(function: Callable[..., Any]) -> bool:
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(getattr(function, "__call__", None))  # noqa: B004


async def _score_on_loop(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    timeout: float,
) -> float:
    limit = asyncio.timeout(timeout)
    try:
        async with limit:
            value = await function(*args, **kwargs)
        return check_score(value)
    except BadScore as error:
        raise RewardFailure("reward_bad_value", str(error)) from error
    except RewardFailure:
        raise
    except Exception as error:  # boundary to the user's code: whatever it raises is one failed score
        if limit.expired():
            raise RewardFailure(
                "reward_timeout",
                f"the reward function did not return within {timeout:g} s",
            ) from error
        raise RewardFailure("reward_raised", describe_error(error)) from error


class AsyncRewardWrapper:
    """Makes a reward function awaitable: ``await wrapper(prompt, completions, prompt_ids, completion_ids, **row)``.

    A row may have columns of these four names: what is given by position counts.

    Args:
        reward_fn: sync (runs in a worker process, so it must be importable there) or async (runs on the event loop).
        timeout_seconds: longest run of one score; None = that of the shared service.
        max_workers, max_retries: accepted for AReaL's scripts; the pool is shared, and a failed score is a failure.
    """

    def __init__(
        self,
        reward_fn: Callable[..., Any],
        timeout_seconds: float | None = None,
        max_workers: int | None = None,
        max_retries: int = 0,
    ) -> None:
        self.reward_fn = reward_fn
        self._on_loop = is_async(reward_fn)  # asked once: it takes longer than sending a call
        self.timeout_seconds = timeout_seconds

    async def __call__(self, *args: Any, **kwargs: Any) -> float:
        """The score, a finite float.

        Raises:
            RewardFailure: it raised, hung, killed its process or returned something else.
        """
        if len(args) == len(_ARGUMENTS) and not _ARGUMENTS.isdisjoint(kwargs):
            kwargs = {key: value for key, value in kwargs.items() if key not in _ARGUMENTS}
        return await shared_service().score(self.reward_fn, args, kwargs, self.timeout_seconds, on_loop=self._on_loop)
