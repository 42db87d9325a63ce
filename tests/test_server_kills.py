"""kill -9 of a rollout server at the worst moments (tests/ordeal.py): no hang, no lost or doubled sample, no token of a wrong version."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from areal.config import GRPOConfig
from tests.ordeal import MOMENTS, TOLERANCE, Moment, Ordeal, ordeal_config
from tests.sglang_python import sglang_python

REPEATS = int(os.environ.get("AREAL_STRESS_REPEATS", "1"))
"""Kills at each moment; `make stress` has 20."""


def _endure(config: GRPOConfig, moments: Sequence[Moment]) -> None:
    async def main() -> None:
        async with Ordeal(config) as ordeal:
            for _ in range(REPEATS):
                for moment in moments:
                    await ordeal.kill_at(moment)
            n_tokens, worst = ordeal.check_tokens()
            assert n_tokens > 1000 and worst < TOLERANCE
            assert ordeal.n_mixed > 0, "no request lived through an update: the test would show nothing"

    asyncio.run(main())


@pytest.mark.timeout(300 + 120 * REPEATS)
@pytest.mark.parametrize(
    ("transport", "mode"), [("broadcast", "abort"), ("broadcast", "retract"), ("disk", "abort"), ("tensor", "abort"), ("shm", "retract")]
)
def test_embedded_servers(tmp_path: Path, transport: str, mode: str) -> None:
    config = ordeal_config(tmp_path, "embedded:d2", transport=transport)
    config = config.new(rollout=config.rollout.new(update_mode=mode))
    moments = MOMENTS if config.transport in ("broadcast", "tensor") else [m for m in MOMENTS if m != "mid_bucket"]
    if transport == "shm":  # the server swaps by itself: nobody is interrupted
        moments = ["idle", "generating"]
    _endure(config, moments)


@pytest.mark.sglang
@pytest.mark.timeout(600 + 400 * REPEATS)
def test_sglang_server(tmp_path: Path) -> None:
    python = sglang_python()
    assert python is not None
    _endure(ordeal_config(tmp_path, "sglang:d1", python), MOMENTS)
