"""Scores answers in worker processes, in parallel with everything else, and never turns a failed score into a number.

Who waits on whom: ``RewardService.score`` waits in a queue for a free worker, then for that worker, at most ``timeout`` seconds
of its running; a worker over that time is killed and replaced. Nothing waits longer than the scores queued before it may take. A worker
that cannot be started (no memory, no process, no file is free) is tried again for as long as another one works, else for a while.

Why not a ProcessPool: its threads cost 0.28 ms of the controller a call, this 0.03 to 0.09 ms (600 scores/s are usual beside everything
else), and it cannot tell which of several calls sent together hung or killed the worker.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import json
import logging
import math
import shutil
import tempfile
import time
import weakref
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Protocol, Self

from areal.reward.counters import Score, ScoreCounters
from areal.reward.on_loop import LoopScorer
from areal.reward.process import Job, RewardFailure, RewardProcess, RewardServiceError, fail, pickled

log = logging.getLogger(__name__)
_FIRST_PAUSE, _LONGEST_PAUSE = 0.25, 8.0  # seconds before a failed start is tried again
_DIED_PATIENCE, _FORK_PATIENCE = 1.5, 20.0  # seconds of failed starts, with no worker at all, until it is given up
_KILL_SECONDS = 10.0
_PIPELINE_SECONDS = 0.002  # scores expected to be shorter than this together are sent to a worker at once
_PIPELINE_DEPTH = 16
_MERGE_GAP = 0.010
_ARGUMENTS = frozenset(("prompt", "completions", "prompt_ids", "completion_ids"))


class ScoreWatch(Protocol):
    """Told when a score of its task is waited for, and when no more."""

    def score_began(self) -> None: ...
    def score_ended(self) -> None: ...


score_watch: ContextVar[ScoreWatch | None] = ContextVar("score_watch", default=None)
home_loop: ContextVar[asyncio.AbstractEventLoop | None] = ContextVar("home_loop", default=None)
"""For code in a thread of ours that may run an event loop of its own: the one whose service scores."""


class RewardService:
    """A pool of scoring processes, shared by all ``AsyncRewardWrapper`` of the event loop in which it was entered.

    Args:
        workers: processes.
        timeout: seconds a score may run, unless a call says otherwise.
        log_dir: where the workers' output goes; None = a temporary folder, removed at the end.
        max_concurrent: async scores at once.

    Attributes:
        counters: what a step's row says about rewards.
        on_broken: called with the reason once no score can be had any more.
    """

    def __init__(self, workers: int = 1, timeout: float = 15.0, log_dir: Path | None = None, max_concurrent: int = 256) -> None:
        self.timeout = timeout
        self.counters = ScoreCounters()
        self._calls = ScoreCounters()
        self.on_broken: Callable[[str], None] = lambda reason: None
        self._on_loop = LoopScorer(max_concurrent)
        self._temporary = Path(tempfile.mkdtemp(prefix="areal-reward-")) if log_dir is None else None
        self.log_dir = log_dir or self._temporary or Path()
        self._n_workers = workers
        self._workers: list[RewardProcess] = []
        self._queue: deque[Job] = deque()
        self._failed_starts = 0  # in a row
        self._failing_since = self._next_start = 0.0  # loop times
        self._retry: asyncio.TimerHandle | None = None
        self._started = 0
        self._seconds = 1.0  # moving average of a score; pessimistic until measured
        self._dispatch_planned = False
        self._closed = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._at_close: list[Callable[[], Awaitable[None]]] = []
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
        if self._retry is not None:
            self._retry.cancel()
        for worker in self._workers:
            worker.kill()
            self.spawn(self._bury(worker))
        self._workers.clear()
        await self._on_loop.close()
        for close in self._at_close:
            await close()
        while self._tasks:
            await asyncio.gather(*self._tasks)
        if self._temporary is not None:
            shutil.rmtree(self._temporary, ignore_errors=True)

    def at_close(self, close: Callable[[], Awaitable[None]]) -> None:
        """Has ``close`` awaited when the service closes: for what reward functions hold open."""
        self._at_close.append(close)

    def spawn(self, coroutine: Coroutine[object, object, None]) -> None:
        """Runs it in a task that ``close`` awaits."""
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def start(self) -> None:
        """Starts the workers now, not with the first score."""
        self._start_missing()

    @property
    def n_ready(self) -> int:
        """Workers that could take a score."""
        return sum(worker.ready for worker in self._workers)

    async def score(
        self,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        timeout: float | None = None,
        *,
        on_loop: bool | None = None,
        counters: ScoreCounters | None = None,
    ) -> float:
        """``function(*args, **kwargs)`` as a finite float; a coroutine function runs on this loop, any other in a worker.

        ``counters`` take the place of the service's own.

        Raises:
            RewardFailure: this score failed, see its cause.
            RewardServiceError: no score can be had.
        """
        if self._broken:
            raise RewardServiceError(self._broken)
        seconds = self.timeout if timeout is None else timeout
        watch = score_watch.get()
        score = (self.counters if counters is None else counters).enter()
        self._begin_span()
        if watch is not None:
            watch.score_began()
        try:
            with _counted(score):
                if is_async(function) if on_loop is None else on_loop:
                    return await self._on_loop.score(function, args, kwargs, seconds, score)
                return float(await self._run_in_worker(function, args, kwargs, seconds, score))
        finally:
            if watch is not None:
                watch.score_ended()
            self._end_span()

    def _begin_span(self) -> None:
        self._active += 1
        if self._active == 1:
            now = time.time()
            if not self._spans or now - self._spans[-1][1] > _MERGE_GAP:
                self._spans.append([now, now])

    def _end_span(self) -> None:
        self._active -= 1
        if self._spans:
            self._spans[-1][1] = time.time()

    async def call(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], timeout: float | None = None) -> Any:
        """``function(*args, **kwargs)``, called in a worker, as a JSON value; what JSON does not know comes as its text.

        Raises:
            RewardFailure: it raised, hung, killed its process or returned too much.
            RewardServiceError: nothing can be called.
        """
        if self._broken:
            raise RewardServiceError(self._broken)
        call = self._calls.enter()
        with _counted(call):
            seconds = self.timeout if timeout is None else timeout
            return json.loads(await self._run_in_worker(function, args, kwargs, seconds, call, wants_json=True))

    def drain_spans(self) -> list[tuple[str, float, float]]:
        """("reward", begin, end) in time.time() seconds of the times at which scores were being had, since the last call."""
        done = [("reward", a, b) for a, b in self._spans if b > a]
        self._spans = [[time.time(), time.time()]] if self._active else []
        return done

    async def _run_in_worker(
        self,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        timeout: float,
        score: Score,
        *,
        wants_json: bool = False,
    ) -> Any:
        loop = asyncio.get_running_loop()
        module = str(getattr(function, "__module__", ""))
        job = Job(module, pickled(function, args, kwargs), loop.create_future(), timeout, score, wants_json=wants_json)
        self._queue.append(job)
        if not self._dispatch_planned:  # calls of the same tick are dealt out together
            self._dispatch_planned = True
            loop.call_soon(self._dispatch)
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
                    job.score.started()
                    worker.send(job)

    def worker_free(self, seconds: float | None) -> None:
        """A worker is ready (None), or answered, its last score having taken ``seconds``."""
        if seconds is None:
            self._failed_starts = 0
        else:  # up at once, down slowly: a slow score must not have others sent behind it
            self._seconds = max(seconds, 0.9 * self._seconds + 0.1 * seconds)
        self._dispatch()

    def _start_missing(self) -> None:
        loop = asyncio.get_running_loop()
        while len(self._workers) < self._n_workers and not self._broken:
            if loop.time() < self._next_start:
                if self._retry is None or self._retry.when() < loop.time():
                    self._retry = loop.call_at(self._next_start, self._dispatch)
                return
            self._started += 1
            try:  # may run in a callback: nobody would hear of an error
                worker = RewardProcess(self, f"reward {self._started}")
            except OSError as error:
                self._start_failed(f"a reward worker could not be started: {error}", _FORK_PATIENCE)
            except RuntimeError as error:  # the training script started again
                self._break(f"a reward worker could not be started: {error}")
            else:
                self._workers.append(worker)
                self.spawn(worker.connect())

    def _start_failed(self, reason: str, patience: float) -> None:
        """What fails now may work soon; but with no worker at all, scores cannot wait for ever."""
        now = asyncio.get_running_loop().time()
        if not self._failed_starts:
            self._failing_since = now
        self._failed_starts += 1
        if not self.n_ready and now - self._failing_since > patience:
            self._break(f"{reason}, {self._failed_starts} times in a row")
            return
        if self._failed_starts.bit_count() == 1:  # 1, 2, 4, 8 ...
            log.warning("%s; trying again (%d failed in a row, %d workers are ready)", reason, self._failed_starts, self.n_ready)
        self._next_start = now + min(_LONGEST_PAUSE, _FIRST_PAUSE * 2.0 ** min(self._failed_starts - 1, 10))

    def worker_lost(self, worker: RewardProcess, start_failure: str = "") -> None:
        """Its unstarted jobs go back to the head of the queue, and it is replaced."""
        self._workers.remove(worker)
        for job in worker.jobs:
            if not job.future.done():
                job.score.requeued()
        self._queue.extendleft(reversed(worker.jobs))
        worker.jobs.clear()
        self.spawn(self._bury(worker, start_failure))
        if not start_failure:
            self._dispatch()

    async def _bury(self, worker: RewardProcess, start_failure: str = "") -> None:
        process = worker.process
        if not await worker.gone(_KILL_SECONDS):
            log.warning("%s (pid %d) was killed, and is still there %g s later", process.name, process.pid, _KILL_SECONDS)
        if start_failure and not self._closed:
            self._start_failed(f"{start_failure}: {process.describe_death()}", _DIED_PATIENCE)
            self._dispatch()

    def _break(self, reason: str) -> None:
        if not self._broken:
            self.on_broken(reason)
        self._broken = reason
        for job in [*self._queue, *(job for worker in self._workers for job in worker.jobs)]:
            fail(job, RewardServiceError(reason))
        self._queue.clear()


@contextlib.contextmanager
def _counted(score: Score) -> Iterator[None]:
    try:
        yield
    except RewardFailure as failure:
        score.done(failure.cause)
        raise
    except BaseException:  # cancelled, or no score can be had at all
        score.cancelled()
        raise
    score.done()


_SERVICES: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, RewardService] = weakref.WeakKeyDictionary()


def current_service() -> RewardService | None:
    """The service of the running loop, if there is one."""
    return _SERVICES.get(asyncio.get_running_loop())


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
        home = home_loop.get()
        if home is not None and home is not asyncio.get_running_loop() and not self._on_loop:  # or each such loop would have workers
            return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(self(*args, **kwargs), home))
        return await shared_service().score(self.reward_fn, args, kwargs, self.timeout_seconds, on_loop=self._on_loop)
