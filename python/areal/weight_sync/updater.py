"""The controller's side of every weight update: which weights are current, and how each rollout server gets them.

Transports differ in who waits for whom:

| transport         | the trainer                                   | a server                                                       |
|-------------------|-----------------------------------------------|----------------------------------------------------------------|
| shm               | writes a buffer and goes on                   | fetches beside generation, swaps between two decode steps      |
| disk              | writes a folder and goes on                   | is interrupted, loads the folder                               |
| broadcast, tensor | sends, until every server has all or failed   | is interrupted, takes bucket after bucket                      |

A server that fails or is late is taken out with one sentence that says why, the others go on; whoever watches the servers replaces it,
and ``join`` brings the current weights to a server before its first request. What a server holds afterwards is compared with what was
sent (``weight_sync.verify``); a difference ends the run, because nothing that it generates could be trusted.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from areal.config import GRPOConfig
from areal.inference.client import RolloutClient, WeightUpdateError
from areal.inference.interruption import InterruptFailed
from areal.inference.servers import RolloutServer
from areal.trainer.worker import TrainerHandle
from areal.weight_sync.disk import remove_old, version_folder
from areal.weight_sync.stream import SendResult, Target
from areal.weight_sync.verify import verify_server

log = logging.getLogger(__name__)

_DIGESTS_KEPT = 8


class WrongWeights(RuntimeError):
    """A server holds other weights than the trainer sent."""


class WeightsNotWritten(OSError):
    """disk: the trainer could not write its weights, so no server would ever see them."""


@dataclass(frozen=True, slots=True)
class Weights:
    """What the trainer published last."""

    version: int
    digest: str | None
    """weights_hash of what was sent, 16 hex digits; None where it was not asked for."""


@dataclass(slots=True)
class UpdateTimes:
    """Seconds of one update, over all its servers together."""

    interrupt: float = 0.0
    """From the first request to stop until every server was still."""
    transfer: float = 0.0
    verify: float = 0.0
    resume: float = 0.0


@dataclass(slots=True)
class _Update:
    """One update of some servers: who is still in it."""

    version: int
    servers: list[RolloutServer]
    times: UpdateTimes = field(default_factory=UpdateTimes)


class WeightUpdater:
    """``publish`` and ``push`` (or ``run``, beside the loop) for servers that are up, ``join`` for one that comes.

    Args:
        servers: the servers that get updates; read anew at every one.
        folder: where transport disk puts versions.
        on_span: told (actor, begin, end) of every update, in ``time.time()`` seconds.
        on_note: told, once a server, what cannot be verified.
    """

    def __init__(
        self,
        config: GRPOConfig,
        trainer: TrainerHandle,
        client: RolloutClient,
        servers: Callable[[], Sequence[RolloutServer]],
        folder: Path,
        on_span: Callable[[str, float, float], None],
        on_note: Callable[[str], None],
    ) -> None:
        self.published: Weights | None = None
        self.times: list[UpdateTimes] = []
        """Of the updates that interrupted servers, since the last ``row``."""
        self._config = config
        self._transport = config.transport
        self._trainer = trainer
        self._client = client
        self._servers = servers
        self._folder = folder
        self._on_span = on_span
        self._on_note = on_note
        self._announced = asyncio.Event()
        self._digests: dict[int, str] = {}
        self._numbered = asyncio.Lock()
        """Held while a server joins, and while it would get other weights than those of the number that it is told."""
        self._updating = asyncio.Lock()
        self._verified: set[str] = set()

    @property
    def streams(self) -> bool:
        """Whether the trainer takes part in an update, from the first bucket to the last."""
        return self._transport in ("broadcast", "tensor")

    def row(self) -> dict[str, float]:
        """For metrics.jsonl: seconds of the updates since the last call; nothing where updates interrupt nobody."""
        times, self.times = self.times, []
        if self._transport == "shm":
            return {}
        return {f"update_{key}_seconds": sum(getattr(t, key) for t in times) for key in ("interrupt", "transfer", "verify", "resume")}

    @asynccontextmanager
    async def changing_weights(self) -> AsyncIterator[None]:
        """Around a train step and the ``publish`` that numbers its result: no server joins meanwhile where it would be sent these weights."""
        if not self.streams:
            yield
            return
        async with self._numbered:
            yield

    # -- what the trainer has ----------------------------------------------------------------------------------------------------

    async def publish(self, version: int, *, announce: bool = True) -> None:
        """The trainer's weights, as they are now, get this number; where the transport streams, every server has them on return.

        Once announced, ``run`` takes them to the servers; otherwise the caller does, by ``push``, and may use a number again: then no
        server joins meanwhile, since one number would mean two weights.
        """
        if announce:
            await self._publish(version)
            self._announced.set()
        else:
            async with self._numbered:
                await self._publish(version)

    async def _publish(self, version: int) -> None:
        begin = time.time()
        if self._transport == "shm":
            _, digest = await self._trainer.publish(version)
            self._remember(Weights(version, f"{digest:016x}"))
        elif self._transport == "disk":
            written = await self._trainer.write_weights(version, want_hash=self._config.weight_sync.verify != "never")
            for outcome in written.outcomes:
                if outcome.error is not None:
                    raise WeightsNotWritten(outcome.error)
            self._remember(Weights(version, _digest(written)))
        else:
            self._remember(Weights(version, None))
            async with self._updating:
                await self._update(_Update(version, self._live()))
        self._on_span("trainer 0", begin, time.time())

    def _remember(self, weights: Weights) -> None:
        self.published = weights
        self._digests = {v: d for v, d in self._digests.items() if v > weights.version - _DIGESTS_KEPT}
        if weights.digest is not None:
            self._digests[weights.version] = weights.digest

    # -- what the servers have ---------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Takes announced weights to the servers until cancelled; versions published meanwhile are skipped over."""
        while True:
            await self._announced.wait()
            self._announced.clear()
            await self.push()

    async def push(self) -> None:
        """Every live server takes the weights published last; returns when all have them, or were taken out, and what they hold was checked."""
        assert self.published is not None
        if self.streams:
            return  # publish has done it
        async with self._updating:
            update = _Update(self.published.version, self._live())
            if self._transport == "disk":
                await self._update(update)
            else:
                self._take_out(update, await self._each(update, self._fetch_from_shm))

    def _live(self) -> list[RolloutServer]:
        live = set(self._client.urls)
        return [server for server in self._servers() if server.url in live]

    async def join(self, server: RolloutServer) -> None:
        """Brings the current weights to a server that gets no requests yet, and lets requests go there.

        ``WeightUpdateError`` if it fails; it has been taken out then.
        """
        async with self._numbered, self._updating:
            self._verified.discard(server.url)
            if self.published is None:
                self._client.add_server(server.url, server.process)
            elif self._transport == "shm":
                await self._fetch_from_shm(server)
                self._client.add_server(server.url, server.process)
            else:
                update = _Update(self.published.version, [server])
                self._take_out(update, await self._transfer(update))
                await self._verify(update)
                if not update.servers:
                    raise WeightUpdateError(f"{server.name} at {server.url} did not get version {update.version}; the reason was logged")
                self._client.add_server(server.url, server.process, version=update.version)

    # -- one update --------------------------------------------------------------------------------------------------------------

    async def _update(self, update: _Update) -> None:
        begin, start = time.time(), time.monotonic()
        self._take_out(update, await self._each(update, self._interrupt))
        update.times.interrupt = time.monotonic() - start
        if update.servers:
            self._take_out(update, await self._transfer(update))
        await self._verify(update)
        start = time.monotonic()
        self._take_out(update, await self._each(update, lambda server: self._resume(server, update.version)))
        update.times.resume = time.monotonic() - start
        self.times.append(update.times)
        end = time.time()
        for server in update.servers:
            self._on_span(server.name, begin, end)
        if self._transport == "disk":
            await asyncio.to_thread(remove_old, self._folder, update.version)

    async def _each(self, update: _Update, do: Callable[[RolloutServer], Awaitable[None]]) -> dict[str, str]:
        """Runs ``do`` for every server together; who failed, with why."""
        results = await asyncio.gather(*(do(server) for server in update.servers), return_exceptions=True)
        failed: dict[str, str] = {}
        for server, result in zip(update.servers, results, strict=True):
            if isinstance(result, (InterruptFailed, WeightUpdateError)):
                failed[server.url] = str(result)
            elif isinstance(result, BaseException):
                raise result
        return failed

    async def _interrupt(self, server: RolloutServer) -> None:
        await self._client.interrupt(server.url)

    async def _resume(self, server: RolloutServer, version: int) -> None:
        await self._client.resume(server.url, version)

    async def _transfer(self, update: _Update) -> dict[str, str]:
        """The weights to every server of the update; who failed, with why."""
        start = time.monotonic()
        try:
            if self._transport == "disk":
                return await self._each(update, lambda server: self._load_from_disk(server, update.version))
            targets = [Target(server.url, server.n_ranks) for server in update.servers]
            sent = await self._trainer.send_weights(update.version, targets, want_hash=any(map(self._is_due, update.servers)))
            self._remember(Weights(update.version, _digest(sent)))
            return {outcome.url: outcome.error for outcome in sent.outcomes if outcome.error is not None}
        finally:
            update.times.transfer = time.monotonic() - start

    async def _load_from_disk(self, server: RolloutServer, version: int) -> None:
        await self._client.update_from_disk(server.url, version_folder(self._folder, version), version)

    async def _fetch_from_shm(self, server: RolloutServer) -> None:
        assert self.published is not None
        ack = await self._client.update_server(server.url, self._trainer.shm_name, self.published.version, server.process)
        self._check_digest(server.url, ack.version, ack.hash)

    def _take_out(self, update: _Update, failed: dict[str, str]) -> None:
        for url, why in failed.items():
            log.warning("%s", why)
            self._client.remove_server(url, why)
        update.servers = [server for server in update.servers if server.url not in failed]

    # -- verification ------------------------------------------------------------------------------------------------------------

    def _is_due(self, server: RolloutServer) -> bool:
        policy = self._config.weight_sync.verify
        return policy == "always" or (policy == "first" and server.url not in self._verified)

    async def _verify(self, update: _Update) -> None:
        """Compares what the servers hold with what was sent; a server that cannot answer in time is taken out, as one that did not update."""
        expected = self._digests.get(update.version)
        due = [server for server in update.servers if self._is_due(server)]
        if expected is None or not due:
            return
        start = time.monotonic()
        self._take_out(
            update, await self._each(_Update(update.version, due), lambda server: self._verify_one(server, update.version, expected))
        )
        update.times.verify = time.monotonic() - start

    async def _verify_one(self, server: RolloutServer, version: int, expected: str) -> None:
        found = await verify_server(
            server.url,
            server.n_ranks,
            await self._trainer.manifest(),
            int(expected, 16),
            self._config.weight_sync.timeout,
            version=version,
            # Only where the trainer waits; else it may have trained on meanwhile.
            tensor_hashes=self._trainer.tensor_hashes if self.streams else None,
            samples=(lambda: self._trainer.sample_tensors(version)) if self.streams else None,
        )
        if not found.ok and found.kind == "none":
            raise WeightUpdateError(found.detail)
        if not found.ok:
            raise WrongWeights(found.detail)
        if server.url not in self._verified and (found.detail or found.unverified):
            self._on_note(found.detail or f"{server.name}: these weights cannot be verified: {', '.join(found.unverified[:5])}")
        self._verified.add(server.url)

    def _check_digest(self, url: str, version: int, digest: str) -> None:
        """A server may already have a newer version than it was asked for."""
        expected = self._digests.get(version)
        if self._config.weight_sync.verify == "never" or expected is None:
            return
        if digest != expected:
            raise WrongWeights(f"{url} holds other weights than the trainer at version {version}: hash {digest} instead of {expected}")


def _digest(sent: SendResult) -> str | None:
    return None if sent.hash is None else f"{sent.hash:016x}"
