"""The loop of asynchronous reinforcement learning: one asyncio process that starts, feeds and watches all others.

    dataset -> runner -> workflow -> reward -> buffer -> cut -> packer -> trainer ranks -> weight_sync -> rollout servers

| who                | waits for                          | is woken by                            | gives up after          |
|--------------------|------------------------------------|----------------------------------------|-------------------------|
| runner             | capacity (staleness, concurrency)  | a finished group, acknowledged weights | never: idle by design   |
| an episode         | tokens of the rollout servers      | the server's answer                    | rollout.request_timeout |
|                    | its score                          | a reward worker                        | reward.timeout          |
| a group            | all its episodes                   | the last one                           | rollout.episode_timeout |
| an evaluation      | a free place among its episodes    | the end of one                         | rollout.episode_timeout |
| the one at the end | a periodic one still running       | its end: it gets all places            | its episodes' deadlines |
| trainer (``cut``)  | a batch that keeps the age bound   | a finished or rejected group           | rollout.batch_timeout   |
| controller         | a train step, a publish            | the ranks' answers                     | actor.step_timeout      |
| ``weights.run``    | published weights (shm, disk)      | the end of a train step                | never: idle by design   |
| a weight update    | servers to be still                | their partial answers                  | weight_sync.timeout     |
|                    | servers to take the weights        | their answers                          | weight_sync.timeout     |
| ``_watch_servers`` | the death of a server              | polling                                | never                   |

Generation never waits for training: it is bounded only by ``capacity``. With shared memory or a folder of weights, training does not
wait for the weight update either: it publishes and goes on with the next batch. Where weights are streamed (broadcast, tensor) it sends
them itself, between two steps. Any task that dies ends the run with its reason.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from areal.algo.advantage import without_truncated
from areal.buffer import TrajectoryBuffer
from areal.cluster import Cluster, first_error
from areal.config import GRPOConfig
from areal.config_check import check_config, check_machine
from areal.drift import DriftProbe
from areal.evaluation import Evaluation
from areal.group_filter import build_filter
from areal.metrics import RunTotals, StepClock, batch_row, meter_row, train_row
from areal.recover import find_resumable
from areal.recover_files import what_is_done
from areal.recover_train import TrainRecovery, TrainState
from areal.runner import Runner
from areal.sft import warm_up
from areal.staleness import StalenessManager
from areal.train_batch import prepare_batch
from areal.trajectory_log import TrajectoryLog
from areal.types import Group
from areal.workflow.build import build_workflow, for_held_out, reward_function


class TrainerMisused(RuntimeError):
    """A call out of order; the sentence says which one is missing."""


class PPOTrainer:
    """A training run: ``with PPOTrainer(config) as trainer: trainer.train()``.

    Entering starts the processes, leaving ends them, also after an error. ``train_dataset`` and ``valid_dataset`` (sequences or
    iterators of rows) replace those of the config.
    """

    def __init__(self, config: GRPOConfig, train_dataset: Any = None, valid_dataset: Any = None) -> None:
        self.config = config
        self.totals = RunTotals()
        self._cluster = Cluster(config, train_dataset, valid_dataset, find_resumed=self._find_resumed)
        self._resumed: TrainState | None = None
        self._given = [k for k, rows in (("train_dataset", train_dataset), ("valid_dataset", valid_dataset)) if rows is not None]
        self._asyncio = asyncio.Runner()
        self._started = 0.0
        self._state = "new"

    def __enter__(self) -> PPOTrainer:
        self._started = time.monotonic()
        check_config(self.config)
        check_machine(self.config, self._given)
        self._asyncio.__enter__()
        try:
            self._in_loop(self._cluster.open())
        except BaseException:  # also Ctrl-C while starting: what was started must end
            self.__exit__()
            raise
        self._state = "entered"
        return self

    def __exit__(self, *_: object) -> None:
        self._state = "closed"
        try:
            self._in_loop(self._cluster.close())
        finally:
            self._asyncio.close()

    @property
    def tokenizer(self) -> Any:
        """Of the model in training; there once the trainer was entered."""
        return self._cluster.tokenizer

    @property
    def run_folder(self) -> Path:
        return self._cluster.run_folder

    def train(
        self,
        workflow: Any = None,
        workflow_kwargs: dict[str, Any] | None = None,
        eval_workflow: Any = None,
        eval_workflow_kwargs: dict[str, Any] | None = None,
        dynamic_filter_fn: Callable[[Group], bool] | str | None = None,
    ) -> RunTotals:
        """Warm-up, evaluation, reinforcement learning, evaluation; returns what ``summary.json`` holds.

        Args:
            workflow: a ``RolloutWorkflow`` object, its class or its import path; None = ``RLVRWorkflow`` with the config's reward.
            workflow_kwargs: of the class.
            eval_workflow, eval_workflow_kwargs: the same for held-out prompts; None = that of training, its ``gconfig`` argument
                replaced by ``evaluator.gconfig``.
            dynamic_filter_fn: true for a finished group that is to be trained on; a function, its import path or "mixed". None = that of
                ``rollout.dynamic_filter``.
        """
        if self._state != "entered":
            how = {"new": "enter it first: with PPOTrainer(config) as trainer: trainer.train()"}.get(self._state, "make a new PPOTrainer")
            raise TrainerMisused(f"this PPOTrainer is {self._state}; {how}")
        self._state = "one that has trained"
        config, tokenizer = self.config, self._cluster.tokenizer
        self.group_filter = build_filter(config.rollout, dynamic_filter_fn)
        self.workflow = build_workflow(config, tokenizer, workflow, workflow_kwargs)
        if eval_workflow is not None or workflow is None:
            self.eval_workflow = build_workflow(config, tokenizer, eval_workflow, eval_workflow_kwargs, evaluation=True)
        elif workflow_kwargs and "gconfig" in workflow_kwargs and config.evaluator.gconfig is not None:
            self.eval_workflow = build_workflow(config, tokenizer, workflow, {**workflow_kwargs, "gconfig": config.evaluator.gconfig})
        else:
            self.eval_workflow = for_held_out(config, self.workflow)
        return self._in_loop(self._train())

    def _find_resumed(self) -> TrainState | None:
        self._resumed = find_resumable(self.config, TrainState)
        if self._resumed is not None:
            self._resumed.place(self._cluster.train_dataset)
        return self._resumed

    def _in_loop(self, coroutine: Any) -> Any:
        try:
            return self._asyncio.run(coroutine)
        except BaseExceptionGroup as group:  # the boundary of the loop's tasks: the first error is the run's
            raise first_error(group) from group

    async def _train(self) -> RunTotals:
        config, cluster, resumed = self.config, self._cluster, self._resumed
        if resumed is not None:
            await cluster.trainer.restore(resumed.folder)
            self.totals = RunTotals(**resumed.totals)
            self._started -= self.totals.seconds_total
        totals = self.totals
        async with asyncio.TaskGroup() as tasks:
            watching = tasks.create_task(cluster.watch())
            if config.warmup is not None and resumed is None:
                begin = time.monotonic()
                warmed = await warm_up(config, cluster, self.eval_workflow)
                for cause, n in warmed.dropped.items():
                    cluster.drops.add(f"demonstration_{cause}", n=n)
                if config.critic is not None or config.uses_ref:
                    await cluster.trainer.start_from_actor()
                totals.seconds_warmup = time.monotonic() - begin
            await cluster.weights.publish(resumed.step if resumed is not None else 0, announce=False)
            await cluster.weights.push()
            if resumed is None:
                totals.add_evaluations(await self._evaluate("before"), None)
            await self._learn(tasks)
            await cluster.wait_for_version(config.total_train_steps)
            after = await self._evaluate("after")
            await cluster.read_engines()  # the evaluation belongs to the timeline and to the total
            await cluster.save("final")
            watching.cancel()
        self._finish(after)
        return totals

    async def _learn(self, tasks: asyncio.TaskGroup) -> None:
        """Reinforcement learning: the runner generates in its own task, this one consumes what it makes."""
        config, rollout, cluster = self.config, self.config.rollout, self._cluster
        batch_size, eta = rollout.consumer_batch_size, rollout.max_head_offpolicyness
        staleness = StalenessManager(batch_size, eta, rollout.max_concurrent_rollouts, config.total_train_steps)
        buffer = TrajectoryBuffer(batch_size, eta, mask_over_age=rollout.over_age_tokens == "mask")
        runner = Runner(config, cluster.client, self.workflow, cluster.train_dataset, staleness, buffer, cluster.drops, self.group_filter)
        recovery = TrainRecovery(cluster, runner, buffer, self.totals, self.group_filter, self._started)
        first = 0
        if (resumed := self._resumed) is not None:
            first = resumed.step
            staleness.resume(first, len(buffer))
            recovery.resume(resumed)
            self._side_work(tasks, first, what_is_done(self.run_folder, first))
        elif config.warmup is not None and config.recover.every_steps:
            await recovery.save(tasks, 0)  # the warm-up is not done twice
        generating = tasks.create_task(runner.run(), name="runner")
        await cluster.read_engines()  # what the evaluation generated is not the first step's
        clock, probe = StepClock(), DriftProbe(cluster)
        with ExitStack() as files:
            log = files.enter_context(TrajectoryLog(self.run_folder / "trajectories.jsonl", cluster.tokenizer)) if self._dumps else None
            for step in range(first, config.total_train_steps):
                clock.start_step()
                groups = await buffer.cut(step, rollout.batch_timeout)
                clock.got_batch()
                if log is not None:
                    log.write(groups, step)
                trained, n_masked = without_truncated(groups) if config.actor.mask_truncated else (groups, 0)
                prepared = await prepare_batch(config, cluster.trainer, trained, groups)
                async with cluster.weights.changing_weights():
                    train_stats = await cluster.trainer.train_step(prepared.batch)
                    clock.trained([*prepared.spans, *train_stats["spans"]])
                    await cluster.weights.publish(step + 1)
                of_trainer = {**train_row(train_stats), **meter_row(train_stats["meters"], clock.train_seconds), **prepared.row}
                row = {"step": step + 1, "version": step, **batch_row(groups, step, trained), **of_trainer}
                row["truncated_masked"] = n_masked
                await probe.complete(row, groups, step + 1)
                await self._report(row, clock, len(buffer), buffer.n_unfinished)
                self._side_work(tasks, step + 1)
                if recovery.is_due(step + 1):
                    await recovery.save(tasks, step + 1)
        generating.cancel()
        self.totals.seconds_rl = recovery.seconds()
        if buffer.n_masked_tokens:
            cluster.drops.add("over_age_tokens_masked", n=buffer.n_masked_tokens)

    @property
    def _dumps(self) -> bool:
        return self.config.stats_logger.dump_trajectories

    def _side_work(self, tasks: asyncio.TaskGroup, step: int, done: Collection[str] = ()) -> None:
        """Checkpoints and evaluations overlap with everything else. ``done``: what the run did of it before it was cut off."""
        saver, evaluator = self.config.saver, self.config.evaluator
        if not 0 < step < self.config.total_train_steps:
            return
        if saver.every_steps and step % saver.every_steps == 0 and "checkpoint" not in done:
            tasks.create_task(self._cluster.save_step(step), name=f"checkpoint {step}")
        if evaluator.every_steps and step % evaluator.every_steps == 0 and "evaluation" not in done:
            tasks.create_task(self._cluster.evaluate_step(self.eval_workflow, step), name=f"evaluation {step}")

    async def _evaluate(self, when: str) -> Evaluation | None:
        """Held-out prompts under the weights that the servers have."""
        return await self._cluster.evaluate(self.eval_workflow, when)

    async def _report(self, row: dict[str, Any], clock: StepClock, n_buffered: int, n_inflight: int) -> None:
        cluster = self._cluster
        self.totals.add_step(row)
        row |= {"buffer_groups": n_buffered, "inflight_groups": n_inflight, "dropped": cluster.dropped}
        row |= {"filtered": self.group_filter.n_filtered, "filter_passed": self.group_filter.n_passed} | cluster.rewards.counters.read()
        row |= clock.row(row["tokens_trained"], *await cluster.read_engines()) | cluster.weights.row()
        cluster.log_step(row, clock)

    def _finish(self, after: Evaluation | None) -> None:
        totals, cluster = self.totals, self._cluster
        totals.add_evaluations(None, after)
        totals.tokens_generated = cluster.meter.tokens_generated
        totals.dropped = cluster.dropped
        totals.filtered, totals.filter_passed = self.group_filter.n_filtered, self.group_filter.n_passed
        totals.seconds_total = time.monotonic() - self._started
        cluster.finish(totals, after.samples if after is not None else [])


def run_train(config: GRPOConfig) -> Path:
    """``areal train``: one run, start to end; returns its folder."""
    reward_function(config)  # a name that leads nowhere is told before anything starts
    with PPOTrainer(config) as trainer:
        trainer.train()
    return trainer.run_folder
