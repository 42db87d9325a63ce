"""Which finished groups are worth training on: DAPO's dynamic sampling (arXiv 2503.14476, section 3.2), with a bound on what it may waste.

A group whose episodes all earned the same has advantages of zero. Leaving it out keeps batches full of groups that teach something; but when
almost every group is like that, the servers would generate for nothing. So a group that is left out must be paid for by groups that are
trained on: ``max_waste`` for each. Beyond that, groups pass whatever they are, and are counted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from areal.config import ConfigError, RolloutConfig
from areal.types import Group
from areal.workflow.base import import_object

Keep = Callable[[Group], bool]


class FilterFailed(RuntimeError):
    """The user's filter raised: its answer is not known, and a run goes on neither with nor without it."""


def mixed(group: Group) -> bool:
    """Whether the group's episodes have different rewards."""
    rewards = [episode[-1].reward for episode in group.episodes()]
    return min(rewards) != max(rewards)


class GroupFilter:
    """Asked once about every group, in the order in which they finish; which ones pass beyond the bound depends on that order.

    Args:
        keep: true for a group to train on; None keeps all.
        max_waste: groups that may be left out for each one that is trained on. Among any groups that finish in a row, with k trained on, at
            most ``max_waste * (k + reserve)`` are left out, or one where that is less.
        reserve: groups whose share may be used up at once: the size of a batch.

    Attributes:
        n_filtered: groups left out.
        n_passed: groups that ``keep`` was against, trained on because the bound was reached.
    """

    def __init__(self, keep: Keep | None = None, max_waste: float = 4.0, reserve: int = 32) -> None:
        self.keep = keep
        self.max_waste = max_waste
        self.n_filtered = self.n_passed = 0
        self._most = max(1.0, max_waste * reserve)
        self._credit = self._most

    def state_dict(self) -> dict[str, float]:
        return {"n_filtered": self.n_filtered, "n_passed": self.n_passed, "credit": self._credit}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """The bound may be another one now; what is left of it is at most that."""
        self.n_filtered, self.n_passed = int(state["n_filtered"]), int(state["n_passed"])
        self._credit = min(self._most, state["credit"])

    def wants(self, group: Group) -> bool:
        """Whether to train on this group.

        Raises:
            FilterFailed: ``keep`` raised.
        """
        if self.keep is None:
            return True
        if not self._asked(group):
            if self._credit >= 1:
                self._credit -= 1
                self.n_filtered += 1
                return False
            self.n_passed += 1
        self._credit = min(self._most, self._credit + self.max_waste)
        return True

    def _asked(self, group: Group) -> bool:
        assert self.keep is not None
        try:
            return bool(self.keep(group))
        except Exception as error:  # boundary to the user's function, which may raise anything
            raise FilterFailed(f"the dynamic filter raised {type(error).__name__}: {error} (about group {group.group_id})") from error


def build_filter(rollout: RolloutConfig, given: Keep | str | None = None) -> GroupFilter:
    """The filter of a run: the one that was ``given`` (a function or an import path), or that of ``rollout.dynamic_filter``.

    Raises:
        ConfigError: an import path that leads nowhere, or to something that cannot be called.
    """
    named = rollout.dynamic_filter if given is None else given
    if named == "mixed":
        keep: Keep | None = mixed
    elif isinstance(named, str):
        keep = import_object("rollout.dynamic_filter" if given is None else "dynamic_filter_fn", named) if named else None
    else:
        keep = named
    if keep is not None and not callable(keep):
        raise ConfigError(f"the dynamic filter is a {type(keep).__name__}", "give a function of a Group that returns true or false")
    return GroupFilter(keep, rollout.dynamic_filter_max_waste, rollout.consumer_batch_size)
