"""Calls from the controller to a worker process over a socket pair: nobody else can connect, and either end notices the other's death.

Messages are pickled tuples. To the worker: (call number, method, keyword arguments). To the controller: ("reply", number, result),
("error", number, Failure), or ("event", name, payload) at any time. Calls are answered in the order of sending.
"""

from __future__ import annotations

import asyncio
import itertools
import socket
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from areal.launcher.local import ChildProcess


class WorkerDied(RuntimeError):
    """A worker process ended; the message has its name, exit code and last log lines."""


class WorkerFailed(RuntimeError):
    """A call raised an exception in the worker; the message is the exception's, the cause its traceback as text."""


class WorkerTimeout(TimeoutError):
    """A worker did not answer in time; the message says who waited on whom, for what and how long."""


@dataclass(frozen=True, slots=True)
class Failure:
    """An exception on its way to the controller."""

    message: str
    traceback: str


class Link:
    """The controller's end of one worker process. All methods belong to the event loop's thread."""

    def __init__(self, name: str, argv: Sequence[str], log_path: Path, env: dict[str, str], on_event: Callable[[str, Any], None]) -> None:
        """Starts ``python argv... --fd N``; N is the worker's end of the connection."""
        ours, theirs = socket.socketpair()
        with theirs:
            self.process = ChildProcess(name, [*argv, "--fd", str(theirs.fileno())], log_path, env, pass_fds=(theirs.fileno(),))
        self._connection = Connection(ours.detach())
        self._loop = asyncio.get_running_loop()
        self._on_event = on_event
        self._numbers = itertools.count()
        self._pending: dict[int, asyncio.Future[Any]] = {}
        self._unanswered: set[int] = set()  # also calls that nobody waits for any more
        self._sending = threading.Lock()
        self._gone = False
        self.was_killed = False
        """Whether its end was ours to decide, and so explains nothing."""
        self._ended: asyncio.Future[None] = self._loop.create_future()
        threading.Thread(target=self._read, name=f"read {name}", daemon=True).start()

    async def call(self, method: str, timeout: float, **arguments: Any) -> Any:
        """The worker's answer. ``WorkerDied``, ``WorkerFailed``, ``WorkerTimeout``."""
        if self._gone:
            raise await self._death()
        number = next(self._numbers)
        future = self._pending[number] = self._loop.create_future()
        self._unanswered.add(number)
        try:
            async with asyncio.timeout(timeout):
                # In a thread: the worker may be busy, and a batch larger than the socket's buffer waits until it reads.
                await asyncio.to_thread(self._send, (number, method, arguments))
                return await future
        except TimeoutError:
            raise WorkerTimeout(f"the controller waited {timeout:g} s for {self.process.name} to answer '{method}'") from None
        except OSError:  # the pipe is broken; the reader is about to say why
            raise await self._death() from None
        finally:
            self._pending.pop(number, None)

    def _send(self, message: tuple[int, str, dict[str, Any]]) -> None:
        with self._sending:
            self._connection.send(message)

    async def _death(self) -> WorkerDied:
        for _ in range(100):  # the connection closes a moment before the exit code is known
            if self.process.poll() is not None:
                break
            await asyncio.sleep(0.02)
        return WorkerDied(self.process.describe_death())

    def _read(self) -> None:
        """A thread of its own: hands what arrives to the loop."""
        while True:
            try:
                message = self._connection.recv()
            except (EOFError, OSError):
                message = None
            try:
                self._loop.call_soon_threadsafe(self._receive, message)
            except RuntimeError:  # the loop was closed: nobody listens any more
                return
            if message is None:
                return

    def _receive(self, message: tuple[Any, ...] | None) -> None:
        if message is not None and message[0] != "event":
            self._unanswered.discard(message[1])
        match message:
            case None:
                self._gone = True
                self._ended.set_result(None)
                for future in self._pending.values():
                    if not future.done():
                        future.set_exception(BrokenPipeError())  # turned into WorkerDied by ``call``
            case ("reply", number, result):
                if (waiting := self._pending.get(number)) is not None and not waiting.done():
                    waiting.set_result(result)
            case ("error", number, failure):
                if (waiting := self._pending.get(number)) is not None and not waiting.done():
                    error = WorkerFailed(f"{self.process.name}: {failure.message}")
                    error.__cause__ = RuntimeError(failure.traceback)
                    waiting.set_exception(error)
            case ("event", name, payload):
                self._on_event(name, payload)

    async def died(self) -> WorkerDied:
        """Returns when the worker has ended, with what to say about it."""
        await asyncio.shield(self._ended)
        return await self._death()

    def kill(self) -> None:
        if self.process.poll() is None:
            self.was_killed = True
            self.process.kill()

    async def close(self, grace: float) -> None:
        """Ends the worker: by a call of its method ``close`` if it is idle, else by signals. Does not raise for a dead one."""
        if not self._gone and not self._unanswered:
            try:
                await self.call("close", grace)
                async with asyncio.timeout(5.0):
                    await asyncio.shield(self._ended)
            except (WorkerDied, WorkerFailed, TimeoutError):
                pass  # it is killed below
        await asyncio.to_thread(self.process.terminate, 1.0)


class Server:
    """The worker's end: answers calls by methods of ``target`` named ``rpc_<method>`` until the controller hangs up."""

    def __init__(self, fd: int) -> None:
        self._connection = Connection(fd)
        self._sending = threading.Lock()

    def event(self, name: str, payload: Any) -> None:
        """Any thread may call it."""
        self._send(("event", name, payload))

    def _send(self, message: tuple[Any, ...]) -> None:
        with self._sending:
            self._connection.send(message)

    def serve(self, target: object, describe: Callable[[Exception], Failure]) -> None:
        """Returns after the call ``close``, or when the controller is gone."""
        while True:
            try:
                number, method, arguments = self._connection.recv()
            except (EOFError, OSError):
                return
            try:
                answer = ("reply", number, getattr(target, f"rpc_{method}")(**arguments))
            except Exception as error:  # process boundary: whatever went wrong, the controller gets to know it
                answer = ("error", number, describe(error))
            try:
                self._send(answer)
            except OSError:
                return
            if method == "close":
                return
