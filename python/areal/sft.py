"""Supervised training on demonstrations, on the engine that also does reinforcement learning: ``SFTTrainer``, and the warm-up of a run.

The loss is the negative log-likelihood of answer tokens (end-of-sequence included), summed over the global batch and divided by the
number of its answer tokens. The rates fall linearly; with ``stop_at_accuracy`` they go on falling, to nearly nothing, from the moment
when sampled answers are that accurate, and training ends there. Answers are checked while training goes on.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from areal.config import ConfigError, GRPOConfig, OptimizerConfig, SFTConfig
from areal.config_check_supervised import check_sft_config, check_sft_machine
from areal.data import MalformedRow, PromptDataset, encode_prompt
from areal.demonstrations import Demonstrations, load_demonstrations, make_sft_batch
from areal.metrics import step_meters
from areal.supervised import SupervisedTrainer
from areal.tasks.arithmetic import THINKING_PREFIX
from areal.types import Minibatch

if TYPE_CHECKING:
    from areal.cluster import Cluster
    from areal.workflow.base import RolloutWorkflow


log = logging.getLogger(__name__)


class WarmupFailed(RuntimeError):
    """Why supervised training cannot go on, in one sentence."""


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

    def accuracy(self) -> Coroutine[Any, Any, float]:
        """Accuracy of those weights, in [0, 1]; training goes on meanwhile."""
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
        overlap: bool = True,
    ) -> None:
        if config.stop_at_accuracy is not None and check is None:
            raise ConfigError(
                "warmup.stop_at_accuracy needs rollout servers, which this run does not have", "set warmup.stop_at_accuracy=null"
            )
        self.config, self.schedule, self.result = config, RateSchedule(config), SFTResult()
        self._engine, self._demonstrations, self._capacity = engine, demonstrations, max_tokens_per_mb
        self._check, self._report, self._overlap = check, report, overlap
        self._checking: asyncio.Task[float] | None = None

    async def run(self) -> SFTResult:
        begin = time.monotonic()
        await self._engine.set_optimizer(self.config.optimizer)
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
        finally:
            if self._checking is not None:
                self._checking.cancel()
                await asyncio.gather(self._checking, return_exceptions=True)
        self.result.dropped = dict(self._demonstrations.dropped)
        return self.result

    def _next_batch(self) -> Minibatch:
        samples, engine = self._demonstrations.batch(self.config.batch_size), self._engine
        return make_sft_batch(samples, self._capacity, engine.n_data_ranks, engine.sequence_cost)

    async def _look_at_check(self) -> float | None:
        """Starts a check when one is due, acts on one that is finished and returns its accuracy."""
        target = self.config.stop_at_accuracy
        if target is None or self._check is None or self.schedule.cooling:
            return None
        if self._checking is None and self.result.steps % self.config.eval_every == 0:
            await self._check.publish()
            self._checking = asyncio.create_task(self._check.accuracy())
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


def check_rows(config: GRPOConfig, train_dataset: Any, tokenizer: Any) -> list[dict[str, Any]]:
    """The prompts of an accuracy check, as ``input_ids`` that end with the forced prefix of the answer.

    They come from the training prompts: held-out ones must not decide when to stop.
    """
    assert config.warmup is not None
    if not isinstance(train_dataset, PromptDataset):
        raise ConfigError("warmup.stop_at_accuracy looks at training prompts again, which an iterator cannot give", "hand over a sequence")
    prefix = config.warmup.forced_prefix or (THINKING_PREFIX if config.train_dataset.type == "arithmetic" else "")
    forced = list(tokenizer(prefix, add_special_tokens=False)["input_ids"]) if prefix else []
    rows = []
    for row in train_dataset.first(config.warmup.eval_samples):
        try:
            prompt = encode_prompt(row, tokenizer)
        except MalformedRow as error:
            log.warning("left out of the accuracy checks: %s", error)
            continue
        rows.append({key: value for key, value in row.items() if key not in ("prompt", "messages")} | {"input_ids": prompt + forced})
    if not rows:
        raise ConfigError(
            "no prompt of train_dataset can be tokenized, so warmup.stop_at_accuracy cannot be checked", "check train_dataset.path"
        )
    return rows


class RolloutCheck:
    """An ``AccuracyCheck`` on the rollout servers of a run.

    All weights of the warm-up have version 0: publishing takes a new number only where policies must be told apart.
    """

    def __init__(self, cluster: Cluster, workflow: RolloutWorkflow, rows: list[dict[str, Any]]) -> None:
        self._cluster, self._workflow, self._rows = cluster, workflow, rows
        self._n_checks = 0

    async def publish(self) -> None:
        await self._cluster.weights.publish(0, announce=False)

    async def accuracy(self) -> float:
        from areal.evaluation import EpisodeSlots, evaluate

        await self._cluster.weights.push()
        self._n_checks += 1
        begin, config = time.time(), self._cluster.config
        result = await evaluate(
            self._cluster.client,
            self._workflow,
            self._rows,
            seed=config.seed + self._n_checks,
            slots=EpisodeSlots(config),
            episode_timeout=config.rollout.episode_timeout,
        )
        self._cluster.stats.span("controller", "evaluation", begin, time.time())
        if result.accuracy is None:
            causes = ", ".join(f"{n} {cause}" for cause, n in result.failures.items())
            raise WarmupFailed(f"none of the {len(self._rows)} answers of an accuracy check of the warm-up could be scored ({causes})")
        return result.accuracy


async def warm_up(
    config: GRPOConfig,
    cluster: Cluster,
    workflow: RolloutWorkflow | None,
    *,
    name: str = "warm-up",
    on_step: Callable[[int, int], None] = lambda step, total: None,
) -> SFTResult:
    """Supervised training before reinforcement learning; afterwards every live rollout server holds the new weights, as version 0.

    ``workflow`` answers the accuracy checks; None where the cluster has no rollout servers. ``name`` is what people see; ``on_step`` is told
    of every step, and how many there are to be.
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
        on_step(row["step"], row["total_steps"])

    run = SupervisedRun(
        config.warmup,
        cluster.trainer,
        load_demonstrations(config, cluster.tokenizer, cluster.given_rows[0]),
        config.actor.mb_spec.max_tokens_per_mb,
        check=check,
        report=report,
        overlap=not config.deterministic,
    )
    result = await run.run()
    await cluster.trainer.set_optimizer(config.actor.optimizer)
    for cause, n in result.dropped.items():
        cluster.drops.add(f"demonstration_{cause}", n=n)
    if config.warmup.stop_at_accuracy is not None and not result.reached:
        cluster.display.note(f"the {name} ended after {result.steps} steps below its target accuracy of {config.warmup.stop_at_accuracy:g}")
    if check is not None:
        await check.publish()
        await cluster.weights.push()
    return result


class SFTTrainer(SupervisedTrainer[SFTResult]):
    """Supervised training alone: ``with SFTTrainer(config) as trainer: trainer.train()``.

    ``config.warmup`` is the recipe, ``config.actor`` the model; what concerns reinforcement learning is ignored. Rollout servers are
    started only for ``warmup.stop_at_accuracy``. The result is the Hugging Face checkpoint ``run_folder/checkpoints/final``.

    Args:
        train_dataset: a sequence of demonstrations (rows with a prompt and an answer) in place of those of the config.

    Raises:
        ConfigError: the configuration has no warmup.
    """

    def __init__(self, config: GRPOConfig, train_dataset: Any = None) -> None:
        if config.warmup is None:
            raise ConfigError("SFTTrainer needs the recipe under the key 'warmup'", "add warmup: {total_steps: ...}")
        super().__init__(config, train_dataset, with_rollout=config.warmup.stop_at_accuracy is not None)

    def _check(self) -> None:
        check_sft_config(self.config)
        check_sft_machine(self.config, self._given)

    async def _learn(self) -> SFTResult:
        from areal.workflow.build import build_workflow

        workflow = build_workflow(self.config, self._cluster.tokenizer) if self._with_rollout else None
        return await warm_up(self.config, self._cluster, workflow, name="sft", on_step=self._stepped)

    def _line(self, result: SFTResult) -> str:
        reached = "" if result.accuracy is None else f", accuracy {100 * result.accuracy:.1f}%"
        return f"{result.steps} steps in {result.seconds:.0f} s, {result.tokens} answer tokens, last loss {result.loss:.4f}{reached}"
