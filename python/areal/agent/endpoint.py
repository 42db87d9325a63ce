"""The HTTP server that agents call: OpenAI's paths in front of the sessions of the episodes that run.

It lives in the controller's event loop, is bound to loopback unless told otherwise, and knows a caller by nothing but the key of its
episode (256 random bits, sent as the API key). Paths work with and without ``/v1``. It is closed by ``close``, or when its event loop
ends: asyncio then cancels the task that holds it open.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
import weakref
from collections.abc import Awaitable, Callable, Iterator

import orjson
from aiohttp import web

from areal.agent import openai_answers
from areal.agent.openai_protocol import ApiError, Call, parse_chat, parse_completion
from areal.agent.session import Session
from areal.config import ConfigError

log = logging.getLogger(__name__)

_MAX_BODY = 256 << 20  # bytes: a conversation of many turns comes whole with every call
_START_TIMEOUT = 30.0
_ANY = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class AgentEndpoint:
    """Args:
    host: what to listen on. Everybody who reaches it and has the key of an episode can generate in that episode, and read nothing.
    port: 0 = a free one.
    """

    def __init__(self, host: str = "127.0.0.1", port: int = 0) -> None:
        self._host = host
        self._port = port
        self._sessions: dict[str, Session] = {}
        self._up: asyncio.Future[str] | None = None
        self._holder: asyncio.Task[None] | None = None

    async def url(self) -> str:
        """``http://host:port/v1``, the base URL for clients on this machine; the first caller starts the server.

        Raises:
            ConfigError: it cannot listen there.
        """
        if self._up is None:
            self._up = asyncio.get_running_loop().create_future()
            self._holder = asyncio.get_running_loop().create_task(self._hold(self._up), name="agent endpoint")
        async with asyncio.timeout(_START_TIMEOUT):
            return await asyncio.shield(self._up)

    async def close(self) -> None:
        """Ends all sessions and stops listening."""
        holder, self._holder, self._up = self._holder, None, None
        if holder is not None:
            holder.cancel()
            await asyncio.wait({holder})

    @contextlib.contextmanager
    def open(self, session: Session) -> Iterator[str]:
        """The key by which a client reaches this session, good until the block is left."""
        key = secrets.token_urlsafe(32)
        self._sessions[key] = session
        try:
            yield key
        finally:
            del self._sessions[key]
            session.end()

    async def _hold(self, up: asyncio.Future[str]) -> None:
        """Listens until it is cancelled."""
        runner = web.AppRunner(self._app(), access_log=None, handler_cancellation=True, shutdown_timeout=1.0)
        try:
            await runner.setup()
            site = web.TCPSite(runner, self._host, self._port, backlog=1024)
            try:
                await site.start()
            except OSError as error:
                where = f"{self._host}:{self._port}" if self._port else self._host
                up.set_exception(
                    ConfigError(
                        f"the agent endpoint cannot listen on {where} ({error.strerror or error})", "free it, or give another host or port"
                    )
                )
                self._up = None
                return
            host, port = runner.addresses[0][:2]
            host = _ANY.get(host, host)
            up.set_result(f"http://{f'[{host}]' if ':' in host else host}:{port}/v1")
            await asyncio.Event().wait()
        finally:
            for session in list(self._sessions.values()):
                session.end()
            await runner.cleanup()

    # -- HTTP ------------------------------------------------------------------------------------------------------------------

    def _app(self) -> web.Application:
        app = web.Application(client_max_size=_MAX_BODY)
        for base in ("/v1", ""):
            app.router.add_post(f"{base}/chat/completions", self._handler(parse_chat))
            app.router.add_post(f"{base}/completions", self._handler(parse_completion))
            app.router.add_get(f"{base}/models", self._models)
        app.router.add_route("*", "/{path:.*}", _unknown)
        return app

    def _handler(self, parse: Callable[[bytes], Call]) -> Handler:
        async def handle(http: web.Request) -> web.StreamResponse:
            session: Session | None = None
            try:
                session = self._session(http)
                call = parse(await http.read())
                answer = await session.answer(call)
                if call.stream:
                    return web.Response(body=openai_answers.events(call, answer), content_type="text/event-stream")
                return web.Response(body=openai_answers.whole(call, answer), content_type="application/json")
            except ApiError as error:
                if session is not None and error.status == 400:
                    session.refusal = error
                return _refused(error)
            except web.HTTPException:
                raise
            except Exception as error:  # boundary to the agent: a fault of ours ends the episode, under its name, and is no wrong answer
                log.exception("the agent endpoint failed")
                if session is not None:
                    session.fail(error)
                return _refused(ApiError(500, f"{type(error).__name__}: {error}", kind="server_error"))

        return handle

    def _session(self, http: web.Request) -> Session:
        scheme, _, key = http.headers.get("Authorization", "").partition(" ")
        session = self._sessions.get(key.strip()) if scheme.lower() == "bearer" else None
        if session is None:
            message = "this is not the key of an episode that runs: use the api_key and base_url that the agent's run was given"
            raise ApiError(401, message, code="invalid_api_key", kind="authentication_error")
        return session

    async def _models(self, http: web.Request) -> web.Response:
        try:
            self._session(http)
        except ApiError as error:
            return _refused(error)
        models = [{"id": "default", "object": "model", "created": int(time.time()), "owned_by": "areal"}]
        return web.Response(body=orjson.dumps({"object": "list", "data": models}), content_type="application/json")


async def _unknown(http: web.Request) -> web.Response:
    paths = "POST /v1/chat/completions, POST /v1/completions and GET /v1/models"
    return _refused(ApiError(404, f"there is no {http.method} {http.path}; there are {paths}", code="unknown_url"))


def _refused(error: ApiError) -> web.Response:
    # OpenAI's client would send again what failed with 5xx; the failure has ended the episode already.
    return web.Response(body=error.body(), status=error.status, content_type="application/json", headers={"x-should-retry": "false"})


_ENDPOINTS: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, dict[tuple[str, int], AgentEndpoint]] = weakref.WeakKeyDictionary()


def shared_endpoint(host: str, port: int) -> AgentEndpoint:
    """One for all workflows of the running event loop that want the same address."""
    endpoints = _ENDPOINTS.setdefault(asyncio.get_running_loop(), {})
    return endpoints.setdefault((host, port), AgentEndpoint(host, port))
