"""What a train step looked like, as one flat row, and the totals of a run."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from areal.types import Group

if TYPE_CHECKING:
    from areal.evaluation import Evaluation


def staleness_of(groups: Sequence[Group], version: int) -> np.ndarray:
    """Age in versions of every loss token that is trained on at policy ``version``."""
    ages = [version - t.versions[t.loss_mask] for g in groups for t in g.trajectories]
    return np.concatenate(ages) if ages else np.zeros(0, np.int32)


def batch_row(groups: Sequence[Group], version: int, trained: Sequence[Group] | None = None) -> dict[str, Any]:
    """The part of the row that is known from the batch alone: of episodes, whose lengths count loss tokens.

    ``trained``: the groups as they are trained on, where that is less; staleness and ``tokens_trained`` are theirs.
    """
    trained = groups if trained is None else trained
    episodes = [e for g in groups for e in g.episodes()]
    lengths = np.array([sum(t.loss_mask.sum() for t in e) for e in episodes])
    rewards = np.array([e[-1].reward for e in episodes])
    ages = staleness_of(trained, version)
    return {
        "reward": float(rewards.mean()),
        "accuracy": float((rewards > 0).mean()),
        "length": float(lengths.mean()),
        "length_max": int(lengths.max()),
        "truncated": float(np.mean([any(t.truncated for t in e) for e in episodes])),
        "staleness_mean": float(ages.mean()) if ages.size else 0.0,
        "staleness_max": int(ages.max()) if ages.size else 0,
        "tokens_trained": int(ages.size),
    }


@dataclass
class EngineMeter:
    """Turns the running counters of the rollout servers into rates between two readings.

    A replaced server starts its counters again at zero, so every server is followed by its URL.
    """

    tokens_generated: int = 0
    busy_seconds: float = 0.0
    _last: dict[str, tuple[int, float]] = field(default_factory=dict)

    def read(self, stats: Mapping[str, Mapping[str, Any]]) -> tuple[int, float]:
        """``{url: /engine_stats answer}`` -> tokens and busy seconds since the last reading, over all servers."""
        new_tokens, new_busy = 0, 0.0
        for url, row in stats.items():
            tokens, busy = self._last.get(url, (0, 0.0))
            new_tokens += row["tokens_generated"] - tokens
            new_busy += row["busy_seconds"] - busy
            self._last[url] = (row["tokens_generated"], row["busy_seconds"])
        self.tokens_generated += new_tokens
        self.busy_seconds += new_busy
        return new_tokens, new_busy


@dataclass
class RunTotals:
    """Fills ``summary.json``; accuracy, length and truncated are None where no evaluation ran."""

    accuracy_before: float | None = None
    accuracy_after: float | None = None
    length_before: float | None = None
    length_after: float | None = None
    seconds_total: float = 0.0
    seconds_warmup: float = 0.0
    seconds_rl: float = 0.0
    train_steps: int = 0
    max_staleness_trained: int = 0
    tokens_generated: int = 0
    tokens_trained: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    filtered: int = 0
    """Groups that rollout.dynamic_filter left out."""
    filter_passed: int = 0
    """Groups that it was against, trained on because of rollout.dynamic_filter_max_waste."""
    truncated_masked: int = 0
    """Sequences that actor.mask_truncated kept out of the loss."""
    skipped_nonfinite: int = 0
    """Optimizer steps that were left out because loss or gradients were not finite."""
    mfu: float | None = None
    """As in the rows, over the time of all train steps."""
    train_seconds: dict[str, float] = field(default_factory=dict)
    """Of all train steps, by phase."""
    peak_mb: dict[str, float] = field(default_factory=dict)
    """Largest memory of a rank in MiB, by phase."""
    truncated_before: float | None = None
    truncated_after: float | None = None
    pass_at_k_before: dict[str, float] = field(default_factory=dict)
    pass_at_k_after: dict[str, float] = field(default_factory=dict)
    majority_at_k_before: dict[str, float] = field(default_factory=dict)
    majority_at_k_after: dict[str, float] = field(default_factory=dict)

    def add_evaluations(self, before: Evaluation | None, after: Evaluation | None) -> None:
        if before is not None:
            self.accuracy_before, self.length_before, self.truncated_before = before.accuracy, before.length, before.truncated
            self.pass_at_k_before, self.majority_at_k_before = before.pass_at_k, before.majority_at_k
        if after is not None:
            self.accuracy_after, self.length_after, self.truncated_after = after.accuracy, after.length, after.truncated
            self.pass_at_k_after, self.majority_at_k_after = after.pass_at_k, after.majority_at_k

    def add_step(self, row: Mapping[str, Any]) -> None:
        self.train_steps += 1
        self.max_staleness_trained = max(self.max_staleness_trained, row["staleness_max"])
        self.tokens_trained += row["tokens_trained"]
        self.truncated_masked += row.get("truncated_masked", 0)
        self.skipped_nonfinite += row.get("skipped_nonfinite", 0)
        self._add_meters(row)

    def _add_meters(self, row: Mapping[str, Any]) -> None:
        seconds = {phase: row[f"{phase}_seconds"] for phase in _PHASES if f"{phase}_seconds" in row}
        before, now = sum(self.train_seconds.values()), sum(seconds.values())
        if row.get("mfu") is not None and now > 0:
            self.mfu = ((self.mfu or 0.0) * before + row["mfu"] * now) / (before + now)
        self.train_seconds |= {phase: self.train_seconds.get(phase, 0.0) + s for phase, s in seconds.items()}
        peaks = {phase: peak for phase in _PHASES if (peak := row.get(f"{phase}_peak_mb")) is not None}
        self.peak_mb |= {phase: max(self.peak_mb.get(phase, 0.0), peak) for phase, peak in peaks.items()}


_OF_OBJECTIVES = (
    "ratio_mean",
    "clip_high_fraction",
    "clip_low_fraction",
    "dual_clip_fraction",
    "truncated_fraction",
    "filtered_fraction",
    "kl_proximal",
    "kl_ref",
)
"""Statistics of the policy's loss, in the row where the objective has them."""


_PHASES = ("recompute", "forward", "backward", "optimizer", "other")
"""Of a train step: ``trainer.meters.PHASES`` and what is none of them."""


def train_row(stats: Mapping[str, Any]) -> dict[str, Any]:
    """The trainer's part of the row."""
    keys = ("loss", "grad_norm", "clip_fraction", "entropy", "kl_behaviour", "importance_weight_mean", "skipped_nonfinite")
    drift = stats["logprob_drift"]
    of_critic = ("value_loss", "value_clip_fraction", "critic_grad_norm", "critic_skipped_nonfinite")
    return {
        **{key: stats[key] for key in keys},
        **{key: stats[key] for key in _OF_OBJECTIVES if key in stats},
        **{key: stats[key] for key in of_critic if key in stats},
        "logprob_drift_mean": drift["mean_abs"],
        "logprob_drift_max": drift["max_abs"],
        "logprob_drift_tokens": drift["n"],
    }


def meter_row(meters: Mapping[str, Any], seconds: float) -> dict[str, Any]:
    """What a train step cost; ``seconds``: the whole of it, from the batch to its statistics.

    What of it is in no phase of the ranks (packing, the way to them, what they prepare and count) is ``other_seconds``.
    """
    phases = {phase: meters["seconds"][phase] for phase in _PHASES}
    phases["other"] += seconds - sum(phases.values())
    return {
        "model_flops_per_s": meters["model_flops"] / seconds,
        "mfu": mfu(meters, seconds),
        **{f"{phase}_seconds": of_phase for phase, of_phase in phases.items()},
        **{f"{phase}_peak_mb": peak for phase, peak in meters["peak_mb"].items()},
    }


def step_meters(stats: Mapping[str, Any]) -> dict[str, Any]:
    """``meter_row`` of a step without rollouts: over what the ranks took for it, because batches are made meanwhile."""
    return meter_row(stats["meters"], sum(stats["meters"]["seconds"].values())) if "meters" in stats else {"mfu": None}


def mfu(meters: Mapping[str, Any], seconds: float) -> float:
    """Model FLOPs (``trainer.meters.ModelFlops``) a second over what all devices together do in a large matrix product."""
    return meters["model_flops"] / seconds / meters["peak_flops_per_s"]


class StepClock:
    """When the trainer waited and when it worked. Times are ``time.time()`` seconds, as everywhere in the timeline."""

    def __init__(self) -> None:
        self._last_end = time.time()

    def start_step(self) -> None:
        self.begin = time.time()

    def got_batch(self) -> None:
        self.batch_at = time.time()

    def trained(self, spans: Iterable[tuple[str, float, float]] = ()) -> None:
        """``spans``: what the trainer says it did, as (kind, begin, end); without them all the time was training."""
        self.trained_at = time.time()
        self._work = list(spans) or [("training", self.batch_at, self.trained_at)]

    @property
    def train_seconds(self) -> float:
        """From the batch to the end of the train step."""
        return max(self.trained_at - self.batch_at, 1e-9)

    def spans(self) -> list[tuple[str, str, float, float]]:
        return [("trainer 0", "waiting", self.begin, self.batch_at), *(("trainer 0", *span) for span in self._work)]

    def row(self, tokens_trained: int, tokens_generated: int, rollout_busy_seconds: float) -> dict[str, float]:
        """Rates since the end of the step before this one."""
        now = time.time()
        seconds, self._last_end = max(now - self._last_end, 1e-9), now
        return {
            "step_seconds": seconds,
            "wait_seconds": self.batch_at - self.begin,
            "trainer_busy": (self.trained_at - self.batch_at) / seconds,
            "rollout_busy": min(1.0, rollout_busy_seconds / seconds),
            "tokens_generated": tokens_generated,
            "gen_tokens_per_s": tokens_generated / seconds,
            "train_tokens_per_s": tokens_trained / seconds,
        }
