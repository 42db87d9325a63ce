"""Stopping one server for new weights, and letting it go on, so that it is exact which version sampled each token.

abort (SGLang's default): the server's gate closes; whatever is in flight ends with the tokens it has and waits at the gate as a new
submission. No token is sampled between ``interrupt`` and ``resume``; every token of a submission has the version that the server had at
the gate. The update must end with ``flush_cache: true``, so that no KV outlives it, that of the radix cache included. SGLang asserts
that it is idle then, and an assertion kills it; it answers a request one step before its scheduler has forgotten it. ``interrupt``
therefore ends with a question that only the scheduler answers: what it is asked after that, it is asked in a later step.

retract: running requests stay in the server, which throws their KV away. A server that stamps versions (the embedded engine) needs no
more. SGLang stamps none, so requests are streamed there, one token a chunk, and each chunk says how often its request has been
retracted. A pause retracts what is running; so the tokens of a request that was seen running are told apart by that number, however late
they arrive, and they do: the acknowledgement of a pause overtakes tokens by milliseconds, or by seconds on a machine that is short of
CPU. What was not seen running since it was sent, or since the last update, may be waiting, and then no pause retracts it: it is aborted
and sent again. Requests with stop strings are aborted too, since SGLang holds tokens back while they could be the beginning of one.
What the server does not end then has either not begun there, or is over there and its last tokens are on their way: the two look alike,
so the first chunk of it that comes after the update is not taken over, and it is sent again.
Retractions for want of memory do not disturb this: before the update is over they find nothing to be told apart, and one that comes
later comes after the one of the pause, unless the request waited for memory when the pause came, and then its next token is of the new
weights as well. What is sampled again is so whatever it was, but for two cases. A token that comes after the update and ends its answer comes
alone, where another one may be put together with the next, and both are sampled again: rare, and within a few steps of an update. And what
SGLang holds back is text that may begin a stop string, so ends by one become rarer at an update: a config with ``gconfig.stop`` is refused.
The one case left is a retraction for want of memory (or by a user's ``pause_all``) within the last steps before a pause, whose token arrives only after
the whole update; ``max_running_requests`` should be such that memory suffices.
The server must run without a radix cache, and updates must say ``flush_cache: false``: it is not idle while requests wait.

in_place (embedded engine): as retract, but the KV is kept.
"""

from __future__ import annotations

import asyncio
from typing import Literal

from areal.inference.router import Server
from areal.inference.wire import HTTPStatusError, WireError

InterruptMode = Literal["abort", "retract", "in_place"]
_REPEAT_FIRST, _REPEAT_LAST = 0.05, 1.0
_QUIET = 0.05
"""Seconds without a token after which those that were on their way have most likely arrived, which saves aborts."""


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
        if not server.stamps:
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
    """Ends every request in the server, until nothing is in flight."""
    pause = _REPEAT_FIRST
    while True:
        # Again and again: a request may have been between our socket and the scheduler, where an abort does not find it.
        await server.wire.call("POST", "/abort_request", {"abort_all": True}, timeout=None)
        try:
            async with asyncio.timeout(pause):
                await server.idle.wait()
            break
        except TimeoutError:
            pause = min(_REPEAT_LAST, 2 * pause)
    await _ask_scheduler(server)


async def _ask_scheduler(server: Server) -> None:
    """When this returns, SGLang's scheduler has handled all that came before. Not /flush_cache: that collects garbage for half a second."""
    if server.stamps:
        return  # the embedded engine handles a command before it acknowledges it
    try:
        await server.wire.call("GET", "/server_info", timeout=None)
    except HTTPStatusError as error:
        if error.status != 404:
            raise


async def _pause(server: Server, mode: InterruptMode) -> None:
    await server.wire.call("POST", "/pause_generation", {"mode": mode}, timeout=None)
    if not server.stamps:
        await _settle(server)
        unclear = [submission for submission in server.submissions.values() if not submission.is_clear]
        for submission in unclear:
            submission.is_doubtful = True  # or a late end would still be taken over, and a late token that is none lost with the abort
            await server.wire.call("POST", "/abort_request", {"rid": submission.rid}, timeout=None)
        if unclear:
            await _settle(server)
    server.meter.set_activity("weight_sync")


async def _settle(server: Server) -> None:
    """Until the scheduler has handled all that came before, and no answer has come for a while."""
    await _ask_scheduler(server)
    heard = -1
    while heard != server.n_heard:
        heard = server.n_heard
        await asyncio.sleep(_QUIET)
