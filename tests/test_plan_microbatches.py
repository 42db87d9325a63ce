"""plan_microbatches: what every plan keeps to, how few and how even micro-batches are, and that both backends give the same plan."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from areal.ops._dispatch import missing_cpp
from areal.ops.plan_microbatches import lower_bound, plan_microbatches

needs_cpp = pytest.mark.skipif(missing_cpp() is not None, reason=str(missing_cpp()))
BACKENDS = ["torch", pytest.param("cpp", marks=needs_cpp)]
ALGORITHMS = ["lpt", "kk", "ffd"]
QUADRATIC = (1.0, 1 / 24576)  # hidden size 4096


def members(plan: list[list[list[int]]]) -> list[list[int]]:
    return [mb for rank in plan for mb in rank]


def lognormal(n: int, mean: float = 8.0, sigma: float = 0.8, longest: int = 32768) -> np.ndarray:
    return np.clip(np.random.default_rng(0).lognormal(mean, sigma, n), 64, longest).astype(np.int64)


def lockstep_efficiency(plan: list[list[list[int]]], costs: np.ndarray) -> float:
    work = np.array([[costs[mb].sum() for mb in rank] for rank in plan])
    return costs.sum() / len(plan) / work.max(axis=0).sum()


def fewest_bins(lengths: list[int], capacity: int) -> int:
    """By trying everything."""
    best = len(lengths)

    def place(at: int, rooms: list[int]) -> None:
        nonlocal best
        if len(rooms) >= best:
            return
        if at == len(lengths):
            best = len(rooms)
            return
        for b in {room: b for b, room in enumerate(rooms) if room >= lengths[at]}.values():
            place(at + 1, [*rooms[:b], rooms[b] - lengths[at], *rooms[b + 1 :]])
        place(at + 1, [*rooms, capacity - lengths[at]])

    place(0, [])
    return best


@pytest.mark.parametrize("backend", BACKENDS)
def test_ffd_follows_the_paper_on_a_worked_example(backend: str) -> None:
    # Descending 8 7 5 4 2 1 under 10: [8], [7], [5], then 4 joins the 5, 2 joins the 8 (fewest sequences), 1 joins the 7.
    plan = plan_microbatches([4, 8, 5, 1, 7, 2], 10, algorithm="ffd", backend=backend)
    assert sorted(map(sorted, members(plan))) == [[0, 2], [1, 5], [3, 4]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_kk_follows_differencing_on_a_worked_example(backend: str) -> None:
    # 8 7 6 5 4 into two: 8-7=1, 6-5=1, then 4 against 8 7, ... ends at 16 and 14, which is what the textbook gives.
    plan = plan_microbatches([8, 7, 6, 5, 4], 16, algorithm="kk", backend=backend)
    assert sorted(sum([8, 7, 6, 5, 4][i] for i in mb) for mb in members(plan)) == [14, 16]


@pytest.mark.parametrize("backend", BACKENDS)
def test_lpt_weighs_cost_not_tokens(backend: str) -> None:
    lengths = [8, 4, 4, 4, 4]  # by tokens 8 4 | 4 4 4; by squares, 64 is as much as four times 16
    plan = plan_microbatches(lengths, 20, k_min=2, cost=(0.0, 1.0), backend=backend)
    assert sorted(members(plan)) == [[0], [1, 2, 3, 4]]
    assert sorted(map(len, members(plan_microbatches(lengths, 20, k_min=2, backend=backend)))) == [2, 3]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_opens_k_min_microbatches(algorithm: str, backend: str) -> None:
    assert len(plan_microbatches([1] * 10, 100, algorithm=algorithm, backend=backend)[0]) == 1
    plan = plan_microbatches([1] * 10, 100, k_min=4, algorithm=algorithm, backend=backend)
    assert sorted(len(mb) for mb in plan[0]) == [2, 2, 3, 3]
    assert len(plan_microbatches([1, 1], 100, k_min=4, algorithm=algorithm, backend=backend)[0]) == 2


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_ranks_get_the_same_number_of_microbatches(algorithm: str, backend: str) -> None:
    plan = plan_microbatches([5, 5, 5, 5, 5], 10, world_size=2, algorithm=algorithm, backend=backend)  # 3 would do; 4 serves both ranks
    assert [len(rank) for rank in plan] == [2, 2]
    assert all(members(plan))
    assert plan_microbatches([5], 10, world_size=3, algorithm=algorithm, backend=backend) == [[[0]], [[]], [[]]]
    assert plan_microbatches([], 10, world_size=2, algorithm=algorithm, backend=backend) == [[], []]


@pytest.mark.parametrize("cost", [(1.0, 0.0), QUADRATIC])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_ranks_get_like_totals(algorithm: str, cost: tuple[float, float]) -> None:
    lengths = np.random.default_rng(0).integers(10, 1000, 400)
    costs = cost[0] * lengths + cost[1] * lengths**2.0
    plan = plan_microbatches(lengths, 4096, world_size=4, cost=cost, algorithm=algorithm)
    totals = [sum(costs[i] for mb in rank for i in mb) for rank in plan]
    assert max(totals) - min(totals) < 0.05 * max(totals)


@pytest.mark.parametrize(
    ("lengths", "least"),
    [
        (lognormal(4096), 512),
        (lognormal(4096, 9.0, 1.0), 1416),  # three sequences a micro-batch, many of a whole one's length
        (np.random.default_rng(0).integers(1, 32769, 4096), 2080),
        (lognormal(256, longest=16384), 32),
    ],
)
@pytest.mark.parametrize("cost", [(1.0, 0.0), QUADRATIC])
def test_lockstep_efficiency_at_the_smallest_count(lengths: np.ndarray, least: int, cost: tuple[float, float]) -> None:
    costs = cost[0] * lengths + cost[1] * lengths**2.0
    for algorithm in ("lpt", "kk"):
        plan = plan_microbatches(lengths, 32768, world_size=8, cost=cost, algorithm=algorithm)
        assert len(members(plan)) == least == -(-lower_bound(np.sort(lengths)[::-1], 32768) // 8) * 8
        if len(lengths) == 4096 or cost[1] == 0:
            assert lockstep_efficiency(plan, costs) > 0.99


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_turn_that_one_sequence_makes_long_is_filled(backend: str) -> None:
    # 300 costs more than the mean of 220: beside it 300, so that 140 are left for each of the next turn, 440 in all and not 300 + 193.
    lengths = [300, *[20] * 29]
    plan = plan_microbatches(lengths, 400, world_size=2, k_min=4, backend=backend)
    assert sum(max(sum(lengths[i] for i in mb) for mb in turn) for turn in zip(*plan, strict=True)) == 440
    assert lockstep_efficiency(plan, np.array(lengths)) == 1.0


@pytest.mark.parametrize("backend", BACKENDS)
def test_full_microbatches_are_found_where_greedy_rules_fail(backend: str) -> None:
    # 36 = 12 * 3 tokens in three micro-batches of exactly 12; costliest first or first fit need four.
    lengths = [6, 6, 4, 4, 4, 5, 5, 2]
    for algorithm in ("lpt", "kk"):
        assert len(plan_microbatches(lengths, 12, algorithm=algorithm, backend=backend)[0]) == 3


@needs_cpp
@settings(deadline=None, max_examples=300)
@given(st.data())
def test_backends_agree_and_every_plan_keeps_the_rules(data: st.DataObject) -> None:
    capacity = data.draw(st.integers(1, 60) | st.just(2**40))
    lengths = data.draw(st.lists(st.integers(max(1, capacity // 8), capacity) | st.integers(1, capacity), max_size=60))
    world_size, k_min = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 8))
    algorithm = data.draw(st.sampled_from(ALGORITHMS))
    cost = data.draw(st.sampled_from([(1.0, 0.0), (0.3, 0.7), (0.0, 1e-3)]))
    options = {"world_size": world_size, "k_min": k_min, "cost": cost, "algorithm": algorithm}
    plan = plan_microbatches(lengths, capacity, **options, backend="cpp")
    assert plan == plan_microbatches(lengths, capacity, **options, backend="torch")
    assert sorted(i for mb in members(plan) for i in mb) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in mb) <= capacity for mb in members(plan))
    assert all(mb == sorted(mb) for mb in members(plan))
    assert len(plan) == world_size and len({len(rank) for rank in plan}) == 1
    assert len(members(plan)) >= min(k_min, len(lengths))
    if len(lengths) >= len(members(plan)):
        assert all(members(plan)), "an empty micro-batch although there are sequences enough"
    if algorithm != "ffd":
        least = max(lower_bound(np.sort(np.array(lengths, dtype=np.int64))[::-1], capacity), min(k_min, len(lengths)))
        assert len(members(plan)) <= -(-max(least, 11 * least // 9 + 1, 1) // world_size) * world_size  # first fit's guarantee


@settings(deadline=None, max_examples=100)
@given(st.integers(2, 30).flatmap(lambda c: st.tuples(st.just(c), st.lists(st.integers(1, c), max_size=8))))
def test_lower_bound_and_smallest_count_against_all_packings(case: tuple[int, list[int]]) -> None:
    capacity, lengths = case
    fewest = fewest_bins(lengths, capacity)
    assert lower_bound(np.sort(np.array(lengths, dtype=np.int64))[::-1], capacity) <= fewest
    for algorithm in ("lpt", "kk"):  # finding the fewest is NP-hard: one more in one or two of a hundred awkward cases
        assert len(members(plan_microbatches(lengths, capacity, algorithm=algorithm))) in (fewest, fewest + 1)


@needs_cpp
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_backends_agree_on_real_sizes(algorithm: str) -> None:
    for lengths, cost in ((lognormal(2000), QUADRATIC), (lognormal(2000, 9.5, 0.5), (1.0, 0.0))):
        options = {"world_size": 8, "cost": cost, "algorithm": algorithm}
        assert plan_microbatches(lengths, 32768, **options, backend="cpp") == plan_microbatches(lengths, 32768, **options, backend="torch")


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (([3, 11, 4], 10), {}, "sequence 1 has 11 tokens; a micro-batch takes 1 to 10"),
        (([3, 0], 10), {}, "sequence 1 has 0 tokens"),
        (([3], 0), {}, "capacity=0"),
        (([3], 9.5), {}, "plan_microbatches: capacity=9.5; it must be an integer"),
        (([3], 3), {"world_size": 0}, "world_size=0"),
        (([3], 3), {"k_min": -1}, "k_min=-1"),
        (([[3]], 10), {}, "2 dimensions"),
        (([1.5], 10), {}, "lengths is float64"),
        (([3], 10), {"cost": (-1.0, 0.0)}, "cost=\\(-1.0, 0.0\\)"),
        (([3], 10), {"cost": (0.0, 0.0)}, "not both 0"),
        (([3], 10), {"cost": (float("nan"), 0.0)}, "cost="),
        (([3], 10), {"cost": 1.0}, "cost=1.0"),
        (([3], 10), {"algorithm": "best"}, "algorithm 'best' is unknown; there are 'lpt', 'kk' and 'ffd'"),
    ],
)
def test_mistakes_are_named(arguments: tuple, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_microbatches(*arguments, **options)
