"""Keeps as many groups in flight as staleness allows: rows in, whole groups of scored trajectories out.

Invariants: every admitted group is handed to the buffer exactly once, as ``put`` or as ``reject``, and its slot returns in the same
moment; a group is put only when all its samples were scored; a dropped group is counted once, by the cause of the sample that failed
first; a group that the filter leaves out is rejected as a dropped one is, but counted by the filter, and no failure. A cancelled runner
leaves no task and no unfinished group behind.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import logging
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from areal.config import GRPOConfig
from areal.generation_slots import EpisodeSlot, GenerationSlots, GroupSlot
from areal.group_filter import GroupFilter
from areal.inference.client import RequestRejected, RolloutClient, Route
from areal.reward import RewardFailure
from areal.reward.service import score_watch
from areal.types import Group, ModelRequest, ModelResponse, Trajectory
from areal.workflow.base import FATAL, EpisodeDropped, RolloutWorkflow, TrajectoryError, to_trajectories
from areal.workflow.user_code import CallFailed, begin, end, result_of

log = logging.getLogger(__name__)
_END_SECONDS = 15.0  # an agent has 10 of them
_PAUSE = 1.0
_LOGGED_PER_CAUSE = 3


class RunnerError(RuntimeError):
    """Rollouts cannot go on: the data set ended, or nothing but failures comes out."""


class Admission(Protocol):
    """``staleness.StalenessManager`` as the runner sees it."""

    def capacity(self, version: int) -> int: ...
    def admit(self) -> None: ...
    def finish_accepted(self) -> None: ...
    def finish_rejected(self) -> None: ...
    def wait_for_scores(self, n: int) -> None: ...


class GroupSink(Protocol):
    """``buffer.TrajectoryBuffer`` as the runner sees it."""

    def admitted(self, group_id: int, version: int) -> None: ...
    def put(self, group: Group) -> None: ...
    def reject(self, group_id: int) -> None: ...


class DropCounter:
    """Dropped groups by cause, over a whole run."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()

    @property
    def totals(self) -> dict[str, int]:
        return dict(sorted(self._counts.items()))

    def restore(self, counts: Mapping[str, int]) -> None:
        """Those of the run that goes on, in place of its own."""
        self._counts = Counter(counts)

    def add(self, cause: str, message: str = "", n: int = 1) -> None:
        """Counts ``n``; the first messages of a cause are logged."""
        self._counts[cause] += n
        if self._counts[cause] <= _LOGGED_PER_CAUSE:
            log.warning("dropped (%s): %s", cause, message or "no message")


class EpisodeEngine:
    """What one episode generates with: every call has its own seed, all samples of a prompt share a server. After ``close`` it refuses."""

    __slots__ = ("_calls", "_client", "_closed", "_key", "_route", "_slot")

    def __init__(self, client: RolloutClient, key: str, route: Route | None = None, slot: EpisodeSlot | None = None) -> None:
        self._client = client
        self._key = key
        self._route = route
        self._slot = slot
        self._calls = 0
        self._closed = False

    def close(self) -> None:
        self._closed = True

    async def agenerate(self, request: ModelRequest) -> ModelResponse:
        """As ``RolloutClient.agenerate``; the n-th call of an episode always has the same random numbers."""
        if self._closed:
            await asyncio.sleep(_PAUSE)  # a workflow that catches everything and tries again must not hold the event loop
            raise RuntimeError("this engine's episode has ended")
        seed = derive_seed(self._key, self._calls)
        self._calls += 1
        if self._slot is None:
            return await self._client.agenerate(request, sampling_seed=seed, route=self._route)
        self._slot.generation_began()
        try:
            return await self._client.agenerate(request, sampling_seed=seed, route=self._route)
        finally:
            self._slot.generation_ended()

    def get_version(self) -> int:
        return self._client.get_version()


def derive_seed(key: str, call: int) -> int:
    """63 bits that depend on every character of the key and on the number of the call."""
    digest = hashlib.blake2b(f"{key}/{call}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def episode_key(seed: int, data: dict[str, Any], sample: int) -> str:
    """What the randomness of an episode depends on: run, prompt, epoch, sample."""
    return f"{seed}/{data.get('prompt_id', '')}/{data.get('epoch', 0)}/{sample}"


async def run_episode(
    client: RolloutClient,
    workflow: RolloutWorkflow,
    data: dict[str, Any],
    *,
    seed: int,
    sample: int = 0,
    route: Route | None = None,
    slot: EpisodeSlot | None = None,
) -> list[Trajectory]:
    """One episode of a row, as checked trajectories: one, unless it has several sequences. With a ``slot`` it has a task of its own.

    The workflow runs in a further task: when this one is cancelled it ends as cancelled, whatever the workflow makes of that.

    Raises:
        EpisodeDropped: it gave no sample; ``cause`` says why. Errors that are nobody's single episode (no server, no reward workers)
            come through as they are.
    """
    engine = EpisodeEngine(client, episode_key(seed, data, sample), route, slot)
    if slot is not None:
        score_watch.set(slot)
    try:
        task = begin(workflow.arun_episode(engine, dict(data)))
        try:
            await asyncio.wait({task})
        finally:
            engine.close()
            await end(task, _END_SECONDS, "an episode")
        result = result_of(task)
        if result is None:
            raise EpisodeDropped("workflow_none", "the workflow returned None")
        return to_trajectories(result)
    except (EpisodeDropped, *FATAL):
        raise
    except RewardFailure as error:
        raise EpisodeDropped(error.cause, str(error)) from error
    except RequestRejected as error:
        raise EpisodeDropped("request_rejected", str(error)) from error
    except TrajectoryError as error:
        raise EpisodeDropped("bad_trajectory", str(error)) from error
    except TimeoutError as error:
        raise EpisodeDropped("request_timeout", str(error) or "a wait inside the workflow timed out") from error
    except CallFailed as error:
        raise EpisodeDropped("workflow_raised", str(error)) from error
    except Exception as error:  # boundary to the user's workflow: whatever it raises costs one group, counted
        log.debug("a workflow raised", exc_info=True)
        raise EpisodeDropped("workflow_raised", f"{type(error).__name__}: {error}") from error
    finally:
        if slot is not None:
            slot.end()


class Runner:
    """Runs episodes until it is cancelled.

    Args:
        config: seed, n_samples, time limits.
        dataset: an iterator of rows, or a sequence (then its rows in shuffled epochs, without end).
        staleness, buffer: admission and destination; the version of both is ``client.acked_version``.
        drops: counts what is lost.
        group_filter: which finished groups the buffer gets.
    """

    def __init__(
        self,
        config: GRPOConfig,
        client: RolloutClient,
        workflow: RolloutWorkflow,
        dataset: Iterable[Any],
        staleness: Admission,
        buffer: GroupSink,
        drops: DropCounter | None = None,
        group_filter: GroupFilter | None = None,
    ) -> None:
        self.config = config
        self.drops = drops if drops is not None else DropCounter()
        self._filter = group_filter or GroupFilter()
        self._client = client
        self._workflow = workflow
        self._rows = _iterator(dataset, config.seed)
        self._staleness = staleness
        self._buffer = buffer
        self._next_group = self._n_rows = 0
        self._again: deque[tuple[int, dict[str, Any]]] = deque()
        self._unfinished: dict[int, dict[str, Any]] = {}
        self._wake = asyncio.Event()
        self.slots = GenerationSlots(staleness, self._wake.set)
        self._dropped_in_a_row = 0
        self._last_drop = ""

    def position(self) -> tuple[int, int, dict[int, dict[str, Any]]]:
        """The number of the next new group, how many rows were read, and the rows of the groups that are not finished, by their numbers."""
        return self._next_group, self._n_rows, {**self._unfinished, **dict(self._again)}

    def resume(self, next_group: int, n_rows: int, again: Sequence[tuple[int, dict[str, Any]]]) -> None:
        """Before ``run``: groups begin with the rows of ``again``, under their old numbers; the data set is where it was left."""
        self._next_group, self._n_rows, self._again = next_group, n_rows, deque(again)

    async def run(self) -> None:
        """Never returns by itself.

        Raises:
            ExceptionGroup: around a RunnerError (the data set ended, nothing but failures), a ServerDied or a RewardServiceError.
        """
        self._client.on_change(self._wake.set)
        try:
            async with asyncio.TaskGroup() as groups:
                while True:
                    self._wake.clear()
                    self._admit(groups)
                    await self._wake.wait()
        finally:
            self._client.off_change(self._wake.set)
            for group_id in list(self._unfinished):  # cancelled, some before they began
                self._finish(group_id, None)

    def _admit(self, groups: asyncio.TaskGroup) -> None:
        version = self._client.acked_version
        if version < 0:  # no server is alive
            return
        for _ in range(self._staleness.capacity(version)):
            if self._again:
                group_id, row = self._again.popleft()
            elif (new := self._next_row()) is not None:
                group_id, row = self._next_group, new
                self._next_group += 1
            else:
                continue
            self._staleness.admit()
            self._buffer.admitted(group_id, version)
            self._unfinished[group_id] = row
            groups.create_task(self._run_group(group_id, row, version), name=f"group {group_id}").add_done_callback(self._wake_up)

    def _wake_up(self, _: object) -> None:
        self._wake.set()

    def _next_row(self) -> dict[str, Any] | None:
        """None for a row that is not a row: counted, and the next one is read in the next round."""
        try:
            row = next(self._rows)
            self._n_rows += 1
        except StopIteration:
            raise RunnerError(
                f"the data set ended after {self._next_group} prompts; give one that goes on (areal.data.PromptDataset)"
            ) from None
        if not isinstance(row, dict):
            self._drop("malformed_row", f"a row is a dict, not {type(row).__name__}: {str(row)[:80]!r}")
            self._wake.set()
            return None
        if "prompt_id" not in row:  # or all such prompts, and all their epochs, would have the same random numbers
            row = {"prompt_id": f"row/{self._next_group}", **row}
        return row

    async def _run_group(self, group_id: int, row: dict[str, Any], version: int) -> None:
        try:
            episodes = await self._episodes(row)
            self._check(episodes, version)
        except EpisodeDropped as dropped:
            self._finish(group_id, None)
            self._drop(dropped.cause, str(dropped))
        else:
            self._dropped_in_a_row = 0
            sizes = [len(episode) for episode in episodes] if any(len(episode) > 1 for episode in episodes) else None
            group = Group(group_id, row, [t for episode in episodes for t in episode], sizes)
            self._finish(group_id, group if self._filter.wants(group) else None)

    def _finish(self, group_id: int, group: Group | None) -> None:
        del self._unfinished[group_id]
        if group is None:
            self._buffer.reject(group_id)
            self._staleness.finish_rejected()
        else:
            self._buffer.put(group)
            self._staleness.finish_accepted()

    async def _episodes(self, row: dict[str, Any]) -> list[list[Trajectory]]:
        """All samples of a prompt, or EpisodeDropped with the cause of the first that failed."""
        seed, route, limit = self.config.seed, Route(), asyncio.timeout(self.config.rollout.episode_timeout)
        n_samples = self.config.gconfig.n_samples
        group = GroupSlot(self.slots, n_samples)
        try:
            async with limit, asyncio.TaskGroup() as samples:
                tasks = [
                    samples.create_task(
                        run_episode(self._client, self._workflow, row, seed=seed, sample=sample, route=route, slot=EpisodeSlot(group))
                    )
                    for sample in range(n_samples)
                ]
        except TimeoutError:
            seconds = self.config.rollout.episode_timeout
            raise EpisodeDropped("episode_timeout", f"a group was not finished after {seconds:g} s (rollout.episode_timeout)") from None
        except BaseExceptionGroup as errors:
            _, others = errors.split(EpisodeDropped)
            if others is not None:
                raise others from None
            raise errors.exceptions[0] from None
        finally:
            group.end()
        return [task.result() for task in tasks]

    def _check(self, episodes: list[list[Trajectory]], admitted: int) -> None:
        """What the trainer and the buffer rely on; ``admitted``: the version at admission."""
        key, longest = self.config.sample_budget
        for trajectory in itertools.chain.from_iterable(episodes):
            if len(trajectory) > longest:
                why = f"a sample of {len(trajectory)} tokens does not fit into a micro-batch ({key}={longest})"
                raise EpisodeDropped("sample_too_long", why)
            if trajectory.oldest_version < admitted:
                why = f"a token has version {trajectory.oldest_version}, but its episode began at version {admitted}"
                raise EpisodeDropped("bad_trajectory", f"{why}; train only on what the episode's own engine sampled")

    def _drop(self, cause: str, message: str) -> None:
        self.drops.add(cause, message)
        self._dropped_in_a_row += 1
        limit = max(100, 3 * self.config.rollout.max_concurrent_rollouts)
        if self._dropped_in_a_row == limit:
            counts = ", ".join(f"{name} {n}" for name, n in self.drops.totals.items())
            raise RunnerError(f"{limit} prompts in a row gave no group (dropped: {counts}); the last one: {message}")


def _iterator(dataset: Iterable[Any], seed: int) -> Iterator[Any]:
    if isinstance(dataset, Iterator):
        return dataset
    from areal.data import PromptDataset

    return PromptDataset(dataset, seed=seed)  # type: ignore[arg-type]
