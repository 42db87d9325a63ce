"""The weight updates of SGLang's protocol on one embedded engine, and areal's own /update_weights_from_shm."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from pathlib import Path
from typing import Any, TypeVar

from aiohttp import web
from torch import Tensor

from areal.inference.embedded.adapter import EngineAdapter
from areal.inference.embedded.distributed_api import DistributedAPI
from areal.inference.embedded.driver import EngineDriver
from areal.inference.embedded.engine import EmbeddedEngine
from areal.inference.embedded.http_json import failure, json_response, parse_object
from areal.inference.embedded.loaded_parts import LoadedParts
from areal.inference.embedded.tensor_api import TensorAPI
from areal.ops.weights_hash import weights_hash
from areal.weight_sync.adapter import CONFIG as ADAPTER_CONFIG
from areal.weight_sync.adapter import read_adapter
from areal.weight_sync.checkpoint_reader import open_checkpoint
from areal.weight_sync.shm import ShmReader, WeightSyncError

_SHM_TIMEOUT = 30.0
"""Seconds that an update waits for the version it was told about."""
_QUIET_TIMEOUT = 120.0
"""Seconds that a part of the weights waits for the requests that run; as in SGLang a pause or an abort spares it the waiting."""
_QUIET_POLL = 0.005

T = TypeVar("T")


class WeightsAPI:
    """Takes new weights over HTTP, one update at a time."""

    def __init__(self, engine: EmbeddedEngine, driver: EngineDriver) -> None:
        self._engine = engine
        self._driver = driver
        self.label = str(engine.version)
        """What ``meta_info.weight_version`` says."""
        self.hash = ""
        """Of the engine's own parameters, 16 hex digits; with an adapter of the adapter's factors."""
        self._readers: dict[str, ShmReader] = {}
        self._update_lock = asyncio.Lock()
        self._updates: set[asyncio.Task[web.Response]] = set()
        self._parts = LoadedParts()
        self._adapter = EngineAdapter()
        self._tensor = TensorAPI(self)
        self._distributed = DistributedAPI(self, engine.device)

    @property
    def routes(self) -> dict[str, Callable[[web.Request], Awaitable[web.StreamResponse]]]:
        """POST handlers by path."""
        return {
            "/update_weights_from_disk": self.update_weights_from_disk,
            "/update_weights_from_shm": self.update_weights_from_shm,
            **self._tensor.routes,
            **self._distributed.routes,
        }

    async def start(self) -> None:
        self.hash = await self._driver.call(self._hash_of_whole, is_long=True)

    def close(self) -> None:
        for reader in self._readers.values():
            reader.close()

    async def update_weights_from_disk(self, http: web.Request) -> web.Response:
        body = parse_object(await http.read())
        path, label = body.get("model_path"), body.get("weight_version")
        if not isinstance(path, str) or not any((Path(path) / name).is_file() for name in ("config.json", ADAPTER_CONFIG)):
            return failure(f"model_path {path!r} cannot be loaded; give a Hugging Face model directory, or an adapter's")

        def number() -> int:
            return int(label) if label is not None and str(label).isdigit() else self._engine.version + 1

        async def update() -> web.Response:
            async with self._update_lock:
                try:
                    if (Path(path) / ADAPTER_CONFIG).is_file():
                        factors, info = await asyncio.to_thread(read_adapter, Path(path))

                        def add(parameters: Mapping[str, Tensor]) -> int:
                            self._adapter.take(parameters, factors, info)
                            return number()

                        return await self._update(add, body, None if label is None else str(label), is_adapter=True)
                    source = await asyncio.to_thread(open_checkpoint, Path(path), self._engine.model)
                except (OSError, ValueError) as error:
                    return failure(f"the weights were not updated, model_path {path} cannot be loaded: {error}")

                def load(parameters: Mapping[str, Tensor]) -> int:
                    source.read_into(parameters)
                    return number()

                with source:
                    return await self._update(load, body, None if label is None else str(label))

        return await self.to_the_end(update())

    async def update_weights_from_shm(self, http: web.Request) -> web.Response:
        body = parse_object(await http.read())
        name, version = body.get("name"), body.get("version")
        if not isinstance(name, str) or not isinstance(version, int):
            return failure("give name, the shared memory's, and version, the oldest one to be taken")

        def fetch() -> tuple[ShmReader, int]:
            reader = self._readers.get(name)
            if reader is None:
                reader = self._readers[name] = ShmReader(name)
            return reader, reader.fetch(version, _SHM_TIMEOUT)[0]

        async def update() -> web.Response:
            async with self._update_lock:
                try:
                    reader, found = await asyncio.to_thread(fetch)  # beside generation; only the copy into the parameters interrupts it
                except (ValueError, OSError, WeightSyncError) as error:
                    self._forget_reader(name)
                    return failure(f"the weights were not updated: {error}")

                def load(parameters: Mapping[str, Tensor]) -> int:
                    if reader.adapter is None:
                        reader.apply(parameters)
                    else:
                        self._adapter.take(parameters, reader.tensors(), reader.adapter)
                    return found

                return await self._update(load, body, None, is_adapter=reader.adapter is not None)

        return await self.to_the_end(update())

    async def update_in_parts(self, fetch: Callable[[], dict[str, Tensor]], body: dict[str, Any]) -> web.Response:
        """One part of the weights, of which the last one has the ``weight_version``; ``fetch`` runs in a thread, one at a time.

        The tensors may lie in memory of the sender, who takes the answer for leave to write there again: what ``fetch`` gave is emptied
        before it is answered.

        Unlike a whole update it never comes between two decode steps of a sequence, which would see half of the new weights: it waits
        until nothing runs, or until generation is paused.
        """

        async def update() -> web.Response:
            async with self._update_lock:
                try:
                    tensors = await asyncio.to_thread(fetch)
                    n_tensors = len(tensors)
                    try:
                        loaded = await self._when_quiet(lambda engine: self._load_part(engine, tensors, body))
                    finally:
                        tensors.clear()
                except (ValueError, OSError, RuntimeError) as error:
                    return failure(f"the weights were not updated: {error}")
                if loaded is None:
                    return json_response({"success": True, "message": f"{n_tensors} tensors loaded."})
                version, self.hash = loaded
                self.label = str(body["weight_version"])
                return self._updated(version)

        return await self.to_the_end(update())

    async def _when_quiet(self, load: Callable[[EmbeddedEngine], T]) -> T:
        def attempt(engine: EmbeddedEngine) -> tuple[T] | None:
            if not engine.paused and engine.n_running + engine.n_waiting:
                return None
            return (load(engine),)

        deadline = time.monotonic() + _QUIET_TIMEOUT
        while (done := await self._driver.call(attempt, is_long=True)) is None:
            if time.monotonic() > deadline:
                raise TimeoutError(f"requests kept running for {_QUIET_TIMEOUT:g} s; pause or abort them first")
            await asyncio.sleep(_QUIET_POLL)
        return done[0]

    def _load_part(self, engine: EmbeddedEngine, tensors: Mapping[str, Tensor], body: dict[str, Any]) -> tuple[int, str] | None:
        """Version and hash once all parts are there, which no step may come before: it would stamp the old version."""
        start = time.time()
        parameters = engine.parameters()
        unknown = set(tensors) - set(parameters)
        if unknown:
            raise ValueError(f"the model has no tensor '{min(unknown)}'")
        self._parts.load(tensors, {name: parameters[name] for name in tensors})
        label = body.get("weight_version")
        loaded = None
        if label is not None:
            number = int(label) if str(label).isdigit() else engine.version + 1
            engine.update_weights(lambda _: number)
            loaded = number, self._parts.hash(parameters)
            self._adapter.forget(loaded[1])
        self._driver.add_span("weight_sync", start, time.time())
        return loaded

    async def to_the_end(self, update: Coroutine[Any, Any, web.Response]) -> web.Response:
        """Also when the client goes: the next update must not find the staging memory in use by a thread that nobody waits for."""
        task = asyncio.create_task(update)
        self._updates.add(task)
        task.add_done_callback(self._updates.discard)
        return await asyncio.shield(task)

    def _forget_reader(self, name: str) -> None:
        """The next update opens the segment anew: another publisher may have the name by then."""
        if (reader := self._readers.pop(name, None)) is not None:
            reader.close()

    async def _update(
        self, load: Callable[[Mapping[str, Tensor]], int], body: dict[str, Any], label: str | None, *, is_adapter: bool = False
    ) -> web.Response:
        mode = body.get("mode")
        if mode not in (None, "abort", "retract", "in_place"):
            return failure(f"mode is {mode!r}; it must be abort, retract or in_place")

        def update(engine: EmbeddedEngine) -> tuple[int, str]:
            start = time.time()
            if mode == "abort" or body.get("abort_all_requests"):
                engine.abort(None)
            engine.update_weights(load, None if mode == "abort" else mode)
            self._parts.forget()
            result = engine.version, self._adapter.hash if is_adapter else self._hash_of_whole(engine)
            self._driver.add_span("weight_sync", start, time.time())
            return result

        try:
            version, self.hash = await self._driver.call(update, is_long=True)
        except (ValueError, OSError) as error:
            if isinstance(error, OSError):  # a disk that fails in the middle leaves a part of the new weights
                self.hash = await self._driver.call(self._hash_of_whole, is_long=True)
            return failure(f"the weights were not updated: {error}")
        self.label = label or str(version)
        return self._updated(version)

    def _updated(self, version: int) -> web.Response:
        message = f"Weights updated to version {version}."
        return json_response({"success": True, "message": message, "version": version, "hash": self.hash, "num_paused_requests": 0})

    def _hash_of_whole(self, engine: EmbeddedEngine) -> str:
        """Of weights that were not made by adding an adapter to others."""
        digest = f"{weights_hash(engine.parameters()):016x}"
        self._adapter.forget(digest)
        return digest
