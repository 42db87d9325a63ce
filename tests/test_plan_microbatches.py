"""plan_microbatches: the paper's algorithm, the cut for ranks, and that both backends give the same plan."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from areal.ops._dispatch import missing_cpp
from areal.ops.plan_microbatches import plan_microbatches

needs_cpp = pytest.mark.skipif(missing_cpp() is not None, reason=str(missing_cpp()))
BACKENDS = ["torch", pytest.param("cpp", marks=needs_cpp)]


def members(plan: list[list[list[int]]]) -> list[list[int]]:
    return [mb for rank in plan for mb in rank]


@pytest.mark.parametrize("backend", BACKENDS)
def test_follows_the_paper_on_a_worked_example(backend: str) -> None:
    # Descending 8 7 5 4 2 1 under 10: [8], [7], [5], then 4 joins the 5, 2 joins the 8 (fewest sequences), 1 joins the 7.
    plan = plan_microbatches([4, 8, 5, 1, 7, 2], 10, backend=backend)
    assert sorted(map(sorted, members(plan))) == [[0, 2], [1, 5], [3, 4]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_opens_k_min_microbatches_first(backend: str) -> None:
    assert len(plan_microbatches([1] * 10, 100, backend=backend)[0]) == 1
    assert sorted(len(mb) for mb in plan_microbatches([1] * 10, 100, k_min=4, backend=backend)[0]) == [2, 2, 3, 3]
    assert len(plan_microbatches([1, 1], 100, k_min=4, backend=backend)[0]) == 2


@pytest.mark.parametrize("backend", BACKENDS)
def test_ranks_get_the_same_number_of_microbatches(backend: str) -> None:
    plan = plan_microbatches([5, 5, 5, 5, 5], 10, world_size=2, backend=backend)  # 3 would do; 4 serves both ranks
    assert [len(rank) for rank in plan] == [2, 2]
    assert all(members(plan))
    assert plan_microbatches([5], 10, world_size=3, backend=backend) == [[[0]], [[]], [[]]]
    assert plan_microbatches([], 10, world_size=2, backend=backend) == [[], []]


@pytest.mark.parametrize("backend", BACKENDS)
def test_ranks_get_like_totals(backend: str) -> None:
    lengths = np.random.default_rng(0).integers(10, 1000, 400)
    plan = plan_microbatches(lengths, 4096, world_size=4, backend=backend)
    totals = [sum(int(lengths[i]) for mb in rank for i in mb) for rank in plan]
    assert max(totals) - min(totals) < 0.05 * max(totals)


@needs_cpp
@settings(deadline=None, max_examples=300)
@given(st.data())
def test_backends_agree_and_nothing_is_lost(data: st.DataObject) -> None:
    capacity = data.draw(st.integers(1, 60))
    lengths = data.draw(st.lists(st.integers(1, capacity), max_size=60))
    world_size, k_min = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 8))
    plan = plan_microbatches(lengths, capacity, world_size=world_size, k_min=k_min, backend="cpp")
    assert plan == plan_microbatches(lengths, capacity, world_size=world_size, k_min=k_min, backend="torch")
    assert sorted(i for mb in members(plan) for i in mb) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in mb) <= capacity for mb in members(plan))
    assert len(plan) == world_size and len({len(rank) for rank in plan}) == 1
    assert len(members(plan)) >= min(k_min, len(lengths))
    if len(lengths) >= len(members(plan)):
        assert all(members(plan)), "an empty micro-batch although there are sequences enough"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([3, 11, 4], 10), "sequence 1 has 11 tokens; a micro-batch takes 1 to 10"),
        (([3, 0], 10), "sequence 1 has 0 tokens"),
        (([3], 0), "capacity=0"),
        (([[3]], 10), "2 dimensions"),
    ],
)
def test_mistakes_are_named(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_microbatches(*arguments)
    with pytest.raises(ValueError, match="algorithm 'lpt' is unknown"):
        plan_microbatches([1], 1, algorithm="lpt")
