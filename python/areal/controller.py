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
        self.train_dataset, self.valid_dataset = self._load_datasets()
