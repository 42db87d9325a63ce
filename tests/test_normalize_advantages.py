"""normalize_advantages against its formula written out with Python's numbers."""

from __future__ import annotations

import math
from itertools import chain

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from areal.ops import normalize_advantages

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def moments(values: list[float], weights: list[float]) -> tuple[float, float]:
    total = sum(weights)
    mean = math.fsum(v * w for v, w in zip(values, weights, strict=True)) / total
    return mean, math.sqrt(math.fsum((v - mean) ** 2 * w for v, w in zip(values, weights, strict=True)) / total)


def by_definition(groups: list[list[float]], weights: list[list[float]], mean: str, std: str, eps: float) -> list[float]:
    """For positive weights."""
    batch = [*chain(*groups)], [*chain(*weights)]
    result = []
    for values, counts in zip(groups, weights, strict=True):
        for i, value in enumerate(values):
            of = {"group": (values, counts), "batch": batch, "leave_one_out": (values, counts)}
            if any(len(set(of[level][0])) == 1 for level in (mean, std) if level != "none"):
                result.append(0.0)
                continue
            match mean:
                case "none":
                    centre = 0.0
                case "leave_one_out":
                    centre = moments(values[:i] + values[i + 1 :], counts[:i] + counts[i + 1 :])[0]
                case _:
                    centre = moments(*of[mean])[0]
            result.append((value - centre) / (1.0 if std == "none" else moments(*of[std])[1] + eps))
    return result


@settings(deadline=None, max_examples=150)
@given(
    groups=st.lists(st.lists(st.sampled_from([0.0, 1.0, -2.5, 0.1, 7.0]), min_size=0, max_size=9), min_size=1, max_size=6),
    mean=st.sampled_from(["group", "batch", "leave_one_out", "none"]),
    std=st.sampled_from(["group", "batch", "none"]),
    weighted=st.booleans(),
)
def test_is_the_formula(groups: list[list[float]], mean: str, std: str, weighted: bool) -> None:
    weights = [[float(1 + (i * j) % 5) if weighted else 1.0 for i, _ in enumerate(group)] for j, group in enumerate(groups)]
    values = torch.tensor([*chain(*groups)], dtype=torch.float64)
    given_weights = torch.tensor([*chain(*weights)], dtype=torch.float64) if weighted else None
    result = normalize_advantages(values, [len(group) for group in groups], weights=given_weights, mean=mean, std=std, eps=1e-4)
    expected = torch.tensor(by_definition(groups, weights, mean, std, 1e-4), dtype=torch.float64)
    torch.testing.assert_close(result, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mean", ["group", "batch", "leave_one_out"])
def test_equal_values_give_exactly_zero(device: str, mean: str) -> None:
    for value in (0.1, -1 / 3, 1e30):
        values = torch.full((21,), value, dtype=torch.float64, device=device)
        assert (normalize_advantages(values, 7, mean=mean) == 0.0).all()
        assert (normalize_advantages(values, 7, mean=mean, std="none") == 0.0).all()
        assert (normalize_advantages(values, 1, mean=mean, std="none") == 0.0).all()


@pytest.mark.parametrize("device", DEVICES)
def test_equal_and_ragged_groups_agree(device: str) -> None:
    values = torch.randn(24, device=device)
    weights = torch.rand(24, device=device)
    for mean in ("group", "batch", "leave_one_out", "none"):
        expected = normalize_advantages(values, 8, weights=weights, mean=mean)
        assert expected.dtype == torch.float32
        ragged = normalize_advantages(values, [8, 0, 8, 8, 0], weights=weights, mean=mean)
        torch.testing.assert_close(ragged, expected, rtol=1e-6, atol=1e-6)


def test_values_without_weight_do_not_count() -> None:
    values = torch.tensor([1.0, 0.0, 100.0, 5.0, 5.0, -3.0])
    weights = torch.tensor([1.0, 1.0, 0.0, 2.0, 2.0, 0.0])
    result = normalize_advantages(values, 3, weights=weights, eps=0.0)
    assert result.tolist() == [1.0, -1.0, 199.0, 0.0, 0.0, 0.0]
    assert normalize_advantages(values, 3, weights=torch.zeros(6)).tolist() == [0.0] * 6


def test_one_group_is_the_batch() -> None:
    values = torch.randn(70_000)
    assert torch.equal(normalize_advantages(values), normalize_advantages(values, 10, mean="batch", std="batch"))
    assert normalize_advantages(torch.empty(0), 4).shape == (0,)
    assert normalize_advantages(torch.empty(0), []).shape == (0,)


def test_wrong_arguments() -> None:
    values = torch.randn(6)
    for message, keys in {
        "6 values cannot be cut into groups of 4": {"group_sizes": 4},
        "6 values cannot be cut into groups of 0": {"group_sizes": 0},
        "group_sizes adds up to 5, for 6 values": {"group_sizes": [2, 3]},
        "no size may be negative": {"group_sizes": [7, -1]},
        "mean is 'median'; it must be one of group, batch, leave_one_out, none": {"mean": "median"},
        "std is 'leave_one_out'; it must be one of": {"std": "leave_one_out"},
        "weights is a list; it must be a tensor": {"weights": [1.0] * 6},
        r"weights has the shape \[5\]; it must be \[6\]": {"weights": torch.ones(5)},
    }.items():
        with pytest.raises(ValueError, match=f"normalize_advantages: .*{message}|{message}"):
            normalize_advantages(values, **keys)
    with pytest.raises(ValueError, match="normalize_advantages: values is int64"):
        normalize_advantages(torch.arange(6))


@pytest.mark.parametrize("mean", ["group", "batch", "leave_one_out"])
def test_a_value_that_does_not_count_may_not_be_a_number(mean: str) -> None:
    weights = torch.tensor([1.0, 2.0, 0.0, 1.0, 1.0])
    for std in ("group", "batch", "none"):
        finite = normalize_advantages(torch.tensor([1.0, 2.0, 9.0, 5.0, 7.0]), [3, 2], weights=weights, mean=mean, std=std)
        for other in (math.nan, math.inf):
            values = torch.tensor([1.0, 2.0, other, 5.0, 7.0])
            result = normalize_advantages(values, [3, 2], weights=weights, mean=mean, std=std)
            assert torch.equal(result[[0, 1, 3, 4]], finite[[0, 1, 3, 4]])
