"""Finished groups on their way to the trainer, and the rule that no token is ever trained on past its age.

A group whose oldest token has version v must be in the batch of policy version ``v + eta`` at the latest: its deadline. A batch takes
finished groups, earliest deadline first. It may leave groups for later, finished or not, only if all of them can still meet their
deadlines; otherwise the cut waits for the oldest unfinished group. So nothing is dropped and nothing is over age.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterable

from areal.types import Group


def can_wait(oldest_versions: Iterable[int], version: int, eta: int, batch_size: int) -> bool:
    """Whether groups left out of the batch of ``version`` can all be trained on in time by the batches after it.

    The batches of versions ``version + 1 .. version + 1 + k`` hold ``(k + 1) * batch_size`` groups: at most that many may have a
    deadline of ``version + 1 + k`` or earlier, for every k; with k = -1, none may have its deadline now.
    """
    due = Counter(v + eta for v in oldest_versions)
    total = 0
    for deadline in sorted(due):
        total += due[deadline]
        if total > max(0, deadline - version) * batch_size:
            return False
    return True


class TrajectoryBuffer:
    """Knows every admitted, untrained group: unfinished ones by their admission version, finished ones by their tokens.

    The calls for one group are ``admitted`` first, then exactly one of ``put`` and ``reject``.
    """

    def __init__(self, batch_size: int, eta: int, *, mask_over_age: bool = False) -> None:
        self.batch_size = batch_size
        self.eta = eta
        self.mask_over_age = mask_over_age
        self.n_masked_tokens = 0
        self._unfinished: dict[int, int] = {}  # group id -> version at admission; no token of it is older
        self._finished: dict[int, Group] = {}
        self._changed = asyncio.Event()

    def __len__(self) -> int:
        """Finished groups."""
        return len(self._finished)

    @property
    def n_unfinished(self) -> int:
        return len(self._unfinished)

    def finished(self) -> list[Group]:
        """Those that no batch has taken yet."""
        return list(self._finished.values())

    def admitted(self, group_id: int, version: int) -> None:
        assert group_id not in self._unfinished and group_id not in self._finished, f"group {group_id} admitted twice"
        self._unfinished[group_id] = version

    def put(self, group: Group) -> None:
        del self._unfinished[group.group_id]
        self._finished[group.group_id] = group
        self._changed.set()

    def reject(self, group_id: int) -> None:
        del self._unfinished[group_id]
        self._changed.set()

    def try_cut(self, version: int) -> list[Group] | None:
        """The batch for the train step at policy ``version``, oldest first, or None when it has to wait."""
        if len(self._finished) < self.batch_size:
            return None
        order = sorted(self._finished.values(), key=lambda g: (g.oldest_version, g.group_id))
        batch, rest = order[: self.batch_size], order[self.batch_size :]
        if not self.mask_over_age:
            left = [g.oldest_version for g in rest] + list(self._unfinished.values())
            if not can_wait(left, version, self.eta, self.batch_size):
                return None
        for group in batch:
            del self._finished[group.group_id]
        self._enforce_age(batch, version)
        return batch

    async def cut(self, version: int, timeout: float) -> list[Group]:
        """Waits for a batch; ``timeout`` seconds without any group finishing is an error that names what is missing."""
        while (batch := self.try_cut(version)) is None:
            self._changed.clear()
            try:
                async with asyncio.timeout(timeout):  # wait_for of Python 3.11 may swallow a cancellation
                    await self._changed.wait()
            except TimeoutError:
                raise TimeoutError(f"the trainer waited {timeout:.0f} s for {self._missing(version)}") from None
        return batch

    def _missing(self, version: int) -> str:
        text = f"the batch of version {version}: {len(self._finished)} of {self.batch_size} groups are finished, {len(self._unfinished)} unfinished"
        if self._unfinished:
            group_id = min(self._unfinished, key=lambda g: (self._unfinished[g], g))
            text += f", the oldest is group {group_id}, admitted at version {self._unfinished[group_id]}"
        return text + "; no group finished in that time"

    def _enforce_age(self, batch: list[Group], version: int) -> None:
        for group in batch:
            for trajectory in group.trajectories:
                over_age = trajectory.loss_mask & (version - trajectory.versions > self.eta)
                n_over_age = int(over_age.sum())
                assert self.mask_over_age or n_over_age == 0, (
                    f"group {group.group_id} has {n_over_age} tokens over age at version {version}"
                )
                if n_over_age:
                    trajectory.loss_mask = trajectory.loss_mask & ~over_age
                    self.n_masked_tokens += n_over_age
