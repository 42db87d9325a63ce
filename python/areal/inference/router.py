"""The set of rollout servers, and which of them a request goes to.

A request goes to the server with the fewest outstanding tokens (its input and what it may still generate), requests of one prompt to
the same one. Every server has a gate: while it is closed nothing is sent there. Who waits on whom: a request waits at the gate of its
server until the gate opens or the server is given up, within the request's own deadline; while there is no server at all it waits for
a replacement at most ``patience`` seconds.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from areal.inference.client_stats import GenerationMeter
from areal.inference.generate_protocol import Submission
from areal.inference.wire import Wire


class ServerDied(RuntimeError):
    """A rollout server is gone and nothing replaced it in time; the message has its last log lines."""


class WatchedProcess(Protocol):
    """What the client wants to know of the process behind a URL (``launcher.local.ChildProcess`` and others)."""

    def poll(self) -> int | None: ...
    def describe_death(self, n: int = 10) -> str: ...


@dataclass(eq=False)
class Server:
    """One rollout server as the client sees it."""

    url: str
    wire: Wire
    process: WatchedProcess | None = None
    version: int = -1
    """Of its weights, as it acknowledged them."""
    outstanding: int = 0
    """Tokens of the requests that were given to it and have no answer yet."""
    submissions: dict[str, Submission] = field(default_factory=dict)
    """In flight: past the gate and without an answer, by the id that the server knows them by."""
    idle: asyncio.Event = field(default_factory=asyncio.Event)
    """Set while nothing of ours is in flight."""
    live: bool = False
    """Whether requests may go there."""
    draining: bool = False
    gate_open: bool = True
    stamps: bool | None = None
    """Whether it says by which version each token was sampled (areal's own engine does, SGLang does not); None = not known yet."""
    n_heard: int = 0
    """Answers and chunks that came from it."""
    meter: GenerationMeter = field(default_factory=GenerationMeter)

    def __post_init__(self) -> None:
        self.idle.set()

    @property
    def usable(self) -> bool:
        return self.live and not self.draining

    @property
    def is_dead(self) -> bool:
        """Whether its process has ended, as far as one is watched."""
        return self.process is not None and self.process.poll() is not None

    def describe(self) -> str:
        return self.process.describe_death() if self.process is not None and self.is_dead else f"the rollout server {self.url}"


@dataclass(slots=True)
class Route:
    """Keeps the requests of one prompt on one server, where its prefix is cached."""

    server: Server | None = None


class Router:
    """``patience``: seconds that a request waits for a replacement while no server is there."""

    def __init__(self, patience: float) -> None:
        self._patience = patience
        self._servers: dict[str, Server] = {}
        self._meters: dict[str, GenerationMeter] = {}
        self._changed = asyncio.Event()
        self._listeners: list[Callable[[], None]] = []
        self._closing: list[Wire] = []
        self._last_death = ""

    # -- the set ---------------------------------------------------------------------------------------------------------------

    def get(self, url: str) -> Server | None:
        return self._servers.get(url)

    def known(self, url: str) -> Server:
        """The server at this address; a new one gets no requests before ``add``."""
        if url not in self._servers:
            # The meter outlives its server: one that comes back under its old address goes on counting.
            self._servers[url] = Server(url, Wire(url), meter=self._meters.setdefault(url, GenerationMeter()))
        return self._servers[url]

    def live(self) -> list[Server]:
        return [server for server in self._servers.values() if server.live]

    def add(self, server: Server) -> None:
        server.live = True
        self.notify()

    def remove(self, url: str, reason: str = "") -> None:
        """Nothing is sent there any more; what waits for it goes to the others. ``reason`` is told if none is left."""
        server = self._servers.pop(url, None)
        if server is None:
            return
        server.live = False
        self._last_death = reason or server.describe()
        server.wire.close()
        self._closing.append(server.wire)
        self.notify()

    def on_change(self, listener: Callable[[], None]) -> None:
        self._listeners.append(listener)

    def off_change(self, listener: Callable[[], None]) -> None:
        self._listeners.remove(listener)

    def notify(self) -> None:
        """To be called when a server came, went, opened its gate or has other weights."""
        self._changed.set()
        for listener in self._listeners:
            listener()

    async def close(self) -> None:
        for url in list(self._servers):
            self.remove(url)
        await asyncio.gather(*(wire.wait_closed() for wire in self._closing))
        self._closing.clear()

    # -- the choice ------------------------------------------------------------------------------------------------------------

    async def acquire(self, submission: Submission, route: Route | None = None, bound: Server | None = None) -> Server:
        """A server for this submission, in flight there until ``release``.

        Args:
            submission: its ``n_tokens`` count as outstanding from the choice on, also while it waits at the gate.
            route: shared by requests that should go to the same server.
            bound: the server that had this request before; it is kept as long as it lives.

        Raises:
            ServerDied: there is no server, and none came in time.
        """
        while True:
            server = bound if bound is not None and bound.usable else self._choose(route)
            if server is None:
                await self._wait_for_server()
                continue
            server.outstanding += submission.n_tokens
            try:
                while server.usable and not server.gate_open:
                    await self._change()
                if server.usable:
                    self._enter(server, submission)
                    return server
            finally:  # of a server that was given up, or of a request that was cancelled at the gate
                if submission.rid not in server.submissions:
                    server.outstanding -= submission.n_tokens

    def release(self, server: Server, submission: Submission) -> None:
        """The submission has its answer, or will have none."""
        server.outstanding -= submission.n_tokens
        del server.submissions[submission.rid]
        server.meter.tokens_generated += submission.n_new
        if not server.submissions:
            server.meter.set_activity(None if server.gate_open else "weight_sync")
            server.idle.set()

    def _enter(self, server: Server, submission: Submission) -> None:
        if not server.submissions:
            server.idle.clear()
            server.meter.set_activity("generation")
        server.submissions[submission.rid] = submission
        submission.version = server.version

    def _choose(self, route: Route | None) -> Server | None:
        if route is not None and route.server is not None and route.server.usable:
            return route.server
        usable = [server for server in self._servers.values() if server.usable]
        if not usable:
            return None
        server = min(usable, key=lambda s: (not s.gate_open, s.outstanding))
        if route is not None:
            route.server = server
        return server

    async def _wait_for_server(self) -> None:
        deadline = time.monotonic() + self._patience
        while not any(server.usable for server in self._servers.values()):
            try:
                async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
                    await self._change()
            except TimeoutError:
                raise ServerDied(
                    f"no rollout server is alive, and none came within {self._patience:.0f} s; the last: {self._last_death or 'none'}"
                ) from None

    async def _change(self) -> None:
        self._changed.clear()
        await self._changed.wait()
