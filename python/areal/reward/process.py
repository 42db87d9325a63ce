"""The controller's end of one scoring process: what was sent to it, until when it must answer, and how it died."""

from __future__ import annotations

import asyncio
import multiprocessing.spawn
import pickle
import socket
from collections import deque
from pathlib import Path
from typing import Any, Protocol

from areal.launcher.local import ChildProcess
from areal.reward.worker import ASKS_LOADED, BAD_VALUE, FRAME_HEADER, LOADED, OK, WANTS_JSON, encode_frame

START_TIMEOUT = 60.0


class RewardFailure(Exception):
    """One score could not be had; ``cause`` is reward_raised, reward_timeout, reward_died or reward_bad_value."""

    def __init__(self, cause: str, message: str) -> None:
        super().__init__(message)
        self.cause = cause


class Pool(Protocol):
    """Who deals out the jobs and is told of every change."""

    log_dir: Path

    def worker_free(self, seconds: float | None) -> None:
        """A worker became ready (None), or had answers, the last score having taken ``seconds``."""
        ...

    def worker_lost(self, worker: RewardProcess, start_failure: str | None) -> None: ...


class Job:
    __slots__ = ("future", "loading", "module", "payload", "timeout", "wants_json", "was_sent")

    def __init__(self, module: str, payload: bytes, future: asyncio.Future[Any], timeout: float, wants_json: bool = False) -> None:
        self.module = module
        self.payload = payload
        self.future = future
        self.timeout = timeout
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
        self.dead = False
        self._deadline = self._loop.time() + START_TIMEOUT
        ours, theirs = socket.socketpair()
        with theirs:
            argv = [
                "-c",
                f"from areal.reward.worker import main; main({theirs.fileno()})",
            ]
            self.process = ChildProcess(
                name,
                argv,
                pool.log_dir / f"{name.replace(' ', '_')}.log",
                pass_fds=[theirs.fileno()],
            )
        self._socket = ours

    async def connect(self) -> None:
        self._socket.setblocking(False)
        await self._loop.create_connection(lambda: self, sock=self._socket)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.WriteTransport)
        self._transport = transport
        preparation = multiprocessing.spawn.get_preparation_data(self.process.name)
        preparation.pop("authkey", None)  # refuses to be pickled, and is not needed
        transport.write(encode_frame(preparation))
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
        self._read_answers(data)
        self._pool.worker_free(self._seconds)

    def _read_answers(self, data: bytes) -> None:
        buffer = self._buffer
        buffer += data
        begin = 0
        while len(buffer) - begin >= FRAME_HEADER.size:
            (size,) = FRAME_HEADER.unpack_from(buffer, begin)
            end = begin + FRAME_HEADER.size + size
            if len(buffer) < end:
                break
            self._answer(pickle.loads(memoryview(buffer)[begin + FRAME_HEADER.size : end]))
            begin = end
        del buffer[:begin]

    def _answer(self, message: Any) -> None:
        if not self.ready:
            self.ready = True
            return
        status, value, seconds = message
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
        self._seconds = seconds
        if status == OK:
            resolve(job, value)
        else:
            fail(
                job,
                RewardFailure(
                    "reward_bad_value" if status == BAD_VALUE else "reward_raised",
                    value,
                ),
            )

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
            self._pool.worker_lost(self, f"{self.process.name} was not ready after {START_TIMEOUT:.0f} s")
        else:
            job = self.jobs.popleft()
            fail(
                job,
                RewardFailure(
                    "reward_timeout",
                    f"the reward function's {'module did not import' if job.loading else 'call did not return'} within {job.limit:g} s",
                ),
            )
            self._pool.worker_lost(self, None)

    def connection_lost(self, exc: Exception | None) -> None:
        if self.dead:
            return
        self._read_rest()
        if not self.ready:
            self._pool.worker_lost(self, f"{self.process.name} died while starting")
            return
        self.kill()
        if self.jobs and self.jobs[0].was_sent:
            fail(
                self.jobs.popleft(),
                RewardFailure(
                    "reward_died",
                    f"the reward function ended its process: {self.process.describe_death(3)}",
                ),
            )
        self._pool.worker_lost(self, None)

    def _read_rest(self) -> None:
        """Sending to a process that has died breaks the connection before its last answers were read: the death is not theirs."""
        try:
            while data := self._socket.recv(1 << 16):
                self._read_answers(data)
        except OSError:  # nothing more, or jobs that it never read
            pass

    def kill(self) -> None:
        self.dead = True
        if self._timer is not None:
            self._timer.cancel()
        if self._transport is not None:
            self._transport.abort()
        else:
            self._socket.close()
        self.process.kill()


def resolve(job: Job, value: float | str) -> None:
    if not job.future.done():
        job.future.set_result(value)


def fail(job: Job, error: Exception) -> None:
    if not job.future.done():
        job.future.set_exception(error)
