"""JSON over HTTP to one server: aiohttp for the connections, orjson for the bodies."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Collection, Coroutine, Mapping
from typing import Any, TypeVar
from urllib.parse import urlsplit

import aiohttp
import orjson

_CONNECT_TIMEOUT = 10.0
_HEADERS = {"Content-Type": "application/json", "Accept": "application/json"}

T = TypeVar("T")


class WireError(ConnectionError):
    """No answer: the server is unreachable, or the connection broke before the answer was complete."""


class AnswerTooLong(WireError):
    """An answer that does not end where it must."""


class HTTPStatusError(RuntimeError):
    """An answer that is not 2xx; ``retry_after`` is that header in seconds, where the answer has it so."""

    def __init__(self, status: int, text: str, retry_after: str = "") -> None:
        super().__init__(f"HTTP {status}: {text}")
        self.status = status
        self.text = text
        self.retry_after = float(retry_after) if re.fullmatch(r"\d{1,6}(\.\d{1,6})?", retry_after) else None


class Wire:
    """All connections to one server. ``url`` is ``http://host:port``; ``longest``: bytes of an answer to ``call``, None = any number."""

    def __init__(self, url: str, schemes: Collection[str] = ("http",), longest: int | None = None) -> None:
        parts = urlsplit(url)
        if parts.scheme not in schemes or not parts.hostname:
            raise ValueError(f"a rollout server's address looks like http://host:port, not {url!r}")
        self.url = url
        self._base = url.rstrip("/")
        self._longest = longest
        self._session: aiohttp.ClientSession | None = None
        self._calls: set[asyncio.Task[Any]] = set()
        self._closing: asyncio.Task[None] | None = None

    async def call(self, method: str, path: str, body: Mapping[str, Any] | None = None, *, timeout: float | None) -> Any:
        """The parsed JSON of the answer (the text, where it is not JSON).

        Raises:
            HTTPStatusError: an answer that is not 2xx.
            WireError: no answer. The request may have been carried out.
            TimeoutError: none within ``timeout`` seconds. The connection is closed, which tells the server to give up.
        """
        answer = await self._until_closed(self._exchange(method, path, body, self._read_whole), timeout)
        try:
            return orjson.loads(answer) if answer else None
        except orjson.JSONDecodeError:
            return answer.decode(errors="replace")

    async def events(self, path: str, body: Mapping[str, Any], take: Callable[[Any], None]) -> None:
        """POST whose answer is a stream of server-sent events: ``take`` gets each, parsed, until the server says that it is done.

        Raises:
            HTTPStatusError: an answer that is not 2xx, or an event that is an error.
            WireError: the stream broke off.
        """

        async def read(response: aiohttp.ClientResponse) -> None:
            rest = b""
            async for piece in response.content.iter_any():
                *events, rest = (rest + piece).split(b"\n\n")
                for event in events:
                    data = event.removeprefix(b"data:").strip()
                    if data == b"[DONE]":
                        return
                    take(_event(data, self.url))
            raise WireError(f"no whole answer from {self.url}: the stream broke off")

        await self._until_closed(self._exchange("POST", path, body, read), None)

    async def _until_closed(self, exchange: Coroutine[Any, Any, T], timeout: float | None) -> T:
        """The exchange as a task of its own, so that ``close`` can end it without cancelling who waits for it."""
        if self._closing is not None:
            exchange.close()
            raise WireError(f"the connection to {self.url} was closed")
        task = asyncio.ensure_future(exchange)
        self._calls.add(task)
        try:
            async with asyncio.timeout(timeout):
                return await task
        except asyncio.CancelledError:
            if self._closing is not None and task.cancelled() and not _is_cancelled():
                raise WireError(f"the connection to {self.url} was closed") from None
            raise
        finally:
            self._calls.discard(task)

    async def _exchange(
        self, method: str, path: str, body: Mapping[str, Any] | None, read: Callable[[aiohttp.ClientResponse], Awaitable[T]]
    ) -> T:
        payload = None if body is None else orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY)
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=60),
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_TIMEOUT),
                headers=_HEADERS,
            )
        try:
            async with self._session.request(method, self._base + path, data=payload) as response:
                if not 200 <= response.status < 300:
                    raise HTTPStatusError(
                        response.status, _sentence(await self._read_whole(response)), response.headers.get("Retry-After", "")
                    )
                return await read(response)
        except WireError:
            raise
        except (aiohttp.ClientError, OSError) as error:  # TimeoutError of the connect included
            raise WireError(f"no whole answer from {self.url}: {error or type(error).__name__}") from error

    async def _read_whole(self, response: aiohttp.ClientResponse) -> bytes:
        if self._longest is None:
            return await response.read()
        answer = b""
        async for piece in response.content.iter_any():
            answer += piece
            if len(answer) > self._longest:
                raise AnswerTooLong(f"{self.url} answers with more than {self._longest} bytes")
        return answer

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


def _event(data: bytes, url: str) -> Any:
    try:
        event = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise WireError(f"{url} streamed something that is not JSON: {data[:80]!r}") from error
    if isinstance(event, dict) and isinstance(told := event.get("error"), dict):  # SGLang's, once the status line is out
        raise HTTPStatusError(int(told.get("code") or 500), _sentence(data))
    return event


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
