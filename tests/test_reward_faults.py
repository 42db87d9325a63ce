"""What may happen to scorers besides what test_reward.py has: stopped processes, forks that fail, functions that hold the event loop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import resource
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from areal.reward import AsyncRewardWrapper, RewardFailure, RewardService, RewardServiceError
from tests.rewards import obey, obey_async


async def score(what: str, wrapper: AsyncRewardWrapper | None = None, **row: Any) -> float:
    return await (wrapper or AsyncRewardWrapper(obey))("p", what, [1], [2], **row)


async def failure(what: str, wrapper: AsyncRewardWrapper | None = None, **row: Any) -> RewardFailure:
    with pytest.raises(RewardFailure) as caught:
        await score(what, wrapper, **row)
    return caught.value


def pids(service: RewardService) -> list[int]:
    return [worker.process.pid for worker in service._workers]


async def until(what: Any, timeout: float = 20.0) -> None:
    async with asyncio.timeout(timeout):
        while not what():
            await asyncio.sleep(0.02)


def is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except FileNotFoundError:
        return True


@contextlib.contextmanager
def no_more_files() -> Iterator[None]:
    """No process can be started meanwhile: its pipes find no free number."""
    old = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, old)


@pytest.mark.parametrize("idle", [False, True])
def test_a_stopped_worker_is_killed_at_the_deadline_and_replaced(idle: bool) -> None:
    async def main() -> None:
        async with RewardService(workers=1, timeout=0.5) as service:
            first = int(await score("pid"))
            if idle:
                os.kill(first, signal.SIGSTOP)
            assert (await failure("score 1" if idle else "stop")).cause == "reward_timeout"
            assert int(await score("pid")) != first
            await until(lambda: is_gone(first))
            assert len(service._workers) == 1

    asyncio.run(main())


def test_workers_killed_from_outside_cost_the_running_scores_only() -> None:
    async def main() -> None:
        async with RewardService(workers=2, timeout=30.0) as service:
            await asyncio.gather(score("sleep 0.1"), score("sleep 0.1"))
            tasks = [asyncio.create_task(score("sleep 0.3")) for _ in range(12)]
            await asyncio.sleep(0.15)  # two run, ten wait
            for pid in pids(service):
                os.kill(pid, signal.SIGKILL)
            results = await asyncio.gather(*tasks, return_exceptions=True)
            assert [getattr(r, "cause", r) for r in results] == ["reward_died"] * 2 + [1.0] * 10
            assert "SIGKILL" in str(results[0])
            row = service.counters.read()
            assert row["reward_failures"] == {"reward_died": 2} and row["reward_queue_max"] >= 10
            assert service.counters.waiting == service.counters.running == 0

    asyncio.run(main())


def test_a_start_that_fails_for_a_while_costs_no_score_and_no_slot(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with RewardService(workers=2, timeout=30.0) as service:
            with no_more_files():
                waiting = asyncio.create_task(score("score 3"))
                await asyncio.sleep(0.6)
                assert not waiting.done() and not service._workers
            assert await waiting == 3.0
            await until(lambda: service.n_ready == 2)
            with no_more_files():
                os.kill(pids(service)[0], signal.SIGKILL)
                await until(lambda: service.n_ready == 1)
                for _ in range(20):  # the other one goes on alone
                    assert await score("score 4") == 4.0
                    await asyncio.sleep(0.05)
                assert len(service._workers) == 1
            async with asyncio.timeout(20):
                while service.n_ready < 2:
                    assert await score("score 5") == 5.0
                    await asyncio.sleep(0.05)

    with caplog.at_level(logging.WARNING):
        asyncio.run(main())
    assert "could not be started: [Errno 24] Too many open files; trying again" in caplog.text


def test_starts_that_always_fail_end_the_service_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("areal.reward.service._FORK_PATIENCE", 0.5)

    async def main() -> None:
        reasons: list[str] = []
        async with RewardService(workers=2) as service:
            service.on_broken = reasons.append
            with no_more_files():
                with pytest.raises(RewardServiceError, match=r"could not be started: .* times in a row"):
                    await score("score 1")
                with pytest.raises(RewardServiceError, match="could not be started"):  # at once
                    await score("score 1")
            assert len(reasons) == 1

    asyncio.run(main())


def test_what_a_function_does_to_its_process_stays_there() -> None:
    async def main() -> None:
        async with RewardService(workers=1, timeout=30.0):
            assert await score("close_stdout") == 2.0
            assert await score("score 1") == 1.0
            spoiled = await failure("spoil")
            assert spoiled.cause == "reward_died" and "spoiled its connection" in str(spoiled)
            assert await score("score 1") == 1.0

    asyncio.run(main())


def test_a_row_that_cannot_be_sent_costs_its_own_score_only() -> None:
    async def main() -> None:
        async with RewardService(workers=1):
            assert (await failure("score 1", stream=open(os.devnull))).cause == "reward_unsendable"  # noqa: SIM115, ASYNC230
            assert await score("score 1") == 1.0

    asyncio.run(main())


def test_async_functions_cannot_outlive_their_time_or_end_the_run() -> None:
    async def main() -> None:
        wrapper = AsyncRewardWrapper(obey_async)
        async with RewardService(timeout=0.3, max_concurrent=1) as service:
            begin = time.monotonic()
            assert (await failure("deaf 1.5", wrapper)).cause == "reward_timeout"
            assert time.monotonic() - begin < 1.2
            assert await score("score 2", wrapper) == 2.0  # its slot is free
            for what, text in (("exit", "SystemExit"), ("cancelled", "CancelledError")):
                failed = await failure(what, wrapper)
                assert failed.cause == "reward_raised" and text in str(failed)
            assert service.counters.read()["reward_failures"] == {"reward_raised": 2, "reward_timeout": 1}
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(main())


def test_async_scores_are_bounded_and_waiting_is_not_their_time() -> None:
    async def main() -> None:
        wrapper = AsyncRewardWrapper(obey_async)
        async with RewardService(timeout=5.0, max_concurrent=4) as service:
            tasks = [asyncio.create_task(score("sleep 0.2", wrapper)) for _ in range(16)]
            await asyncio.sleep(0.1)
            assert (service.counters.running, service.counters.waiting) == (4, 12)
            tasks[-1].cancel()
            await asyncio.gather(*tasks[:-1])
            row = service.counters.read()
            assert row["reward_queue_max"] == 12
            assert row["reward_scoring_seconds_mean"] >= 0.2
            assert row["reward_seconds_mean"] > 1.5 * row["reward_scoring_seconds_mean"]
            assert row["reward_seconds_max"] >= 0.8
            assert service.counters.totals() | {"seconds": 0, "scoring_seconds": 0} == {
                "waiting": 0, "running": 0, "scores": 15, "failures": {}, "cancelled": 1, "seconds": 0, "scoring_seconds": 0
            }  # fmt: skip
            empty = service.counters.read()
            assert empty["reward_seconds_mean"] is None and empty["reward_queue_max"] == 0

    asyncio.run(main())


def test_an_async_function_that_holds_the_event_loop_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        wrapper = AsyncRewardWrapper(obey_async)
        async with RewardService():
            assert await score("sleep 0.4", wrapper) == 1.0
            assert not caplog.records
            for _ in range(3):
                assert await score("block 0.4", wrapper) == 1.0

    with caplog.at_level(logging.WARNING):
        asyncio.run(main())
    (record,) = caplog.records
    assert "obey_async held the event loop for 0.4" in record.getMessage()


def test_a_closing_service_leaves_no_call_waiting() -> None:
    async def main() -> None:
        async with RewardService(workers=1) as service:
            await score("score 1")
            tasks = [
                asyncio.create_task(call)
                for call in (score("sleep 60"), score("sleep 60"), score("sleep 60", AsyncRewardWrapper(obey_async)))
            ]
            await asyncio.sleep(0.2)
            left = pids(service)
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(result, RewardServiceError) for result in results), results
        assert all(map(is_gone, left))

    asyncio.run(main())
