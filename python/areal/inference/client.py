"""``agenerate`` against SGLang's native protocol, over any number of rollout servers that come, update and die.

Who waits on whom: a request waits for its answer at most ``request_timeout`` seconds, resubmissions, closed gates and the wait for a
replacement included; while no server is alive it waits for one at most ``startup_timeout`` seconds. A generation that loses its server,
or is aborted for new weights, goes on from the tokens it has: it has no side effects, and dropping it would favour short answers.
"""

from __future__ import annotations

import asyncio
import itertools
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from areal.config import GenerationConfig, RolloutConfig
from areal.inference.exchange import Exchanges, ask_kind
from areal.inference.generate_protocol import PartialAnswer, ProtocolError, RequestRejected, Submission, sampling_params
from areal.inference.interruption import InterruptFailed, InterruptMode, end_all, interrupt, resume
from areal.inference.router import Route, Router, Server, ServerDied, WatchedProcess
from areal.inference.weight_calls import WeightsAck, WeightUpdateError, not_taken, update_from_disk, update_from_shm
from areal.inference.wire import HTTPStatusError, WireError
from areal.types import ModelRequest, ModelResponse, StopReason

_RETRY_FIRST, _RETRY_LAST, _RETRIES = 0.05, 1.0, 6
_CONTROL_TIMEOUT = 10.0
__all__ = [
    "InterruptFailed",
    "ProtocolError",
    "RequestRejected",
    "RolloutClient",
    "Route",
    "ServerDied",
    "WatchedProcess",
    "WeightUpdateError",
    "WeightsAck",
]

_SEED_STEP = 0x9E3779B97F4A7C15  # golden ratio: another seed for the rest of an answer, not the same random numbers again


class RolloutClient:
    """All rollout servers of a run behind one ``agenerate``.

    Args:
        config: deadlines.
        urls: ``http://host:port`` of servers that are up, holding the weights of version 0; others join by ``add_server``.
        processes: theirs, in the same order; None = watched by nobody here.
        update_mode: how ``interrupt`` stops a server (``GRPOConfig.update_mode``); None = that of ``config``, abort where it is auto.
        interrupt_timeout: seconds a server may take to stop generating, and to go on (``weight_sync.timeout``).
    """

    def __init__(
        self,
        config: RolloutConfig | None = None,
        urls: Sequence[str] = (),
        processes: Sequence[WatchedProcess | None] = (),
        *,
        update_mode: InterruptMode | None = None,
        interrupt_timeout: float = 120.0,
    ) -> None:
        self.config = config or RolloutConfig()
        named = self.config.update_mode
        self.update_mode: InterruptMode = update_mode or ("abort" if named == "auto" else named)
        self._interrupt_timeout = interrupt_timeout
        self._router = Router(self.config.startup_timeout if self.config.max_restarts or self.config.urls else 0.0)
        self._newest = 0
        self._sampling: dict[int, tuple[GenerationConfig, dict[str, Any]]] = {}
        self._rids = (f"{prefix}-{n}" for prefix in [secrets.token_hex(4)] for n in itertools.count())
        self._exchanges = Exchanges(self._router, streams=self.update_mode != "abort", silence=self.config.request_timeout / 4)
        for index, url in enumerate(urls):
            self.add_server(url, processes[index] if index < len(processes) else None)

    # -- servers ---------------------------------------------------------------------------------------------------------------

    @property
    def urls(self) -> list[str]:
        """Of the live servers."""
        return [server.url for server in self._router.live()]

    def is_known(self, url: str) -> bool:
        """False once the server was given up: it is dead, or failed too often."""
        return self._router.get(url) is not None

    @property
    def acked_version(self) -> int:
        """The newest version that every live server has acknowledged; -1 while there is no server."""
        return min((server.version for server in self._router.live()), default=-1)

    def get_version(self) -> int:
        return self.acked_version

    def add_server(self, url: str, process: WatchedProcess | None = None, *, version: int = 0) -> None:
        """Lets requests go to this server, which holds the weights of ``version``, or those that ``update_server`` gave it."""
        server = self._router.known(url)
        server.process = process
        server.version = max(server.version, version)
        self._router.add(server)

    def remove_server(self, url: str, reason: str = "") -> None:
        """Nothing is sent there any more; what waits for it goes to the others. ``reason`` is told if none is left."""
        self._router.remove(url, reason)

    async def drain(self, url: str, timeout: float) -> None:
        """Removes a server: it gets no new requests, and what is not finished after ``timeout`` seconds goes on elsewhere."""
        server = self._router.get(url)
        if server is None:
            return
        server.draining = True
        self._router.notify()
        try:
            async with asyncio.timeout(timeout):
                await server.idle.wait()
        except TimeoutError:
            try:
                async with asyncio.timeout(self._interrupt_timeout):
                    await end_all(server)
            except (TimeoutError, WireError, HTTPStatusError):
                pass  # then its requests go elsewhere without what they have: removal breaks their connections
        self.remove_server(url, f"{server.describe()} was drained")

    def on_change(self, listener: Callable[[], None]) -> None:
        """``listener`` is called when a server comes or goes, and when ``acked_version`` may have changed."""
        self._router.on_change(listener)

    def off_change(self, listener: Callable[[], None]) -> None:
        self._router.off_change(listener)

    async def close(self) -> None:
        """Closes every connection, which ends what the servers generate for us."""
        await self._router.close()
        await self._exchanges.wait_ended()

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
        server: Server | None = None
        n_limit = request.gconfig.max_new_tokens
        while True:
            n_before = len(done.tokens)
            submission = Submission(
                f"{next(self._rids)}-{request.rid}", len(request.input_ids) + n_limit, done, holds_back=bool(request.gconfig.stop)
            )
            chosen = await self._router.acquire(submission, route, server)
            if chosen is not server:  # what another server did says nothing about this one
                failures, server = 0, chosen
            try:
                await self._exchanges.submit(server, submission, self._body(submission, request, seed))
            except (WireError, HTTPStatusError) as error:
                if n_before and isinstance(error, HTTPStatusError) and error.status == 400:
                    return "length"  # SGLang refuses inputs six tokens short of the context, which it lets answers grow into
                failures = failures + 1 if len(done.tokens) == n_before else 1
                await self._after_failure(server, failures, error)
                continue
            failures = 0
            if submission.reason in ("stop", "length"):
                return submission.reason
            if submission.n_new and not (submission.stamped or submission.streamed):
                # SGLang samples one token more after an abort, and does not look whether it ends the answer. Dropped whatever it
                # is, it is sampled again from the same distribution, and then an end is seen as one.
                done.drop_last()
            if len(done.tokens) >= n_limit:
                return "length"
            idle_aborts = idle_aborts + 1 if not submission.n_new else 0
            if idle_aborts > 1 and server.gate_open:  # a server that is closing, or paused: do not spin
                await asyncio.sleep(min(_RETRY_LAST, _RETRY_FIRST * idle_aborts))

    def _body(self, submission: Submission, request: ModelRequest, seed: int | None) -> dict[str, Any]:
        tokens = submission.done.tokens
        return {
            "rid": submission.rid,
            "input_ids": [*request.input_ids, *tokens],
            "sampling_params": self._sampling_params(request.gconfig, seed, len(tokens)),
            "return_logprob": True,
        }

    async def _after_failure(self, server: Server, failures: int, error: WireError | HTTPStatusError) -> None:
        """Counts a server out when its process is dead or it answers nobody; else waits a little, or raises RequestRejected."""
        if not server.live:
            return
        if server.is_dead:
            self.remove_server(server.url)
        elif isinstance(error, HTTPStatusError) and error.status < 500:
            raise RequestRejected(f"{server.url} refused the request: {error.text}") from error
        elif failures < _RETRIES:
            await asyncio.sleep(min(_RETRY_LAST, _RETRY_FIRST * 2 ** (failures - 1)))
        elif not await self._is_well(server):
            await _exit_of(server)
            why = server.describe() if server.is_dead else f"{server.describe()} failed {failures} times in a row, the last time: {error}"
            self.remove_server(server.url, why)
        elif isinstance(error, HTTPStatusError) and error.status == 503:
            await asyncio.sleep(_RETRY_LAST)  # busy
        else:  # SGLang answers 500 to an unknown sampling parameter, and breaks a stream off
            raise RequestRejected(f"{server.url}, which is well, failed {failures} times at the request: {error}") from error

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

    # -- interruption ----------------------------------------------------------------------------------------------------------

    async def interrupt(self, url: str) -> None:
        """Stops a server for new weights: when this returns, it samples no token before ``resume``, and nothing is sent there.

        Raises:
            InterruptFailed: it did not stop in time, or died. Its gate stays closed: remove it.
        """
        server = self._the(url)
        if self.update_mode != "abort" and server.stamps is None:
            try:
                await ask_kind(server)
            except (WireError, HTTPStatusError) as error:
                raise InterruptFailed(f"{url} could not be stopped for new weights: {error}") from error
        await interrupt(server, self.update_mode, self._interrupt_timeout)

    async def resume(self, url: str, version: int) -> None:
        """Lets a server that was interrupted, and now has the weights of ``version``, go on. Raises InterruptFailed."""
        server = self._the(url)
        await resume(server, self.update_mode, version, self._interrupt_timeout)
        self._router.notify()

    def _the(self, url: str) -> Server:
        server = self._router.get(url)
        if server is None:
            raise InterruptFailed(f"the rollout server {url} is gone")
        return server

    # -- control ---------------------------------------------------------------------------------------------------------------

    async def update_server(self, url: str, name: str, version: int, process: WatchedProcess | None = None) -> WeightsAck:
        """One server takes at least ``version`` from shared memory ``name``. Of a new one, ``add_server`` is to be called directly after.

        It ends with the newest version that any server was told to take, so that ``acked_version`` never goes back.

        Raises:
            WeightUpdateError: it did not do it within ``interrupt_timeout`` seconds, or died.
        """
        self._newest = max(self._newest, version)
        self._router.known(url).process = process
        while True:
            ack = await self._update(self._router.known(url), name, self._newest)
            if ack is None:
                raise WeightUpdateError(f"the rollout server {url} died before it had version {self._newest}")
            if ack.version >= self._newest:
                return ack

    async def _update(self, server: Server, name: str, version: int) -> WeightsAck | None:
        mode = "in_place" if self.update_mode == "in_place" else "retract"
        try:
            ack = await update_from_shm(server, name, version, mode, self._interrupt_timeout)
        except WireError as error:
            if await self._is_dead(server):
                return None
            raise not_taken(server, version, error) from error
        server.version = ack.version
        self._router.notify()
        return ack

    async def update_from_disk(self, url: str, folder: Path | str, version: int) -> WeightsAck:
        """One server, interrupted or not yet added, loads a Hugging Face folder.

        Raises:
            WeightUpdateError: it did not do it within ``interrupt_timeout`` seconds, or died.
        """
        server = self._router.known(url)
        try:
            return await update_from_disk(server, folder, version, self.update_mode == "abort", self._interrupt_timeout)
        except WireError as error:
            raise WeightUpdateError(f"{server.url} did not take version {version}: {error}") from error

    async def control(self, url: str, method: str, path: str, body: Mapping[str, Any] | None = None, *, timeout: float) -> Any:
        """The parsed answer of one server to any call. Raises HTTPStatusError, WireError or TimeoutError as ``Wire.call`` does."""
        return await self._router.known(url).wire.call(method, path, body, timeout=timeout)

    async def _is_well(self, server: Server) -> bool:
        """Whether it answers others: then an error is the request's own. Not /health, for which SGLang generates a token."""
        try:
            await server.wire.call("GET", "/model_info", timeout=_CONTROL_TIMEOUT)
        except (WireError, HTTPStatusError, TimeoutError):
            return False
        return True

    async def _is_dead(self, server: Server) -> bool:
        """After its connection broke. An exit code may come a moment later than the broken connection."""
        for _ in range(20):
            if not self.is_known(server.url) or server.is_dead:
                self.remove_server(server.url)
                return True
            if await self._is_well(server):
                return False
            await asyncio.sleep(_RETRY_FIRST)
        self.remove_server(server.url)
        return True

    async def engine_stats(self) -> dict[str, dict[str, Any]]:
        """``/engine_stats`` of every server that answers, by URL; of one that has none (SGLang), what this client saw of it."""
        answers = await self._everywhere("GET", "/engine_stats")
        found: dict[str, dict[str, Any]] = {}
        for server in self._router.live():
            answer = answers.get(server.url)
            if isinstance(answer, HTTPStatusError) and answer.status == 404:
                stats = server.meter.read()
                stats["tokens_generated"] += sum(submission.n_new for submission in server.submissions.values())  # streamed so far
                found[server.url] = {**stats, "running": len(server.submissions), "version": server.version}
            elif isinstance(answer, dict):
                found[server.url] = answer
        return found

    async def pause_all(self, mode: str = "retract") -> None:
        """Stops generation on every server until ``resume_all``: mode abort, retract or in_place. For users, not for weight updates."""
        await self._everywhere("POST", "/pause_generation", {"mode": mode})

    async def resume_all(self) -> None:
        await self._everywhere("POST", "/continue_generation", {})

    async def _everywhere(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """By URL, the answer or the HTTPStatusError; servers that do not answer are left out: whoever needs it asks again."""
        servers = self._router.live()
        calls = (server.wire.call(method, path, body, timeout=_CONTROL_TIMEOUT) for server in servers)
        answers = await asyncio.gather(*calls, return_exceptions=True)
        found: dict[str, Any] = {}
        for server, answer in zip(servers, answers, strict=True):
            if isinstance(answer, BaseException) and not isinstance(answer, (WireError, TimeoutError, HTTPStatusError)):
                raise answer
            if not isinstance(answer, (WireError, TimeoutError)):
                found[server.url] = answer
        return found


async def _exit_of(server: Server) -> None:
    """Waits a little for a process that no longer listens: how it ended says more than a refused connection."""
    for _ in range(50):
        if server.process is None or server.is_dead:
            return
        await asyncio.sleep(0.1)
