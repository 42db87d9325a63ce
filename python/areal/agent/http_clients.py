"""The HTTP clients that agents are handed: making one takes OpenAI's client 30 to 70 ms (TLS certificates), on the event loop."""

from __future__ import annotations

import asyncio
import importlib
import weakref
from typing import Any


class HttpClients:
    """Those of one event loop, shared by all episodes, or None where neither httpx nor httpx2 is installed (areal needs neither).

    Closing one, which ``async with AsyncOpenAI(http_client=...)`` does, has no effect: others are using it.
    """

    def __init__(self) -> None:
        self._module = _httpx()
        self._asynchronous: Any = None
        self._synchronous: Any = None
        self._holder: asyncio.Task[None] | None = None

    @property
    def asynchronous(self) -> Any:
        """``httpx.AsyncClient``, for agents on the event loop."""
        if self._asynchronous is None and self._module is not None:
            self._asynchronous = _asynchronous(self._module.AsyncClient)(**self._options())
            self._hold()
        return self._asynchronous

    @property
    def synchronous(self) -> Any:
        """``httpx.Client``, for agents in threads."""
        if self._synchronous is None and self._module is not None:
            self._synchronous = _synchronous(self._module.Client)(**self._options())
            self._hold()
        return self._synchronous

    async def aclose(self) -> None:
        """Closes them in earnest, as the end of the event loop does; new ones are made when they are asked for."""
        holder, self._holder = self._holder, None
        if holder is not None:
            holder.cancel()
            await asyncio.wait({holder})

    def _hold(self) -> None:
        if self._holder is None:
            self._holder = asyncio.get_running_loop().create_task(self._until_cancelled(), name="http clients of agents")

    async def _until_cancelled(self) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            asynchronous, self._asynchronous = self._asynchronous, None
            synchronous, self._synchronous = self._synchronous, None
            if synchronous is not None:
                synchronous.really_close()
            if asynchronous is not None:
                await asynchronous.really_close()

    def _options(self) -> dict[str, Any]:
        assert self._module is not None
        return {
            # The endpoint answers every call within rollout.request_timeout; loopback is not reached through a proxy.
            "timeout": self._module.Timeout(None, connect=10.0),
            "limits": self._module.Limits(max_connections=None, max_keepalive_connections=None),
            "trust_env": False,
        }


def _httpx() -> Any:
    for name in ("httpx", "httpx2"):  # openai from 3.0 on comes with the second and takes both
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    return None


def _asynchronous(client: Any) -> Any:
    class SharedAsyncClient(client):  # type: ignore[misc]
        async def aclose(self) -> None: ...

        async def really_close(self) -> None:
            await super().aclose()

    return SharedAsyncClient


def _synchronous(client: Any) -> Any:
    class SharedClient(client):  # type: ignore[misc]
        def close(self) -> None: ...

        def really_close(self) -> None:
            super().close()

    return SharedClient


_CLIENTS: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, HttpClients] = weakref.WeakKeyDictionary()


def http_clients() -> HttpClients:
    """Those of the running event loop."""
    loop = asyncio.get_running_loop()
    if (clients := _CLIENTS.get(loop)) is None:
        clients = _CLIENTS[loop] = HttpClients()
    return clients
