"""Backends: what is forced runs, or is an error."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from areal.ops._dispatch import BackendUnavailable, choose_backend

CANDIDATES = {"cuda": "torch finds no CUDA device", "cpp": None, "torch": None}


def test_best_available_first(areal_ops: Callable[[str], None]) -> None:
    areal_ops("")
    assert choose_backend("op", CANDIDATES) == "cpp"


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ("torch", "torch"),
        ("op=torch", "torch"),
        ("other=torch", "cpp"),
        ("cpp,op=torch", "torch"),
        ("op = torch , cpp", "torch"),
        ("", "cpp"),
    ],
)
def test_environment(areal_ops: Callable[[str], None], environment: str, expected: str) -> None:
    areal_ops(environment)
    assert choose_backend("op", CANDIDATES) == expected
    assert choose_backend("op", CANDIDATES, "cpp") == "cpp"


def test_forced_and_missing_is_an_error(areal_ops: Callable[[str], None]) -> None:
    with pytest.raises(BackendUnavailable, match="op: backend 'cuda' was asked for, but torch finds no CUDA device"):
        choose_backend("op", CANDIDATES, "cuda")
    areal_ops("op=cuda")
    with pytest.raises(BackendUnavailable):
        choose_backend("op", CANDIDATES)
    areal_ops("fast")
    with pytest.raises(ValueError, match="AREAL_OPS='fast': op has the backends cuda, cpp, torch"):
        choose_backend("op", CANDIDATES)
