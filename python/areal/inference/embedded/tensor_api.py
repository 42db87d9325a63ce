"""Weights by reference into one embedded engine: SGLang's /update_weights_from_tensor with ``flattened_bucket``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from aiohttp import web
from torch import Tensor

from areal.inference.embedded.http_json import failure, parse_object
from areal.weight_sync.tensor import PATH, deserialize


class _Loader(Protocol):
    async def update_in_parts(self, fetch: Callable[[], dict[str, Tensor]], body: dict[str, Any]) -> web.Response: ...


class TensorAPI:
    """Handlers by path in ``routes``; ``loader`` takes what the body refers to into the engine."""

    def __init__(self, loader: _Loader) -> None:
        self._loader = loader
        self.routes = {PATH: self.update}

    async def update(self, http: web.Request) -> web.Response:
        body = parse_object(await http.read())
        parts = body.get("serialized_named_tensors")
        if body.get("load_format") != "flattened_bucket" or not isinstance(parts, list) or len(parts) != 1 or not isinstance(parts[0], str):
            return failure(
                "give load_format: flattened_bucket, and serialized_named_tensors: a list of one string, for this server's one rank"
            )
        return await self._loader.update_in_parts(lambda: deserialize(parts[0]), body)
