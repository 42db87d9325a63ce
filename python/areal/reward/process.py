"""The controller's end of one scoring process: what was sent to it, until when it must answer, and how it died.

Nothing here waits: a process is killed with a signal and reaped by polling, because one that is slow to die (a large memory, a file
system that hangs) must not hold up the event loop.
"""

from __future__ import annotations

import asyncio
import multiprocessing.spawn
import pickle
import socket
from collections import deque
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, Protocol

from areal.launcher.local import ChildProcess
from areal.reward.counters import Score
from areal.reward.worker import (
    ASKS_LOADED,
    BAD_VALUE,
    FRAME_HEADER,
    LOADED,
    MAX_ANSWER,
    MAX_REQUEST,
    OK,
    READY,
    WANTS_JSON,
    decode_answer,
    encode_frame,
)

START_TIMEOUT = 60.0
_TELL_SECONDS = 2.0  # for the exit code of a process that has closed its connection
_END_SECONDS = 0.5  # for such a process to end by itself
_SLOWEST_POLL = 0.1


class RewardFailure(Exception):
    """One score could not be had; ``cause`` is reward_raised, reward_timeout, reward_died, reward_bad_value or reward_unsendable; of an
    HTTP service also reward_unreachable, reward_refused, or the cause that it names."""

    def __init__(self, cause: str, message: str) -> None:
        super().__init__(message)
        self.cause = cause


class RewardServiceError(RuntimeError):
    """No score can be had at all: workers do not start, or the function cannot be sent to them."""


class Pool(Protocol):
    """Who deals out the jobs and is told of every change."""

    log_dir: Path

    def worker_free(self, seconds: float | None) -> None:
        """A worker became ready (None), or had answers, the last score having taken ``seconds``."""
        ...

    def worker_lost(self, worker: RewardProcess, start_failure: str = "") -> None: ...

    def spawn(self, coroutine: Coroutine[object, object, None]) -> None: ...


class Job:
    __slots__ = ("future", "loading", "module", "payload", "score", "timeout", "wants_json", "was_sent")

    def __init__(
        self, module: str, payload: bytes, future: asyncio.Future[Any], timeout: float, score: Score, *, wants_json: bool = False
    ) -> None:
        self.module = module
        self.payload = payload
        self.future = future
        self.timeout = timeout
        self.score = score
        self.wants_json = wants_json
        self.was_sent = False
        self.loading = False  # sent to a process that has yet to import the module: time for that is not the score's

    @property
    def flags(self) -> int:
        return ASKS_LOADED * self.loading | WANTS_JSON * self.wants_json

    @property
    def limit(self) -> float:
        """Seconds from now that it may take, when it is the running one."""
        return START_TIMEOUT if self.loading else self.timeout


def pickled(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bytes:
    """
    Raises:
        RewardServiceError: the function cannot be sent to a worker: no score will do.
        RewardFailure: these arguments cannot.
    """
    try:
        payload = pickle.dumps((function, args, kwargs), protocol=pickle.HIGHEST_PROTOCOL)
    except Exception as error:  # boundary to the row's own objects, which may raise anything
        try:
            pickle.dumps(function)
        except (pickle.PicklingError, AttributeError, TypeError) as reason:
            raise RewardServiceError(
                f"the function {getattr(function, '__qualname__', repr(function))} cannot be sent to a worker process ({reason}); "
                "define it at the top level of a module, or make it async"
            ) from reason
        raise RewardFailure("reward_unsendable", f"the row cannot be sent to a worker process: {error}") from error
    if len(payload) > MAX_REQUEST:
        raise RewardFailure("reward_unsendable", f"a row of {len(payload)} bytes is too long to be sent to a worker process")
    return payload


class RewardProcess(asyncio.Protocol):
    """The parent's end of one worker process."""

    def __init__(self, pool: Pool, name: str) -> None:
        self._pool = pool
        self._loop = asyncio.get_running_loop()
        self._buffer = bytearray()
        self._timer: asyncio.TimerHandle | None = None
        self._transport: asyncio.WriteTransport | None = None
        self.jobs: deque[Job] = deque()  # sent and unanswered, in order; the first is running
        self.ready = False
        self._modules: set[str] = set()
        self._seconds: float | None = None
        self.dead = self._killed = False
        self._deadline = self._loop.time() + START_TIMEOUT
        ours, theirs = socket.socketpair()
        with theirs:
            argv = ["-c", f"from areal.reward.worker import main; main({theirs.fileno()})"]
            try:
                self.process = ChildProcess(name, argv, pool.log_dir / f"{name.replace(' ', '_')}.log", pass_fds=[theirs.fileno()])
            except BaseException:
                ours.close()
                raise
        self._socket = ours

    async def connect(self) -> None:
        """Failures end in ``worker_lost``."""
        try:
            self._socket.setblocking(False)
            await self._loop.create_connection(lambda: self, sock=self._socket)
        except OSError as error:
            if not self.dead:
                self._lost(f"the connection to {self.process.name} could not be made: {error}")

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.WriteTransport)
        self._transport = transport
        preparation = multiprocessing.spawn.get_preparation_data(self.process.name)
        preparation.pop("authkey", None)  # refuses to be pickled, and is not needed
        transport.write(encode_frame(pickle.dumps(preparation)))
        self._arm()

    def send(self, job: Job) -> None:
        assert self._transport is not None
        job.loading = job.module not in self._modules
        self._modules.add(job.module)
        if not self.jobs:
            self._deadline = self._loop.time() + job.limit
            self._arm()
        self.jobs.append(job)
        if not self._transport.is_closing():
            self._transport.write(FRAME_HEADER.pack(len(job.payload) + 1) + bytes([job.flags]) + job.payload)
        job.was_sent = not self._transport.is_closing()  # to a process that has died nothing is: the next one gets it

    def data_received(self, data: bytes) -> None:
        try:
            self._read_answers(data)
        except ValueError as error:
            self._ended(f"spoiled its connection ({error}) and was ended")
        else:
            self._pool.worker_free(self._seconds)

    def _read_answers(self, data: bytes) -> None:
        """``ValueError``: what comes is not from a worker but from the function it runs."""
        buffer = self._buffer
        buffer += data
        begin = 0
        while len(buffer) - begin >= FRAME_HEADER.size:
            (size,) = FRAME_HEADER.unpack_from(buffer, begin)
            if size > MAX_ANSWER:
                raise ValueError(f"an answer of {size} bytes")
            end = begin + FRAME_HEADER.size + size
            if len(buffer) < end:
                break
            self._answer(bytes(buffer[begin + FRAME_HEADER.size : end]))
            begin = end
        del buffer[:begin]

    def _answer(self, payload: bytes) -> None:
        status, value, text, seconds = decode_answer(payload)
        if (status == READY) == self.ready or (self.ready and not self.jobs):
            raise ValueError("an answer that nobody asked for")
        if status == READY:
            self.ready = True
            return
        job = self.jobs[0]
        if status == LOADED:
            job.loading = False
        else:
            self.jobs.popleft()
        if self.jobs:
            self._deadline = self._loop.time() + self.jobs[0].limit
            self._arm()
        if status == LOADED:
            return
        self._seconds = job.score.scoring_seconds = seconds
        if status == OK:
            resolve(job, text if job.wants_json else value)
        else:
            fail(job, RewardFailure("reward_bad_value" if status == BAD_VALUE else "reward_raised", text))

    def _arm(self) -> None:
        """One lazy timer a worker: moving the deadline later costs nothing."""
        if self._timer is None or self._timer.when() > self._deadline:
            if self._timer is not None:
                self._timer.cancel()
            self._timer = self._loop.call_at(self._deadline, self._check_deadline)

    def _check_deadline(self) -> None:
        self._timer = None
        if self.dead or (self.ready and not self.jobs):
            return
        if self._loop.time() < self._deadline:
            self._arm()
        elif not self.ready:
            self._lost(f"{self.process.name} was not ready after {START_TIMEOUT:.0f} s")
        else:
            job = self.jobs.popleft()
            what = "module did not import" if job.loading else "call did not return"
            fail(job, RewardFailure("reward_timeout", f"the reward function's {what} within {job.limit:g} s"))
            self._lost()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.dead:
            self._read_rest()
            self._ended("ended its process")

    def _read_rest(self) -> None:
        """Sending to a process that has died breaks the connection before its last answers were read: the death is not theirs."""
        try:
            while data := self._socket.recv(1 << 16):
                self._read_answers(data)
        except (OSError, ValueError):  # nothing more, or jobs that it never read
            pass

    def _ended(self, how: str) -> None:
        """It is of no use any more: the score that it was at fails, once its exit code is known; the others go to the next worker."""
        self._detach()
        if not self.ready:
            self._pool.worker_lost(self, f"{self.process.name} died while starting")
            return
        job = self.jobs.popleft() if self.jobs and self.jobs[0].was_sent else None
        self._pool.worker_lost(self)
        if job is not None:
            self._pool.spawn(self._tell(job, how))

    async def _tell(self, job: Job, how: str) -> None:
        await self.gone(_TELL_SECONDS)
        fail(job, RewardFailure("reward_died", f"the reward function {how}: {self.process.describe_death(3)}"))

    def _lost(self, start_failure: str = "") -> None:
        self.kill()
        self._pool.worker_lost(self, start_failure)

    def kill(self) -> None:
        """Everything of it is told to end; ``gone`` tells when it has."""
        self._detach()
        self._killed = True
        self.process.kill_soon()

    def _detach(self) -> None:
        self.dead = True
        if self._timer is not None:
            self._timer.cancel()
        if self._transport is not None:
            self._transport.abort()
        else:
            self._socket.close()

    async def gone(self, timeout: float) -> bool:
        """Reaps the process, which is killed if it does not end by itself; False if the kernel still holds it after ``timeout`` seconds."""
        pause, begin = 0.001, self._loop.time()
        while self.process.poll() is None:
            seconds = self._loop.time() - begin
            if seconds > timeout:
                return False
            if seconds > _END_SECONDS and not self._killed:
                self.kill()
            await asyncio.sleep(pause)
            pause = min(2 * pause, _SLOWEST_POLL)
        return True


def resolve(job: Job, value: float | str) -> None:
    if not job.future.done():
        job.future.set_result(value)


def fail(job: Job, error: Exception) -> None:
    if not job.future.done():
        job.future.set_exception(error)
