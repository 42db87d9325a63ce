"""``HTTPReward`` against services that answer, refuse, are full, vanish or talk nonsense."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator
from typing import Any

import pytest
from aiohttp import web

from areal.config import ConfigError, GRPOConfig
from areal.config_check import check_config, check_machine
from areal.launcher.local import free_port
from areal.reward import AsyncRewardWrapper, RewardFailure, RewardService, RewardServiceError
from areal.reward.http import HTTPReward
from areal.workflow.build import reward_function
from tests.rollout_servers import aiohttp_server

Answer = tuple[int, Any, dict[str, str]] | Any


def answering(answers: Iterable[Answer], seen: list[Any] | None = None) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    """A service that gives these answers one after the other: JSON, or (status, JSON, headers)."""
    left = iter(answers)

    async def handler(request: web.Request) -> web.StreamResponse:
        if seen is not None:
            seen.append(await request.json())
        answer = next(left)
        status, content, headers = answer if isinstance(answer, tuple) else (200, answer, {})
        return web.json_response(content, status=status, headers=headers)

    return handler


async def ask(reward: HTTPReward, **row: Any) -> float:
    return await AsyncRewardWrapper(reward)("the prompt", "the answer", [1, 2], [3], **row)


async def failure(reward: HTTPReward, **row: Any) -> RewardFailure:
    with pytest.raises(RewardFailure) as caught:
        await ask(reward, **row)
    return caught.value


def with_service(timeout: float, handler: Any, check: Callable[[HTTPReward], Awaitable[None]]) -> None:
    async def main() -> None:
        async with aiohttp_server(handler) as url, RewardService(timeout=timeout):
            await check(HTTPReward(f"{url}/score", timeout=timeout))
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(main())


def test_what_is_sent_and_which_answers_are_scores() -> None:
    seen: list[Any] = []

    async def check(reward: HTTPReward) -> None:
        assert await ask(reward, answer="72", weights=[0.5]) == 1.0
        assert [await ask(reward) for _ in range(4)] == [-2.5, 0.25, 3.0, 1.0]
        assert seen[0] == {
            "prompt": "the prompt", "completions": "the answer", "prompt_ids": [1, 2], "completion_ids": [3], "answer": "72", "weights": [0.5]
        }  # fmt: skip

    with_service(20, answering([{"score": 1}, {"score": -2.5, "reward": 7}, {"reward": 0.25}, 3, True], seen), check)


NONSENSE = [{"score": "1.0"}, {"score": None}, {"points": 1}, "1.0", [1.0], {}, None]
FAILURES = [
    ({"cause": "reward_raised", "message": "KeyError"}, "reward_raised"),
    ({"cause": "../x"}, "reward_failed"),
    ({}, "reward_failed"),
]


def test_nonsense_and_failures_are_never_scores() -> None:
    async def check(reward: HTTPReward) -> None:
        for _ in NONSENSE:
            assert (await failure(reward)).cause == "reward_bad_value"
        for _, cause in FAILURES:
            assert (await failure(reward)).cause == cause
        assert await ask(reward) == 1.0

    with_service(20, answering([*NONSENSE, *({"failure": f} for f, _ in FAILURES), 1.0]), check)


def test_a_full_service_is_asked_again_when_it_says() -> None:
    full = (429, {"error": {"message": "full"}}, {"Retry-After": "0.3"})

    async def check(reward: HTTPReward) -> None:
        begin = time.monotonic()
        assert await ask(reward) == 5.0
        assert time.monotonic() - begin >= 0.6

    with_service(20, answering([full, full, 5.0]), check)


def test_a_service_that_stays_full_is_given_up_in_time() -> None:
    seen: list[Any] = []
    busy = (503, {"error": {"message": "full"}}, {})
    tomorrow = (429, {"error": {"message": "full"}}, {"Retry-After": "86400"})

    async def check(reward: HTTPReward) -> None:
        late = await failure(reward)
        assert late.cause == "reward_timeout" and "HTTP 503: full" in str(late) and f"asked {len(seen)} times" in str(late)
        assert len(seen) >= 2
        begin = time.monotonic()  # told to come after the deadline, it does not wait in vain
        assert (await failure(HTTPReward(reward.url, timeout=5.0))).cause == "reward_timeout"
        assert time.monotonic() - begin < 4.0

    def answers() -> Iterator[Answer]:
        while True:
            yield busy if time.monotonic() < end else tomorrow

    end = time.monotonic() + 1.5
    with_service(1.5, answering(answers(), seen), check)


def test_a_service_that_hangs_or_is_away() -> None:
    async def hang(request: web.Request) -> web.StreamResponse:
        await asyncio.sleep(1.5)
        return web.json_response(1.0)

    async def check(reward: HTTPReward) -> None:
        begin = time.monotonic()
        assert (await failure(reward)).cause == "reward_timeout"
        away = await failure(HTTPReward(f"http://127.0.0.1:{free_port()}/score", timeout=0.6))
        assert away.cause == "reward_unreachable" and "annot connect" in str(away)
        assert time.monotonic() - begin < 5.0

    with_service(0.6, hang, check)


def test_an_answer_without_an_end_is_cut_off() -> None:
    written = 0

    async def endless(request: web.Request) -> web.StreamResponse:
        nonlocal written
        response = web.StreamResponse()
        await response.prepare(request)
        with contextlib.suppress(ConnectionError):
            while True:
                await response.write(b"1" * 65536)
                written += 65536
        return response

    async def check(reward: HTTPReward) -> None:
        failed = await failure(reward)
        assert failed.cause == "reward_bad_value" and "more than 1048576 bytes" in str(failed)

    with_service(20, endless, check)
    assert written < 64 << 20


def test_a_connection_that_breaks_is_made_again() -> None:
    n = 0

    async def handler(request: web.Request) -> web.StreamResponse:
        nonlocal n
        n += 1
        if n <= 2:
            assert request.transport is not None
            request.transport.abort()
        return web.json_response({"score": 2})

    async def check(reward: HTTPReward) -> None:
        assert await ask(reward) == 2.0

    with_service(20, handler, check)
    assert n == 3


def test_a_wrong_address_ends_the_run_but_an_error_later_costs_one_score() -> None:
    missing, broken = (404, {"error": {"message": "this server scores math"}}, {}), (500, {"detail": "bug"}, {})

    async def check(reward: HTTPReward) -> None:
        with pytest.raises(RewardServiceError, match=r"is not the address of a reward service \(HTTP 404: this server scores math\)"):
            await ask(reward)
        assert (await failure(reward)).cause == "reward_refused"
        assert await ask(reward) == 1.0
        failed = await failure(reward)
        assert failed.cause == "reward_refused" and "404" in str(failed)

    with_service(20, answering([missing, broken, 1.0, missing]), check)


def test_a_row_that_is_not_json_costs_its_own_score() -> None:
    async def check(reward: HTTPReward) -> None:
        assert (await failure(reward, image=object())).cause == "reward_unsendable"
        assert await ask(reward) == 1.0

    with_service(20, answering([1.0]), check)


def test_calls_in_flight_are_bounded_and_a_cancelled_one_hangs_up() -> None:
    running, most, gone = 0, 0, asyncio.Event()

    async def handler(request: web.Request) -> web.StreamResponse:
        nonlocal running, most
        running += 1
        most = max(most, running)
        try:
            await asyncio.sleep(60 if (await request.json())["completions"] == "hang" else 0.02)
        except asyncio.CancelledError:
            gone.set()
            raise
        finally:
            running -= 1
        return web.json_response(1.0)

    async def main() -> None:
        app = web.Application()
        app.router.add_post("/", handler)
        runner = web.AppRunner(app, handler_cancellation=True)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", port := free_port()).start()
        reward = HTTPReward(f"http://127.0.0.1:{port}", max_in_flight=3)  # without a service: closed by hand
        assert await asyncio.gather(*(reward("p", "c", [], []) for _ in range(20))) == [1.0] * 20
        assert most == 3
        hanging = asyncio.create_task(reward("p", "hang", [], []))
        await asyncio.sleep(0.1)
        hanging.cancel()
        async with asyncio.timeout(5):
            await gone.wait()
        await reward.close()
        await runner.cleanup()

    asyncio.run(main())


def config(reward_fn: str) -> GRPOConfig:
    tree = {"actor": {"init_from_scratch": {"model_type": "qwen2"}, "device": "cpu", "mb_spec": {"max_tokens_per_mb": 2048}}}
    rest = {"train_dataset": {"type": "arithmetic"}, "gconfig": {"n_samples": 2}, "rollout": {"device": "cpu"}}
    return GRPOConfig.model_validate({**tree, **rest, "reward_fn": reward_fn, "reward": {"timeout": 7, "max_concurrent": 5}})


def test_the_config_names_a_service() -> None:
    with_url = config("http://127.0.0.1:30100/score/math")
    check_config(with_url)
    reward = reward_function(with_url)
    assert isinstance(reward, HTTPReward) and (reward.timeout, reward.max_in_flight) == (7, 5)
    for wrong in ("http://", "http://host:x/score", "ftp://host/score", "http://ho st/score"):
        with pytest.raises(ConfigError, match="is not the address of a reward service"):
            check_config(config(wrong))
    url = f"http://127.0.0.1:{free_port()}/score"
    with pytest.raises(ConfigError, match=rf"reward_fn='{url}': nothing can be reached there \(Connection refused\).*areal reward-server"):
        check_machine(config(url))
