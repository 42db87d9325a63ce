"""Stopping one server for new weights, and letting it go on, so that it is exact which version sampled each token.

abort (SGLang's default): the server's gate closes, whatever is in flight ends with the tokens it has and waits at the gate as a new
submission. Once nothing is in flight, ``/flush_cache`` must succeed: SGLang answers before its scheduler has forgotten a request, and an
update with ``flush_cache: true`` in that moment would kill it. No token is sampled between ``interrupt`` and ``resume``, and no KV
outlives it, that of the radix cache included; every token of a submission has the version that the server had at the gate.

retract: running requests stay in the server, which throws their KV away. A server that stamps versions (the embedded engine) needs no
more. SGLang stamps none, so requests are streamed there. It acknowledges the pause before its scheduler knows of it, so ``/flush_cache``,
which only the scheduler answers, tells when it stands still, and tokens still on their way have arrived when none came for a while.
The pause adds one to ``num_retractions`` of every request that had KV; tokens with more retractions than a request had shown when the
server was resumed are of the new weights, all others of the old ones. A retraction for want of memory does not disturb this: it raises
the number too, but before the pause it is shown with the next token, or that token comes after the update.
What had shown no token is aborted; if the server does not end it, it has not begun, and all its tokens will be of the new weights.
The same goes for requests with stop strings, whose tokens SGLang holds back while they could be the beginning of one.
The server must run without a radix cache, and updates must say ``flush_cache: false``: it cannot be flushed while requests wait.

in_place (embedded engine): as retract, but the KV is kept.
"""

from __future__ import annotations

import asyncio
from typing import Literal

from areal.inference.router import Server
from areal.inference.wire import HTTPStatusError, WireError

InterruptMode = Literal["abort", "retract", "in_place"]
_REPEAT_FIRST, _REPEAT_LAST = 0.05, 1.0
_QUIET = 0.1
"""Seconds without a new token after which those that were on their way have arrived; between processes of one server they take 1 ms."""


class InterruptFailed(RuntimeError):
    """A server did not stop, or did not go on, in time; its gate stays closed, so it is to be removed."""


async def interrupt(server: Server, mode: InterruptMode, timeout: float) -> None:
    """Returns when the server samples no more tokens. Raises InterruptFailed."""
    server.gate_open = False
    if not server.submissions:
        server.meter.set_activity("weight_sync")
    try:
        async with asyncio.timeout(timeout):
            if mode == "abort":
                await end_all(server)
            else:
                await _pause(server, mode)
    except TimeoutError:
        raise InterruptFailed(
            f"the controller waited {timeout:g} s (weight_sync.timeout) for {server.url} to stop generating; "
            f"{len(server.submissions)} requests were still in flight there"
        ) from None
    except (WireError, HTTPStatusError) as error:
        raise InterruptFailed(f"{server.url} could not be stopped for new weights: {error}") from error


async def resume(server: Server, mode: InterruptMode, version: int, timeout: float) -> None:
    """Lets the server go on under the weights of ``version``. Raises InterruptFailed."""
    server.version = version
    if mode != "abort":
        for submission in server.submissions.values():
            submission.resumed_with(version)
        try:
            await server.wire.call("POST", "/continue_generation", {}, timeout=timeout)
        except TimeoutError:
            raise InterruptFailed(f"{server.url} did not go on within {timeout:g} s (weight_sync.timeout) after its update") from None
        except (WireError, HTTPStatusError) as error:
            raise InterruptFailed(f"{server.url} did not go on after its update: {error}") from error
    server.meter.set_activity("generation" if server.submissions else None)
    server.gate_open = True


async def end_all(server: Server) -> None:
    """Ends every request in the server, until nothing is in flight and no KV is left."""
    pause = _REPEAT_FIRST
    while True:
        # Again and again: a request may have been between our socket and the scheduler, where an abort does not find it.
        await server.wire.call("POST", "/abort_request", {"abort_all": True}, timeout=None)
        try:
            async with asyncio.timeout(pause):
                await server.idle.wait()
        except TimeoutError:
            pause = min(_REPEAT_LAST, 2 * pause)
            continue
        if await _flush(server):
            return
        await asyncio.sleep(pause)  # it is ending a request that we do not wait for: its caller gave up, or is somebody else
        pause = min(_REPEAT_LAST, 2 * pause)


async def _flush(server: Server) -> bool:
    """Whether the scheduler was idle, so that its cache is now empty; in any case it has handled all that came before."""
    try:
        await server.wire.call("POST", "/flush_cache", {}, timeout=None)
    except HTTPStatusError as error:
        if error.status != 400:
            raise
        return False
    return True


async def _pause(server: Server, mode: InterruptMode) -> None:
    await server.wire.call("POST", "/pause_generation", {"mode": mode}, timeout=None)
    if not server.stamps:
        await _flush(server)
        await _quiet(server)
        unclear = [s for s in server.submissions.values() if not s.n_new or s.holds_back]
        for submission in unclear:
            await server.wire.call("POST", "/abort_request", {"rid": submission.rid}, timeout=None)
        if unclear:
            await _flush(server)
            await _quiet(server)
    server.meter.set_activity("weight_sync")


async def _quiet(server: Server) -> None:
    """Until no token has come from this server for a while."""
    heard = -1
    while heard != server.n_heard:
        heard = server.n_heard
        await asyncio.sleep(_QUIET)
