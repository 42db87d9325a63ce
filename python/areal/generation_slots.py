"""Which groups of a runner need room among those that generate: all but the ones that only wait for their scores.

A group whose every unfinished episode waits for a score generates nothing, so it is not counted in ``max_concurrent_rollouts``, and
another one may start: that is how slow scorers are hidden. The staleness bound counts it all the same. A workflow that generates
again after a score (several turns, each scored) would bring more groups back than there is room for: once an episode is seen to do that,
every group counts until it has finished.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol


class WaitCounter(Protocol):
    """``staleness.StalenessManager`` as seen from here."""

    def wait_for_scores(self, n: int) -> None: ...


class GenerationSlots:
    """``wake`` is called when a group gives its room to others."""

    def __init__(self, staleness: WaitCounter, wake: Callable[[], None]) -> None:
        self._staleness = staleness
        self._wake = wake
        self.scores_come_last = True

    def waits(self, n: int) -> None:
        self._staleness.wait_for_scores(n)
        if n > 0:
            self._wake()


class GroupSlot:
    """One group's claim; ``end`` when it has finished, however."""

    def __init__(self, slots: GenerationSlots, n_episodes: int) -> None:
        self.slots = slots
        self._n_busy = n_episodes
        self._waits = False

    def change_busy(self, n: int) -> None:
        self._n_busy += n
        self._set(self._n_busy == 0 and self.slots.scores_come_last)

    def end(self) -> None:
        self._set(False)

    def _set(self, waits: bool) -> None:
        if waits != self._waits:
            self._waits = waits
            self.slots.waits(1 if waits else -1)


class EpisodeSlot:
    """One episode: busy unless it only waits for scores, or is over."""

    def __init__(self, group: GroupSlot) -> None:
        self._group = group
        self._n_requests = self._n_scores = 0
        self._scored = self._over = False
        self._busy = True

    def generation_began(self) -> None:
        if self._scored:
            self._group.slots.scores_come_last = False
        self._n_requests += 1
        self._update()

    def generation_ended(self) -> None:
        self._n_requests -= 1
        self._update()

    def score_began(self) -> None:
        self._n_scores += 1
        self._update()

    def score_ended(self) -> None:
        self._n_scores -= 1
        self._scored = True
        self._update()

    def end(self) -> None:
        self._over = True
        self._update()

    def _update(self) -> None:
        busy = not self._over and (self._n_requests > 0 or self._n_scores == 0)
        if busy != self._busy:
            self._busy = busy
            self._group.change_busy(1 if busy else -1)
