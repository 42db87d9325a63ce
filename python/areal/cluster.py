"""Everything that a run has besides its loop: folder, model, data, processes, weights on their way, and what one sees of it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass
from typing import Any

from areal.config import GRPOConfig
from areal.data import load_dataset
from areal.display import Display
from areal.evaluation import Evaluation, SampleAnswer, evaluate, held_out_rows
from areal.inference.client import RolloutClient, WeightsAck, WeightUpdateError
from areal.inference.servers import RolloutServer, ServerStartError, start_server
from areal.launcher.local import refuse_second_start
from areal.metrics import EngineMeter, RunTotals, StepClock
from areal.reward import RewardService
from areal.run_folder import create_run_folder, keep_last, load_tokenizer, prepare_model, run_lock
from areal.runner import DropCounter
from areal.stats import StatsLogger
from areal.trainer.worker import TrainerHandle
from areal.weight_sync.shm import unlink_stale
from areal.workflow.base import RolloutWorkflow

log = logging.getLogger(__name__)


class RunFailed(RuntimeError):
    """What ends a run: one sentence, with the last log lines of who died."""


def first_error(group: BaseExceptionGroup) -> BaseException:
    """The error that ended a task group: its first member that is not a mere consequence."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


@dataclass(frozen=True, slots=True)
class Weights:
    """What the trainer published last."""

    version: int
    digest: str
    """weights_hash, 16 hex digits."""


class Cluster:
    """The processes of a run. ``open`` starts them, ``close`` ends them; ``watch`` runs beside the loop and keeps them going."""

    def __init__(self, config: GRPOConfig, train_dataset: Any = None, valid_dataset: Any = None, *, with_rollout: bool = True) -> None:
        self.config = config
        self._with_rollout = with_rollout  # false: the trainer alone, for supervised training
        self.drops = DropCounter()
        self.meter = EngineMeter()
        self.weights: Weights | None = None
        self.servers: list[RolloutServer] = []
        self._digests: dict[int, str] = {}  # of the last versions published
        self.given_rows = (train_dataset, valid_dataset)
        self._resources = AsyncExitStack()
        self._published = asyncio.Event()
        self._acknowledged = asyncio.Event()
        self._evaluating = asyncio.Lock()
        self._tidying = asyncio.Lock()
        self._n_saving = 0
        self._version_reused = asyncio.Lock()

    async def open(self) -> None:
        refuse_second_start()
        config = self.config
        train, valid = self.given_rows
        self.train_dataset = train if isinstance(train, Iterator) else load_dataset(config.train_dataset, config.seed, given=train)
        self.valid_rows = held_out_rows(config, valid)
        self.run_folder = create_run_folder(config)
        self._resources.enter_context(run_lock(self.run_folder))
        self.model_folder = prepare_model(config, self.run_folder)
        self.tokenizer = load_tokenizer(self.model_folder)
        self.display = self._resources.enter_context(Display(config, self.run_folder))
        self.stats = self._resources.enter_context(StatsLogger(self.run_folder, config))
        unlink_stale()
        if not self._with_rollout:
            await self._start_trainer()
            return
        self.rewards = await self._resources.enter_async_context(
            RewardService(config.reward.workers, config.reward.timeout, self.run_folder / "logs")
        )
        self.client = RolloutClient(config.rollout, update_mode=config.update_mode, interrupt_timeout=config.weight_sync.timeout)
        self.client.on_change(self._acknowledged.set)
        self._resources.push_async_callback(self.client.close)
        self._resources.callback(self._end_servers)
        async with asyncio.TaskGroup() as starting:
            starting.create_task(self._start_trainer())
            for index in range(config.layout.n_servers):
                starting.create_task(self._add_server(index))

    async def close(self) -> None:
        await self._resources.aclose()

    async def _start_trainer(self) -> None:
        self.trainer = await TrainerHandle.start(self.config, self.model_folder, self.run_folder)
        self._resources.push_async_callback(self.trainer.close)

    async def _add_server(self, index: int, restarts: int = 0) -> None:
        """Starts a server; it gets requests once it has the current weights."""
        server = await start_server(self.config, self.model_folder, self.run_folder, index, restarts)
        try:
            async with self._version_reused:  # or it could join with weights that were replaced under the same number meanwhile
                if self.weights is not None:
                    ack = await self.client.update_server(server.url, self.trainer.shm_name, self.weights.version, server.process)
                    self._check_hash(server.url, ack)
                self.client.add_server(server.url, server.process)
        except BaseException:  # also when cancelled: it is in no list yet
            self.client.remove_server(server.url)
            server.process.kill()
            raise
        self.servers.append(server)

    def _end_servers(self) -> None:
        for server in self.servers:
            server.process.terminate()

    # -- beside the loop --------------------------------------------------------------------------------------------------------

    async def watch(self) -> None:
        """Brings weights to the servers and replaces dead ones, until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._sync_weights(), name="weight sync")
            tasks.create_task(self._watch_servers(), name="server watch")
            tasks.create_task(self._watch_trainer(), name="trainer watch")

    async def _sync_weights(self) -> None:
        """Takes the newest published weights to every server; versions published meanwhile are skipped over."""
        while True:
            await self._published.wait()
            self._published.clear()
            await self.push()

    async def push(self) -> None:
        """Every live server takes the weights published last; returns when all have them and their hashes were checked."""
        assert self.weights is not None
        acks = await self.client.update_weights_from_shm(self.trainer.shm_name, self.weights.version)
        for url, ack in acks.items():
            self._check_hash(url, ack)

    def _check_hash(self, url: str, ack: WeightsAck) -> None:
        """Both sides must hold the same weights. A server may already have a newer version than it was asked for."""
        expected = self._digests.get(ack.version)
        if expected is not None and ack.hash != expected:
            raise RunFailed(f"{url} holds other weights than the trainer at version {ack.version}: hash {ack.hash} instead of {expected}")

    async def _watch_servers(self) -> None:
        """Replaces rollout servers that died or that the client gave up, each up to ``rollout.max_restarts`` times."""
        async with asyncio.TaskGroup() as replacing:
            while True:
                await asyncio.sleep(0.1)
                for server in [s for s in self.servers if s.process.poll() is not None or not self.client.is_known(s.url)]:
                    self.servers.remove(server)
                    self.client.remove_server(server.url)
                    replacing.create_task(self._replace(server), name=f"replacement of {server.name}")

    async def _replace(self, server: RolloutServer) -> None:
        """A replacement that dies before it is ready is replaced in its turn."""
        process, restarts = server.process, server.restarts
        lives = process.poll() is None
        why = f"it did not answer any more; {process.describe_death()}" if lives else process.describe_death()
        if lives:
            await asyncio.to_thread(process.kill)
        while True:
            if restarts >= self.config.rollout.max_restarts:
                raise RunFailed(f"a rollout server died after {restarts} replacements: {why}")
            restarts += 1
            self.display.note(f"{server.name} {'is' if lives else 'died and is'} being replaced: {why}")
            try:
                return await self._add_server(server.index, restarts)
            except (ServerStartError, WeightUpdateError) as error:
                why = str(error)

    async def _watch_trainer(self) -> None:
        """Ends the run when a rank dies, also while nobody waits for its answer."""
        raise await self.trainer.died()

    # -- weights ---------------------------------------------------------------------------------------------------------------

    async def publish(self, version: int, *, announce: bool = True) -> None:
        """The trainer's weights into shared memory, under this number; waits for no reader.

        Once announced, ``watch`` takes them to the servers; otherwise the caller does, by ``push``, and may use a number again: then no
        server joins meanwhile, since one number would mean two weights.
        """
        if announce:
            await self._publish(version)
            self._published.set()
        else:
            async with self._version_reused:
                await self._publish(version)

    async def _publish(self, version: int) -> None:
        begin = time.time()
        version, digest = await self.trainer.publish(version)
        self.weights = Weights(version, f"{digest:016x}")
        self._digests = {v: d for v, d in self._digests.items() if v > version - 8} | {version: self.weights.digest}
        self.stats.span("trainer 0", "weight_sync", begin, time.time())

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
        """On the held-out rows, one at a time; None where there are none."""
        if not self.valid_rows:
            return None
        async with self._evaluating:
            begin = time.time()
            result = await evaluate(self.client, workflow, self.valid_rows, seed=self.config.seed, tokenizer=self.tokenizer)
            self.stats.span("controller", "evaluation", begin, time.time())
        self.display.evaluation(when, result)
        self.stats.evaluation(when, result)
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
