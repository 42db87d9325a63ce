"""Whether slow scorers cost generation anything: the same rollouts with scores that come at once, and with scores that take a second.

A real embedded server, the real runner and buffer; no trainer: batches are taken as soon as they are there, and the staleness bound is out of
the way (the table says for how many groups it must have room). ``max_concurrent_rollouts`` groups of one sample generate, on as many slots.
The repeats of the variants take turns, each has a server of its own while it runs:

    instant            an async scorer that returns at once
    async              one that sleeps on the event loop
    async, counted     the same with groups that wait for scores counted as if they were generating: what is to be avoided
    worker processes   a plain function that sleeps, in ``--workers`` processes
    http service       the sleeping async scorer in ``areal reward-server``

What counts is generated tokens a second, by the server's own counter.

    python -m benchmarks reward_latency -- [--repeats 5] [--seconds 10] [--latency 1] [--in-flight 64] [--tokens 512]
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

from areal.buffer import TrajectoryBuffer
from areal.config import GRPOConfig
from areal.inference.client import RolloutClient
from areal.inference.servers import start_server
from areal.reward import RewardService
from areal.reward.http import HTTPReward
from areal.runner import Runner
from areal.staleness import StalenessManager
from areal.workflow.rlvr import RLVRWorkflow
from benchmarks.measure import report
from tests.rewards import at_once, sleeps, sleeps_async
from tests.rollout_servers import make_model

INSTANT, ASYNC, COUNTED, WORKERS, HTTP = VARIANTS = ("instant", "async", "async, counted", "worker processes", "http service")
BATCH, ETA = 16, 10**6
ROOT = Path(__file__).resolve().parents[1]


def rows(latency: float) -> Iterator[dict[str, Any]]:
    for i in itertools.count():
        yield {"prompt": f"a{i % 10}b=", "prompt_id": f"row {i}", "epoch": 0, "seconds": latency}


class Rollouts:
    """Everything of a run that generates, and a consumer in the trainer's place."""

    def __init__(self, config: GRPOConfig, client: RolloutClient, reward_fn: Callable[..., Any], tokenizer: Any, latency: float) -> None:
        self.staleness = StalenessManager(BATCH, ETA, config.rollout.max_concurrent_rollouts)
        self.buffer = TrajectoryBuffer(BATCH, ETA)
        workflow = RLVRWorkflow(reward_fn, config.gconfig, tokenizer)
        self.runner = Runner(config, client, workflow, rows(latency), self.staleness, self.buffer)

    async def run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self.runner.run())
            while True:
                await self.buffer.cut(0, 120.0)


def config_of(arguments: argparse.Namespace, model: Path) -> GRPOConfig:
    return GRPOConfig.model_validate(
        {
            "actor": {"path": str(model), "device": "cpu"},
            "train_dataset": {"type": "arithmetic"},
            "gconfig": {"n_samples": 1, "max_new_tokens": arguments.tokens, "ignore_eos": True},
            "rollout": {
                "backend": "embedded:d1", "device": "cpu", "max_running_requests": arguments.in_flight,
                "max_concurrent_rollouts": arguments.in_flight, "max_context": arguments.tokens + 64,
            },
        }
    )  # fmt: skip


async def measure(
    name: str, arguments: argparse.Namespace, model: Path, tokenizer: Any, folder: Path, service_url: str
) -> dict[str, float]:
    config = config_of(arguments, model)
    functions = {INSTANT: at_once, ASYNC: sleeps_async, COUNTED: sleeps_async, WORKERS: sleeps, HTTP: HTTPReward(service_url, 60, 1024)}
    async with AsyncExitStack() as resources:
        rewards = await resources.enter_async_context(RewardService(arguments.workers, 60, folder / "logs", 1024))
        if name == WORKERS:
            rewards.start()
            while rewards.n_ready < arguments.workers:
                await asyncio.sleep(0.1)
        server = await start_server(config, model, folder, 0)
        resources.callback(server.terminate)
        client = RolloutClient(config.rollout, [server.url], [server.process])
        resources.push_async_callback(client.close)
        rollouts = Rollouts(config, client, functions[name], tokenizer, arguments.latency)
        rollouts.runner.slots.scores_come_last = name != COUNTED
        running = asyncio.create_task(rollouts.run())
        await asyncio.wait([running], timeout=arguments.settle)
        marks, waiting = [await _read(client, server.url)], []
        rewards.counters.read()
        while marks[-1][0] < marks[0][0] + arguments.seconds:
            await asyncio.wait([running], timeout=0.25)
            waiting.append(rollouts.staleness.n_waiting)
            marks.append(await _read(client, server.url))
        begin, end, row = marks[0], marks[-1], rewards.counters.read()
        if running.done():
            running.result()
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
    if row["reward_failures"]:
        raise RuntimeError(f"{name}: scores failed: {row['reward_failures']}")
    tokens, busy = ((end[i] - begin[i]) / (end[0] - begin[0]) for i in (1, 2))
    return {
        "tokens/s": tokens,
        "server busy": busy,
        "slots in use": statistics.mean(mark[3] for mark in marks[1:]),
        "groups waiting": statistics.mean(waiting),
        "s a score": row["reward_seconds_mean"],
    }


async def _read(client: RolloutClient, url: str) -> tuple[float, int, float, int]:
    stats = (await client.engine_stats())[url]
    return time.perf_counter(), stats["tokens_generated"], stats["busy_seconds"], stats["running"]


def start_service() -> tuple[subprocess.Popen[str], str]:
    command = [sys.executable, "-m", "areal", "reward-server", "tests.rewards:sleeps_async", "--port", "0", "--timeout", "60"]
    service = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert service.stdout is not None
    return service, service.stdout.readline().strip() + "/score"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks reward_latency", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=10.0, help="of one measurement")
    parser.add_argument("--settle", type=float, default=5.0, metavar="SECONDS", help="before it")
    parser.add_argument("--latency", type=float, default=1.0, metavar="SECONDS", help="of a score")
    parser.add_argument("--in-flight", type=int, default=64, help="groups that generate, and slots of the server")
    parser.add_argument("--tokens", type=int, default=512, help="of an answer")
    parser.add_argument("--workers", type=int, default=64, help="processes of the variant that has them")
    parser.add_argument("--variants", default=";".join(VARIANTS), help="separated by semicolons; the first one is the yardstick")
    arguments = parser.parse_args(argv)
    results: dict[str, list[dict[str, float]]] = {}
    service, url = start_service()
    try:
        with tempfile.TemporaryDirectory(prefix="areal-bench-") as name:
            tokenizer = make_model(
                Path(name) / "model", hidden_size=96, intermediate_size=288, num_attention_heads=4, num_key_value_heads=2
            )
            for repeat, variant in itertools.product(range(arguments.repeats), arguments.variants.split(";")):
                folder = Path(name) / f"{variant}-{repeat}"
                row = asyncio.run(measure(variant, arguments, Path(name) / "model", tokenizer, folder, url))
                results.setdefault(variant, []).append(row)
                print(f"{variant:17} run {repeat}: {row['tokens/s']:8.0f} tokens/s", file=sys.stderr, flush=True)
    finally:
        service.terminate()
        service.wait(20)
    report("reward_latency", table(results), **{k: v for k, v in vars(arguments).items() if k != "variants"})


def table(results: dict[str, list[dict[str, float]]]) -> list[dict[str, Any]]:
    """Medians; the share of the first variant's tokens is taken repeat by repeat, so that a slow spell of the machine hits both."""
    first = next(iter(results.values()))
    lines = []
    for variant, runs in results.items():
        shares = [run["tokens/s"] / yardstick["tokens/s"] for run, yardstick in zip(runs, first, strict=True)]
        medians = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        lines.append({"scorer": variant, **medians, "of instant": statistics.median(shares), "least": min(shares), "most": max(shares)})
    return lines


if __name__ == "__main__":
    main()
