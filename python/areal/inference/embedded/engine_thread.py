"""The thread that owns an EmbeddedEngine, and the asyncio side's handle on it.

Commands (submit, abort, pause, update ...) wait in one queue and run between two decode steps, in order. Answer answers reach the
event loop in one call per step.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from areal.inference.embedded.engine import EmbeddedEngine
from areal.inference.embedded.request import Answer, GenerateRequest

logger = logging.getLogger(__name__)

T = TypeVar("T")

_SPAN_GAP = 0.010
"""Seconds: activity spans closer than this are told as one."""


class EngineDied(RuntimeError):
    """The engine thread ended with an exception."""


class EngineThread:
    def __init__(self, engine: EmbeddedEngine, loop: asyncio.AbstractEventLoop) -> None:
        self.engine = engine
        self.busy_seconds = 0.0
        self.failure: BaseException | None = None
        self._loop = loop
        self._commands: deque[_Command] = deque()
        self._wake = threading.Event()
        self._stopping = False
        self._spans: list[list[Any]] = []
        self._waiting: dict[int, asyncio.Future[Answer]] = {}
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout: float = 10.0) -> None:
        self._stopping = True
        self._wake.set()
        self._thread.join(timeout)

    def generate(self, request: GenerateRequest) -> asyncio.Future[Answer]:
        """To be called on the event loop, with a request that passed ``engine.check``."""
        future: asyncio.Future[Answer] = self._loop.create_future()
        self._waiting[id(request)] = future
        self._post(_Command(lambda engine: engine.submit(request), None))
        return future

    async def call(self, command: Callable[[EmbeddedEngine], T]) -> T:
        """Runs a command on the engine's thread, between two decode steps, and returns its result or raises its error."""
        future: asyncio.Future[T] = self._loop.create_future()
        self._post(_Command(command, future))
        return await future

    def abort_soon(self, rid: str) -> None:
        """Aborts without waiting for it."""
        self._post(_Command(lambda engine: engine.abort(rid), None))

    def add_span(self, kind: str, start: float, end: float) -> None:
        """Engine thread only. Times are time.time() seconds."""
        if self._spans and self._spans[-1][0] == kind and start - self._spans[-1][2] < _SPAN_GAP:
            self._spans[-1][2] = end
        else:
            self._spans.append([kind, start, end])

    def drain_spans(self) -> list[list[Any]]:
        """Engine thread only: the activity since the last call, as [kind, start, end]."""
        spans, self._spans = self._spans, []
        return spans

    def _post(self, command: _Command) -> None:
        if self.failure is not None:
            raise EngineDied(f"the engine has failed: {self.failure!r}; see the server's log")
        self._commands.append(command)
        self._wake.set()

    def _run(self) -> None:
        try:
            while not self._stopping:
                while self._commands:
                    self._execute(self._commands.popleft())
                if not self.engine.has_work:
                    self._wake.wait(1.0)
                    self._wake.clear()
                    continue
                start = time.time()
                finished = self.engine.step()
                end = time.time()
                self.busy_seconds += end - start
                self.add_span("generation", start, end)
                if finished:
                    self._loop.call_soon_threadsafe(self._deliver, finished)
        except BaseException as error:  # thread boundary: whatever ended it must reach everybody who waits
            logger.exception("the engine thread failed")
            self.failure = error
            self._loop.call_soon_threadsafe(self._fail_all)

    def _execute(self, command: _Command) -> None:
        if command.future is None:
            command.function(self.engine)
            return
        try:
            result = command.function(self.engine)
        except Exception as error:  # task boundary: a command's error belongs to its caller, not to the engine
            self._loop.call_soon_threadsafe(_settle, command.future, None, error)
        else:
            self._loop.call_soon_threadsafe(_settle, command.future, result, None)

    def _deliver(self, finished: list[Answer]) -> None:
        for answer in finished:
            future = self._waiting.pop(id(answer.request), None)
            if future is not None and not future.done():
                future.set_result(answer)

    def _fail_all(self) -> None:
        error = EngineDied(f"the engine has failed: {self.failure!r}; see the server's log")
        futures = [*self._waiting.values(), *(c.future for c in self._commands if c.future is not None)]
        self._waiting.clear()
        self._commands.clear()
        for future in futures:
            _settle(future, None, error)


@dataclass(slots=True)
class _Command:
    function: Callable[[EmbeddedEngine], Any]
    future: asyncio.Future[Any] | None
    """Who gets the result; None: nobody, and an error is fatal."""


def _settle(future: asyncio.Future[Any], result: Any, error: BaseException | None) -> None:
    if future.done():
        return
    if error is not None:
        future.set_exception(error)
    else:
        future.set_result(result)
