"""JSON over HTTP to one rollout server: aiohttp for the connections, orjson for the bodies."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import orjson

_CONNECT_TIMEOUT = 10.0
_HEADERS = {"Content-Type": "application/json", "Accept": "application/json"}


class WireError(ConnectionError):
    """No answer: the server is unreachable, or the connection broke before the answer was complete."""


class HTTPStatusError(RuntimeError):
    """An answer that is not 2xx."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(f"HTTP {status}: {text}")
        self.status = status
        self.text = text


class Wire:
    """All connections to one server. ``url`` is ``http://host:port``."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        if parts.scheme != "http" or not parts.hostname:
            raise ValueError(f"a rollout server's address looks like http://host:port, not {url!r}")
        self.url = url
        self._base = url.rstrip("/")
        self._session: aiohttp.ClientSession | None = None
        self._calls: set[asyncio.Task[tuple[int, bytes]]] = set()
        self._closing: asyncio.Task[None] | None = None

    async def call(self, method: str, path: str, body: Mapping[str, Any] | None = None, *, timeout: float | None) -> Any:
        """The parsed JSON of the answer (the text, where it is not JSON).

        Raises:
            HTTPStatusError: an answer that is not 2xx.
            WireError: no answer. The request may have been carried out.
            TimeoutError: none within ``timeout`` seconds. The connection is closed, which tells the server to give up.
        """
        if self._closing is not None:
            raise WireError(f"the connection to {self.url} was closed")
        payload = None if body is None else orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY)
        exchange = asyncio.ensure_future(self._exchange(method, path, payload))
        self._calls.add(exchange)
        try:
            async with asyncio.timeout(timeout):
                status, answer = await exchange
        except asyncio.CancelledError:
            if self._closing is not None and exchange.cancelled() and not _is_cancelled():
                raise WireError(f"the connection to {self.url} was closed") from None
            raise
        finally:
            self._calls.discard(exchange)
        if not 200 <= status < 300:
            raise HTTPStatusError(status, _sentence(answer))
        try:
            return orjson.loads(answer) if answer else None
        except orjson.JSONDecodeError:
            return answer.decode(errors="replace")

    async def _exchange(self, method: str, path: str, payload: bytes | None) -> tuple[int, bytes]:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=60),
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_TIMEOUT),
                headers=_HEADERS,
            )
        try:
            async with self._session.request(method, self._base + path, data=payload) as response:
                return response.status, await response.read()
        except (aiohttp.ClientError, OSError) as error:  # TimeoutError of the connect included
            raise WireError(f"no whole answer from {self.url}: {error or type(error).__name__}") from error

    def close(self) -> None:
        """Closes every connection; calls still waiting get a WireError."""
        if self._closing is None:
            session, self._session = self._session, None
            self._closing = asyncio.ensure_future(session.close() if session is not None else asyncio.sleep(0))
            for call in self._calls:
                call.cancel()

    async def wait_closed(self) -> None:
        """Until the connections are gone, after ``close``."""
        if self._closing is not None:
            await self._closing


def _is_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _sentence(answer: bytes) -> str:
    """What a server said about an error: the message inside its JSON, or its text."""
    try:
        said = orjson.loads(answer)
    except orjson.JSONDecodeError:
        return answer[:500].decode(errors="replace")
    while isinstance(said, dict) and (inner := said.get("error") or said.get("message") or said.get("detail")):
        said = inner
    return str(said)[:500]
