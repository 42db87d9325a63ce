"""Starting the rollout servers of a run, and knowing when one is ready or dead."""

from __future__ import annotations

import asyncio
import socket
import time
from dataclasses import dataclass
from pathlib import Path

import aiohttp

from areal.config import GRPOConfig
from areal.launcher.local import ChildProcess


class ServerStartError(RuntimeError):
    """A rollout server that died or did not answer while starting."""


@dataclass(slots=True)
class RolloutServer:
    """One server process; ``restarts`` counts how often this place was refilled."""

    index: int
    url: str
    process: ChildProcess
    restarts: int = 0

    @property
    def name(self) -> str:
        return f"rollout {self.index}"


def rollout_device(config: GRPOConfig, index: int) -> str:
    """The device of server ``index``: GPUs behind those of the trainer where there are enough, shared ones otherwise."""
    import torch

    if config.rollout.device not in ("auto", "cuda"):
        first = config.rollout.device
        return first if first == "cpu" else f"cuda:{int(first.partition(':')[2] or 0) + index}"
    n_gpus = torch.cuda.device_count()
    if n_gpus == 0:
        return "cpu"
    n_ranks = int(config.actor.backend.partition(":d")[2] or 1) if config.actor.device != "cpu" else 0
    return f"cuda:{(n_ranks + index) % n_gpus}"


async def start_server(config: GRPOConfig, model_dir: Path, run_dir: Path, index: int, restarts: int = 0) -> RolloutServer:
    """Starts server ``index`` and waits until it answers; raises ``ServerStartError`` with its last log lines."""
    rollout = config.rollout
    # Bound here and handed on: a port that was merely free a moment ago may be another run's server by the time this one is asked.
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        port = bound.getsockname()[1]
        process = _start_process(config, model_dir, run_dir, index, bound)
    server = RolloutServer(index, f"http://127.0.0.1:{port}", process, restarts)
    try:
        await _wait_ready(server, rollout.startup_timeout)
    except BaseException:  # also when cancelled: a process that nobody waits for any more must not stay
        process.kill()
        raise
    return server


def _start_process(config: GRPOConfig, model_dir: Path, run_dir: Path, index: int, bound: socket.socket) -> ChildProcess:
    rollout = config.rollout
    arguments = {
        "model": model_dir,
        "host": "127.0.0.1",
        "port": bound.getsockname()[1],
        "fd": bound.fileno(),
        "device": rollout_device(config, index),
        "dtype": config.actor.dtype,
        "max-running-requests": rollout.max_running_requests,
        "max-context": rollout.max_context,
        "threads": rollout.threads,
        "update-mode": "in_place" if config.update_mode == "in_place" else "retract",
    }
    argv = ["-m", "areal.inference.embedded.server"]
    for key, value in arguments.items():
        argv += [f"--{key}", str(value)]
    if config.deterministic:
        argv.append("--deterministic")
    env = {"OMP_NUM_THREADS": str(rollout.threads), "HF_HUB_OFFLINE": "1"}
    return ChildProcess(f"rollout {index}", argv, run_dir / "logs" / f"rollout_{index}.log", env, pass_fds=(bound.fileno(),))


async def _wait_ready(server: RolloutServer, timeout: float) -> None:
    deadline = time.monotonic() + timeout
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=5)) as session:
        while True:
            if server.process.poll() is not None:
                raise ServerStartError(f"a rollout server died while starting: {server.process.describe_death()}")
            try:
                async with session.get(f"{server.url}/health") as response:
                    if response.status == 200:
                        return
            except (aiohttp.ClientError, TimeoutError):
                pass  # not listening yet
            if time.monotonic() > deadline:
                raise ServerStartError(
                    f"{server.name} was not ready after {timeout:.0f} s (rollout.startup_timeout); its log ends:\n{server.process.last_log_lines()}"
                )
            await asyncio.sleep(0.05)
