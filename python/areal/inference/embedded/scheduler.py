"""Which waiting sequences are admitted, and which of them share a prefill."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from areal.inference.embedded.request import Sequence


@dataclass(slots=True)
class PrefillGroup:
    """Sequences of one prompt: the first is prefilled, the others get copies of its K/V."""

    members: list[Sequence]


class Scheduler:
    """First come, first served. Admission waits until a few slots are free, since prefills are cheaper together."""

    def __init__(self, n_slots: int) -> None:
        self.waiting: deque[Sequence] = deque()
        self._batch = max(1, n_slots // 8)

    def take(self, n_free: int, n_running: int) -> list[PrefillGroup]:
        """The sequences to be admitted now, grouped by prompt in order of arrival."""
        n_waiting = len(self.waiting)
        if not n_waiting or n_free == 0 or (n_running and n_free < min(self._batch, n_waiting)):
            return []
        groups: dict[bytes, PrefillGroup] = {}
        for _ in range(min(n_free, n_waiting)):
            sequence = self.waiting.popleft()
            group = groups.get(sequence.prompt_key)
            if group is None:
                groups[sequence.prompt_key] = PrefillGroup([sequence])
            else:
                group.members.append(sequence)
        return list(groups.values())

    def remove(self, rid: str | None) -> list[Sequence]:
        """Takes the sequences of a request id (None: of every request) out of the queue."""
        removed = [s for s in self.waiting if rid is None or s.request.rid == rid]
        if removed:
            self.waiting = deque(s for s in self.waiting if rid is not None and s.request.rid != rid)
        return removed
