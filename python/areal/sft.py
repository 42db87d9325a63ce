"""Supervised training on demonstrations, on the engine that also does reinforcement learning: ``SFTTrainer``, and the warm-up of a run.

The loss is the negative log-likelihood of answer tokens (end-of-sequence included), summed over the global batch and divided by the
number of its answer tokens. The rates fall linearly; with ``stop_at_accuracy`` they go on falling, to nearly nothing, from the moment
when sampled answers are that accurate, and training ends there. Answers are checked while training goes on.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from areal.config import ConfigError, GRPOConfig, OptimizerConfig, SFTConfig
from areal.config_check_supervised import check_sft_config, check_sft_machine
from areal.data import PromptDataset
from areal.demonstrations import Demonstrations, demonstration_rows, load_demonstrations, make_sft_batch
from areal.metrics import step_meters
from areal.recover_supervised import SFTState
from areal.sft_check import RolloutCheck, check_rows
from areal.supervised import SupervisedTrainer
from areal.types import Minibatch

if TYPE_CHECKING:
    from areal.cluster import Cluster
    from areal.workflow.base import RolloutWorkflow


class SupervisedEngine(Protocol):
    """``trainer.worker.TrainerHandle`` as this module sees it."""

    @property
    def n_data_ranks(self) -> int:
        """Ranks that get micro-batches of their own."""
        ...

    @property
    def sequence_cost(self) -> tuple[float, float]:
        """By which the ranks get like shares of a batch, as of ``plan_microbatches``."""
        ...

    async def set_optimizer(self, config: OptimizerConfig) -> None:
        """A new optimizer with empty state."""
        ...

    def sft_step(self, minibatch: Minibatch, lr_scale: float) -> Coroutine[Any, Any, Mapping[str, Any]]:
        """One optimizer step at ``lr_scale`` times the configured rates; ``loss`` (per token) and ``grad_norm`` are in the answer."""
        ...


class AccuracyCheck(Protocol):
    """Judges the model in training by its sampled answers."""

    async def publish(self) -> None:
        """Takes the weights as they are now; training waits for it."""
        ...

    def accuracy(self, number: int) -> Coroutine[Any, Any, float]:
        """Accuracy of those weights, in [0, 1]; training goes on meanwhile. ``number``: of the check, from 1."""
        ...


@dataclass
class RateSchedule:
    """Linear from 1 to ``lr_end`` over ``total_steps``, its start over ``optimizer.warmup_steps``; after ``cool_down(s)`` from there to ``cooldown_lr_end`` in ``cooldown_steps``."""

    config: SFTConfig
    _cooling_since: int | None = None
    _cooling_from: float = 1.0

    @property
    def cooling(self) -> bool:
        return self._cooling_since is not None

    @property
    def n_steps(self) -> int:
        """Steps in all, as far as is known."""
        if self._cooling_since is None:
            return self.config.total_steps
        return self._cooling_since + self.config.cooldown_steps

    def scale(self, step: int) -> float:
        """Share of the configured rates at the step numbered ``step`` from 0."""
        if self._cooling_since is None:
            warmed = min(1.0, (step + 1) / max(1, self.config.optimizer.warmup_steps))
            return warmed * (1 - (1 - self.config.lr_end) * step / self.config.total_steps)
        done = (step - self._cooling_since) / self.config.cooldown_steps
        return self._cooling_from + (min(self._cooling_from, self.config.cooldown_lr_end) - self._cooling_from) * min(1.0, done)

    def cool_down(self, step: int) -> None:
        self._cooling_from, self._cooling_since = self.scale(step), step

    def state_dict(self) -> dict[str, Any]:
        return {"cooling_since": self._cooling_since, "cooling_from": self._cooling_from}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._cooling_since, self._cooling_from = state["cooling_since"], state["cooling_from"]


@dataclass(slots=True)
class SFTResult:
    steps: int = 0
    tokens: int = 0
    """Answer tokens trained on."""
    seconds: float = 0.0
    loss: float = float("nan")
    """Of the last step, per token."""
    accuracy: float | None = None
    """Of the last finished check."""
    reached: bool = False
    """Whether stop_at_accuracy was reached."""
    dropped: dict[str, int] = field(default_factory=dict)


class SupervisedRun:
    """One supervised training run: ``await SupervisedRun(...).run()``.

    Args:
        config: the recipe.
        max_tokens_per_mb: capacity of a micro-batch.
        check: judges answers every ``eval_every`` steps when ``stop_at_accuracy`` is set.
        report: called after every step with {step, total_steps, phase, loss, grad_norm, lr_scale, tokens, tokens_per_s, seconds,
            skipped_nonfinite, mfu} (the last of the rank's time in this step), and accuracy when one has just been measured.
        after_step: called then, with this run; training waits for it.
        overlap: go on training while answers are checked; false where runs must repeat bit for bit.
    """

    def __init__(
        self,
        config: SFTConfig,
        engine: SupervisedEngine,
        demonstrations: Demonstrations,
        max_tokens_per_mb: int,
        *,
        check: AccuracyCheck | None = None,
        report: Callable[[dict[str, Any]], None] = lambda row: None,
        after_step: Callable[[SupervisedRun], Awaitable[None]] | None = None,
        overlap: bool = True,
    ) -> None:
        if config.stop_at_accuracy is not None and check is None:
            raise ConfigError(
                "warmup.stop_at_accuracy needs rollout servers, which this run does not have", "set warmup.stop_at_accuracy=null"
            )
        self.config, self.schedule, self.result = config, RateSchedule(config), SFTResult()
        self._engine, self._demonstrations, self._capacity = engine, demonstrations, max_tokens_per_mb
        self._check, self._report, self._after_step, self._overlap = check, report, after_step, overlap
        self._checking: asyncio.Task[float] | None = None
        self._n_checks, self._owes_check = 0, False
        self._place = demonstrations.state_dict()

    def state_dict(self) -> dict[str, Any]:
        """After a step: the fields ``result``, ``rows`` and ``progress`` of ``SFTState``."""
        progress = {"schedule": self.schedule.state_dict(), "n_checks": self._n_checks, "checking": self._checking is not None}
        return {"result": asdict(self.result), "rows": self._place, "progress": progress}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Before ``run``: goes on behind the step of this state, in whose optimizer the engine has it. A check that was going on is begun anew after the next step."""
        self.result = SFTResult(**state["result"])
        self._demonstrations.load_state_dict(state["rows"])
        self.schedule.load_state_dict(state["progress"]["schedule"])
        self._n_checks, self._owes_check = state["progress"]["n_checks"], state["progress"]["checking"]

    async def run(self) -> SFTResult:
        """The engine has the optimizer that is to be used."""
        begin = time.monotonic() - self.result.seconds
        batch = self._next_batch()
        try:
            while self.result.steps < self.schedule.n_steps:
                stepping = asyncio.create_task(self._engine.sft_step(batch, self.schedule.scale(self.result.steps)))
                await asyncio.sleep(0)  # the ranks get this batch before the next one is made
                tokens, batch = batch.denominator, self._next_batch()
                stats = await stepping
                self.result.steps += 1
                self.result.tokens += int(tokens)
                self.result.loss = float(stats["loss"])
                measured = await self._look_at_check()
                self.result.seconds = time.monotonic() - begin
                self._report(self._row(stats) | ({} if measured is None else {"accuracy": measured}))
                if self._after_step is not None:
                    await self._after_step(self)
        finally:
            if self._checking is not None:
                self._checking.cancel()
                await asyncio.gather(self._checking, return_exceptions=True)
        self.result.dropped = dict(self._demonstrations.dropped)
        return self.result

    def _next_batch(self) -> Minibatch:
        self._place = self._demonstrations.state_dict()  # what comes from here on is not trained on yet
        samples, engine = self._demonstrations.batch(self.config.batch_size), self._engine
        return make_sft_batch(samples, self._capacity, engine.n_data_ranks, engine.sequence_cost)

    async def _look_at_check(self) -> float | None:
        """Starts a check when one is due, acts on one that is finished and returns its accuracy."""
        target = self.config.stop_at_accuracy
        if target is None or self._check is None or self.schedule.cooling:
            return None
        if self._checking is None and (self._owes_check or self.result.steps % self.config.eval_every == 0):
            await self._check.publish()
            self._n_checks, self._owes_check = self._n_checks + 1, False
            self._checking = asyncio.create_task(self._check.accuracy(self._n_checks))
        if self._checking is None or not (self._checking.done() or not self._overlap):
            return None
        accuracy, self._checking = await self._checking, None
        self.result.accuracy = accuracy
        if accuracy >= target:
            self.result.reached = True
            self.schedule.cool_down(self.result.steps)
        return accuracy

    def _row(self, stats: Mapping[str, Any]) -> dict[str, Any]:
        result = self.result
        return {
            "step": result.steps,
            "total_steps": self.schedule.n_steps,
            "phase": "cool-down" if self.schedule.cooling else "training",
            "loss": result.loss,
            "grad_norm": stats.get("grad_norm"),
            "lr_scale": self.schedule.scale(result.steps - 1),
            "tokens": result.tokens,
            "tokens_per_s": result.tokens / result.seconds if result.seconds else 0.0,
            "seconds": result.seconds,
            "skipped_nonfinite": stats.get("skipped_nonfinite"),
            **step_meters(stats),
        }


async def warm_up(
    config: GRPOConfig,
    cluster: Cluster,
    workflow: RolloutWorkflow | None,
    *,
    name: str = "warm-up",
    rows: PromptDataset | None = None,
    resumed: SFTState | None = None,
    after_step: Callable[[SupervisedRun], Awaitable[None]] | None = None,
) -> SFTResult:
    """Supervised training before reinforcement learning; afterwards every live rollout server holds the new weights, as version 0.

    Args:
        workflow: answers the accuracy checks; None where the cluster has no rollout servers.
        name: what people see.
        rows: of ``demonstration_rows``; None = those of the cluster's config, or the rows that it was given.
        resumed: where to go on from; the ranks hold it already.
        after_step: of ``SupervisedRun``.
    """
    assert config.warmup is not None
    check = None
    if workflow is not None:
        checked = config.warmup.stop_at_accuracy is not None
        check = RolloutCheck(cluster, workflow, check_rows(config, cluster.train_dataset, cluster.tokenizer) if checked else [])

    stepped = time.time()

    def report(row: dict[str, Any]) -> None:
        nonlocal stepped
        begin, stepped = stepped, time.time()
        cluster.stats.span("trainer 0", "training", begin, stepped)
        cluster.stats.warmup(row)
        cluster.display.warmup(row, name)

    run = SupervisedRun(
        config.warmup,
        cluster.trainer,
        load_demonstrations(config, cluster.tokenizer, rows if rows is not None else demonstration_rows(config, cluster.given_rows[0])),
        config.actor.mb_spec.max_tokens_per_mb,
        check=check,
        report=report,
        after_step=after_step,
        overlap=not config.deterministic,
    )
    if resumed is None:
        await cluster.trainer.set_optimizer(config.warmup.optimizer)
    else:
        run.load_state_dict(asdict(resumed))
    result = await run.run()
    await cluster.trainer.set_optimizer(config.actor.optimizer)
    if config.warmup.stop_at_accuracy is not None and not result.reached:
        cluster.display.note(f"the {name} ended after {result.steps} steps below its target accuracy of {config.warmup.stop_at_accuracy:g}")
    if check is not None:
        await check.publish()
        await cluster.weights.push()
    return result


class SFTTrainer(SupervisedTrainer[SFTResult, SFTState]):
    """Supervised training alone: ``with SFTTrainer(config) as trainer: trainer.train()``.

    ``config.warmup`` is the recipe, ``config.actor`` the model; what concerns reinforcement learning is ignored. Rollout servers are
    started only for ``warmup.stop_at_accuracy``. The result is the Hugging Face checkpoint ``run_folder/checkpoints/final``.

    Args:
        train_dataset: a sequence of demonstrations (rows with a prompt and an answer) in place of those of the config.

    Raises:
        ConfigError: the configuration has no warmup.
    """

    _state = SFTState

    def __init__(self, config: GRPOConfig, train_dataset: Any = None) -> None:
        if config.warmup is None:
            raise ConfigError("SFTTrainer needs the recipe under the key 'warmup'", "add warmup: {total_steps: ...}")
        super().__init__(config, train_dataset, with_rollout=config.warmup.stop_at_accuracy is not None)

    def _check(self) -> PromptDataset:
        check_sft_config(self.config)
        check_sft_machine(self.config, self._given)
        return demonstration_rows(self.config, self._cluster.given_rows[0])

    @property
    def _optimizer(self) -> OptimizerConfig:
        assert self.config.warmup is not None
        return self.config.warmup.optimizer

    async def _learn(self, resumed: SFTState | None) -> SFTResult:
        from areal.workflow.build import build_workflow

        workflow = build_workflow(self.config, self._cluster.tokenizer) if self._with_rollout else None

        async def after_step(run: SupervisedRun) -> None:
            await self._stepped(run.result.steps, run.schedule.n_steps, run.state_dict())

        return await warm_up(self.config, self._cluster, workflow, name="sft", rows=self._rows, resumed=resumed, after_step=after_step)

    def _line(self, result: SFTResult) -> str:
        reached = "" if result.accuracy is None else f", accuracy {100 * result.accuracy:.1f}%"
        return f"{result.steps} steps in {result.seconds:.0f} s, {result.tokens} answer tokens, last loss {result.loss:.4f}{reached}"
