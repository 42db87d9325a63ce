"""Backends: what is forced runs, or is an error."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from areal.ops import logprob_entropy, ppo_loss
from areal.ops._dispatch import BackendUnavailable, backend_for, choose_backend

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


def test_cpp_takes_tensors_of_the_cpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AREAL_OPS", raising=False)
    for device in "meta", "mps", "xpu":
        assert backend_for("op", torch.device(device), None, has=("torch", "cpp")) == "torch"
    with pytest.raises(BackendUnavailable, match="on the device meta|not built"):
        backend_for("op", torch.device("meta"), "cpp", has=("torch", "cpp"))
    floats, mask = torch.empty(5, device="meta"), torch.empty(5, dtype=torch.bool, device="meta")
    loss, stats = ppo_loss(floats, floats, floats, floats, mask, eps_clip=0.2, denominator=2.0)
    assert loss.is_meta and stats["ratio"].is_meta
    logprobs, _ = logprob_entropy(torch.empty(5, 3, device="meta"), torch.empty(5, dtype=torch.int64, device="meta"))
    assert logprobs.shape == (5,) and logprobs.is_meta
