"""`areal reward-server` as a process: protocol, back-pressure, several runs on one server, and its end."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import aiohttp
import psutil
import pytest

from areal.reward import AsyncRewardWrapper, RewardFailure, RewardService
from areal.reward.http import HTTPReward
from areal.reward.server import BadRow, read_row
from tests.reward_servers import ROOT, RewardServerProcess, all_gone
from tests.runs import TrainRun

OBEY = "tests.rewards:obey"


@pytest.fixture(scope="module")
def server() -> Iterator[RewardServerProcess]:
    started = RewardServerProcess(
        "math", OBEY, "slow=tests.rewards:obey_async", "--workers", "2", "--timeout", "1.5", "--max-queue", "4"
    ).ready()
    yield started
    code, out, err = started.end()
    assert (code, out) == (0, f"{started.url}\n"), err
    assert err == "scoring math, obey, slow with 2 workers; Ctrl-C ends it\n"


async def score(reward: HTTPReward, what: str) -> float | RewardFailure:
    try:
        return await AsyncRewardWrapper(reward)("p", what, [1], [2])
    except RewardFailure as failure:
        return failure


async def fill(server: RewardServerProcess, reward: HTTPReward) -> list[asyncio.Task[Any]]:
    """6 calls of a second: 2 running, and a full queue of 4."""
    tasks: list[asyncio.Task[Any]] = []
    async with asyncio.timeout(20):
        for key, n in (("running", 2), ("waiting", 4)):
            tasks += [asyncio.create_task(score(reward, "sleep 1")) for _ in range(n)]
            while (await asyncio.to_thread(server.get, "/stats"))["functions"]["obey"][key] < n:
                await asyncio.sleep(0.02)
    return tasks


async def until_idle(server: RewardServerProcess) -> dict[str, Any]:
    async with asyncio.timeout(20):
        while True:
            stats: dict[str, Any] = await asyncio.to_thread(server.get, "/stats")
            if not stats["waiting"] and not any(f["running"] for f in stats["functions"].values()):
                return stats
            await asyncio.sleep(0.05)


def test_protocol(server: RewardServerProcess) -> None:
    row = {"prompt": "2+2=", "completions": "#### 4", "prompt_ids": [1], "completion_ids": [2, 3], "answer": "4", "prompt_id": "x"}
    assert server.post("/score/math", row) == (200, {"score": 1.0})
    assert server.post("/score/math", {"completions": "#### 4", "answer": "5"}) == (200, {"score": 0.0})
    assert server.post("/score/slow", {"completions": "score -2.5"}) == (200, {"score": -2.5})
    status, failed = server.post("/score/math", {"completions": "#### 4"})
    assert status == 200 and failed["failure"]["cause"] == "reward_raised" and "no 'answer'" in failed["failure"]["message"]
    assert server.get("/health") == {"status": "ok", "functions": ["math", "obey", "slow"]}
    for path, body, code, sentence in (
        ("/score", row, 404, "this server scores math, obey, slow: POST to /score/math"),
        ("/score/nosuch", row, 404, "POST to /score/math"),
        ("/score/math", b"{", 400, "the body is not JSON"),
        ("/score/math", [1], 400, "must be a JSON object with the key completions"),
        ("/score/math", {"prompt": "x"}, 400, "the body has no completions; it has prompt"),
        ("/score/math", {"completions": 1}, 400, "completions must be a string, not int"),
        ("/score/math", {"completions": "", "prompt_ids": [1.5]}, 400, "prompt_ids must be a list of token ids"),
    ):
        status, answer = server.post(path, body)
        assert status == code and sentence in answer["error"]["message"]
    stats = server.get("/stats")["functions"]["math"]
    assert stats["scores"] == 2 and stats["failures"] == {"reward_raised": 1} and stats["seconds"] >= stats["scoring_seconds"] > 0


@pytest.mark.parametrize("body", [b"", b"nonsense", b"null", b'"x"', b'{"completions": "", "completion_ids": "12"}'])
def test_bodies_that_are_no_rows(body: bytes) -> None:
    with pytest.raises(BadRow):
        read_row(body)


def test_hangs_and_deaths_are_failures_and_cost_no_worker(server: RewardServerProcess) -> None:
    async def main() -> None:
        reward = HTTPReward(server.url + "/score/obey", timeout=30)
        async with RewardService(timeout=30):
            for what, cause in (("stop", "reward_timeout"), ("kill", "reward_died"), ("sleep 60", "reward_timeout")):
                results = await asyncio.gather(score(reward, what), score(reward, "score 3"))
                assert getattr(results[0], "cause", None) == cause and results[1] == 3.0
            pids = {await score(reward, "pid") for _ in range(4)}
            assert pids <= {float(p.pid) for p in server.children()}

    asyncio.run(main())


def test_several_runs_share_it_and_are_held_back_when_it_is_full(server: RewardServerProcess) -> None:
    """4 runs of 8 calls on 2 workers with a queue of 4: most are turned away at first, and all get their score."""

    async def run() -> list[Any]:
        reward = HTTPReward(server.url + "/score/obey", timeout=60)
        async with RewardService(timeout=60):
            return await asyncio.gather(*(score(reward, "sleep 0.1") for _ in range(8)))

    results: dict[int, list[Any]] = {}
    before = server.get("/stats")["turned_away"]
    runs = [threading.Thread(target=lambda i=i: results.setdefault(i, asyncio.run(run()))) for i in range(4)]
    for thread in runs:
        thread.start()
    for thread in runs:
        thread.join(60)
    assert results == {i: [1.0] * 8 for i in range(4)}
    assert server.get("/stats")["turned_away"] > before


def test_a_full_server_says_when_to_come_again_and_a_late_score_is_a_failure(server: RewardServerProcess) -> None:
    async def main() -> None:
        await until_idle(server)
        reward = HTTPReward(server.url + "/score/obey", timeout=20)
        async with RewardService(timeout=20), aiohttp.ClientSession() as session:
            filling = await fill(server, reward)
            async with session.post(server.url + "/score/obey", json={"completions": "score 1"}) as answer:
                assert answer.status == 429 and 1 <= int(answer.headers["Retry-After"]) <= 10
            late = await score(HTTPReward(server.url + "/score/obey", timeout=0.5), "score 1")
            assert isinstance(late, RewardFailure) and late.cause == "reward_timeout" and "4 scores wait already" in str(late)
            assert await asyncio.gather(*filling) == [1.0] * 6

    asyncio.run(main())


def test_callers_that_go_away_take_their_scores_out_of_the_queue(server: RewardServerProcess) -> None:
    async def main() -> None:
        before = (await until_idle(server))["functions"]["obey"]
        reward = HTTPReward(server.url + "/score/obey", timeout=30)
        async with RewardService(timeout=30):
            tasks = await fill(server, reward)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            begin = time.monotonic()
            assert await score(reward, "score 7") == 7.0
            assert time.monotonic() - begin < 2.5  # the two that run, not all six one after the other
        after = (await until_idle(server))["functions"]["obey"]
        assert after["cancelled"] - before["cancelled"] == 6 and after["scores"] - before["scores"] == 1

    asyncio.run(main())


def test_killed_server_takes_its_workers_along_and_its_successor_serves_the_same_callers() -> None:
    first = RewardServerProcess(OBEY, "--workers", "2").ready()

    async def main() -> tuple[RewardServerProcess, list[psutil.Process]]:
        reward = HTTPReward(first.url + "/score", timeout=60)
        async with RewardService(timeout=60):
            assert await score(reward, "score 1") == 1.0
            workers = first.children()
            assert len(workers) == 2
            tasks = [asyncio.create_task(score(reward, "sleep 1")) for _ in range(6)]
            await asyncio.sleep(0.5)
            first.kill()
            assert all_gone(workers)
            second = RewardServerProcess(OBEY, "--workers", "2", port=first.port)
            assert await asyncio.gather(*tasks) == [1.0] * 6
            return second, second.children()

    second, workers = asyncio.run(main())
    assert second.end()[0] == 0 and all_gone(workers)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_in_order_with_scores_running(number: signal.Signals) -> None:
    server = RewardServerProcess(OBEY, "--workers", "1").ready()
    answers: list[tuple[int, Any]] = []
    asking = [threading.Thread(target=lambda: answers.append(server.post("/score/obey", {"completions": "sleep 30"}))) for _ in range(3)]
    for thread in asking:
        thread.start()
    while server.get("/stats")["waiting"] < 2:
        time.sleep(0.02)
    processes = server.children()
    begin = time.monotonic()
    server.process.send_signal(number)
    _, err = server.process.communicate(timeout=30)
    assert server.process.returncode == 0 and "Traceback" not in err, err
    assert time.monotonic() - begin < 8 and all_gone(processes)
    for thread in asking:
        thread.join(10)
    assert [status for status, _ in answers] == [503] * 3  # "ask again"


def test_a_module_that_ends_the_workers_costs_scores_and_not_the_server(tmp_path: Any) -> None:
    (tmp_path / "dies_in_workers.py").write_text(
        f"import os\nif os.getppid() != {os.getpid()}: os._exit(9)\ndef reward(*args, **row): return 1.0\n"
    )
    environment = {**os.environ, "PYTHONPATH": ":".join([str(tmp_path), *(p for p in sys.path if p)])}
    command = [sys.executable, "-m", "areal", "reward-server", "dies_in_workers:reward", "--port", "0", "--workers", "1"]
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    url = process.stdout.readline().strip()

    async def main() -> None:
        async with RewardService(timeout=30):
            failed = await score(HTTPReward(url + "/score", timeout=30), "x")
            assert isinstance(failed, RewardFailure) and failed.cause == "reward_died" and "code 9" in str(failed)

    asyncio.run(main())
    process.terminate()
    _, err = process.communicate(timeout=30)
    assert process.returncode == 0, err


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["nosuch"], "'nosuch' is no reward function"),
        (["nosuch:reward"], "nosuch:reward' cannot be imported"),
        (["math", "math"], "two functions have the name 'math'"),
        (["a/b=tests.rewards:obey"], "'a/b' cannot be a name in a URL"),
        (["math", "--workers", "0"], "--workers=0 is too small"),
        (["math", "--port", "99999"], "a port is at most 65535"),
        (["math", "--isolation", "rlimit"], "--isolation rlimit is for code"),
        ([], "required: FUNCTION"),
    ],
)
def test_wrong_words_end_in_one_sentence(words: list[str], sentence: str, capfd: pytest.CaptureFixture[str]) -> None:
    from areal.cli import main

    try:
        code = main(["reward-server", *words])
    except SystemExit as ended:
        code = int(ended.code or 0)
    err = capfd.readouterr().err
    assert code in (1, 2) and sentence in err and "Traceback" not in err


def test_a_port_in_use_is_told_before_a_worker_starts(server: RewardServerProcess, capfd: pytest.CaptureFixture[str]) -> None:
    from areal.cli import main

    assert main(["reward-server", "math", "--port", str(server.port)]) == 1
    assert f"cannot listen on 127.0.0.1:{server.port}" in capfd.readouterr().err


def test_a_training_run_with_its_scores_from_a_service(tmp_path: Any) -> None:
    service = RewardServerProcess("areal.tasks.arithmetic:arithmetic_reward", "--workers", "1").ready()
    try:
        run = TrainRun(tmp_path, f"reward_fn={service.url}/score", "total_train_steps=3", "evaluator.n_prompts=0")
        assert run.summary()["train_steps"] == 3
        stats = service.get("/stats")["functions"]["arithmetic_reward"]
    finally:
        code, _, err = service.end()
    assert code == 0, err
    assert stats["scores"] >= 3 * 4 * 2 and stats["failures"] == {}
    rows = run.metrics()
    assert all(row["reward_failures"] == {} and row["reward_queue_max"] >= 0 for row in rows)
    scored = [row for row in rows if row["reward_seconds_mean"] is not None]  # a step may take what was there already
    assert scored and all(r["reward_seconds_max"] >= r["reward_seconds_mean"] >= r["reward_scoring_seconds_mean"] > 0 for r in scored)
