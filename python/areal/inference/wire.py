"""HTTP/1.1 with keep-alive, as little of it as JSON between a controller and its rollout servers needs.

A rollout of short answers makes about a thousand requests a second beside everything else on one core: aiohttp costs 0.09 ms of it each,
this 0.04 ms, most of which is the kernel. No TLS, no redirects, no compression, one request at a time on a connection.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

import orjson

_CONNECT_TIMEOUT = 10.0
_MAX_IDLE = 1024
_HEADERS_END = b"\r\n\r\n"


class WireError(ConnectionError):
    """No answer came: the connection failed, or what came back is not HTTP."""


class HTTPStatusError(Exception):
    """The server answered with something else than 2xx; ``text`` is its sentence."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(f"HTTP {status}: {text}")
        self.status = status
        self.text = text


class _Connection(asyncio.Protocol):
    """One socket: ``send`` a request, await the (status, body) it returns, and then again."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._answer: asyncio.Future[tuple[int, bytes]] | None = None
        self._buffer = bytearray()
        self._status = 0
        self._length = -1  # of the body; -1: headers not complete
        self._chunks: bytearray | None = None  # body so far of a chunked answer
        self._until_close = False
        self._keep_alive = True
        self.n_requests = 0

    @property
    def reusable(self) -> bool:
        return self._keep_alive and self._transport is not None and not self._transport.is_closing() and self._answer is None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def send(self, request: bytes) -> asyncio.Future[tuple[int, bytes]]:
        assert self._transport is not None and self._answer is None
        self.n_requests += 1
        self._answer = self._loop.create_future()
        self._transport.write(request)
        return self._answer

    def close(self) -> None:
        self._keep_alive = False
        if self._transport is not None:
            self._transport.abort()

    def data_received(self, data: bytes) -> None:
        if self._answer is None:
            self.close()  # nobody asked
            return
        self._buffer += data
        try:
            if self._length < 0 and not self._parse_head():
                return
            body = self._parse_body()
        except (ValueError, IndexError) as error:
            self._finish_with(WireError(f"the answer is not HTTP: {error}"))
            return
        if body is not None:
            self._finish(body)

    def connection_lost(self, exc: Exception | None) -> None:
        self._keep_alive = False
        if self._answer is not None and self._until_close and exc is None:
            self._finish(bytes(self._buffer))
        elif self._answer is not None:
            self._finish_with(WireError(f"the server closed the connection before its answer was complete{f' ({exc})' if exc else ''}"))

    def _parse_head(self) -> bool:
        end = self._buffer.find(_HEADERS_END)
        if end < 0:
            return False
        lines = bytes(self._buffer[:end]).split(b"\r\n")
        version, status = lines[0].split(b" ", 2)[:2]
        if not version.startswith(b"HTTP/1."):
            raise ValueError(lines[0][:80])
        self._status = int(status)
        del self._buffer[: end + 4]
        headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(b":") for line in lines[1:])}
        connection = headers.get(b"connection", b"").lower()
        self._keep_alive = connection != b"close" and (version != b"HTTP/1.0" or connection == b"keep-alive")
        self._length = 0
        if headers.get(b"transfer-encoding", b"").lower() == b"chunked":
            self._chunks = bytearray()
        elif b"content-length" in headers:
            self._length = int(headers[b"content-length"])
            if self._length < 0:
                raise ValueError("negative content-length")
        elif self._status not in (204, 304):
            self._until_close = True
        return True

    def _parse_body(self) -> bytes | None:
        if self._until_close:
            return None
        if self._chunks is not None:
            return self._parse_chunks()
        return bytes(self._buffer[: self._length]) if len(self._buffer) >= self._length else None

    def _parse_chunks(self) -> bytes | None:
        assert self._chunks is not None
        while (line_end := self._buffer.find(b"\r\n")) >= 0:
            size = int(bytes(self._buffer[:line_end]).split(b";")[0], 16)
            end = line_end + 2 + size
            if len(self._buffer) < end + 2:
                return None
            self._chunks += self._buffer[line_end + 2 : end]
            del self._buffer[: end + 2]
            if size == 0:
                return bytes(self._chunks)
        return None

    def _finish(self, body: bytes) -> None:
        answer, self._answer = self._answer, None
        self._buffer.clear()
        self._length, self._chunks, self._until_close = -1, None, False
        if answer is not None and not answer.done():
            answer.set_result((self._status, body))

    def _finish_with(self, error: WireError) -> None:
        answer, self._answer = self._answer, None
        self.close()
        if answer is not None and not answer.done():
            answer.set_exception(error)


class Wire:
    """All connections to one server. ``url`` is ``http://host:port``."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        if parts.scheme != "http" or not parts.hostname:
            raise ValueError(f"a rollout server's address looks like http://host:port, not {url!r}")
        self.url = url
        self._host, self._port = parts.hostname, parts.port or 80
        self._prefix = parts.path.rstrip("/")
        self._idle: list[_Connection] = []
        self._busy: set[_Connection] = set()
        self._heads: dict[tuple[str, str], bytes] = {}

    async def call(self, method: str, path: str, body: Mapping[str, Any] | None = None, *, timeout: float | None) -> Any:
        """The parsed JSON of the answer (the text, where it is not JSON).

        Raises:
            HTTPStatusError: an answer that is not 2xx.
            WireError: no answer. The request may have been carried out.
            TimeoutError: none within ``timeout`` seconds. The connection is closed, which tells the server to give up.
        """
        payload = b"" if body is None else orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY)
        request = self._head(method, path) + b"%d\r\n\r\n" % len(payload) + payload
        async with asyncio.timeout(timeout):
            status, answer = await self._exchange(request)
        if 200 <= status < 300:
            try:
                return orjson.loads(answer) if answer else None
            except orjson.JSONDecodeError:
                return answer.decode(errors="replace")
        raise HTTPStatusError(status, _sentence(answer))

    async def _exchange(self, request: bytes) -> tuple[int, bytes]:
        while True:
            connection = await self._connection()
            self._busy.add(connection)
            fresh = connection.n_requests == 0
            try:
                answer = await connection.send(request)
            except WireError:
                if fresh:
                    raise
                continue  # a kept connection that the server had closed meanwhile: normal, once more on another
            finally:
                self._busy.discard(connection)
                if connection.reusable and len(self._idle) < _MAX_IDLE:
                    self._idle.append(connection)
                else:
                    connection.close()  # also after a cancellation, with the answer under way
            return answer

    async def _connection(self) -> _Connection:
        while self._idle:
            connection = self._idle.pop()
            if connection.reusable:
                return connection
        try:
            async with asyncio.timeout(_CONNECT_TIMEOUT):
                _, connection = await asyncio.get_running_loop().create_connection(_Connection, self._host, self._port)
        except OSError as error:  # TimeoutError included
            raise WireError(f"cannot connect to {self.url}: {error or type(error).__name__}") from error
        return connection

    def _head(self, method: str, path: str) -> bytes:
        head = self._heads.get((method, path))
        if head is None:
            host = f"[{self._host}]" if ":" in self._host else self._host
            head = (
                f"{method} {self._prefix}{path} HTTP/1.1\r\nHost: {host}:{self._port}\r\nAccept: application/json\r\n"
                "Content-Type: application/json\r\nContent-Length: "
            ).encode()
            self._heads[method, path] = head
        return head

    def close(self) -> None:
        """Closes every connection; calls still waiting get a WireError."""
        for connection in [*self._idle, *self._busy]:
            connection.close()
        self._idle.clear()


def _sentence(answer: bytes) -> str:
    """What a server said about an error: the message inside its JSON, or its text."""
    try:
        said = orjson.loads(answer)
    except orjson.JSONDecodeError:
        return answer[:500].decode(errors="replace")
    while isinstance(said, dict) and (inner := said.get("error") or said.get("message") or said.get("detail")):
        said = inner
    return str(said)[:500]
