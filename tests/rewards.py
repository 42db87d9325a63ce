"""Reward functions for the tests, importable by worker processes."""

import asyncio
import contextlib
import os
import signal
import sys
import time
from typing import Any


def raises_sometimes(prompt: str, completions: str, prompt_ids: list[int], completion_ids: list[int], **row: Any) -> float:
    if sum(completion_ids) % 5 == 0:
        raise RuntimeError("no score for this one")
    return 1.0


def always_nan(prompt: str, completions: str, prompt_ids: list[int], completion_ids: list[int], **row: Any) -> float:
    return float("nan")


def share_of_even_ids(prompt: str, completions: str, prompt_ids: list[int], completion_ids: list[int], **row: Any) -> float:
    """Varies within a group also for a random model."""
    return sum(token % 2 == 0 for token in completion_ids) / len(completion_ids)


def first_id_is_even(prompt: str, completions: str, prompt_ids: list[int], completion_ids: list[int], **row: Any) -> float:
    """Two values: groups of few samples often have the same."""
    return float(completion_ids[0] % 2 == 0)


def minus_one(prompt: str, completions: str, prompt_ids: list[int], completion_ids: list[int], **row: Any) -> float:
    return -1.0


def obey(prompt: str, completions: str, prompt_ids: list[int], completion_ids: list[int], **row: Any) -> float:
    """Does what the completion says, in a worker process."""
    match completions.split():
        case ["score", value]:
            return float(value)
        case ["pid"]:
            return float(os.getpid())
        case ["sleep", seconds]:
            time.sleep(float(seconds))
            return 1.0
        case ["stop"]:
            os.kill(os.getpid(), signal.SIGSTOP)
        case ["kill"]:
            os.kill(os.getpid(), signal.SIGKILL)
        case ["close_stdout"]:
            sys.stdout.close()
            return 2.0
        case ["spoil"]:
            for fd in (int(name) for name in os.listdir("/proc/self/fd") if int(name) > 2):
                with contextlib.suppress(OSError):
                    os.write(fd, b"\xff" * 64)
            time.sleep(60)
    raise AssertionError(completions)


async def obey_async(prompt: str, completions: str, prompt_ids: list[int], completion_ids: list[int], **row: Any) -> float:
    """Does what the completion says, on the event loop."""
    match completions.split():
        case ["score", value]:
            return float(value)
        case ["sleep", seconds]:
            await asyncio.sleep(float(seconds))
            return 1.0
        case ["block", seconds]:
            await asyncio.sleep(0)
            time.sleep(float(seconds))  # noqa: ASYNC251
            return 1.0
        case ["deaf", seconds]:
            end = time.monotonic() + float(seconds)
            while time.monotonic() < end:
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.sleep(end - time.monotonic())
            return 1.0
        case ["exit"]:
            sys.exit(3)
        case ["cancelled"]:
            raise asyncio.CancelledError
    raise AssertionError(completions)


async def at_once(*args: Any, **row: Any) -> float:
    return 1.0


async def sleeps_async(*args: Any, seconds: float, **row: Any) -> float:
    await asyncio.sleep(seconds)
    return 1.0


def sleeps(*args: Any, seconds: float, **row: Any) -> float:
    time.sleep(seconds)
    return 1.0
