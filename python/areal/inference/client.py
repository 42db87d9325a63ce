"""``agenerate`` against SGLang's native protocol, over any number of rollout servers that come, update and die.

Who waits on whom: a request waits for its server at most ``request_timeout`` seconds, resubmissions included; while no server is
alive it waits for a replacement at most ``startup_timeout`` seconds. A generation that loses its server starts again on another
one: it has no side effects, and dropping it would favour short answers.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from areal.config import GenerationConfig, RolloutConfig
from areal.inference.generate_protocol import PartialAnswer, ProtocolError, RequestRejected, sampling_params, take_answer
from areal.inference.wire import HTTPStatusError, Wire, WireError
from areal.types import ModelRequest, ModelResponse, StopReason

_RETRY_FIRST, _RETRY_LAST, _RETRIES = 0.05, 1.0, 6
_CONTROL_TIMEOUT = 10.0
__all__ = ["ProtocolError", "RequestRejected", "RolloutClient", "Route", "ServerDied", "WeightUpdateError", "WeightsAck"]

_SEED_STEP = 0x9E3779B97F4A7C15  # golden ratio: another seed for the rest of an answer, not the same random numbers again


class ServerDied(RuntimeError):
    """A rollout server is gone and nothing replaced it in time; the message has its last log lines."""


class WeightUpdateError(RuntimeError):
    """A live rollout server did not take the new weights."""


class WatchedProcess(Protocol):
    """What the client wants to know of the process behind a URL (``launcher.local.ChildProcess`` and others)."""

    def poll(self) -> int | None: ...
    def describe_death(self, n: int = 10) -> str: ...


@dataclass(frozen=True, slots=True)
class WeightsAck:
    """A server has the weights of ``version``; ``hash`` is over its own parameters, 16 hex digits."""

    version: int
    hash: str


@dataclass(eq=False)
class _Server:
    url: str
    wire: Wire
    process: WatchedProcess | None = None
    version: int = -1
    outstanding: int = 0
    live: bool = False

    def describe(self) -> str:
        return (
            self.process.describe_death()
            if self.process is not None and self.process.poll() is not None
            else f"the rollout server {self.url}"
        )


@dataclass(slots=True)
class Route:
    """Keeps the requests of one prompt on one server, where its prefix is cached."""

    server: _Server | None = None


class RolloutClient:
    """All rollout servers of a run behind one ``agenerate``.

    Args:
        config: deadlines.
        urls: ``http://host:port`` of servers that are up, holding the weights of version 0; others join by ``add_server``.
        processes: theirs, in the same order; None = watched by nobody here.
    """

    def __init__(
        self, config: RolloutConfig | None = None, urls: Sequence[str] = (), processes: Sequence[WatchedProcess | None] = ()
    ) -> None:
        self.config = config or RolloutConfig()
        self._servers: dict[str, _Server] = {}
        self._closing: list[Wire] = []
        self._changed = asyncio.Event()
        self._listeners: list[Callable[[], None]] = []
        self._newest = 0
        self._last_death = ""
        self._sampling: dict[int, tuple[GenerationConfig, dict[str, Any]]] = {}
        for index, url in enumerate(urls):
            self.add_server(url, processes[index] if index < len(processes) else None)

    # -- servers ---------------------------------------------------------------------------------------------------------------

    @property
    def urls(self) -> list[str]:
        """Of the live servers."""
        return [server.url for server in self._live()]

    def is_known(self, url: str) -> bool:
        """False once the server was given up: it is dead, or failed too often."""
        return url in self._servers

    @property
    def acked_version(self) -> int:
        """The newest version that every live server has acknowledged; -1 while there is no server."""
        return min((server.version for server in self._live()), default=-1)

    def get_version(self) -> int:
        return self.acked_version

    def add_server(self, url: str, process: WatchedProcess | None = None) -> None:
        """Lets requests go to this server; it has version 0 unless ``update_server`` came before."""
        server = self._known(url)
        server.process = process
        server.version = max(server.version, 0)
        server.live = True
        self._notify()

    def remove_server(self, url: str, reason: str = "") -> None:
        """Nothing is sent there any more; what waits for it goes to the others. ``reason`` is told if none is left."""
        server = self._servers.pop(url, None)
        if server is not None:
            server.live = False
            self._last_death = reason or server.describe()
            server.wire.close()
            self._closing.append(server.wire)
            self._notify()

    def on_change(self, listener: Callable[[], None]) -> None:
        """``listener`` is called when a server comes or goes, and when ``acked_version`` may have changed."""
        self._listeners.append(listener)

    def off_change(self, listener: Callable[[], None]) -> None:
        self._listeners.remove(listener)

    def _notify(self) -> None:
        self._changed.set()
        for listener in self._listeners:
            listener()

    async def close(self) -> None:
        """Closes every connection, which ends what the servers generate for us."""
        for url in list(self._servers):
            self.remove_server(url)
        await asyncio.gather(*(wire.wait_closed() for wire in self._closing))
        self._closing.clear()

    def _known(self, url: str) -> _Server:
        if url not in self._servers:
            self._servers[url] = _Server(url, Wire(url))
        return self._servers[url]

    def _live(self) -> list[_Server]:
        return [server for server in self._servers.values() if server.live]

    async def _choose(self, route: Route | None) -> _Server:
        """The route's server, else the one with the fewest requests; waits for a replacement while there is none."""
        if route is not None and route.server is not None and route.server.live:
            return route.server
        patience = self.config.startup_timeout if self.config.max_restarts else 0.0
        deadline = time.monotonic() + patience
        while not (live := self._live()):
            self._changed.clear()
            try:
                async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
                    await self._changed.wait()
            except TimeoutError:
                raise ServerDied(
                    f"no rollout server is alive, and none came within {patience:.0f} s; the last: {self._last_death or 'none'}"
                ) from None
        server = min(live, key=lambda s: s.outstanding)
        if route is not None:
            route.server = server
        return server

    # -- generation ------------------------------------------------------------------------------------------------------------

    async def agenerate(self, request: ModelRequest, *, sampling_seed: int | None = None, route: Route | None = None) -> ModelResponse:
        """The answer to one request; an interrupted one goes on from the tokens it has.

        Args:
            request: ``gconfig.n_samples`` is ignored, this is one sample.
            sampling_seed: 64 bits that make the answer repeatable; None = random.
            route: shared by requests that should go to the same server.

        Raises:
            RequestRejected: the server refuses it.
            ServerDied: no server is left.
            TimeoutError: no answer within ``request_timeout`` seconds.
        """
        begin = time.monotonic()
        timeout = self.config.request_timeout
        done = PartialAnswer()
        try:
            async with asyncio.timeout(timeout):
                reason = await self._generate(request, sampling_seed, route, done)
        except TimeoutError:
            where = f" on {route.server.url}" if route is not None and route.server is not None else ""
            raise TimeoutError(
                f"request {request.rid}{where} had no answer after {timeout:g} s (rollout.request_timeout); "
                f"{len(done.tokens)} tokens were there"
            ) from None
        return ModelResponse(list(request.input_ids), done.tokens, done.logprobs, done.versions, reason, time.monotonic() - begin)

    async def _generate(self, request: ModelRequest, seed: int | None, route: Route | None, done: PartialAnswer) -> StopReason:
        failures, idle_aborts = 0, 0
        last: _Server | None = None
        body: dict[str, Any] = {"rid": request.rid, "input_ids": request.input_ids, "return_logprob": True}
        while True:
            body["sampling_params"] = self._sampling_params(request.gconfig, seed, len(done.tokens))
            if done.tokens:
                body["input_ids"] = [*request.input_ids, *done.tokens]
            server = await self._choose(route)
            if server is not last:  # what another server did says nothing about this one
                failures, last = 0, server
            server.outstanding += 1
            version = server.version
            try:
                answer = await server.wire.call("POST", "/generate", body, timeout=None)  # agenerate has the deadline
            except WireError as error:
                failures += 1
                await self._after_failure(server, failures, error)
                continue
            except HTTPStatusError as error:
                failures += 1
                busy = error.status == 503
                well = failures >= _RETRIES and await self._is_well(server)
                if error.status < 500 or (well and not busy):
                    raise RequestRejected(f"{server.url} refused the request: {error.text}") from error
                await (asyncio.sleep(_RETRY_LAST) if well else self._after_failure(server, failures, error))
                continue
            finally:
                server.outstanding -= 1
            n_before = len(done.tokens)
            reason = take_answer(answer, version, done, server.url)
            if reason != "abort":
                return reason
            if len(done.tokens) >= request.gconfig.max_new_tokens:
                return "length"
            idle_aborts = idle_aborts + 1 if len(done.tokens) == n_before else 0
            if idle_aborts:  # a server that is closing, or paused: do not spin
                await asyncio.sleep(min(_RETRY_LAST, _RETRY_FIRST * idle_aborts))

    async def _after_failure(self, server: _Server, failures: int, error: Exception) -> None:
        """Counts a server out when its process is dead or it failed too often; else waits a little."""
        if not server.live:
            return
        if server.process is not None and server.process.poll() is not None:
            self.remove_server(server.url)
        elif failures >= _RETRIES:
            self.remove_server(server.url, f"{server.describe()} failed {failures} times in a row, the last time: {error}")
        else:
            await asyncio.sleep(min(_RETRY_LAST, _RETRY_FIRST * 2 ** (failures - 1)))

    def _sampling_params(self, gconfig: GenerationConfig, seed: int | None, n_done: int) -> dict[str, Any]:
        """SGLang's names; after ``n_done`` tokens only the rest is asked for."""
        known = self._sampling.get(id(gconfig))
        if known is None or known[0] is not gconfig:
            if len(self._sampling) > 256:
                self._sampling.clear()
            known = self._sampling[id(gconfig)] = (gconfig, sampling_params(gconfig))
        if seed is None and not n_done:
            return known[1]
        params = dict(known[1])
        params["max_new_tokens"] = gconfig.max_new_tokens - n_done
        if gconfig.min_new_tokens:
            params["min_new_tokens"] = max(0, gconfig.min_new_tokens - n_done)
        if seed is not None:
            params["sampling_seed"] = (seed + _SEED_STEP * n_done) & 0x7FFFFFFFFFFFFFFF
        return params

    # -- control ---------------------------------------------------------------------------------------------------------------

    async def update_weights_from_shm(self, name: str, version: int) -> dict[str, WeightsAck]:
        """Tells every live server to take at least ``version`` from shared memory ``name``; a server that dies meanwhile is left out.

        Raises:
            WeightUpdateError: a server that lives did not do it within ``request_timeout`` seconds.
        """
        self._newest = max(self._newest, version)
        servers = self._live()
        acks = await asyncio.gather(*(self._update(server, name, version) for server in servers))
        return {server.url: ack for server, ack in zip(servers, acks, strict=True) if ack is not None}

    async def update_server(self, url: str, name: str, version: int, process: WatchedProcess | None = None) -> WeightsAck:
        """The same for one server, before ``add_server`` lets requests go there: to be called directly after, with no await between.

        It ends with the newest version that any server was told to take, so that ``acked_version`` never goes back.
        """
        self._newest = max(self._newest, version)
        self._known(url).process = process
        while True:
            ack = await self._update(self._known(url), name, self._newest)
            if ack is None:
                raise WeightUpdateError(f"the rollout server {url} died before it had version {self._newest}")
            if ack.version >= self._newest:
                return ack

    async def _update(self, server: _Server, name: str, version: int) -> WeightsAck | None:
        body = {"name": name, "version": version, "mode": "in_place" if self.config.update_mode == "in_place" else "retract"}
        try:
            answer = await server.wire.call("POST", "/update_weights_from_shm", body, timeout=self.config.request_timeout)
        except TimeoutError:
            raise WeightUpdateError(
                f"the controller waited {self.config.request_timeout:g} s (rollout.request_timeout) for {server.url} to take version {version}"
            ) from None
        except HTTPStatusError as error:
            raise WeightUpdateError(f"{server.url} refused version {version}: {error.text}") from error
        except WireError as error:
            if await self._is_dead(server):
                return None
            raise WeightUpdateError(f"{server.url} is alive but did not take version {version}: {error}") from error
        if not isinstance(answer, dict) or not answer.get("success"):
            said = answer.get("message", answer) if isinstance(answer, dict) else answer
            raise WeightUpdateError(f"{server.url} did not take version {version}: {said}")
        server.version = int(answer["version"])
        self._notify()
        return WeightsAck(server.version, str(answer.get("hash", "")))

    async def _is_well(self, server: _Server) -> bool:
        """Whether it answers others: then an error is the request's own."""
        try:
            await server.wire.call("GET", "/health", timeout=_CONTROL_TIMEOUT)
        except (WireError, HTTPStatusError, TimeoutError):
            return False
        return True

    async def _is_dead(self, server: _Server) -> bool:
        """After its connection broke. An exit code may come a moment later than the broken connection."""
        for _ in range(20):
            if server.url not in self._servers or (server.process is not None and server.process.poll() is not None):
                self.remove_server(server.url)
                return True
            if await self._is_well(server):
                return False
            await asyncio.sleep(_RETRY_FIRST)
        self.remove_server(server.url)
        return True

    async def engine_stats(self) -> dict[str, dict[str, Any]]:
        """``/engine_stats`` of every server that answers, by URL."""
        answers = await self._everywhere("GET", "/engine_stats")
        return {url: answer for url, answer in answers.items() if isinstance(answer, dict)}

    async def pause(self, mode: str = "retract") -> None:
        """Stops generation on every server until ``resume``: mode abort, retract or in_place."""
        await self._everywhere("POST", "/pause_generation", {"mode": mode})

    async def resume(self) -> None:
        await self._everywhere("POST", "/continue_generation", {})

    async def _everywhere(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        servers = self._live()
        calls = (server.wire.call(method, path, body, timeout=_CONTROL_TIMEOUT) for server in servers)
        answers = await asyncio.gather(*calls, return_exceptions=True)
        found: dict[str, Any] = {}
        for server, answer in zip(servers, answers, strict=True):
            if isinstance(answer, (WireError, TimeoutError, HTTPStatusError)):
                continue  # dying, or busy: whoever needs this answer asks again
            if isinstance(answer, BaseException):
                raise answer
            found[server.url] = answer
        return found
