"""Whether slow scorers cost generation anything: the same rollouts with scores that come at once, and with scores that take a second.

A real embedded server, the real runner and buffer; no trainer: batches are taken as soon as they are there, and the staleness bound is out of
the way (the table says for how many groups it must have room). ``max_concurrent_rollouts`` groups of one sample generate, on as many slots.
It runs all the time; every few seconds the scorer of new groups changes, and once those of the one before are through, tokens are counted:

    instant            an async scorer that returns at once
    async              one that sleeps on the event loop
    async, counted     the same with groups that wait for scores counted as if they generated: what is to be avoided
    worker processes   a plain function that sleeps, in ``--workers`` processes
    http service       the sleeping async scorer in ``areal reward-server``

What counts is generated tokens a second by the server's own counter, against those of ``instant`` in the same round.

    python -m benchmarks reward_latency -- [--rounds 15] [--seconds 3] [--latency 1] [--in-flight 64] [--tokens 384]
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import random
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
from areal.config import GenerationConfig, GRPOConfig
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


class Scored:
    """``RLVRWorkflow`` with the scorer that a row names, and answers of half to one and a half times the length: of one length they would
    all end in the same moment."""

    def __init__(self, scorers: dict[str, Callable[..., Any]], gconfig: GenerationConfig, tokenizer: Any) -> None:
        lengths = [gconfig.max_new_tokens * (8 + step) // 16 for step in range(17)]
        self._workflows = {
            name: [RLVRWorkflow(scorer, gconfig.new(max_new_tokens=length), tokenizer) for length in lengths]
            for name, scorer in scorers.items()
        }

    async def arun_episode(self, engine: Any, data: dict[str, Any]) -> dict[str, Any]:
        return await self._workflows[data["scorer"]][data["length"]].arun_episode(engine, data)


class Rollouts:
    """Everything of a run that generates, and a consumer in the trainer's place. ``scorer`` is that of the groups to come."""

    def __init__(self, config: GRPOConfig, client: RolloutClient, workflow: Scored, latency: float) -> None:
        self.scorer = INSTANT
        self.latency = latency
        self.staleness = StalenessManager(BATCH, ETA, config.rollout.max_concurrent_rollouts)
        self.buffer = TrajectoryBuffer(BATCH, ETA)
        self.runner = Runner(config, client, workflow, self.rows(), self.staleness, self.buffer)

    def rows(self) -> Iterator[dict[str, Any]]:
        lengths = random.Random(0)
        for i in itertools.count():
            row = {"prompt": f"a{i % 10}b=", "prompt_id": f"row {i}", "epoch": 0, "length": lengths.randrange(17)}
            yield {**row, "scorer": self.scorer, "seconds": self.latency}

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
                "max_concurrent_rollouts": arguments.in_flight, "max_context": 2 * arguments.tokens,
            },
        }
    )  # fmt: skip


async def measure(
    arguments: argparse.Namespace, model: Path, tokenizer: Any, folder: Path, service: str
) -> dict[str, list[dict[str, float]]]:
    """What each variant did in each round."""
    config = config_of(arguments, model)
    scorers = {INSTANT: at_once, ASYNC: sleeps_async, COUNTED: sleeps_async, WORKERS: sleeps, HTTP: HTTPReward(service, 60, 1024)}
    results: dict[str, list[dict[str, float]]] = {name: [] for name in VARIANTS}
    async with AsyncExitStack() as resources:
        rewards = await resources.enter_async_context(RewardService(arguments.workers, 60, folder / "logs", 1024))
        rewards.start()
        while rewards.n_ready < arguments.workers:
            await asyncio.sleep(0.1)
        server = await start_server(config, model, folder, 0)
        resources.callback(server.terminate)
        client = RolloutClient(config.rollout, [server.url], [server.process])
        resources.push_async_callback(client.close)
        rollouts = Rollouts(config, client, Scored(scorers, config.gconfig, tokenizer), arguments.latency)
        running = asyncio.create_task(rollouts.run())
        for number in range(-1, arguments.rounds):  # the first round warms up
            for place in range(len(VARIANTS)):
                name = VARIANTS[(number + place) % len(VARIANTS)]
                row = await _slice(name, arguments, rollouts, client, server.url, rewards, running)
                if number >= 0:
                    results[name].append(row)
                    print(f"{name:17} round {number}: {row['tokens/s']:8.0f} tokens/s", file=sys.stderr, flush=True)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
    return results


async def _slice(
    name: str,
    arguments: argparse.Namespace,
    rollouts: Rollouts,
    client: RolloutClient,
    url: str,
    rewards: RewardService,
    running: asyncio.Task[None],
) -> dict[str, float]:
    rollouts.scorer = name
    rollouts.runner.slots.scores_come_last = name != COUNTED
    await asyncio.wait([running], timeout=arguments.settle)
    marks, waiting = [await _read(client, url)], []
    rewards.counters.read()
    while marks[-1][0] < marks[0][0] + arguments.seconds:
        await asyncio.wait([running], timeout=0.25)
        waiting.append(rollouts.staleness.n_waiting)
        marks.append(await _read(client, url))
    if running.done():
        running.result()
    begin, end, row = marks[0], marks[-1], rewards.counters.read()
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
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=3.0, help="of one measurement")
    parser.add_argument("--settle", type=float, default=3.0, metavar="SECONDS", help="before it, for the groups of the scorer before")
    parser.add_argument("--latency", type=float, default=1.0, metavar="SECONDS", help="of a score")
    parser.add_argument("--in-flight", type=int, default=64, help="groups that generate, and slots of the server")
    parser.add_argument("--tokens", type=int, default=384, help="of an answer, on average")
    parser.add_argument("--workers", type=int, default=96, help="processes of the variant that has them")
    arguments = parser.parse_args(argv)
    service, url = start_service()
    try:
        with tempfile.TemporaryDirectory(prefix="areal-bench-") as name:
            model = Path(name) / "model"
            tokenizer = make_model(model, hidden_size=96, intermediate_size=288, num_attention_heads=4, num_key_value_heads=2)
            results = asyncio.run(measure(arguments, model, tokenizer, Path(name), url))
    finally:
        service.terminate()
        service.wait(20)
    report("reward_latency", table(results), **vars(arguments))


def table(results: dict[str, list[dict[str, float]]]) -> list[dict[str, Any]]:
    """Medians; the share of ``instant`` is taken round by round, so that a slow spell of the machine hits both."""
    lines = []
    for variant, rounds in results.items():
        shares = [row["tokens/s"] / yardstick["tokens/s"] for row, yardstick in zip(rounds, results[INSTANT], strict=True)]
        low, middle, high = statistics.quantiles(shares, n=4) if len(shares) > 1 else shares * 3
        medians = {key: statistics.median(row[key] for row in rounds) for key in rounds[0]}
        lines.append({"scorer": variant, **medians, "of instant": middle, "quartiles": f"{low:.3f} {high:.3f}"})
    return lines


if __name__ == "__main__":
    main()
