"""Admission: how many groups may be started, so that no batch can become too stale (AReaL paper, section 5.1).

With B groups a batch, policy version i and bound eta, the number of groups ever admitted (running + accepted, a rejected one gives
its slot back) stays at or below ``(i + eta + 1) * B``. This bounds how far generation runs ahead; the age of every single token is
bounded by the second check, at the cut (``buffer.py``).
"""

from __future__ import annotations


class StalenessManager:
    """Counts groups. Every ``admit`` is followed by exactly one ``finish_accepted`` or ``finish_rejected``."""

    def __init__(self, batch_size: int, eta: int, max_concurrent: int, total_batches: int | None = None) -> None:
        """``total_batches``: batches the run will train on at all; groups beyond them are not started."""
        self.batch_size = batch_size
        self.eta = eta
        self.max_concurrent = max_concurrent
        self.total_batches = total_batches
        self.n_running = 0
        self.n_waiting = 0
        self.n_accepted = 0

    def capacity(self, version: int) -> int:
        """Groups that may start now; ``version`` is the newest that every live rollout server has acknowledged."""
        batches = self.eta + version + 1
        if self.total_batches is not None:
            batches = min(batches, self.total_batches)
        ahead = batches * self.batch_size - (self.n_running + self.n_accepted)
        return max(0, min(ahead, self.max_concurrent - (self.n_running - self.n_waiting)))

    def wait_for_scores(self, n: int) -> None:
        """``n`` more running groups only wait for their scores (fewer, if negative): they need no room among those that generate."""
        self.n_waiting += n

    def admit(self) -> None:
        self.n_running += 1

    def finish_accepted(self) -> None:
        self._finish()
        self.n_accepted += 1

    def finish_rejected(self) -> None:
        self._finish()

    def _finish(self) -> None:
        assert self.n_running > 0, "a group finished that was never admitted"
        self.n_running -= 1

    def resume(self, version: int, n_buffered: int) -> None:
        """After a restart: what was trained on, plus what the restored buffer holds; anything else would inflate the bound."""
        assert self.n_running == 0, "resume belongs before the first admission"
        self.n_accepted = version * self.batch_size + n_buffered
