"""Calls of what users give, other than reward functions: never in the controller's way, and with a deadline each.

Who waits on whom: code on the event loop that is not wanted any more is cancelled, and waited for a while (``end``). It may catch that and
go on; then it is ended by force.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import pickle
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any, Literal

from areal.config import ConfigError
from areal.reward import RewardFailure
from areal.reward.service import is_async, shared_service
from areal.reward.worker import describe_error

log = logging.getLogger(__name__)
_END_SECONDS = 2.0
_KINDS: dict[str, Literal["raised", "timeout", "died"]] = {"reward_timeout": "timeout", "reward_died": "died"}


class CallFailed(Exception):
    """A call gave no value. ``kind``: it raised (or its value is too long), it took too long, or the process that ran it died."""

    def __init__(self, kind: Literal["raised", "timeout", "died"], message: str) -> None:
        super().__init__(message)
        self.kind = kind


async def call(function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], timeout: float | None = None) -> Any:
    """An async function runs on the event loop; any other in a reward worker, which is killed when it hangs, and gives a JSON value.

    Args:
        timeout: seconds; None = that of the reward service.

    Raises:
        CallFailed: no value.
        RewardServiceError: no worker can be had, or the function cannot be sent to one.
    """
    service = shared_service()
    seconds = service.timeout if timeout is None else timeout
    if not is_async(function):
        try:
            return await service.call(function, args, dict(kwargs), seconds)
        except RewardFailure as failure:
            message = str(failure).replace("the reward function", "the function")
            raise CallFailed(_KINDS.get(failure.cause, "raised"), message) from failure
    try:
        task = begin(function(*args, **kwargs))
        try:
            await asyncio.wait({task}, timeout=seconds)
            in_time = task.done()
        finally:
            await end(task, _END_SECONDS, "a function")
        if not in_time:
            raise CallFailed("timeout", f"the function did not return within {seconds:g} s")
        return result_of(task)
    except CallFailed:
        raise
    except Exception as error:  # boundary to the user's code
        raise CallFailed("raised", describe_error(error)) from error


def begin(awaitable: Awaitable[Any]) -> asyncio.Future[Any]:
    """User code in a task of its own. An error that nobody waits for any more is not logged as forgotten."""
    task = asyncio.ensure_future(awaitable)
    task.add_done_callback(_forget)
    return task


def _forget(task: asyncio.Future[Any]) -> None:
    if not task.cancelled():
        task.exception()


def result_of(task: asyncio.Future[Any]) -> Any:
    """Of one that has ended; what it raised.

    Raises:
        CallFailed: it was cancelled, and not by us: what it waited for was. A CancelledError would say that we are cancelled.
    """
    if task.cancelled():
        raise CallFailed("raised", "CancelledError: what it waited for was cancelled")
    return task.result()


async def end(task: asyncio.Future[Any], seconds: float, what: str) -> None:
    """Cancels it, if it still runs, and waits for its end; code that catches that and goes on is ended by force."""
    if task.done():
        return
    task.cancel()
    if not (await asyncio.wait({task}, timeout=seconds))[0]:
        log.warning("%s did not end within %g s of being cancelled, and is ended by force", what, seconds)
        _force(task)


async def end_others(seconds: float = 10.0) -> None:
    """Ends all other tasks of this event loop, which would wait for them without a limit when it is closed."""
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    if others and (left := (await asyncio.wait(others, timeout=seconds))[1]):
        log.warning("%d tasks did not end within %g s of being cancelled, and are ended by force: %s", len(left), seconds, _names(left))
        for task in left:
            _force(task)
        await asyncio.wait(left, timeout=seconds)


def _force(task: asyncio.Future[Any]) -> None:
    """GeneratorExit where it waits: nothing catches that by mistake, but ``except:``."""
    if isinstance(task, asyncio.Task) and inspect.iscoroutine(coroutine := task.get_coro()):
        try:
            coroutine.close()
        except RuntimeError as error:
            log.warning("%s cannot be ended: %s", _names([task]), error)
    task.add_done_callback(_forget)
    task.cancel()  # so that it looks at its coroutine


def _names(tasks: Iterable[asyncio.Future[Any]]) -> str:
    return ", ".join(sorted({getattr(task.get_coro(), "__qualname__", "a task") for task in tasks if isinstance(task, asyncio.Task)}))


def check_sendable(what: str, function: Callable[..., Any]) -> None:
    """``ConfigError`` for a sync function that no worker process could be given."""
    if is_async(function):
        return
    try:
        pickle.dumps(function)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise ConfigError(
            f"{what} cannot be sent to a worker process ({error})", "define it at the top level of a module, or make it async"
        ) from error
