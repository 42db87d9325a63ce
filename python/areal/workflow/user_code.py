"""Calls of functions that users give, other than reward functions: never in the controller's way, and with a deadline each."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import Callable, Mapping
from typing import Any, Literal

from areal.config import ConfigError
from areal.reward import RewardFailure
from areal.reward.service import is_async, shared_service
from areal.reward.worker import describe_error

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
    limit = asyncio.timeout(seconds)
    try:
        async with limit:
            return await function(*args, **kwargs)
    except Exception as error:  # boundary to the user's code
        if limit.expired():
            raise CallFailed("timeout", f"the function did not return within {seconds:g} s") from error
        raise CallFailed("raised", describe_error(error)) from error


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
