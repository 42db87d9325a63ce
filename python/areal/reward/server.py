"""Scores over HTTP for several runs: one pool of workers, one bounded queue, first come, first served.

    POST /score/NAME   {"completions": ..., "prompt", "prompt_ids", "completion_ids", further columns of the row}
                       -> {"score": 1.0}, or {"failure": {"cause": "reward_timeout", "message": "..."}}: an answer too, so also with status 200
    POST /score        the same, where there is one function only
    GET  /health, /stats

A caller that finds the queue full gets 429 and Retry-After; one that goes away takes its score out of the queue. Errors are
``{"error": {"message": ...}}``: 400 for a body that is no row, 404 for a function that is not here, 503 from a server that is ending.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import orjson
from aiohttp import web

from areal.reward.counters import ScoreCounters
from areal.reward.service import RewardFailure, RewardService, RewardServiceError, is_async

_MAX_BODY = 256 << 20
_LONGEST_RETRY_AFTER = 10


class BadRow(ValueError):
    """A body that is no row, in one sentence."""


class RewardServer:
    """The HTTP side of a ``RewardService``.

    Args:
        functions: reward functions by the names they have in the URL.
        max_queue: scores that may wait; the next caller is told to come again.
    """

    def __init__(self, service: RewardService, functions: Mapping[str, Callable[..., Any]], workers: int, max_queue: int) -> None:
        self.service = service
        self.max_queue = max_queue
        self.n_turned_away = 0
        self._workers = workers
        self._functions = {name: (function, is_async(function), ScoreCounters()) for name, function in functions.items()}

    def app(self) -> web.Application:
        app = web.Application(client_max_size=_MAX_BODY)
        app.add_routes(
            [
                web.post("/score", self._score),
                web.post("/score/{name}", self._score),
                web.get("/health", self._health),
                web.get("/stats", self._stats),
            ]
        )
        return app

    @property
    def n_waiting(self) -> int:
        return sum(counters.waiting for _, _, counters in self._functions.values())

    async def _score(self, request: web.Request) -> web.Response:
        names = list(self._functions)
        name = request.match_info.get("name", names[0] if len(names) == 1 else "")
        if name not in self._functions:
            return _error(404, f"this server scores {', '.join(names)}: POST to /score/{names[0]}")
        function, on_loop, counters = self._functions[name]
        body = await request.read()
        if self.n_waiting >= self.max_queue:
            self.n_turned_away += 1
            return _error(429, f"{self.max_queue} scores wait already; come again later", {"Retry-After": str(self._retry_after())})
        try:
            arguments, row = read_row(body)
            score = await self.service.score(function, arguments, row, on_loop=on_loop, counters=counters)
        except BadRow as error:
            return _error(400, str(error))
        except RewardFailure as failure:
            return _json({"failure": {"cause": failure.cause, "message": str(failure)}})
        except RewardServiceError as error:
            return _error(503, str(error))
        return _json({"score": score})

    def _retry_after(self) -> int:
        """Whole seconds, as HTTP wants them, until half of the queue is gone."""
        counters = [counters for _, _, counters in self._functions.values()]
        done = sum(c.n_scores + c.failures.total() for c in counters)
        seconds = sum(c.scoring_seconds for c in counters) / done if done else 0.0
        return max(1, min(_LONGEST_RETRY_AFTER, math.ceil(seconds * self.max_queue / 2 / self._workers)))

    async def _health(self, request: web.Request) -> web.Response:
        return _json({"status": "ok", "functions": list(self._functions)})

    async def _stats(self, request: web.Request) -> web.Response:
        return _json(
            {
                "waiting": self.n_waiting,
                "max_queue": self.max_queue,
                "turned_away": self.n_turned_away,
                "workers": self._workers,
                "workers_ready": self.service.n_ready,
                "functions": {name: counters.totals() for name, (_, _, counters) in self._functions.items()},
            }
        )


def read_row(body: bytes) -> tuple[tuple[str, str, list[int], list[int]], dict[str, Any]]:
    """The four arguments of a reward function, and the row's other columns.

    Raises:
        BadRow: not a JSON object, or an argument of the wrong type. Only ``completions`` must be there.
    """
    try:
        row = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise BadRow(f"the body is not JSON: {error}") from None
    if not isinstance(row, dict):
        raise BadRow("the body must be a JSON object with the key completions")
    if "completions" not in row:
        raise BadRow(f"the body has no completions; it has {', '.join(row) or 'nothing'}"[:300])
    texts = [row.pop(key, "") for key in ("prompt", "completions")]
    ids = [row.pop(key, []) for key in ("prompt_ids", "completion_ids")]
    for key, text in zip(("prompt", "completions"), texts, strict=True):
        if not isinstance(text, str):
            raise BadRow(f"{key} must be a string, not {type(text).__name__}")
    for key, tokens in zip(("prompt_ids", "completion_ids"), ids, strict=True):
        if not isinstance(tokens, list) or set(map(type, tokens)) - {int}:
            raise BadRow(f"{key} must be a list of token ids")
    return (texts[0], texts[1], ids[0], ids[1]), row


def _json(content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> web.Response:
    return web.Response(body=orjson.dumps(content), status=status, content_type="application/json", headers=headers)


def _error(status: int, sentence: str, headers: Mapping[str, str] | None = None) -> web.Response:
    return _json({"error": {"message": sentence}}, status, headers)
