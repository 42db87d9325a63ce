"""Backends: what is forced runs, or is an error."""

from __future__ import annotations

import pytest

from areal.ops._dispatch import BackendUnavailable, choose_backend

CANDIDATES = {"cuda": "torch finds no CUDA device", "cpp": None, "torch": None}


def test_best_available_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AREAL_OPS", raising=False)
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
def test_environment(monkeypatch: pytest.MonkeyPatch, environment: str, expected: str) -> None:
    monkeypatch.setenv("AREAL_OPS", environment)
    assert choose_backend("op", CANDIDATES) == expected
    assert choose_backend("op", CANDIDATES, "cpp") == "cpp"


def test_forced_and_missing_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BackendUnavailable, match="op: backend 'cuda' was asked for, but torch finds no CUDA device"):
        choose_backend("op", CANDIDATES, "cuda")
    monkeypatch.setenv("AREAL_OPS", "op=cuda")
    with pytest.raises(BackendUnavailable):
        choose_backend("op", CANDIDATES)
    monkeypatch.setenv("AREAL_OPS", "fast")
    with pytest.raises(ValueError, match="AREAL_OPS='fast': op has the backends cuda, cpp, torch"):
        choose_backend("op", CANDIDATES)
