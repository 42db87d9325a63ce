"""One submission's exchange with its server: sent, streamed or whole, and ended also when nobody waits for it any more."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from typing import Any

from areal.inference.generate_protocol import ProtocolError, Submission
from areal.inference.router import Router, Server
from areal.inference.wire import HTTPStatusError, WireError

_REPEAT_FIRST, _REPEAT_LAST = 0.05, 1.0
_CONTROL_TIMEOUT = 10.0
_ABORT_TIMEOUT = 5.0
_HANGS_AFTER = 60.0
"""Seconds in which a server ends what it is told to end, at the longest; one that does not will not answer anybody else either."""


class Exchanges:
    """All exchanges of a client.

    Args:
        streams: whether answers of servers that stamp no versions are streamed, since requests stay in them through an update.
        silence: seconds without a token after which a streamed request is sent again.
    """

    def __init__(self, router: Router, *, streams: bool, silence: float) -> None:
        self._router = router
        self._may_stream = streams
        self._silence = silence
        self._abandoned: set[asyncio.Task[Any]] = set()

    async def wait_ended(self) -> None:
        """Until those that nobody waits for have ended too, after the router was closed."""
        await asyncio.gather(*self._abandoned, return_exceptions=True)

    async def submit(self, server: Server, submission: Submission, body: dict[str, Any]) -> None:
        """One POST /generate; what comes back goes into the submission, which is released then.

        If the caller is cancelled, the server is told, and the submission counts as in flight until the server has ended it: weights
        must not change under it, and SGLang itself looks only every few seconds whether a client is still there.

        Raises:
            RequestRejected, ProtocolError, HTTPStatusError: see ``Submission.take`` and ``Wire.call``.
            WireError: the answer broke off; what had been streamed is in the submission.
        """
        exchange = asyncio.create_task(self._exchange(server, submission, body))
        try:
            await asyncio.shield(exchange)
        except asyncio.CancelledError:
            if not exchange.done():
                self._abandon(server, submission, exchange)
            raise

    async def _stream(self, server: Server, submission: Submission, body: dict[str, Any], take: Callable[[Any], None]) -> None:
        """Reads a streamed answer. SGLang 0.5.14 was seen to forget a request that waited in it through several pauses, so one that shows
        nothing for ``silence`` seconds is aborted, and sent again whether the server answers to that or not."""
        stream = asyncio.ensure_future(server.wire.events("/generate", {**body, "stream": True}, take))
        shown = -1
        try:
            while not stream.done():
                await asyncio.wait([stream], timeout=self._silence)
                if not stream.done() and submission.n_new == shown and server.gate_open:
                    await _ask(server, "POST", "/abort_request", {"rid": submission.rid})
                    await asyncio.wait([stream], timeout=_ABORT_TIMEOUT)
                    break
                shown = submission.n_new
            if not stream.done():
                raise WireError(f"{server.url} does not answer to request {submission.rid}, nor to its abortion")
            await stream
        finally:
            stream.cancel()

    def _abandon(self, server: Server, submission: Submission, exchange: asyncio.Task[Any]) -> None:
        """Has the server end a submission whose tokens nobody wants any more."""
        for task in (exchange, asyncio.create_task(self._end(server, submission.rid, exchange))):
            self._abandoned.add(task)
            task.add_done_callback(self._forget)

    def _forget(self, task: asyncio.Task[Any]) -> None:
        self._abandoned.discard(task)
        if not task.cancelled():
            task.exception()  # or asyncio logs that nobody asked for it

    async def _exchange(self, server: Server, submission: Submission, body: dict[str, Any]) -> None:
        exchange = asyncio.current_task()
        assert exchange is not None

        def take(answer: Any) -> None:
            server.n_heard += 1
            was_lost = submission.is_lost
            submission.take(answer, server.url)
            if submission.is_lost and not was_lost:
                self._abandon(server, submission, exchange)

        try:
            submission.streamed = self._may_stream and not await stamps_versions(server)
            if submission.streamed:
                await self._stream(server, submission, body, take)
            else:
                take(await server.wire.call("POST", "/generate", body, timeout=None))  # agenerate has the deadline
            if submission.reason is None:
                raise ProtocolError(f"{server.url} ended an answer without a finish reason")
        finally:
            self._router.release(server, submission)
        if submission.n_new:
            server.stamps = submission.stamped

    async def _end(self, server: Server, rid: str, exchange: asyncio.Task[Any]) -> None:
        """Has the server abort a request, again while it goes on: the first time it may not know of it yet. One that hangs is given up."""
        pause, begin = _REPEAT_FIRST, time.monotonic()
        while not exchange.done() and server.live:
            try:
                await server.wire.call("POST", "/abort_request", {"rid": rid}, timeout=_CONTROL_TIMEOUT)
            except (WireError, HTTPStatusError, TimeoutError):
                pass  # it is dying, or busy
            await asyncio.wait([exchange], timeout=pause)
            pause = min(_REPEAT_LAST, 2 * pause)
            if not server.gate_open:
                begin = time.monotonic()  # an update has a deadline of its own
            elif not exchange.done() and time.monotonic() - begin > _HANGS_AFTER:
                why = f"{server.describe()} hangs: {_HANGS_AFTER:g} s after it was told to end request {rid} it had not"
                self._router.remove(server.url, why)


async def stamps_versions(server: Server) -> bool:
    """Whether the server says by which version each token was sampled: areal's own engine does, SGLang does not."""
    if server.stamps is None:
        await ask_kind(server)
    return bool(server.stamps)


async def ask_kind(server: Server) -> None:
    """Sets ``server.stamps``."""
    info = await _ask(server, "GET", "/model_info")
    server.stamps = isinstance(info, dict) and str(info.get("engine", "")).startswith("areal")


async def _ask(server: Server, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
    """A call that is part of a request: too late an answer is a failure of the server, not the deadline of the request."""
    try:
        return await server.wire.call(method, path, body, timeout=_CONTROL_TIMEOUT)
    except TimeoutError:
        raise WireError(f"{server.url} did not answer to {path} within {_CONTROL_TIMEOUT:g} s") from None
