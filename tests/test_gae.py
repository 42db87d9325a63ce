"""gae against the recurrence written out in float64, on every backend."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from areal.ops import gae
from areal.ops._dispatch import build_info, missing_cpp
from areal.ops.gae import _cpp, _op
from tests.op_backends import backends

ALL = pytest.mark.parametrize(("backend", "device"), backends("torch", "cpp", "cuda"))
LENGTHS = [0, 1, 7, 8, 9, 10, 0, 0, 100, 1025, 3, 0]


def packed(lengths: list[int], device: str = "cpu") -> tuple[Tensor, Tensor, Tensor, Tensor]:
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    total = int(cu_seqlens[-1])
    drawn = torch.randn(total), torch.randn(total), torch.randn(len(lengths))
    rewards, values, bootstrap = (x.to(device) for x in drawn)
    return rewards, values, cu_seqlens.to(device), bootstrap


def recurrence(rewards: Tensor, values: Tensor, cu_seqlens: Tensor, gamma: float, lam: float, bootstrap: Tensor | None) -> Tensor:
    """The advantages in float64, token by token."""
    r, v, ends = rewards.tolist(), values.tolist(), cu_seqlens.tolist()
    advantages = [0.0] * len(r)
    for i, (begin, end) in enumerate(itertools.pairwise(ends)):
        advantage, next_value = 0.0, 0.0 if bootstrap is None else bootstrap[i].item()
        for t in reversed(range(begin, end)):
            advantage = r[t] + gamma * next_value - v[t] + gamma * lam * advantage
            next_value = v[t]
            advantages[t] = advantage
    return torch.tensor(advantages, dtype=torch.float64)


def check(lengths: list[int], gamma: float, lam: float, with_bootstrap: bool, backend: str, device: str = "cpu") -> None:
    rewards, values, cu_seqlens, drawn = packed(lengths, device)
    bootstrap = drawn if with_bootstrap else None
    expected = recurrence(rewards, values, cu_seqlens, gamma, lam, bootstrap)
    advantages, returns = gae(rewards, values, cu_seqlens, gamma, lam, backend, bootstrap=bootstrap)
    assert advantages.dtype == returns.dtype == torch.float32 and not advantages.requires_grad
    bound = 1e-5 * max(1.0, expected.abs().max().item() if len(expected) else 0.0)
    torch.testing.assert_close(advantages.cpu().double(), expected, rtol=0, atol=bound)
    torch.testing.assert_close(returns.cpu().double(), expected + values.cpu().double(), rtol=0, atol=bound)


@ALL
@pytest.mark.parametrize("with_bootstrap", [False, True])
@pytest.mark.parametrize(("gamma", "lam"), [(0.99, 0.95), (1.0, 1.0), (0.9, 0.0), (0.0, 1.0)])
def test_is_the_recurrence(on_backend: tuple[str, str], gamma: float, lam: float, with_bootstrap: bool) -> None:
    check(LENGTHS, gamma, lam, with_bootstrap, *on_backend)


@ALL
@pytest.mark.parametrize("lengths", [[], [0], [0, 0, 0], [1], [1024], [1023, 1], [1024, 1024], [1] * 1500, [3000, 0, 5000]])
def test_shapes(on_backend: tuple[str, str], lengths: list[int]) -> None:
    check(lengths, 0.97, 0.9, True, *on_backend)


@ALL
@pytest.mark.parametrize("lengths", [[70_001], [1] * 3 + [69_000] + [5] * 200])
def test_more_than_65536_tokens(on_backend: tuple[str, str], lengths: list[int]) -> None:
    check(lengths, 1.0, 0.99, False, *on_backend)


def test_a_sequence_over_more_tiles_than_a_block_has_threads(cuda_on_host: object) -> None:
    # gamma = lam = 1: every tile matters to the first one. The advantage is the sum of all rewards to come.
    total = 258 * 1024 + 5
    rewards, values = torch.zeros(total), torch.zeros(total)
    rewards[-1], rewards[0] = 2.0, 1.0
    advantages, _ = gae(rewards, values, torch.tensor([0, total], dtype=torch.int32), 1.0, 1.0, "cuda")
    assert advantages[0] == 3.0 and (advantages[1:] == 2.0).all()


@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.integers(0, 70), max_size=12),
    gamma=st.floats(0.0, 1.0),
    lam=st.floats(0.0, 1.0),
    with_bootstrap=st.booleans(),
    backend=st.sampled_from(["torch", "cpp"] if missing_cpp() is None else ["torch"]),
)
def test_any_cut(lengths: list[int], gamma: float, lam: float, with_bootstrap: bool, backend: str) -> None:
    check(lengths, gamma, lam, with_bootstrap, backend)


@ALL
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays_in_its_sequence(on_backend: tuple[str, str], poison: float) -> None:
    backend, device = on_backend
    rewards, values, cu_seqlens, _ = packed([5, 20, 2000, 7], device)
    expected, _ = gae(rewards, values, cu_seqlens, 0.99, 0.95, "torch")
    rewards[5 + 20 + 1500] = poison
    values[5] = poison
    advantages, _ = gae(rewards, values, cu_seqlens, 0.99, 0.95, backend)
    clean = torch.cat([torch.arange(5), torch.arange(2025, 2032)]).to(device)
    torch.testing.assert_close(advantages[clean], expected[clean])
    assert not advantages[5:6].isfinite().any() and not advantages[25 : 25 + 1501].isfinite().any()


@ALL
def test_views_that_begin_anywhere(on_backend: tuple[str, str]) -> None:
    backend, device = on_backend
    rewards, values, _, _ = packed([3000], device)
    cu_seqlens = torch.tensor([0, 999, 2997], dtype=torch.int32, device=device)
    expected = recurrence(rewards[3:], values[3:], cu_seqlens, 0.9, 0.9, None)
    advantages, _ = gae(rewards[3:], values[3:], cu_seqlens, 0.9, 0.9, backend)
    torch.testing.assert_close(advantages.cpu().double(), expected, rtol=0, atol=1e-5)


@pytest.mark.skipif(missing_cpp() is not None, reason=str(missing_cpp()))
def test_instruction_sets_and_threads() -> None:
    rewards, values, cu_seqlens, bootstrap = packed([200_000, 0, 100_000, *LENGTHS, 65_536])
    expected = gae(rewards.double(), values.double(), cu_seqlens, 0.99, 0.95, "torch", bootstrap=bootstrap.double())
    info = build_info()
    assert info is not None
    for name in info["instruction_sets"]:
        result = _cpp(rewards, values, cu_seqlens, 0.99, 0.95, bootstrap, name)
        for got, want in zip(result, expected, strict=True):
            torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-4)
        torch.set_num_threads(3)
        try:
            threaded = _cpp(rewards, values, cu_seqlens, 0.99, 0.95, bootstrap, name)
        finally:
            torch.set_num_threads(1)
        assert all(torch.equal(a, b) for a, b in zip(result, threaded, strict=True))


def test_the_reference_takes_other_dtypes() -> None:
    rewards, values, cu_seqlens, _ = packed([5, 3])
    wide, _ = gae(rewards.double(), values.double(), cu_seqlens, 0.9, 0.9)
    assert wide.dtype == torch.float64
    narrow, _ = gae(rewards.bfloat16(), values.bfloat16(), cu_seqlens, 0.9, 0.9)
    torch.testing.assert_close(narrow.double(), wide, rtol=0.1, atol=0.1)


def test_gradients_end_here() -> None:
    rewards, values, cu_seqlens, _ = packed([5, 3])
    advantages, returns = gae(rewards.requires_grad_(), values.requires_grad_(), cu_seqlens, 0.9, 0.9)
    assert not advantages.requires_grad and not returns.requires_grad


def test_compiles_without_graph_break() -> None:
    arguments = packed(LENGTHS)

    def step(rewards: Tensor, values: Tensor, cu_seqlens: Tensor, bootstrap: Tensor) -> Tensor:
        advantages, returns = gae(rewards * 2, values, cu_seqlens, 0.9, 0.8, bootstrap=bootstrap)
        return advantages - returns

    torch.testing.assert_close(torch.compile(step, fullgraph=True, backend="aot_eager")(*arguments), step(*arguments))


@pytest.mark.parametrize("backend", ["torch", "cpp"] if missing_cpp() is None else ["torch"])
def test_opcheck(backend: str) -> None:
    rewards, values, cu_seqlens, bootstrap = packed([4, 0, 9])
    torch.library.opcheck(_op, (rewards, values, cu_seqlens, 0.9, 0.8, bootstrap, backend))


def test_wrong_arguments() -> None:
    rewards, values, cu_seqlens, bootstrap = packed([4, 5])
    cases = [
        ("gae: rewards is int64; it must be float32 or", (torch.zeros(9, dtype=torch.int64), values, cu_seqlens)),
        ("gae: rewards has the shape", (rewards[:, None], values, cu_seqlens)),
        ("gae: values has the shape", (rewards, values[1:], cu_seqlens)),
        ("gae: values is float64; it must be float32", (rewards, values.double(), cu_seqlens)),
        ("gae: values is on meta", (rewards, values.to("meta"), cu_seqlens)),
        ("gae: values is not contiguous", (rewards, torch.zeros(18)[::2], cu_seqlens)),
        ("gae: cu_seqlens is int64; it must be int32", (rewards, values, cu_seqlens.long())),
        ("gae: cu_seqlens is empty", (rewards, values, cu_seqlens[:0])),
    ]
    for message, (r, v, c) in cases:
        with pytest.raises(ValueError, match=message):
            gae(r, v, c, 0.9, 0.9)
    with pytest.raises(ValueError, match="gae: bootstrap has the shape"):
        gae(rewards, values, cu_seqlens, 0.9, 0.9, bootstrap=bootstrap[:1])
    for backend in ["torch", "cpp"] if missing_cpp() is None else ["torch"]:
        for bad in ([1, 4, 9], [0, 4, 8], [0, 10, 9]):
            with pytest.raises(ValueError, match="gae: cu_seqlens"):
                gae(rewards, values, torch.tensor(bad, dtype=torch.int32), 0.9, 0.9, backend)
