"""SGLang's native HTTP protocol on one embedded engine (aiohttp).

areal's own additions to the protocol are ``meta_info.output_token_versions``, POST /update_weights_from_shm and GET /engine_stats.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import orjson
from aiohttp import web

from areal.inference.embedded.driver import EngineDied, EngineDriver
from areal.inference.embedded.engine import EmbeddedEngine
from areal.inference.embedded.http_json import failure, json_response, parse_json, parse_object
from areal.inference.embedded.protocol import GenerateCall, answer_json, parse_generate
from areal.inference.embedded.request import Answer, RequestError
from areal.inference.embedded.weights_api import WeightsAPI


class EngineServer:
    """The HTTP side of one engine."""

    def __init__(self, engine: EmbeddedEngine, model_path: str, on_failure: Callable[[], None] = lambda: None) -> None:
        self._engine = engine
        self._model_path = model_path
        self._driver = EngineDriver(engine, on_failure)
        self._weights = WeightsAPI(engine, self._driver)

    def app(self) -> web.Application:
        app = web.Application(client_max_size=1 << 30, middlewares=[_errors])
        for path, handler in {
            "/generate": self.generate,
            "/pause_generation": self.pause_generation,
            "/continue_generation": self.continue_generation,
            "/abort_request": self.abort_request,
            "/flush_cache": self.flush_cache,
            **self._weights.routes,
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
        await self._weights.start()

    @property
    def failure(self) -> BaseException | None:
        """What ended the engine."""
        return self._driver.failure

    async def stop(self) -> None:
        await self._driver.stop()
        self._weights.close()

    # -- generation -------------------------------------------------------------------------------------------------------------

    async def generate(self, http: web.Request) -> web.StreamResponse:
        start = time.perf_counter()
        engine = self._engine
        call = parse_generate(parse_json(await http.read()), engine.tokenizer, engine.max_context)
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
        contents = [answer_json(answer, call, engine.tokenizer, self._weights.label, latency) for answer in answers]
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
                content = answer_json(answer, call, self._engine.tokenizer, self._weights.label, time.perf_counter() - start)
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
        body = parse_object(await http.read())
        if not body.get("abort_all") and not isinstance(body.get("rid"), str):
            return failure("give rid, the id of the request to be aborted, or abort_all: true")
        rid = None if body.get("abort_all") else body["rid"]
        n = await self._driver.call(lambda engine: engine.abort(rid))
        return json_response({"success": True, "aborted": n})

    async def pause_generation(self, http: web.Request) -> web.Response:
        mode = parse_object(await http.read()).get("mode", "abort")
        if mode not in ("abort", "retract", "in_place"):
            return failure(f"mode is {mode!r}; it must be abort, retract or in_place")
        await self._driver.call(lambda engine: engine.pause(mode))
        return json_response({"status": "ok", "message": "Generation paused successfully."})

    async def continue_generation(self, http: web.Request) -> web.Response:
        await self._driver.call(lambda engine: engine.resume())
        return json_response({"status": "ok", "message": "Generation continued successfully."})

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
                "weight_version": self._weights.label,
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
            "hash": self._weights.hash,
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
