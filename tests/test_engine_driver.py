"""The task that calls the engine: slow steps in a thread, failures told to everybody who waits."""

from __future__ import annotations

import asyncio
import threading

import pytest
import torch
from engine_cases import build, requests, worst_error

from areal.inference.embedded import driver as driver_module
from areal.inference.embedded.driver import EngineDied, EngineDriver
from areal.inference.embedded.engine import EmbeddedEngine

torch.set_num_threads(1)


@pytest.mark.parametrize("slow_step", [0.0, 1e9])
def test_answers_come_whether_steps_are_slow_or_not(slow_step: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver_module, "_SLOW_STEP", slow_step)
    engine = EmbeddedEngine(build("qwen2"), max_running_requests=4)
    threads = set()
    step = engine.step
    monkeypatch.setattr(engine, "step", lambda: (threads.add(threading.current_thread().name), step())[1])

    async def run() -> list:
        driver = EngineDriver(engine)
        driver.start()
        answers = await asyncio.wait_for(asyncio.gather(*map(driver.generate, requests(10))), 30)
        assert await driver.call(lambda e: e.n_running, is_long=True) == 0
        with pytest.raises(ZeroDivisionError):
            await driver.call(lambda e: 1 / 0)
        spans = driver.drain_spans()
        assert spans and all(kind == "generation" and end >= start for kind, start, end in spans)
        await driver.stop()
        return answers

    assert worst_error(build("qwen2"), asyncio.run(run())) < 1e-5
    assert any(name.startswith("engine") for name in threads) == (slow_step == 0.0)


def test_an_engine_that_fails_tells_everybody(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = EmbeddedEngine(build("qwen2"), max_running_requests=4)

    def fail() -> None:
        raise RuntimeError("out of memory")

    async def run() -> None:
        driver = EngineDriver(engine)
        driver.start()
        monkeypatch.setattr(engine, "step", fail)
        futures = [driver.generate(request) for request in requests(3)]
        for future in futures:
            with pytest.raises(EngineDied, match="out of memory"):
                await asyncio.wait_for(future, 10)
        with pytest.raises(EngineDied, match="out of memory"):
            driver.generate(requests(1)[0])
        await driver.stop()

    asyncio.run(run())
