"""One server told to take weights that lie somewhere: in shared memory, or in a folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from areal.inference.router import Server
from areal.inference.wire import HTTPStatusError, WireError


class WeightUpdateError(RuntimeError):
    """A live rollout server did not take the new weights."""


@dataclass(frozen=True, slots=True)
class WeightsAck:
    """A server has the weights of ``version``; ``hash`` is over its own parameters, 16 hex digits, "" where it cannot tell."""

    version: int
    hash: str


async def update_from_shm(server: Server, name: str, version: int, mode: str, timeout: float) -> WeightsAck:
    """At least ``version`` from the shared memory ``name``. Raises WeightUpdateError, or WireError if the server may be dead."""
    body = {"name": name, "version": version, "mode": mode}
    return await _update(server, "/update_weights_from_shm", body, version, timeout)


async def update_from_disk(server: Server, folder: Path | str, version: int, flush: bool, timeout: float) -> WeightsAck:
    """``version`` from a Hugging Face folder. Raises WeightUpdateError, or WireError if the server may be dead."""
    # flush_cache while requests wait in a paused server kills SGLang; without it, and with a radix cache, it would serve old KV.
    body = {"model_path": str(folder), "weight_version": str(version), "flush_cache": flush}
    return await _update(server, "/update_weights_from_disk", body, version, timeout)


async def _update(server: Server, path: str, body: Mapping[str, Any], version: int, timeout: float) -> WeightsAck:
    try:
        answer = await server.wire.call("POST", path, body, timeout=timeout)
    except TimeoutError:
        raise WeightUpdateError(
            f"the controller waited {timeout:g} s (weight_sync.timeout) for {server.url} to take version {version} by {path}"
        ) from None
    except HTTPStatusError as error:
        raise WeightUpdateError(f"{server.url} refused version {version}: {error.text}") from error
    if not isinstance(answer, dict) or not answer.get("success"):
        said = answer.get("message", answer) if isinstance(answer, dict) else answer
        raise WeightUpdateError(f"{server.url} did not take version {version}: {said}")
    return WeightsAck(int(answer.get("version", version)), str(answer.get("hash", "")))


def not_taken(server: Server, version: int, error: WireError) -> WeightUpdateError:
    return WeightUpdateError(f"{server.url} is alive but did not take version {version}: {error}")
