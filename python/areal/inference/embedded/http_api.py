"""SGLang's native HTTP protocol on one embedded engine (aiohttp).

areal's own additions to the protocol are ``meta_info.output_token_versions``, POST /update_weights_from_shm and GET /engine_stats.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import orjson
from aiohttp import web
from torch import Tensor

from areal.inference.embedded.driver import EngineDied, EngineDriver
from areal.inference.embedded.engine import EmbeddedEngine
from areal.inference.embedded.protocol import GenerateCall, answer_json, parse_generate
from areal.inference.embedded.request import Answer, RequestError
from areal.models.loading import load_model
from areal.ops.weights_hash import weights_hash
from areal.weight_sync.shm import ShmReader, WeightSyncError

_SHM_TIMEOUT = 30.0
"""Seconds that an update waits for the version it was told about."""


def json_response(content: Any, status: int = 200) -> web.Response:
    return web.Response(body=orjson.dumps(content), status=status, content_type="application/json")


def failure(sentence: str, status: int = 400) -> web.Response:
    return json_response({"success": False, "message": sentence, "error": {"message": sentence}}, status)


class EngineServer:
    """The HTTP side of one engine."""

    def __init__(self, engine: EmbeddedEngine, model_path: str, on_failure: Callable[[], None] = lambda: None) -> None:
        self._engine = engine
        self._model_path = model_path
        self._driver = EngineDriver(engine, on_failure)
        self._weight_version = str(engine.version)
        self._hash = ""
        self._readers: dict[str, ShmReader] = {}
        self._update_lock = asyncio.Lock()
        self._updates: set[asyncio.Task[web.Response]] = set()

    def app(self) -> web.Application:
        app = web.Application(client_max_size=1 << 30, middlewares=[_errors])
        for path, handler in {
            "/generate": self.generate,
            "/pause_generation": self.pause_generation,
            "/continue_generation": self.continue_generation,
            "/abort_request": self.abort_request,
            "/update_weights_from_disk": self.update_weights_from_disk,
            "/update_weights_from_shm": self.update_weights_from_shm,
            "/flush_cache": self.flush_cache,
        }.items():
            app.router.add_post(path, handler)
        for path, handler in {
            "/health": self.health,
            "/health_generate": self.health,
            "/model_info": self.model_info,
            "/get_model_info": self.model_info,
            "/engine_stats": self.engine_stats,
            "/flush_cache": self.flush_cache,
        }.items():
            app.router.add_get(path, handler)
        return app

    async def start(self) -> None:
        self._driver.start()
        self._hash = await self._driver.call(_hash_of, is_long=True)

    @property
    def failure(self) -> BaseException | None:
        """What ended the engine."""
        return self._driver.failure

    async def stop(self) -> None:
        await self._driver.stop()
        for reader in self._readers.values():
            reader.close()

    # -- generation -------------------------------------------------------------------------------------------------------------

    async def generate(self, http: web.Request) -> web.StreamResponse:
        start = time.perf_counter()
        engine = self._engine
        call = parse_generate(_json(await http.read()), engine.tokenizer, engine.max_context)
        for request in call.requests:
            engine.check(request)
        if call.stream:
            return await self._stream(http, call, start)
        futures = [self._driver.generate(request) for request in call.requests]
        try:
            answers = [await future for future in futures]
        except asyncio.CancelledError:  # the client has gone
            for rid in {request.rid for request in call.requests}:
                self._driver.abort_soon(rid)
            raise
        latency = time.perf_counter() - start
        contents = [answer_json(answer, call, engine.tokenizer, self._weight_version, latency) for answer in answers]
        return json_response(contents if call.is_list else contents[0])

    async def _stream(self, http: web.Request, call: GenerateCall, start: float) -> web.StreamResponse:
        """Server-sent events; each holds everything generated so far, as SGLang's do."""
        loop = asyncio.get_running_loop()
        news: asyncio.Queue[tuple[int, Any]] = asyncio.Queue()
        for index, request in enumerate(call.requests):
            request.on_token = partial(_tell, loop, news, index)
        futures = [self._driver.generate(request) for request in call.requests]
        for index, future in enumerate(futures):
            future.add_done_callback(partial(_done, news, index))
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        try:
            await response.prepare(http)
            running = len(futures)
            while running:
                index, answer = await news.get()
                if isinstance(answer, asyncio.Future):
                    answer = answer.result()
                    running -= 1
                content = answer_json(answer, call, self._engine.tokenizer, self._weight_version, time.perf_counter() - start)
                if call.is_list:
                    content["index"] = index
                await response.write(b"data: " + orjson.dumps(content) + b"\n\n")
            await response.write(b"data: [DONE]\n\n")
        except (asyncio.CancelledError, ConnectionError):  # the client has gone
            for rid in {request.rid for request in call.requests}:
                self._driver.abort_soon(rid)
            raise
        return response

    async def abort_request(self, http: web.Request) -> web.Response:
        body = _object(await http.read())
        if not body.get("abort_all") and not isinstance(body.get("rid"), str):
            return failure("give rid, the id of the request to be aborted, or abort_all: true")
        rid = None if body.get("abort_all") else body["rid"]
        n = await self._driver.call(lambda engine: engine.abort(rid))
        return json_response({"success": True, "aborted": n})

    async def pause_generation(self, http: web.Request) -> web.Response:
        mode = _object(await http.read()).get("mode", "abort")
        if mode not in ("abort", "retract", "in_place"):
            return failure(f"mode is {mode!r}; it must be abort, retract or in_place")
        await self._driver.call(lambda engine: engine.pause(mode))
        return json_response({"status": "ok", "message": "Generation paused successfully."})

    async def continue_generation(self, http: web.Request) -> web.Response:
        await self._driver.call(lambda engine: engine.resume())
        return json_response({"status": "ok", "message": "Generation continued successfully."})

    # -- weights ----------------------------------------------------------------------------------------------------------------

    async def update_weights_from_disk(self, http: web.Request) -> web.Response:
        body = _object(await http.read())
        path, label = body.get("model_path"), body.get("weight_version")
        if not isinstance(path, str) or not (Path(path) / "config.json").is_file():
            return failure(f"model_path {path!r} cannot be loaded; give a Hugging Face model directory")

        def read() -> dict[str, Tensor]:
            dtype = next(self._engine.model.parameters()).dtype
            return dict(load_model(path, dtype=dtype).named_parameters())

        async def update() -> web.Response:
            async with self._update_lock:
                try:
                    tensors = await asyncio.to_thread(read)  # beside generation; only the copy interrupts it
                except (OSError, ValueError) as error:
                    return failure(f"model_path {path} cannot be loaded: {error}")

                def load(parameters: Mapping[str, Tensor]) -> int:
                    _copy_all(tensors, parameters)
                    return int(label) if label is not None and str(label).isdigit() else self._engine.version + 1

                return await self._update(load, body, None if label is None else str(label))

        return await self._to_the_end(update())

    async def update_weights_from_shm(self, http: web.Request) -> web.Response:
        body = _object(await http.read())
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
                    reader.apply(parameters)
                    return found

                return await self._update(load, body, None)

        return await self._to_the_end(update())

    async def _to_the_end(self, update: Coroutine[Any, Any, web.Response]) -> web.Response:
        """Also when the client goes: the next update must not find the staging memory in use by a thread that nobody waits for."""
        task = asyncio.create_task(update)
        self._updates.add(task)
        task.add_done_callback(self._updates.discard)
        return await asyncio.shield(task)

    def _forget_reader(self, name: str) -> None:
        """The next update opens the segment anew: another publisher may have the name by then."""
        if (reader := self._readers.pop(name, None)) is not None:
            reader.close()

    async def _update(self, load: Callable[[Mapping[str, Tensor]], int], body: dict[str, Any], label: str | None) -> web.Response:
        mode = body.get("mode")
        if mode not in (None, "abort", "retract", "in_place"):
            return failure(f"mode is {mode!r}; it must be abort, retract or in_place")

        def update(engine: EmbeddedEngine) -> tuple[int, str]:
            start = time.time()
            if mode == "abort" or body.get("abort_all_requests"):
                engine.abort(None)
            engine.update_weights(load, None if mode == "abort" else mode)
            result = engine.version, _hash_of(engine)
            self._driver.add_span("weight_sync", start, time.time())
            return result

        try:
            version, self._hash = await self._driver.call(update, is_long=True)
        except (ValueError, OSError) as error:
            return failure(f"the weights were not updated: {error}")
        self._weight_version = label or str(version)
        message = f"Weights updated to version {version}."
        return json_response({"success": True, "message": message, "version": version, "hash": self._hash, "num_paused_requests": 0})

    # -- information ------------------------------------------------------------------------------------------------------------

    async def health(self, http: web.Request) -> web.Response:
        if self._driver.failure is not None:
            return failure(f"the engine has failed: {self._driver.failure!r}", 503)
        return web.Response()

    async def model_info(self, http: web.Request) -> web.Response:
        return json_response(
            {
                "model_path": self._model_path,
                "tokenizer_path": self._model_path,
                "is_generation": True,
                "weight_version": self._weight_version,
                "max_context": self._engine.max_context,
                "engine": "areal embedded",
            }
        )

    async def engine_stats(self, http: web.Request) -> web.Response:
        stats = await self._driver.call(self._stats)
        return json_response(stats)

    def _stats(self, engine: EmbeddedEngine) -> dict[str, Any]:
        return {
            "tokens_generated": engine.tokens_generated,
            "prefill_tokens": engine.prefill_tokens,
            "running": engine.n_running,
            "waiting": engine.n_waiting,
            "version": engine.version,
            "hash": self._hash,
            "busy_seconds": self._driver.busy_seconds,
            "spans": self._driver.drain_spans(),
        }

    async def flush_cache(self, http: web.Request) -> web.Response:
        """Nothing outlives its sequence here; there is no prefix cache to flush."""
        return web.Response(text="Cache flushed.\n")


@web.middleware
async def _errors(request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]) -> web.StreamResponse:
    try:
        return await handler(request)
    except RequestError as error:
        return failure(str(error))
    except EngineDied as error:
        return failure(str(error), 503)


def _done(news: asyncio.Queue[tuple[int, Any]], index: int, future: asyncio.Future[Any]) -> None:
    news.put_nowait((index, future))


def _tell(loop: asyncio.AbstractEventLoop, news: asyncio.Queue[tuple[int, Any]], index: int, answer: Answer) -> None:
    loop.call_soon_threadsafe(news.put_nowait, (index, answer))


def _json(body: bytes) -> Any:
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise RequestError(f"the body is not JSON: {error}") from error


def _object(body: bytes) -> dict[str, Any]:
    content = _json(body) if body else {}
    if not isinstance(content, dict):
        raise RequestError("the body must be a JSON object")
    return content


def _hash_of(engine: EmbeddedEngine) -> str:
    return f"{weights_hash(engine.parameters()):016x}"


def _copy_all(tensors: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> None:
    """Copies every parameter; raises ValueError before the first copy if names or shapes differ."""
    for name, parameter in parameters.items():
        if name not in tensors:
            raise ValueError(f"the checkpoint has no tensor '{name}'")
        if tensors[name].shape != parameter.shape:
            raise ValueError(f"tensor '{name}' has shape {tuple(tensors[name].shape)}, the model's is {tuple(parameter.shape)}")
    for name, parameter in parameters.items():
        parameter.copy_(tensors[name])
