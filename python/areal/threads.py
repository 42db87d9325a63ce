"""A thread for each call, in place of the event loop's pool of a few.

Users' code waits in threads (``asyncio.to_thread`` in an agent, around a client that blocks), and so do train steps on their way to the
ranks: from one pool, calls that hang would hold up training. And a pool is waited for when loop and process end, a daemon thread is not.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any


class DaemonThreads(ThreadPoolExecutor):
    """Starts a daemon thread for every call; ``shutdown`` waits for none. A pool by its type only, which asyncio asks for."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()

        def work() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                result = fn(*args, **kwargs)
            except BaseException as error:  # boundary to what was called: whoever waits gets it, as from any pool
                future.set_exception(error)
            else:
                future.set_result(result)

        threading.Thread(target=work, name=getattr(fn, "__name__", "call"), daemon=True).start()
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Nothing is held here."""


def use_daemon_threads() -> None:
    """For ``asyncio.to_thread`` and ``run_in_executor(None, ...)`` of the running event loop, whoever calls them."""
    asyncio.get_running_loop().set_default_executor(DaemonThreads())
