"""Starting the rollout servers of a run, or reaching those that run already, and knowing when one is ready or dead."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import aiohttp

from areal.config import GRPOConfig
from areal.inference.placement import rollout_device, shares_gpu
from areal.inference.sglang import refusal, sglang_argv, sglang_env, sglang_python
from areal.launcher.local import ChildProcess

_ARGPARSE_EXIT = 2
_HEALTH_TIMEOUT = 25.0
"""Seconds for one answer. A server that somebody started without our settings generates a token for /health, and gives up after 20."""


class ServerStartError(RuntimeError):
    """A rollout server that died or did not answer while starting."""


@dataclass(slots=True)
class RolloutServer:
    """One server; ``restarts`` counts how often this place was refilled."""

    index: int
    url: str
    process: ChildProcess | None
    """None for a server of ``rollout.urls``: somebody else starts and ends it."""
    restarts: int = 0
    n_ranks: int = 1
    """Tensor-parallel ranks."""

    @property
    def name(self) -> str:
        return f"rollout {self.index}" if self.process is not None else f"rollout {self.index} ({self.url})"

    def has_died(self) -> bool:
        """Whether its process is seen to be over; that of another machine is not seen."""
        return self.process is not None and self.process.poll() is not None

    def describe_death(self) -> str:
        return self.process.describe_death() if self.process is not None else f"{self.name} does not answer"

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()

    def terminate(self) -> None:
        if self.process is not None:
            self.process.terminate()


def end_servers(servers: Sequence[RolloutServer]) -> None:
    """Ends all that were started here, together: one of SGLang's takes a second or two."""
    with ThreadPoolExecutor(max(1, len(servers))) as pool:
        list(pool.map(RolloutServer.terminate, servers))


async def start_server(config: GRPOConfig, model_dir: Path, run_dir: Path, index: int, restarts: int = 0) -> RolloutServer:
    """Starts server ``index`` and waits until it answers; one of ``rollout.urls`` is only waited for.

    Raises:
        ServerStartError: it died or did not answer in time; with its last log lines.
    """
    timeout, n_ranks = config.rollout.startup_timeout, config.layout.n_ranks
    if config.rollout.urls:
        server = RolloutServer(index, config.rollout.urls[index].rstrip("/"), None, restarts, n_ranks)
        await _wait_ready(server, timeout)
        return server
    # In a thread: it may ask another interpreter. The process itself is not started there, since it would die with that thread.
    python = await asyncio.to_thread(sglang_python, config.sglang.python) if config.layout.engine == "sglang" else ""
    log = run_dir / "logs" / f"rollout_{index}.log"
    # Ports are held until the server answers: one that was merely free a moment ago may be another run's server by then.
    with _hold_port() as port, _hold_port() as dist_port:
        if python:
            process = _start_sglang(config, model_dir, log, index, port, dist_port, python)
        else:
            process = _start_embedded(config, model_dir, log, index, port)
        server = RolloutServer(index, f"http://127.0.0.1:{port.getsockname()[1]}", process, restarts, n_ranks)
        try:
            await _wait_ready(server, timeout)
        except BaseException:  # also when cancelled: a process that nobody waits for any more must not stay
            process.kill()
            raise
    return server


def _hold_port() -> socket.socket:
    """A port of the loopback interface that nobody gets by chance; whoever is told its number can still listen on it."""
    held = socket.socket()
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # two such sockets may share a port while only one listens
    held.bind(("127.0.0.1", 0))
    return held


def _start_sglang(
    config: GRPOConfig, model_dir: Path, log: Path, index: int, port: socket.socket, dist_port: socket.socket, python: str
) -> ChildProcess:
    rollout, device = config.rollout, rollout_device(config, index)
    argv = sglang_argv(
        model_dir,
        port.getsockname()[1],
        device=device,
        dtype=config.actor.dtype,
        n_ranks=config.layout.n_ranks,
        dist_port=dist_port.getsockname()[1],
        max_running_requests=rollout.max_running_requests,
        max_context=rollout.max_context,
        keep_prefixes=config.update_mode != "retract",
        shared_gpu=shares_gpu(config, index),
        options=config.sglang.options,
    )
    return ChildProcess(f"rollout {index}", argv, log, sglang_env(device, rollout.threads, python, config.layout.n_ranks), python=python)


def _start_embedded(config: GRPOConfig, model_dir: Path, log: Path, index: int, port: socket.socket) -> ChildProcess:
    rollout = config.rollout
    arguments = {
        "model": model_dir,
        "host": "127.0.0.1",
        "port": port.getsockname()[1],
        "fd": port.fileno(),
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
    return ChildProcess(f"rollout {index}", argv, log, env, pass_fds=(port.fileno(),))


async def _wait_ready(server: RolloutServer, timeout: float) -> None:
    deadline = time.monotonic() + timeout
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=_HEALTH_TIMEOUT)) as session:
        while True:
            if server.process is not None and server.has_died():
                raise ServerStartError(_why_it_died(server.name, server.process))
            if await _is_ready(session, server):
                await _freeze_gc(session, server)
                return
            if time.monotonic() > deadline:
                raise ServerStartError(_why_not_ready(server, timeout))
            await asyncio.sleep(0.05 if server.process is not None else 0.5)


async def _is_ready(session: aiohttp.ClientSession, server: RolloutServer) -> bool:
    try:
        if server.process is None:
            # A run that was killed may have left it paused, and then SGLang's /health waits for a token that never comes.
            async with session.post(f"{server.url}/continue_generation", json={}) as response:
                await response.read()
        async with session.get(f"{server.url}/health") as response:
            return response.status == 200
    except (aiohttp.ClientError, OSError, TimeoutError):
        return False  # not listening yet, or busy starting


async def _freeze_gc(session: aiohttp.ClientSession, server: RolloutServer) -> None:
    """What SGLang has loaded by now is never garbage; on the CPU every flush of its cache would look through all of it (0.4 s)."""
    try:
        async with session.post(f"{server.url}/freeze_gc", json={}) as response:
            await response.read()
    except (aiohttp.ClientError, OSError, TimeoutError):
        pass  # slower, but right; and the embedded engine has nothing to freeze


def _why_not_ready(server: RolloutServer, timeout: float) -> str:
    if server.process is None:
        return (
            f"{server.name} did not answer within {timeout:.0f} s (rollout.startup_timeout); start it there with `areal serve`, "
            "reachable under the address in rollout.urls"
        )
    return f"{server.name} was not ready after {timeout:.0f} s (rollout.startup_timeout); its log ends:\n{server.process.last_log_lines()}"


def _why_it_died(name: str, process: ChildProcess) -> str:
    """An option that SGLang refused, in its own words; else the end of the log."""
    said = refusal(process.last_log_lines(5)) if process.poll() == _ARGPARSE_EXIT else None
    if said is not None:
        return f"{name} did not start, since SGLang refuses an option: {said}; correct sglang.options ({process.log_path})"
    return f"a rollout server died while starting: {process.describe_death()}"
