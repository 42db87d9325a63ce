"""The reward service with real processes: rewards that hang, raise, return nonsense or kill their own process."""

from __future__ import annotations

import asyncio
import gc
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from areal.reward import (
    AsyncRewardWrapper,
    RewardFailure,
    RewardService,
    RewardServiceError,
)
from areal.reward.math import math_equal, math_reward
from areal.reward.worker import BadScore, check_score


def behave(
    prompt: str,
    completions: str,
    prompt_ids: list[int],
    completion_ids: list[int],
    **row: object,
) -> object:
    """A reward function as bad as its completion says."""
    match completions.split():
        case ["score", value]:
            return float(value)
        case ["raise"]:
            raise KeyError("answer")
        case ["exit"]:
            sys.exit(3)
        case ["die"]:
            os._exit(3)
        case ["kill"]:
            os.kill(os.getpid(), signal.SIGKILL)
        case ["hang"]:
            while True:
                pass
        case ["sleep", seconds]:
            time.sleep(float(seconds))
            return 1.0
        case ["nan"]:
            return math.nan
        case ["string"]:
            return "1.0"
        case ["none"]:
            return None
        case ["numpy"]:
            return np.float32(0.5)
        case ["array"]:
            return np.zeros(3)
        case ["child"]:
            return float(subprocess.Popen(["sleep", "300"]).pid)
        case ["pid"]:
            return float(os.getpid())
        case ["row"]:
            return float(row["answer"])  # type: ignore[arg-type]
        case ["torch"]:
            return float("torch" in sys.modules)
    raise AssertionError(completions)


async def behave_async(
    prompt: str,
    completions: str,
    prompt_ids: list[int],
    completion_ids: list[int],
    **row: object,
) -> object:
    if completions == "hang":
        await asyncio.sleep(300)
    return behave(prompt, completions, prompt_ids, completion_ids, **row)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


async def _score(wrapper: AsyncRewardWrapper, what: str, **row: object) -> float:
    return await wrapper("p", what, [1], [2], **row)


CAUSES = [
    ("raise", "reward_raised", "KeyError: 'answer'"),
    ("exit", "reward_raised", "SystemExit"),
    ("die", "reward_died", "code 3"),
    ("kill", "reward_died", "SIGKILL"),
    ("hang", "reward_timeout", "1 s"),
    ("nan", "reward_bad_value", "nan"),
    ("string", "reward_bad_value", "str '1.0'"),
    ("none", "reward_bad_value", "NoneType"),
    ("array", "reward_bad_value", "one finite number"),
]


def test_scores_and_failures_by_cause() -> None:
    async def main() -> None:
        async with RewardService(workers=2, timeout=1.0) as service:
            wrapper = AsyncRewardWrapper(behave)
            assert await _score(wrapper, "score -2.5") == -2.5
            assert await _score(wrapper, "numpy") == 0.5
            assert await _score(wrapper, "row", answer=7) == 7.0
            assert await _score(wrapper, "torch") == 0.0  # workers stay light
            # All at once, good ones between the bad: a bad one costs nobody else's score.
            mixed = [what for cause in CAUSES for what in (cause[0], "score 4")]
            results = await asyncio.gather(*(_score(wrapper, what) for what in mixed), return_exceptions=True)
            for (what, cause, text), failure, good in zip(CAUSES, results[::2], results[1::2], strict=True):
                assert isinstance(failure, RewardFailure), what
                assert failure.cause == cause, what
                assert text in str(failure), what
                assert good == 4.0
            pids = [worker.process.pid for worker in service._workers]
        assert pids and not any(_alive(pid) for pid in pids)

    asyncio.run(main())


def test_fast_scores_are_sent_together_and_a_hanging_one_harms_only_itself() -> None:
    async def main() -> None:
        async with RewardService(workers=1, timeout=0.5):
            wrapper = AsyncRewardWrapper(behave)
            for _ in range(3):  # the service learns that these are short
                await asyncio.gather(*(_score(wrapper, f"score {i}") for i in range(64)))
            whats = [f"score {i}" for i in range(40)]
            whats[5] = "hang"
            whats[9] = "die"
            results = await asyncio.gather(*(_score(wrapper, what) for what in whats), return_exceptions=True)
            assert [r for i, r in enumerate(results) if i not in (5, 9)] == [float(i) for i in range(40) if i not in (5, 9)]
            assert [getattr(results[i], "cause", None) for i in (5, 9)] == [
                "reward_timeout",
                "reward_died",
            ]

    asyncio.run(main())


def test_answers_from_before_a_death_count_though_sending_was_what_noticed_it() -> None:
    async def main() -> None:
        async with RewardService(workers=1) as service:
            wrapper = AsyncRewardWrapper(behave)
            for _ in range(3):
                await asyncio.gather(*(_score(wrapper, f"score {i}") for i in range(64)))
            tasks = [asyncio.create_task(_score(wrapper, what)) for what in ("sleep 0.1", "score 2", "die")]
            while len(service._workers[0].jobs) < 3:
                await asyncio.sleep(0)
            tasks += [asyncio.create_task(_score(wrapper, f"score {i}")) for i in range(20)]
            await asyncio.sleep(0)  # these are to be sent next
            time.sleep(0.5)  # noqa: ASYNC251  # before that the loop is busy elsewhere: answers and death wait on the socket
            results = await asyncio.gather(*tasks, return_exceptions=True)
            assert getattr(results.pop(2), "cause", None) == "reward_died"
            assert results == [1.0, 2.0, *map(float, range(20))]

    asyncio.run(main())


def test_a_worker_that_died_while_idle_costs_no_score() -> None:
    async def main() -> None:
        async with RewardService(workers=1) as service:
            wrapper = AsyncRewardWrapper(behave)
            for _ in range(3):
                assert await _score(wrapper, "score 1") == 1.0
                task = asyncio.create_task(_score(wrapper, "score 2"))
                await asyncio.sleep(0)  # it is to be sent next
                os.kill(service._workers[0].process.pid, signal.SIGKILL)
                time.sleep(0.2)  # noqa: ASYNC251  # it is dead before the loop can hear of it
                assert await task == 2.0

    asyncio.run(main())


def test_workers_run_in_parallel_and_time_in_the_queue_is_not_counted() -> None:
    async def main() -> None:
        async with RewardService(workers=4, timeout=1.0):
            wrapper = AsyncRewardWrapper(behave)
            await asyncio.gather(*(_score(wrapper, "sleep 0.05") for _ in range(8)))
            begin = time.monotonic()
            assert await asyncio.gather(*(_score(wrapper, "sleep 0.4") for _ in range(16))) == [1.0] * 16  # 1.6 s for each worker
            assert time.monotonic() - begin < 4.0

    asyncio.run(main())


def test_async_functions_run_on_the_loop() -> None:
    async def main() -> None:
        async with RewardService(timeout=0.2):
            wrapper = AsyncRewardWrapper(behave_async)
            assert await _score(wrapper, "pid") == os.getpid()
            for what, cause in [
                ("hang", "reward_timeout"),
                ("raise", "reward_raised"),
                ("string", "reward_bad_value"),
            ]:
                with pytest.raises(RewardFailure) as caught:
                    await _score(wrapper, what)
                assert caught.value.cause == cause

    asyncio.run(main())


def test_cancelled_scores_leave_nothing_behind() -> None:
    async def main() -> None:
        async with RewardService(workers=1, timeout=30.0) as service:
            wrapper = AsyncRewardWrapper(behave)
            pid = int(await _score(wrapper, "pid"))
            tasks = [asyncio.ensure_future(_score(wrapper, what)) for what in ["sleep 0.3", "hang", "hang", "hang"]]
            await asyncio.sleep(0.1)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            assert await asyncio.wait_for(_score(wrapper, "pid"), 5.0) == pid  # the running one ended, the queued hangs were never sent
            assert not service._queue
        assert not _alive(pid)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(main())


def test_children_of_a_hung_reward_die_with_it() -> None:
    async def main() -> None:
        async with RewardService(workers=1, timeout=0.5):
            wrapper = AsyncRewardWrapper(behave)
            child = int(await _score(wrapper, "child"))
            assert _alive(child)
            with pytest.raises(RewardFailure):
                await _score(wrapper, "hang")
            await asyncio.sleep(0.1)
            assert not _alive(child)

    asyncio.run(main())


def test_time_to_import_the_functions_module_is_not_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "slow_to_import.py").write_text(
        "import os, time\nif os.getpid() != PARENT: time.sleep(1.0)\ndef reward(*args):\n    time.sleep(args[0])\n    return 2.0\n".replace(
            "PARENT", str(os.getpid())
        )
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    import slow_to_import  # type: ignore[import-not-found]

    async def main() -> None:
        async with RewardService(timeout=0.5):
            wrapper = AsyncRewardWrapper(slow_to_import.reward)
            assert await asyncio.gather(wrapper(0), wrapper(0)) == [2.0, 2.0]
            with pytest.raises(RewardFailure, match=r"0.5 s"):
                await wrapper(5)

    asyncio.run(main())


def test_function_that_cannot_travel_is_one_clear_error() -> None:
    async def main() -> None:
        async with RewardService():
            with pytest.raises(RewardServiceError, match="top level of a module, or make it async"):
                await AsyncRewardWrapper(lambda *args: 1.0)("p", "c", [], [])

    asyncio.run(main())


def test_default_service_closes_by_hand() -> None:
    async def main() -> None:
        from areal.reward.service import shared_service

        assert await AsyncRewardWrapper(behave)("p", "score 1", [], []) == 1.0
        await shared_service().close()
        assert not shared_service()._workers

    asyncio.run(main())
    gc.collect()


SCRIPT = """
import asyncio, json, sys
from areal.reward import AsyncRewardWrapper, RewardService, RewardServiceError
def reward(prompt, completions, prompt_ids, completion_ids, **row):
    import os, time
    if completions == "hang":
        print(json.dumps(os.getpid()))
        sys.stdout.flush()
        time.sleep(300)
    return len(completions)
async def main():
    async with RewardService(log_dir=__import__("pathlib").Path(sys.argv[1])):
        print(json.dumps(await AsyncRewardWrapper(reward)("p", "four", [], [])), flush=True)
        if "stay" in sys.argv:
            await AsyncRewardWrapper(reward)("p", "hang", [], [])
GUARD
"""


def _run_script(tmp_path: Path, guard: str, *args: str) -> subprocess.Popen[str]:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT.replace("GUARD", guard))
    command = [sys.executable, str(script), str(tmp_path), *args]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_function_of_the_users_script(tmp_path: Path) -> None:
    process = _run_script(tmp_path, "if __name__ == '__main__':\n    asyncio.run(main())")
    out, err = process.communicate(timeout=60)
    assert (json.loads(out), process.returncode) == (4.0, 0), err


def test_script_without_guard_is_told(tmp_path: Path) -> None:
    process = _run_script(tmp_path, "asyncio.run(main())")
    _, err = process.communicate(timeout=100)
    assert process.returncode != 0
    assert "if __name__ == '__main__'" in err


def test_killed_controller_takes_a_hung_worker_with_it(tmp_path: Path) -> None:
    process = _run_script(tmp_path, "if __name__ == '__main__':\n    asyncio.run(main())", "stay")
    log = tmp_path / "reward_1.log"
    for _ in range(300):
        if log.exists() and log.read_text().strip():
            break
        time.sleep(0.1)
    pid = int(log.read_text())
    assert _alive(pid)
    process.kill()
    process.communicate(timeout=10)
    for _ in range(50):
        if not _alive(pid):
            return
        time.sleep(0.1)
    pytest.fail("the worker outlived its controller")


@pytest.mark.parametrize("value", [1, True, 0.5, np.float64(2), np.int32(3), np.array(4.0)])
def test_check_score_accepts_numbers(value: object) -> None:
    assert check_score(value) == float(value)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", ["1", b"1", None, math.inf, -math.inf, [1.0], {}, 1j])
def test_check_score_refuses_the_rest(value: object) -> None:
    with pytest.raises(BadScore):
        check_score(value)


@pytest.mark.parametrize(
    ("completion", "answer", "score"),
    [
        ("So she has 72 clips.\n#### 72", "48+24 = 72\n#### 72", 1.0),
        ("The answer is \\boxed{72}.", "#### 72", 1.0),
        ("We get $72$.", "72", 1.0),
        ("#### 1,000", "#### 1000", 1.0),
        ("#### 1000", "#### 1,000", 1.0),
        ("it is 0.5", "1/2", 1.0),
        ("#### 71", "#### 72", 0.0),
        ("I do not know", "#### 72", 0.0),
        ("", "#### 72", 0.0),
    ],
)
def test_gsm8k(completion: str, answer: str, score: float) -> None:
    assert math_reward("q", completion, [], [], answer=answer) == score


def test_gsm8k_needs_an_answer() -> None:
    with pytest.raises(ValueError, match="answer"):
        math_reward("q", "1", [], [])
    assert math_equal("\\boxed{x^2}", "$x^2$")
