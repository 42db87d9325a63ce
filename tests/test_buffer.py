import asyncio
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from areal.buffer import TrajectoryBuffer, can_wait
from areal.staleness import StalenessManager
from areal.types import Group, Trajectory


def group(group_id: int, versions: list[int]) -> Group:
    n = len(versions)
    trajectory = Trajectory(
        input_ids=np.arange(n + 1),
        loss_mask=np.array([False] + [True] * n),
        logprobs=np.zeros(n + 1, np.float32),
        versions=np.array([-1, *versions], np.int32),
        reward=1.0,
    )
    return Group(group_id, {}, [trajectory])


def test_oldest_is_consumed_first() -> None:
    buffer = TrajectoryBuffer(batch_size=1, eta=5)
    for group_id, version in [(0, 3), (1, 1), (2, 2)]:
        buffer.admitted(group_id, version)
        buffer.put(group(group_id, [version, 3]))
    assert [buffer.try_cut(3)[0].group_id for _ in range(3)] == [1, 2, 0]


def test_cut_waits_for_an_old_unfinished_group_only_when_it_must() -> None:
    buffer = TrajectoryBuffer(batch_size=1, eta=1)
    buffer.admitted(0, 0)  # long
    buffer.admitted(1, 0)
    buffer.put(group(1, [0]))
    assert [g.group_id for g in buffer.try_cut(0)] == [1]  # group 0 can still go into the batch of version 1
    buffer.admitted(2, 1)
    buffer.put(group(2, [1]))
    assert buffer.try_cut(1) is None  # its deadline is now
    buffer.put(group(0, [0, 1]))
    assert [g.group_id for g in buffer.try_cut(1)] == [0]


def test_rejection_of_the_awaited_group_frees_the_cut() -> None:
    async def scenario() -> list[Group]:
        buffer = TrajectoryBuffer(batch_size=1, eta=0)
        buffer.admitted(0, 0)
        buffer.admitted(1, 0)
        buffer.put(group(1, [0]))
        asyncio.get_running_loop().call_later(0.05, buffer.reject, 0)
        return await buffer.cut(0, timeout=5)

    assert [g.group_id for g in asyncio.run(scenario())] == [1]


def test_a_cut_that_waits_too_long_says_for_whom() -> None:
    buffer = TrajectoryBuffer(batch_size=2, eta=0)
    buffer.admitted(7, 0)
    with pytest.raises(TimeoutError, match=r"0 of 2 groups are finished, 1 unfinished, the oldest is group 7, admitted at version 0"):
        asyncio.run(buffer.cut(0, timeout=0.05))


def test_a_cut_that_is_cancelled_while_it_is_woken_ends() -> None:
    async def scenario() -> None:
        buffer = TrajectoryBuffer(batch_size=1, eta=0)
        buffer.admitted(0, 0)
        cutting = asyncio.create_task(buffer.cut(0, timeout=5))
        await asyncio.sleep(0.01)
        buffer.reject(0)
        await asyncio.sleep(0)  # the wait is done, the cut has not yet run on
        cutting.cancel()
        await asyncio.wait({cutting}, timeout=1)
        assert cutting.cancelled()

    asyncio.run(scenario())


def test_masking_instead_of_waiting_counts_tokens() -> None:
    buffer = TrajectoryBuffer(batch_size=1, eta=1, mask_over_age=True)
    buffer.admitted(0, 0)
    buffer.put(group(0, [0, 0, 1, 2]))
    (cut,) = buffer.try_cut(2)
    assert cut.trajectories[0].loss_mask.tolist() == [False, False, False, True, True]
    assert buffer.n_masked_tokens == 2


def brute_force_can_wait(oldest: list[int], version: int, eta: int, batch_size: int) -> bool:
    """Trains on the rest, earliest deadline first, and looks whether anybody is late."""
    rest = sorted(v + eta for v in oldest)
    step = version + 1
    while rest:
        if rest[0] < step:
            return False
        batch, rest = rest[:batch_size], rest[batch_size:]
        if any(deadline < step for deadline in batch):
            return False
        step += 1
    return True


@given(st.lists(st.integers(0, 8), max_size=14), st.integers(0, 8), st.integers(0, 4), st.integers(1, 4))
def test_can_wait_equals_playing_it_through(oldest: list[int], version: int, eta: int, batch_size: int) -> None:
    assert can_wait(oldest, version, eta, batch_size) == brute_force_can_wait(oldest, version, eta, batch_size)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, 4), st.integers(1, 4), st.floats(0, 0.3))
def test_no_token_is_ever_over_age_and_the_loop_never_stalls(seed: int, eta: int, batch_size: int, p_reject: float) -> None:
    """Random lengths, deaths, out-of-order finishes and late weight acknowledgements; the buffer asserts the age of every token."""
    rng = random.Random(seed)
    manager, buffer = StalenessManager(batch_size, eta, max_concurrent=50), TrajectoryBuffer(batch_size, eta)
    version = acknowledged = next_id = 0
    running: dict[int, list[int]] = {}
    for _ in range(4000):
        if version == 15:
            break
        for _ in range(manager.capacity(acknowledged)):
            manager.admit()
            buffer.admitted(next_id, acknowledged)
            running[next_id] = []
            next_id += 1
        for group_id, versions in list(running.items()):
            if rng.random() < 0.7:
                versions.append(acknowledged)
            if versions and rng.random() < (0.5 if group_id % 3 else 0.03):
                del running[group_id]
                if rng.random() < p_reject:
                    manager.finish_rejected()
                    buffer.reject(group_id)
                else:
                    manager.finish_accepted()
                    buffer.put(group(group_id, versions))
        if buffer.try_cut(version) is not None:
            version += 1
        if rng.random() < 0.5:
            acknowledged = version
    assert version == 15
