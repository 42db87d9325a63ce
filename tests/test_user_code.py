"""Users' code on the event loop that catches its cancellation, goes on, or leaves something behind."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import time
from typing import Any

import pytest

from areal.config import GenerationConfig
from areal.inference.client import RolloutClient
from areal.reward import RewardService
from areal.runner import EpisodeEngine, run_episode
from areal.types import ModelRequest
from areal.workflow import EpisodeDropped, Tool
from areal.workflow.user_code import begin, end, end_others


async def goes_on(**arguments: Any) -> None:
    while True:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(60)


async def raises_instead() -> None:
    try:
        await asyncio.sleep(60)
    finally:
        raise KeyError("clean-up")


class Workflow:
    def __init__(self, act: Any) -> None:
        self.act = act

    async def arun_episode(self, engine: Any, data: dict[str, Any]) -> None:
        self.engine = engine
        await self.act()


@pytest.mark.parametrize("act", [goes_on, raises_instead])
def test_a_cancelled_episode_ends_as_cancelled(act: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Whatever its workflow makes of it: a failure would be counted as one."""
    monkeypatch.setattr("areal.runner._END_SECONDS", 0.2)
    monkeypatch.setattr("areal.runner._PAUSE", 0.01)

    async def main() -> None:
        workflow = Workflow(act)
        episode = asyncio.ensure_future(run_episode(RolloutClient(), workflow, {}, seed=0))
        await asyncio.sleep(0.05)
        episode.cancel()
        with pytest.raises(asyncio.CancelledError):
            await episode
        with pytest.raises(RuntimeError, match="this engine's episode has ended"):
            await workflow.engine.agenerate(ModelRequest([1], GenerationConfig()))
        await asyncio.sleep(0.05)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(main())
    gc.collect()
    assert ("ended by force" in caplog.text) == (act is goes_on) and "never retrieved" not in caplog.text


def test_what_a_workflow_waited_for_was_cancelled() -> None:
    async def waits() -> None:
        inner = asyncio.ensure_future(asyncio.sleep(60))
        asyncio.get_running_loop().call_soon(inner.cancel)
        await inner

    async def main() -> None:
        with pytest.raises(EpisodeDropped, match="CancelledError: what it waited for was cancelled") as dropped:
            await run_episode(RolloutClient(), Workflow(waits), {}, seed=0)
        assert dropped.value.cause == "workflow_raised"

    asyncio.run(main())


def test_an_engine_that_refuses_gives_others_their_turn() -> None:
    async def main() -> None:
        engine = EpisodeEngine(RolloutClient(), "key")
        engine.close()

        async def again_and_again() -> None:
            while True:
                with contextlib.suppress(RuntimeError):
                    await engine.agenerate(ModelRequest([1], GenerationConfig()))

        task = begin(again_and_again())
        await asyncio.sleep(0.05)
        await end(task, 1.0, "it")
        assert task.cancelled()

    asyncio.run(main())


def test_a_tool_that_goes_on_is_told_as_late(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("areal.workflow.user_code._END_SECONDS", 0.1)

    async def main() -> None:
        async with RewardService():
            begin = time.monotonic()
            assert await Tool("t", goes_on, timeout=0.1).result({}) == "Error: the function did not return within 0.1 s"
            assert time.monotonic() - begin < 20

    asyncio.run(main())


def test_the_event_loop_ends_whatever_was_left_in_it(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        left = [asyncio.ensure_future(goes_on()), asyncio.ensure_future(asyncio.sleep(60))]
        await asyncio.sleep(0.01)
        await end_others(0.2)
        assert all(task.done() for task in left)

    with caplog.at_level(logging.WARNING):
        asyncio.run(main())
    assert "1 tasks did not end within 0.2 s of being cancelled, and are ended by force: goes_on" in caplog.text
