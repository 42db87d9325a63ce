"""Weights by broadcast into one embedded engine: SGLang's endpoints, with ``flattened_bucket`` or a tensor at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
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
    async def to_the_end(self, update: Coroutine[Any, Any, web.Response]) -> web.Response: ...

    async def update_in_parts(self, fetch: Callable[[], dict[str, Tensor]], body: dict[str, Any]) -> web.Response: ...


class DistributedAPI:
    """Handlers by path in ``routes``; ``loader`` takes what was received into the engine."""

    def __init__(self, loader: _Loader, device: torch.device) -> None:
        self._loader = loader
        self._receiver = BroadcastReceiver(device)
        self._receiving = asyncio.Lock()
        self._free = asyncio.Semaphore(BroadcastReceiver.N_BUCKETS)
        """Memory for buckets: one may arrive while the one before it is being loaded."""

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
        if not described or any(dtype.itemsize != described[0][2].itemsize for _, _, dtype in described):
            return failure("send tensors, of one dtype at a time")  # so that each can be looked at where it arrives
        (bucket,) = plan_buckets(described, 1 << 62)
        is_flat = body.get("load_format") == "flattened_bucket"

        async def update() -> web.Response:
            async with self._free:
                async with self._receiving:
                    try:
                        tensors = await asyncio.to_thread(self._receiver.receive, name, bucket, is_flat, _TIMEOUT)
                    except RuntimeError as error:
                        return failure(f"the weights were not received: {error}")
                return await self._loader.update_in_parts(lambda: tensors, body)

        return await self._loader.to_the_end(update())

    async def destroy_group(self, http: web.Request) -> web.Response:
        name = str(parse_object(await http.read()).get("group_name"))
        if not self._receiver.has_joined(name):
            return failure(f"the process group '{name}' does not exist")
        await asyncio.to_thread(self._receiver.leave, name)
        return json_response({"success": True, "message": "Process group left."})
