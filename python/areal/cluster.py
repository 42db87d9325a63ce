"""Everything that a run has besides its loop: folder, model, data, processes, weights on their way, and what one sees of it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict
from typing import Any

from areal.config import GRPOConfig
from areal.data import load_dataset
from areal.display import Display
from areal.evaluation import EpisodeSlots, Evaluation, SampleAnswer, evaluate, held_out_rows
from areal.inference.client import RolloutClient, WeightUpdateError
from areal.inference.placement import trainer_gpus
from areal.inference.servers import RolloutServer, ServerStartError, end_servers, start_server
from areal.inference.sglang import taken_of_trainer_gpu
from areal.launcher.local import refuse_second_start
from areal.metrics import EngineMeter, RunTotals, StepClock
from areal.recover import SavedState, go_on
from areal.reward import RewardService
from areal.reward.code import CodeReward
from areal.reward.sandbox.levels import describe
from areal.run_folder import create_run_folder, keep_last, load_tokenizer, prepare_model, run_folder_of, run_lock, write_config
from areal.runner import DropCounter
from areal.stats import StatsLogger
from areal.threads import use_daemon_threads
from areal.trainer.worker import TrainerHandle
from areal.weight_sync.shm import unlink_stale
from areal.weight_sync.transports import weights_folder
from areal.weight_sync.updater import WeightUpdater
from areal.workflow.base import RolloutWorkflow
from areal.workflow.build import build_workflow, reward_function
from areal.workflow.user_code import end_others

log = logging.getLogger(__name__)


class RunFailed(RuntimeError):
    """What ends a run: one sentence, with the last log lines of who died."""


def first_error(group: BaseExceptionGroup) -> BaseException:
    """The error that ended a task group: its first member that is not a mere consequence."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


class Cluster:
    """The processes of a run. ``open`` starts them, ``close`` ends them; ``watch`` runs beside the loop and keeps them going."""

    def __init__(
        self,
        config: GRPOConfig,
        train_dataset: Any = None,
        valid_dataset: Any = None,
        *,
        with_rollout: bool = True,
        find_resumed: Callable[[], SavedState | None] = lambda: None,
    ) -> None:
        """
        Args:
            with_rollout: false = the trainer alone, for supervised training.
            find_resumed: what this run goes on from, by ``find_resumable``; takes the rows, which are there by then, to their place.
        """
        self.config = config
        self._resumed: SavedState | None = None
        self._with_rollout = with_rollout
        self._find_resumed = find_resumed
        self.drops = DropCounter()
        self.meter = EngineMeter()
        self.servers: list[RolloutServer] = []
        self.given_rows = (train_dataset, valid_dataset)
        self._resources = AsyncExitStack()
        self._acknowledged = asyncio.Event()
        self._evaluating = asyncio.Lock()
        self._evaluation_slots = EpisodeSlots(config)
        self._tidying = asyncio.Lock()
        self._n_saving = 0

    async def open(self) -> None:
        refuse_second_start()
        use_daemon_threads()
        config = self.config
        train, valid = self.given_rows
        self.train_dataset = train if isinstance(train, Iterator) else load_dataset(config.train_dataset, config.seed, given=train)
        self.valid_rows = held_out_rows(config, valid)
        self._open_folder()
        self.model_folder = prepare_model(config, self.run_folder)
        self.tokenizer = load_tokenizer(self.model_folder)
        self.display = self._resources.enter_context(Display(config, self.run_folder))
        self.stats = self._resources.enter_context(StatsLogger(self.run_folder, config, self._resumed.step if self._resumed else 0))
        self._tell_resumed()
        unlink_stale()
        await self._tell_memory()
        if not self._with_rollout:
            await self._start_trainer()
            return
        if config.workflow or config.workflow_kwargs:
            build_workflow(config, self.tokenizer)  # mistakes in workflow_kwargs are told before servers start
        self.rewards = await self._resources.enter_async_context(
            RewardService(config.reward.workers, config.reward.timeout, self.run_folder / "logs", config.reward.max_concurrent)
        )
        await self._tell_isolation()
        self.client = RolloutClient(config.rollout, update_mode=config.update_mode, interrupt_timeout=config.weight_sync.timeout)
        self.client.on_change(self._acknowledged.set)
        self._resources.push_async_callback(self.client.close)
        self._resources.callback(self._end_servers)
        async with asyncio.TaskGroup() as starting:
            starting.create_task(self._start_trainer())
            for index in range(config.layout.n_servers):
                starting.create_task(self._first_server(index))
        self.weights = WeightUpdater(
            config,
            self.trainer,
            self.client,
            lambda: self.servers,
            weights_folder(config, self.run_folder),
            self._weight_span,
            self.display.note,
        )

    def _open_folder(self) -> None:
        """That of the run which goes on, as it was then, or a new one."""
        self._resumed = self._find_resumed()
        if self._resumed is None:
            self.run_folder = create_run_folder(self.config)
            self._resources.enter_context(run_lock(self.run_folder))
            return
        self.run_folder = run_folder_of(self.config)
        self._resources.enter_context(run_lock(self.run_folder))
        go_on(self._resumed, self.run_folder)
        write_config(self.config, self.run_folder)

    def _tell_resumed(self) -> None:
        if self._resumed is not None:
            for note in self._resumed.notes:
                self.display.note(note)
            self.display.note(f"the run goes on after step {self._resumed.step}, from {self._resumed.folder}", style="")

    async def _tell_memory(self) -> None:
        """What the trainer will need; ``ConfigError`` before anything is started where that is more than there is."""
        from areal.trainer.memory import check_memory  # transformers: not for those who only look at this module

        taken = taken_of_trainer_gpu(self.config) if self._with_rollout else 0.0
        line, is_close = await asyncio.to_thread(
            check_memory, self.config, self.model_folder, "cuda" if trainer_gpus(self.config) else "cpu", taken
        )
        self.display.note(line, style="yellow" if is_close else "")

    async def _tell_isolation(self) -> None:
        """Where answers are programs: how they are confined on this machine."""
        if isinstance(function := reward_function(self.config), CodeReward):
            level = await asyncio.to_thread(describe, function.isolation)
            self.display.note(f"programs are run at the isolation level {level}", style="")

    def _weight_span(self, actor: str, begin: float, end: float) -> None:
        self.stats.span(actor, "weight_sync", begin, end)

    async def close(self) -> None:
        await self._resources.aclose()
        await end_others()  # what users' code left

    async def _start_trainer(self) -> None:
        self.trainer = await TrainerHandle.start(self.config, self.model_folder, self.run_folder)
        self._resources.push_async_callback(self.trainer.close)

    async def _first_server(self, index: int) -> None:
        """All servers of the start are told to have version 0: weights are pushed before the first request."""
        server = await start_server(self.config, self.model_folder, self.run_folder, index)
        self.client.add_server(server.url, server.process)
        self.servers.append(server)

    async def _new_server(self, index: int, restarts: int) -> None:
        """Starts a server; it gets requests once it has the current weights."""
        server = await start_server(self.config, self.model_folder, self.run_folder, index, restarts)
        try:
            await self.weights.join(server)
        except BaseException:  # also when cancelled: it is in no list yet
            self.client.remove_server(server.url)
            server.kill()
            raise
        self.servers.append(server)

    def _end_servers(self) -> None:
        end_servers(self.servers)

    # -- beside the loop --------------------------------------------------------------------------------------------------------

    async def watch(self) -> None:
        """Brings weights to the servers and replaces dead ones, until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self.weights.run(), name="weight sync")
            tasks.create_task(self._watch_servers(), name="server watch")
            tasks.create_task(self._watch_trainer(), name="trainer watch")

    async def _watch_servers(self) -> None:
        """Replaces rollout servers that died or that the client gave up, each up to ``rollout.max_restarts`` times."""
        async with asyncio.TaskGroup() as replacing:
            while True:
                await asyncio.sleep(0.1)
                for server in [s for s in self.servers if s.has_died() or not self.client.is_known(s.url)]:
                    self.servers.remove(server)
                    self.client.remove_server(server.url)
                    replacing.create_task(self._replace(server), name=f"replacement of {server.name}")

    async def _replace(self, server: RolloutServer) -> None:
        """A replacement that dies before it is ready is replaced in its turn."""
        if server.process is None:
            return await self._rejoin(server)
        restarts, lives = server.restarts, not server.has_died()
        why = f"it did not answer any more; {server.describe_death()}" if lives else server.describe_death()
        if lives:
            await asyncio.to_thread(server.kill)
        while True:
            if restarts >= self.config.rollout.max_restarts:
                raise RunFailed(f"a rollout server died after {restarts} replacements: {why}")
            restarts += 1
            self.display.note(f"{server.name} {'is' if lives else 'died and is'} being replaced: {why}")
            try:
                return await self._new_server(server.index, restarts)
            except (ServerStartError, WeightUpdateError) as error:
                why = str(error)

    async def _rejoin(self, server: RolloutServer) -> None:
        """A server that nobody here can restart comes back when it answers again; with none left, the requests' deadline ends the run."""
        self.display.note(f"{server.name} is left out until it answers again: {server.describe_death()}")
        while True:
            try:
                return await self._new_server(server.index, server.restarts + 1)
            except (ServerStartError, WeightUpdateError):
                await asyncio.sleep(1.0)

    async def _watch_trainer(self) -> None:
        """Ends the run when a rank dies, also while nobody waits for its answer."""
        raise await self.trainer.died()

    # -- weights ---------------------------------------------------------------------------------------------------------------

    async def wait_for_version(self, version: int) -> None:
        """Until every live server has acknowledged ``version``."""
        try:
            async with asyncio.timeout(self.config.rollout.request_timeout):
                while self.client.acked_version < version:
                    self._acknowledged.clear()
                    await self._acknowledged.wait()
        except TimeoutError:
            raise RunFailed(
                f"the controller waited {self.config.rollout.request_timeout:g} s (rollout.request_timeout) for the rollout servers to "
                f"acknowledge version {version}; the oldest of them has {self.client.acked_version}"
            ) from None

    # -- evaluation, checkpoints, display ------------------------------------------------------------------------------------------

    async def evaluate(self, workflow: RolloutWorkflow, when: str) -> Evaluation | None:
        """On the held-out rows while nothing else generates, after one that is still running; None where there are no such rows."""
        if not self.valid_rows:
            return None
        self._evaluation_slots.have_all()
        return await self._evaluate(workflow, when)

    async def evaluate_step(self, workflow: RolloutWorkflow, step: int) -> None:
        """Beside training, within ``evaluator.max_concurrent``; left out and counted while the one before still runs."""
        if not self.valid_rows:
            return
        if self._evaluating.locked():
            self.drops.add("evaluation_skipped", f"that of step {step}: the one before is still running")
            self.display.note(
                f"no evaluation at step {step}: the one before is still running; raise evaluator.every_steps or evaluator.max_concurrent"
            )
            return
        self._evaluation_slots.share()
        await self._evaluate(workflow, f"step {step}")

    async def _evaluate(self, workflow: RolloutWorkflow, when: str) -> Evaluation:
        config = self.config
        async with self._evaluating:
            begin, step = time.time(), self.stats.last_step
            result = await evaluate(
                self.client,
                workflow,
                self.valid_rows,
                seed=config.seed,
                slots=self._evaluation_slots,
                episode_timeout=config.rollout.episode_timeout,
                n_samples=config.evaluator.n_samples,
                tokenizer=self.tokenizer,
            )
            self.stats.span("controller", "evaluation", begin, time.time())
        self.display.evaluation(when, result)
        self.stats.evaluation(when, result, step)
        return result

    async def save(self, name: str) -> None:
        """A Hugging Face checkpoint under checkpoints/name, whole or not at all."""
        self._n_saving += 1
        try:
            done = await self.trainer.save(self.run_folder / "checkpoints" / name)
        finally:
            self._n_saving -= 1
        self.stats.spans("trainer 0", done["spans"])

    async def save_step(self, step: int) -> None:
        """A checkpoint during the run: one that fails is counted and shown, and the run goes on.

        It is left out while the one before is still being written: its weights would have to be kept until then, or be later ones.
        """
        if self._n_saving:
            self.drops.add("checkpoint_skipped", f"that of step {step}: the one before is still being written")
            self.display.note(f"no checkpoint of step {step}: the one before is still being written; raise saver.every_steps")
            return
        try:
            await self.save(f"step_{step:06d}")
        except OSError as error:
            self.drops.add("checkpoint_failed", str(error))
            self.display.note(f"the checkpoint of step {step} could not be written: {error}")
            return
        async with self._tidying:
            await asyncio.to_thread(keep_last, self.run_folder / "checkpoints", self.config.saver.keep)

    async def read_engines(self) -> tuple[int, float]:
        """Tokens generated and seconds busy, over all servers, since the last call."""
        answers = await self.client.engine_stats()
        for server in self.servers:
            if server.url in answers:
                for kind, begin, end in answers[server.url]["spans"]:
                    self.stats.span(server.name, kind, begin, end)
        for kind, begin, end in self.rewards.drain_spans():
            self.stats.span("reward", kind, begin, end)
        tokens, busy = self.meter.read(answers)
        return tokens, busy / max(1, len(answers))

    def log_step(self, row: dict[str, Any], clock: StepClock) -> None:
        for actor, kind, begin, end in clock.spans():
            self.stats.span(actor, kind, begin, end)
        self.stats.step(row)
        self.display.step(row)

    @property
    def dropped(self) -> dict[str, int]:
        """Groups and rows that were lost so far, by cause."""
        total = Counter(self.drops.totals)
        total.update(getattr(self.train_dataset, "dropped", {}))
        return dict(sorted(total.items()))

    def finish(self, totals: RunTotals, samples: Sequence[SampleAnswer]) -> None:
        self.stats.summary(asdict(totals))
        self.display.finish(totals, samples)
