"""What scoring costs and how it fails: the queue, the seconds, the causes. One object a service, or a function of a shared server."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any


class ScoreCounters:
    """Counted since the start, and again from every ``read`` to the next.

    ``waiting`` is the queue now: scores that no worker has, or that wait for a slot of the event loop.
    """

    def __init__(self) -> None:
        self.waiting = 0
        self.running = 0
        self.n_scores = 0
        self.n_cancelled = 0
        self.failures: Counter[str] = Counter()
        self.seconds = 0.0
        self.scoring_seconds = 0.0
        self._reset()

    def _reset(self) -> None:
        self._n = 0
        self._seconds = self._seconds_max = self._scoring_seconds = 0.0
        self._queue_max = self.waiting

    def enter(self) -> Score:
        """A score is asked for."""
        return Score(self)

    def _waits(self, n: int) -> None:
        self.waiting += n
        self._queue_max = max(self._queue_max, self.waiting)

    def _done(self, seconds: float, scoring_seconds: float, cause: str) -> None:
        if cause:
            self.failures[cause] += 1
        else:
            self.n_scores += 1
        self.seconds += seconds
        self.scoring_seconds += scoring_seconds
        self._n += 1
        self._seconds += seconds
        self._seconds_max = max(self._seconds_max, seconds)
        self._scoring_seconds += scoring_seconds

    def read(self) -> dict[str, Any]:
        """Part of a step's row: since the last call the longest queue and the seconds of scores and failures (None without any), waiting
        included, and of the scoring alone; failures by cause since the start."""
        n = self._n
        row = {
            "reward_queue_max": self._queue_max,
            "reward_seconds_mean": self._seconds / n if n else None,
            "reward_seconds_max": self._seconds_max if n else None,
            "reward_scoring_seconds_mean": self._scoring_seconds / n if n else None,
            "reward_failures": dict(sorted(self.failures.items())),
        }
        self._reset()
        return row

    def totals(self) -> dict[str, Any]:
        """Now, and since the start: sums of seconds, so that whoever asks twice has the mean of the time between."""
        return {
            "waiting": self.waiting,
            "running": self.running,
            "scores": self.n_scores,
            "failures": dict(sorted(self.failures.items())),
            "cancelled": self.n_cancelled,
            "seconds": self.seconds,
            "scoring_seconds": self.scoring_seconds,
        }


class Score:
    """One score on its way: ``started`` and perhaps ``requeued``, then exactly one of ``done`` and ``cancelled``."""

    __slots__ = ("_begin", "_counters", "_running", "_started_at", "scoring_seconds")

    def __init__(self, counters: ScoreCounters) -> None:
        self._counters = counters
        self._begin = self._started_at = time.perf_counter()
        self._running = False
        self.scoring_seconds: float | None = None
        """Told by a worker; else it is the time since ``started``."""
        counters._waits(1)

    def started(self) -> None:
        self._started_at = time.perf_counter()
        self._running = True
        self._counters._waits(-1)
        self._counters.running += 1

    def requeued(self) -> None:
        """The worker that had it died before it began."""
        self._leave()
        self._running = False
        self._counters._waits(1)

    def done(self, cause: str = "") -> None:
        """A score, or a failure with its cause."""
        self._leave()
        now = time.perf_counter()
        scoring = self.scoring_seconds
        if scoring is None:
            scoring = now - self._started_at if self._running else 0.0
        self._counters._done(now - self._begin, scoring, cause)

    def cancelled(self) -> None:
        """Whoever wanted it does not any more."""
        self._leave()
        self._counters.n_cancelled += 1

    def _leave(self) -> None:
        if self._running:
            self._counters.running -= 1
        else:
            self._counters._waits(-1)
