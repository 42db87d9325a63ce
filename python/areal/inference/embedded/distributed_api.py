"""Weights by broadcast into one embedded engine: SGLang's endpoints, with ``flattened_bucket`` or a tensor at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Protocol

import torch
from aiohttp import web
from torch import Tensor

from areal.inference.embedded.http_json import failure, json_response, parse_object
from areal.weight_sync.broadcast import BroadcastReceiver
from areal.weight_sync.stream import plan_buckets

_TIMEOUT = 300.0
"""Seconds that a join and a bucket may take; the sender's own deadline comes first, and it then closes the connection."""


class _Loader(Protocol):
    async def update_in_parts(self, fetch: Callable[[], Mapping[str, Tensor]], body: dict[str, Any]) -> web.Response: ...


class DistributedAPI:
    """Handlers by path in ``routes``; ``loader`` takes what was received into the engine."""

    def __init__(self, loader: _Loader, device: torch.device) -> None:
        self._loader = loader
        self._receiver = BroadcastReceiver(device)

    @property
    def routes(self) -> dict[str, Callable[[web.Request], Awaitable[web.StreamResponse]]]:
        return {
            "/init_weights_update_group": self.init_group,
            "/update_weights_from_distributed": self.update,
            "/destroy_weights_update_group": self.destroy_group,
        }

    async def init_group(self, http: web.Request) -> web.Response:
        body = parse_object(await http.read())
        try:
            address, name = str(body["master_address"]), str(body["group_name"])
            port, rank, world_size = int(body["master_port"]), int(body["rank_offset"]), int(body["world_size"])
        except (KeyError, TypeError, ValueError):
            return failure("give master_address, master_port, rank_offset, world_size and group_name")
        try:
            await asyncio.to_thread(self._receiver.join, name, address, port, rank, world_size, _TIMEOUT)
        except (RuntimeError, OSError) as error:
            return failure(f"the process group '{name}' could not be joined: {error}")
        return json_response({"success": True, "message": "Process group joined."})

    async def update(self, http: web.Request) -> web.Response:
        body = parse_object(await http.read())
        name = str(body.get("group_name"))
        if not self._receiver.has_joined(name):
            return failure(f"the process group '{name}' was not joined; POST /init_weights_update_group first")
        try:
            described = [
                (str(tensor), [int(n) for n in shape], getattr(torch, str(dtype).removeprefix("torch.")))
                for tensor, shape, dtype in zip(body["names"], body["shapes"], body["dtypes"], strict=True)
            ]
        except (KeyError, TypeError, ValueError, AttributeError):
            return failure("give names, dtypes and shapes, one of each a tensor")
        if any(dtype.itemsize != described[0][2].itemsize for _, _, dtype in described):
            return failure("send tensors of one dtype at a time")  # so that each can be looked at where it arrives
        buckets = plan_buckets(described, 1 << 62)
        is_flat = body.get("load_format") == "flattened_bucket"

        def fetch() -> dict[str, Tensor]:
            return self._receiver.receive(name, buckets[0], is_flat, _TIMEOUT) if buckets else {}

        return await self._loader.update_in_parts(fetch, body)

    async def destroy_group(self, http: web.Request) -> web.Response:
        name = str(parse_object(await http.read()).get("group_name"))
        if not self._receiver.has_joined(name):
            return failure(f"the process group '{name}' does not exist")
        await asyncio.to_thread(self._receiver.leave, name)
        return json_response({"success": True, "message": "Process group left."})
