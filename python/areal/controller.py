"""The loop of asynchronous reinforcement learning: one asyncio process that starts, feeds and watches all others.

    dataset -> runner -> workflow -> reward -> buffer -> cut -> packer -> trainer ranks -> shared memory -> rollout servers

| who                | waits for                          | is woken by                            | gives up after          |
|--------------------|------------------------------------|----------------------------------------|-------------------------|
| runner             | capacity (staleness, concurrency)  | a finished group, acknowledged weights | never: idle by design   |
| an episode         | tokens of the rollout servers      | the server's answer                    | rollout.request_timeout |
|                    | its score                          | a reward worker                        | reward.timeout          |
| a group            | all its episodes                   | the last one                           | rollout.episode_timeout |
| trainer (``cut``)  | a batch that keeps the age bound   | a finished or rejected group           | rollout.batch_timeout   |
| controller         | a train step, a publish            | the ranks' answers                     | actor.step_timeout      |
| ``_sync_weights``  | published weights                  | the end of a train step                | never: idle by design   |
|                    | the servers' acknowledgement       | their answers                          | rollout.request_timeout |
| ``_watch_servers`` | the death of a server              | polling                                | never                   |

Generation never waits for training: it is bounded only by ``capacity``. Training never waits for the weight update: it publishes
into shared memory and goes on with the next batch. Any task that dies ends the run with its reason.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine
from contextlib import AsyncExitStack
from types import TracebackType
from typing import Any, Self

from areal.algo.advantage import compute_advantages
from areal.buffer import TrajectoryBuffer
from areal.config import GRPOConfig
from areal.data import PromptDataset, load_dataset
from areal.display import Display
from areal.evaluation import Evaluation, evaluate
from areal.inference.client import RolloutClient
from areal.inference.servers import RolloutServer, n_servers, start_server
from areal.metrics import EngineMeter, RunTotals, batch_row
from areal.packer import make_train_batch
from areal.run_folder import create_run_folder, load_tokenizer, prepare_model
from areal.runner import DropCounter, Runner
from areal.staleness import StalenessManager
from areal.stats import StatsLogger
from areal.trainer.worker import TrainerHandle
from areal.trajectory_log import TrajectoryLog
from areal.types import Group, TrainBatch


class RunFailed(RuntimeError):
    """Something that ends the run; the message is one sentence with the last log lines of who died."""


class PPOTrainer:
    """A training run: ``with PPOTrainer(config) as trainer: trainer.train()``.

    Entering starts the processes, leaving ends them, also after an error. ``train_dataset`` and ``valid_dataset`` replace those of
    the config; ``workflow`` is a ``RolloutWorkflow`` object, class or import path (default: ``RLVRWorkflow`` on the config's reward).
    """

    def __init__(self, config: GRPOConfig, train_dataset: Any = None, valid_dataset: Any = None) -> None:
        self.config = config
        self._given_datasets = (train_dataset, valid_dataset)
        self._asyncio = asyncio.Runner()
        self._resources = AsyncExitStack()
        self.totals = RunTotals()
        self.drops = DropCounter()
        self._meter = EngineMeter()
        self._published = asyncio.Event()
        self.version = 0

    # -- life ------------------------------------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        self._asyncio.__enter__()
        try:
            self._asyncio.run(self._open())
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            self._asyncio.run(self._resources.aclose())
        finally:
            self._asyncio.close()

    def train(self, workflow: Any = None, workflow_kwargs: dict[str, Any] | None = None) -> RunTotals:
        """Runs warm-up, evaluation, reinforcement learning, evaluation; returns what ``summary.json`` holds."""
        try:
            return self._asyncio.run(self._train(workflow, workflow_kwargs or {}))
        except BaseExceptionGroup as group:
            raise _first_error(group) from group

    async def _open(self) -> None:
        config = self.config
        self._started = time.monotonic()
        self.run_folder = create_run_folder(config)
        model_folder = prepare_model(config, self.run_folder)
        self.tokenizer = load_tokenizer(model_folder)
        self.train_dataset, self.valid_dataset = self._given_datasets
        if self.train_dataset is None:
            self.train_dataset = load_dataset(config.train_dataset, seed=config.seed, split="train")
        if self.valid_dataset is None:
            self.valid_dataset = load_validation(config)
        self.display = self._resources.enter_context(Display(config, self.run_folder))
        self.stats = self._resources.enter_context(StatsLogger(self.run_folder, config))
        self._model_folder = model_folder
        await self._start_processes()

    async def _start_processes(self) -> None:
        config = self.config
        self.client = RolloutClient(config.rollout)
        self._resources.push_async_callback(self.client.close)
        self.rewards = await self._resources.enter_async_context(
            RewardService(config.reward.workers, config.reward.timeout, self.run_folder / "logs")
        )
        self.servers: list[RolloutServer] = []
        self._resources.callback(self._kill_servers)
        async with asyncio.TaskGroup() as starting:
            trainer = starting.create_task(TrainerHandle.start(config, self._model_folder, self.run_folder))
            for index in range(n_servers(config.rollout.backend)):
                starting.create_task(self._add_server(index))
        self.trainer = trainer.result()
        self._resources.push_async_callback(self.trainer.close)

    def _kill_servers(self) -> None:
        for server in self.servers:
            server.process.terminate()

    async def _add_server(self, index: int, restarts: int = 0) -> None:
        """Starts a server and hands it to the client once it has the current weights."""
        server = await start_server(self.config, self._model_folder, self.run_folder, index, restarts)
        self.servers.append(server)
        if self._weights is not None:
            await self.client.update_server(server.url, self.trainer.shm_name, self._weights.version)
        self.client.add_server(server.url, server.process)

    # -- the run ---------------------------------------------------------------------------------------------------------------

    async def _train(self, workflow: Any, workflow_kwargs: dict[str, Any]) -> RunTotals:
        config, totals = self.config, self.totals
        self.workflow = build_workflow(config, workflow, workflow_kwargs, self.tokenizer)
        async with asyncio.TaskGroup() as tasks:
            watchers = [tasks.create_task(self._watch_servers()), tasks.create_task(self._sync_weights())]
            if config.warmup is not None:
                begin = time.monotonic()
                await self._warm_up(config.warmup)
                totals.seconds_warmup = time.monotonic() - begin
            await self._publish(0)
            before = await self._evaluate("before")
            begin = time.monotonic()
            await self._learn(tasks)
            totals.seconds_rl = time.monotonic() - begin
            after = await self._evaluate("after")
            await self.trainer.save(self.run_folder / "checkpoints" / "final")
            for watcher in watchers:
                watcher.cancel()
        self._finish(before, after)
        return totals

    async def _learn(self, tasks: asyncio.TaskGroup) -> None:
        """Reinforcement learning: generation runs in its own task, this one consumes what it makes."""
        config, rollout = self.config, self.config.rollout
        staleness = StalenessManager(
            rollout.consumer_batch_size, rollout.max_head_offpolicyness, rollout.max_concurrent_rollouts, config.total_train_steps
        )
        self.buffer = TrajectoryBuffer(
            rollout.consumer_batch_size, rollout.max_head_offpolicyness, mask_over_age=rollout.over_age_tokens == "mask"
        )
        self.runner = Runner(config, self.client, self.workflow, self.train_dataset, staleness, self.buffer, self.drops)
        generating = tasks.create_task(self.runner.run())
        with TrajectoryLog.maybe(self.run_folder, self.tokenizer, enabled=config.stats_logger.dump_trajectories) as log:
            for step in range(config.total_train_steps):
                begin = time.time()
                groups = await self.buffer.cut(self.version, rollout.batch_timeout)
                waited = time.time()
                log.write(groups, step)
                batch = await asyncio.to_thread(self._pack, groups)
                train_stats = await self.trainer.train_step(batch)
                await self._publish(self.version + 1)
                await self._report_step(groups, train_stats, begin, waited)
                self._start_side_work(tasks, step + 1)
        generating.cancel()

    def _pack(self, groups: list[Group]) -> TrainBatch:
        actor = self.config.actor
        return make_train_batch(
            groups,
            compute_advantages(groups, actor),
            n_minibatches=actor.ppo_n_minibatches,
            max_tokens_per_mb=actor.mb_spec.max_tokens_per_mb,
            world_size=self.trainer.world_size,
        )

    # -- weights ---------------------------------------------------------------------------------------------------------------

    async def _publish(self, version: int) -> None:
        """Into shared memory; does not wait for any reader."""
        _, digest = await self.trainer.publish(version)
        self.version = version
        self._weights = Weights(version, digest)
        self._published.set()

    async def _sync_weights(self) -> None:
        """Brings the newest published weights to every server; those published meanwhile are skipped over."""
        while True:
            await self._published.wait()
            self._published.clear()
            begin = time.time()
            assert self._weights is not None
            await self.client.update_weights_from_shm(self.trainer.shm_name, self._weights.version)
            self._check_hashes(acks)
            self.stats.span("controller", "weight_sync", begin, time.time())

    async def _watch_servers(self) -> None:
        """Replaces dead rollout servers, up to ``rollout.max_restarts`` times each."""
        while True:
            await asyncio.sleep(0.1)
            for server in [s for s in self.servers if s.process.poll() is not None]:
                self.servers.remove(server)
                self.client.remove_server(server.url)
                if server.restarts >= self.config.rollout.max_restarts:
                    raise RunFailed(f"a rollout server died, after {server.restarts} replacements: {server.process.describe_death()}")
                self.display.note(f"{server.name} died and is being replaced: {server.process.describe_death(3)}")
                await self._add_server(server.index, server.restarts + 1)
