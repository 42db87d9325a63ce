"""``areal reward-server``: checks its words, serves until a signal comes, and leaves no process behind."""

from __future__ import annotations

import asyncio
import re
import signal
import socket
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from areal.config import ConfigError, RewardConfig
from areal.launcher.local import bound_socket
from areal.reward.code import CodeReward
from areal.reward.sandbox.levels import HINT, describe, namespaces_missing
from areal.reward.sandbox.limits import Isolation
from areal.reward.service import RewardService, is_async
from areal.workflow.base import import_object
from areal.workflow.user_code import check_sendable

BUILT_IN = {"math": "areal.reward.math:math_reward", "code": "areal.reward.code:code_reward"}
_END_SECONDS = 2.0


def named_functions(words: Sequence[str]) -> dict[str, Callable[..., Any]]:
    """``math``, ``package.module:function`` (called as the function) and ``NAME=package.module:function`` -> functions by name.

    Raises:
        ConfigError: a word that is none of these, a name that comes twice, a function that cannot be imported or sent to a worker.
    """
    functions: dict[str, Callable[..., Any]] = {}
    for word in words:
        name, _, path = word.rpartition("=")
        path = BUILT_IN.get(path, path)
        if not re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", path):
            raise ConfigError(f"'{word}' is no reward function", f"write {', '.join(BUILT_IN)}, or [NAME=]package.module:function")
        name = name or (word if word in BUILT_IN else path.rpartition(":")[2])
        if not re.fullmatch(r"[\w.-]+", name):
            raise ConfigError(f"'{name}' cannot be a name in a URL", "use letters, digits, dots and dashes")
        if name in functions:
            raise ConfigError(f"two functions have the name '{name}'", f"give one of them another: OTHER={path}")
        functions[name] = _function(word, path)
    return functions


def _function(word: str, path: str) -> Callable[..., Any]:
    function = import_object(word, path)
    if not callable(function):
        raise ConfigError(f"'{word}' is no function but {type(function).__name__}", "name one that can be called")
    check_sendable(f"'{word}'", function)
    return function  # type: ignore[no-any-return]


def confined(functions: dict[str, Callable[..., Any]], timeout: float, isolation: Isolation | None) -> dict[str, Callable[..., Any]]:
    """Those that run programs with the server's isolation, and with less time than a score has."""
    if isolation is not None and not any(isinstance(function, CodeReward) for function in functions.values()):
        raise ConfigError(f"--isolation {isolation} is for code", "leave it out")
    if isolation == "namespaces" and (reason := namespaces_missing()):
        raise ConfigError(f"--isolation namespaces: this machine does not have that level ({reason})", f"{HINT}, or use --isolation auto")
    server = RewardConfig(timeout=timeout, isolation=isolation or "auto")
    return {name: function.within(server) if isinstance(function, CodeReward) else function for name, function in functions.items()}


def run_reward_server(
    words: Sequence[str], *, host: str, port: int, workers: int, timeout: float, max_queue: int, isolation: Isolation | None = None
) -> int:
    """Until a signal comes (0), or no worker can be had (1). Prints the address to stdout once it answers."""
    for option, value, least in (("--workers", workers, 1), ("--max-queue", max_queue, 1), ("--timeout", timeout, 0.001)):
        if value < least:
            raise ConfigError(f"{option}={value} is too small", f"give {least} or more")
    functions = confined(named_functions(words), timeout, isolation)
    bound = bound_socket(host, port)
    for function in functions.values():
        if isinstance(function, CodeReward):
            print(f"programs are run at the isolation level {describe(function.isolation)}", file=sys.stderr)
    return asyncio.run(_serve(functions, bound, host, workers, timeout, max_queue))


async def _serve(
    functions: dict[str, Callable[..., Any]], bound: socket.socket, host: str, workers: int, timeout: float, max_queue: int
) -> int:
    from aiohttp import web

    from areal.reward.server import RewardServer

    ended = asyncio.Event()
    broken: list[str] = []
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(number, ended.set)
    with tempfile.TemporaryDirectory(prefix="areal-reward-") as logs:
        async with RewardService(workers, timeout, Path(logs)) as service:

            def give_up(reason: str) -> None:  # a server without workers must not look alive
                broken.append(reason)
                ended.set()

            service.on_broken = give_up
            if not all(map(is_async, functions.values())):
                service.start()
            server = RewardServer(service, functions, workers, max_queue)
            runner = web.AppRunner(server.app(), access_log=None, handler_cancellation=True, shutdown_timeout=_END_SECONDS)
            await runner.setup()
            await web.SockSite(runner, bound, backlog=1024).start()
            address = f"http://{socket.gethostname() if host in ('0.0.0.0', '::') else host}:{bound.getsockname()[1]}"
            print(f"scoring {', '.join(functions)} with {workers} workers; Ctrl-C ends it", file=sys.stderr)
            print(address, flush=True)
            await ended.wait()
            reason = broken[0] if broken else ""
            await service.close()  # callers still waiting are told to ask again
            await runner.cleanup()
    if reason:
        print(f"error: {reason}", file=sys.stderr)
    return 1 if reason else 0
