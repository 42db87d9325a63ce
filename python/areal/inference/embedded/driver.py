"""Who calls the engine: one task of the event loop, which runs commands (submit, abort, pause, update ...) between two decode steps.

Steps of a few milliseconds run on the loop's own thread: two threads that hand the interpreter lock back and forth cost a small model
15% of its tokens. As soon as steps take longer they run in a thread of their own, and so do weight updates; HTTP then goes on meanwhile.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from areal.inference.embedded.engine import EmbeddedEngine
from areal.inference.embedded.request import Answer, GenerateRequest

logger = logging.getLogger(__name__)

T = TypeVar("T")

_SPAN_GAP = 0.010
"""Seconds: activity spans closer than this are told as one."""
_SLOW_STEP = 0.010
"""Seconds: after a step longer than this the next one runs in the thread."""


class EngineDied(RuntimeError):
    """The engine ended with an exception."""


@dataclass(slots=True)
class _Command:
    function: Callable[[EmbeddedEngine], Any]
    future: asyncio.Future[Any] | None
    """Who gets the result; None: nobody, and an error is fatal."""
    is_long: bool = False


class EngineDriver:
    """To be used on the event loop only."""

    def __init__(self, engine: EmbeddedEngine, on_failure: Callable[[], None] = lambda: None) -> None:
        """``on_failure`` is called once, when the engine has failed and everybody who waited was told."""
        self.engine = engine
        self._on_failure = on_failure
        self.busy_seconds = 0.0
        self.failure: BaseException | None = None
        self._commands: deque[_Command] = deque()
        self._wake = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, "engine")
        self._last_step = 0.0
        self._spans: list[list[Any]] = []
        self._waiting: dict[int, asyncio.Future[Answer]] = {}
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._drive(), name="engine")

    async def stop(self) -> None:
        """Ends after the step that is running; waiting requests stay unanswered."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task], timeout=10)
        self._thread.shutdown(wait=False, cancel_futures=True)

    def generate(self, request: GenerateRequest) -> asyncio.Future[Answer]:
        """Queues a request that passed ``engine.check``."""
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._waiting[id(request)] = future
        self._post(_Command(lambda engine: engine.submit(request), None))
        return future

    async def call(self, command: Callable[[EmbeddedEngine], T], *, is_long: bool = False) -> T:
        """Runs a command between two decode steps and returns its result or raises its error. ``is_long``: in the engine's thread."""
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._post(_Command(command, future, is_long))
        return await future

    def abort_soon(self, rid: str) -> None:
        """Aborts without waiting for it."""
        self._post(_Command(lambda engine: engine.abort(rid), None))

    def add_span(self, kind: str, start: float, end: float) -> None:
        """Times are time.time() seconds."""
        if self._spans and self._spans[-1][0] == kind and start - self._spans[-1][2] < _SPAN_GAP:
            self._spans[-1][2] = end
        else:
            self._spans.append([kind, start, end])

    def drain_spans(self) -> list[list[Any]]:
        """The activity since the last call, as [kind, start, end]."""
        spans, self._spans = self._spans, []
        return spans

    def _post(self, command: _Command) -> None:
        if self.failure is not None:
            raise EngineDied(f"the engine has failed: {self.failure!r}; see the server's log")
        self._commands.append(command)
        self._wake.set()

    async def _drive(self) -> None:
        try:
            while True:
                while self._commands:
                    await self._execute(self._commands.popleft())
                if self.engine.has_work:
                    self._deliver(await self._step())
                    await asyncio.sleep(0)  # HTTP's turn
                else:
                    self._wake.clear()
                    await self._wake.wait()
        except Exception as error:  # task boundary: whatever ended it must reach everybody who waits
            logger.exception("the engine failed")
            self.failure = error
            self._fail_all()
            self._on_failure()

    async def _step(self) -> list[Answer]:
        start = time.time()
        if self._last_step > _SLOW_STEP:
            finished = await self._in_thread(self.engine.step)
        else:
            finished = self.engine.step()
        end = time.time()
        self._last_step = end - start
        self.busy_seconds += end - start
        self.add_span("generation", start, end)
        return finished

    async def _execute(self, command: _Command) -> None:
        try:
            function = command.function
            result = await self._in_thread(lambda: function(self.engine)) if command.is_long else function(self.engine)
        except Exception as error:  # task boundary: a command's error belongs to its caller, not to the engine
            if command.future is None:
                raise
            _settle(command.future, None, error)
        else:
            if command.future is not None:
                _settle(command.future, result, None)

    async def _in_thread(self, function: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function)

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


def _settle(future: asyncio.Future[Any], result: Any, error: BaseException | None) -> None:
    if future.done():
        return
    if error is not None:
        future.set_exception(error)
    else:
        future.set_result(result)
