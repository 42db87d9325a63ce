"""JSON over HTTP to one server, against small real servers that misbehave."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
from aiohttp import web
from rollout_servers import aiohttp_server

from areal.inference.wire import HTTPStatusError, Wire, WireError
from areal.launcher.local import free_port


@contextlib.asynccontextmanager
async def _raw_server(answer: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]) -> AsyncIterator[str]:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            await answer(reader, writer)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", port := free_port())
    async with server:
        yield f"http://127.0.0.1:{port}"


def test_wire_speaks_http_with_a_real_server() -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        match request.path:
            case "/echo":
                return web.json_response({"method": request.method, "body": await request.text(), "length": request.content_length})
            case "/chunked":
                response = web.StreamResponse()
                response.enable_chunked_encoding()
                await response.prepare(request)
                for piece in (b'{"a"', b":", b"[1, 2, 3]", b"}"):
                    await response.write(piece)
                    await asyncio.sleep(0.01)
                return response
            case "/text":
                return web.Response(text="fine")
            case "/none":
                return web.Response(status=200)
            case "/close":
                response = web.json_response([1])
                response.force_close()
                return response
            case "/big":
                return web.json_response(["x" * 1000] * 3000)
        return web.json_response({"error": {"message": "the prompt is too long"}}, status=400)

    async def main() -> None:
        async with aiohttp_server(handler) as url:
            wire = Wire(url)
            assert await wire.call("POST", "/echo", {"a": 1}, timeout=5) == {"method": "POST", "body": '{"a":1}', "length": 7}
            assert await wire.call("GET", "/chunked", timeout=5) == {"a": [1, 2, 3]}
            assert await wire.call("GET", "/text", timeout=5) == "fine"
            assert await wire.call("GET", "/none", timeout=5) is None
            assert await wire.call("GET", "/close", timeout=5) == [1]
            assert len(await wire.call("GET", "/big", timeout=5)) == 3000
            with pytest.raises(HTTPStatusError, match=r"^HTTP 400: the prompt is too long$"):
                await wire.call("GET", "/other", timeout=5)
            results = await asyncio.gather(*(wire.call("POST", "/echo", {"i": i}, timeout=5) for i in range(100)))
            assert [r["body"] for r in results] == [f'{{"i":{i}}}' for i in range(100)]
            wire.close()
            await wire.wait_closed()

    asyncio.run(main())


async def _read_request(reader: asyncio.StreamReader) -> bytes:
    head = await reader.readuntil(b"\r\n\r\n")
    length = next(int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length"))
    return await reader.readexactly(length)


@pytest.mark.parametrize(
    "said",
    [
        b"",
        b"HTTP/1.1 200 OK\r\nContent-Le",
        b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n[1,",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n[1",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"SSH-2.0-OpenSSH_9.0\r\n\r\n",
        b"HTTP/1.1 abc\r\n\r\n",
    ],
)
def test_wire_tells_broken_answers(said: bytes) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await _read_request(reader)
        writer.write(said)
        await writer.drain()

    async def main() -> None:
        async with _raw_server(answer) as url:
            with pytest.raises(WireError, match=f"no whole answer from {url}"):
                await Wire(url).call("POST", "/", {}, timeout=5)

    asyncio.run(main())


def test_wire_takes_an_answer_in_single_bytes_and_one_that_ends_with_the_connection() -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        body = await _read_request(reader)
        head = b"HTTP/1.1 200 OK\r\n" if b"close" in body else b"HTTP/1.1 200 OK\r\nCONTENT-LENGTH:   3 \r\n"
        for byte in head + b"\r\n[7]":
            writer.write(bytes([byte]))
            await writer.drain()

    async def main() -> None:
        async with _raw_server(answer) as url:
            assert await Wire(url).call("POST", "/", {}, timeout=5) == [7]
            assert await Wire(url).call("POST", "/", {"close": 1}, timeout=5) == [7]

    asyncio.run(main())


def test_wire_outlives_a_server_that_closes_idle_connections() -> None:
    n_connections = 0

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal n_connections
        n_connections += 1
        await _read_request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\n[1]")  # promises to keep it open, and closes

    async def main() -> None:
        async with _raw_server(answer) as url:
            wire = Wire(url)
            for _ in range(20):
                assert await wire.call("POST", "/", {}, timeout=5) == [1]
            assert n_connections == 20

    asyncio.run(main())


def test_wire_gives_up_in_time_and_closes() -> None:
    closed = asyncio.Event()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await _read_request(reader)
        assert await reader.read() == b""
        closed.set()

    async def main() -> None:
        async with _raw_server(answer) as url:
            wire = Wire(url)
            with pytest.raises(TimeoutError):
                await wire.call("POST", "/", {}, timeout=0.1)
            await asyncio.wait_for(closed.wait(), 5)

    asyncio.run(main())


@pytest.mark.parametrize("url", ["https://host:1", "host:80", "ftp://x", "http://"])
def test_wire_refuses_other_addresses(url: str) -> None:
    with pytest.raises(ValueError, match="http://host:port"):
        Wire(url)
