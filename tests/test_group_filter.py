"""Which groups are left out of training, within the bound on waste; and what that does to a runner on a real server."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rollout_servers import Server, make_model

from areal.buffer import TrajectoryBuffer
from areal.config import ConfigError, GRPOConfig, RolloutConfig
from areal.group_filter import FilterFailed, GroupFilter, build_filter, mixed
from areal.inference.client import RolloutClient
from areal.runner import DropCounter, Runner, RunnerError
from areal.staleness import StalenessManager
from areal.types import Group, Trajectory

B, ETA, N_SAMPLES = 4, 2, 3


def group(*rewards: float, sizes: list[int] | None = None) -> Group:
    return Group(0, {}, [Trajectory(np.zeros(2), np.array([False, True]), np.zeros(2), np.zeros(2), r) for r in rewards], sizes)


def test_mixed_compares_the_rewards_of_episodes() -> None:
    assert mixed(group(1, 1, 0)) and mixed(group(0.25, 0.5))
    assert not mixed(group(0, 0, 0)) and not mixed(group(0.3))
    # The last sequence's reward is the episode's.
    assert not mixed(group(0, 1, 0.5, 1, sizes=[2, 2])) and mixed(group(1, 0, 1, 1, sizes=[2, 2]))


@given(
    wanted=st.lists(st.booleans(), max_size=300),
    max_waste=st.floats(0.1, 6),
    reserve=st.integers(1, 20),
)
def test_the_bound_holds_for_any_groups_in_a_row(wanted: list[bool], max_waste: float, reserve: int) -> None:
    answers = iter(wanted)
    chosen = GroupFilter(lambda _: next(answers), max_waste, reserve)
    trained = [chosen.wants(group(0)) for _ in wanted]
    assert all(t for t, w in zip(trained, wanted, strict=True) if w)
    assert chosen.n_filtered == trained.count(False)
    assert chosen.n_passed == sum(t and not w for t, w in zip(trained, wanted, strict=True))
    # Over all stretches: the left out ones less what the kept ones pay for never rise by more than the reserve.
    balance = list(itertools.accumulate(((-max_waste if t else 1.0) for t in trained), initial=0.0))
    lowest = itertools.accumulate(balance, min)
    assert all(now - low <= max(1.0, max_waste * reserve) + 1e-6 for now, low in zip(balance, lowest, strict=True))
    if max_waste >= 1 and not any(wanted):  # and the bound is used: nothing passes before
        assert trained[: int(max_waste * reserve)] == [False] * min(len(wanted), int(max_waste * reserve))


def test_off_by_default() -> None:
    chosen = build_filter(RolloutConfig())
    assert chosen.wants(group(0, 0)) and (chosen.n_filtered, chosen.n_passed) == (0, 0)


def keeps_even(group: Group) -> bool:
    return group.data["number"] % 2 == 0


def test_filters_by_name_and_given() -> None:
    assert build_filter(RolloutConfig(dynamic_filter="mixed")).keep is mixed
    assert build_filter(RolloutConfig(dynamic_filter="areal.group_filter:mixed")).keep is mixed
    assert build_filter(RolloutConfig(dynamic_filter="mixed"), keeps_even).keep is keeps_even
    assert build_filter(RolloutConfig(), "mixed").keep is mixed
    with pytest.raises(ConfigError, match=r"rollout.dynamic_filter='no.where:at_all' cannot be imported"):
        build_filter(RolloutConfig(dynamic_filter="no.where:at_all"))
    with pytest.raises(ConfigError, match="is a int"):
        build_filter(RolloutConfig(), 3)  # type: ignore[arg-type]
    with pytest.raises(FilterFailed, match=r"KeyError: 'number' \(about group 0\)"):
        build_filter(RolloutConfig(), keeps_even).wants(group(0))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder: Path = tmp_path_factory.mktemp("model")
    make_model(folder)
    server = Server(folder, tmp_path_factory.mktemp("logs") / "rollout_0.log").wait()
    yield server
    server.process.terminate()


class Numbered:
    """An episode without a word: the row's number is its reward, of the last sample one more if it is even."""

    def __init__(self) -> None:
        self.n_failures = 0

    async def arun_episode(self, engine: Any, data: dict[str, Any]) -> dict[str, Any]:
        await asyncio.sleep(0)
        if data["number"] < self.n_failures:
            raise ValueError("early rows fail")
        return {"input_ids": [3, 4], "loss_mask": [0, 1], "logprobs": [0, -1], "versions": [-1, 0], "rewards": float(data["number"])}


def run(server: Server, chosen: GroupFilter, *, n_failures: int = 0, until_end: bool = False) -> tuple[list[int], DropCounter, int]:
    """(numbers of the groups in the buffer, drops, rows read) once no group is admitted any more at version 0."""
    rollout = {"consumer_batch_size": B, "max_head_offpolicyness": ETA, "max_concurrent_rollouts": 8}
    config = GRPOConfig.model_validate(
        {"actor": {"path": "x"}, "train_dataset": {"type": "arithmetic"}, "gconfig": {"n_samples": N_SAMPLES}, "rollout": rollout}
    )
    read = itertools.count()
    rows = ({"prompt": "a1=", "number": next(read)} for _ in itertools.count())
    staleness, buffer, drops, workflow = StalenessManager(B, ETA, 8), TrajectoryBuffer(B, ETA), DropCounter(), Numbered()
    workflow.n_failures = n_failures

    async def main() -> list[int]:
        client = RolloutClient(config.rollout, [server.url])
        task = asyncio.create_task(Runner(config, client, workflow, rows, staleness, buffer, drops, chosen).run())
        try:
            async with asyncio.timeout(60):
                while until_end or len(buffer) < (ETA + 1) * B or buffer.n_unfinished:
                    if task.done():
                        await task
                    await asyncio.sleep(0.01)
                assert staleness.n_accepted == len(buffer) == (ETA + 1) * B and staleness.n_running == 0
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await client.close()
        return sorted(g.data["number"] for _ in range(ETA + 1) for g in buffer.try_cut(0) or [])

    return asyncio.run(main()), drops, next(read)


def test_a_filtered_group_gives_its_slot_back(server: Server) -> None:
    chosen = GroupFilter(keeps_even, max_waste=4, reserve=B)
    kept, drops, n_read = run(server, chosen)
    assert kept == list(range(0, 2 * (ETA + 1) * B, 2))  # with equal times, the first that the filter keeps
    assert chosen.n_filtered == n_read - len(kept) and chosen.n_passed == 0 and not drops.totals


def test_hundreds_of_filtered_groups_are_no_failure(server: Server) -> None:
    chosen = GroupFilter(lambda g: g.data["number"] >= 500, max_waste=1000, reserve=B)
    kept, drops, _ = run(server, chosen, n_failures=40)  # then 460 that are filtered
    assert kept == list(range(500, 500 + (ETA + 1) * B)) and chosen.n_filtered == 460 and drops.totals == {"workflow_raised": 40}


def test_beyond_the_bound_groups_pass(server: Server) -> None:
    chosen = GroupFilter(mixed, max_waste=2, reserve=B)  # every group is all alike
    kept, _, n_read = run(server, chosen)
    n = (ETA + 1) * B
    # The reserve, then two for each that is trained on but the last, behind which nothing comes any more.
    assert (
        len(kept) == n == chosen.n_passed and 2 * B + 2 * (n - 8) <= chosen.n_filtered <= 2 * B + 2 * n and n_read == n + chosen.n_filtered
    )


def test_a_filter_that_raises_ends_the_run(server: Server) -> None:
    def broken(group: Group) -> bool:
        raise ZeroDivisionError("hm")

    with pytest.raises(BaseExceptionGroup) as caught:
        run(server, GroupFilter(broken), until_end=True)
    assert caught.group_contains(FilterFailed, match="ZeroDivisionError: hm") and not caught.group_contains(RunnerError)
