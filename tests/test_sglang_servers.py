"""Real SGLang servers started, watched and ended as a run does it."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import pytest
from rollout_servers import make_model

from areal.config import GRPOConfig
from areal.inference.servers import ServerStartError, end_servers, start_server
from tests.sglang_python import sglang_python

pytestmark = [pytest.mark.sglang, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_model(folder)
    return folder


def sglang_config(model: Path, rollout: dict[str, Any] | None = None, **options: Any) -> GRPOConfig:
    return GRPOConfig.model_validate(
        {
            "actor": {"path": str(model)},
            "train_dataset": {"type": "arithmetic"},
            "rollout": {"backend": "sglang:d1", "device": "cpu", "startup_timeout": 300, **(rollout or {})},
            "sglang": {"python": sglang_python() or "", "options": options},
        }
    )


async def post(url: str, path: str, body: dict[str, Any]) -> Any:
    async with aiohttp.ClientSession() as session, session.post(url + path, json=body) as response:
        assert response.status == 200, await response.text()
        return await response.json()


def members(session: int) -> list[psutil.Process]:
    """What runs in a session: a server is in one with all its processes."""
    found = []
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (ProcessLookupError, psutil.NoSuchProcess):
            pass
    return found


def wait_until_empty(session: int, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while left := members(session):
        assert time.monotonic() < deadline, [(p.pid, p.cmdline()) for p in left]
        time.sleep(0.1)


async def check_the_longest_answer(url: str) -> None:
    """It comes whole: by itself SGLang ends an answer two tokens before its context is full, and refuses the last inputs."""
    body = {"input_ids": [5] * 10, "sampling_params": {"max_new_tokens": 54, "ignore_eos": True}, "return_logprob": True}
    meta = (await post(url, "/generate", body))["meta_info"]
    assert meta["finish_reason"] == {"type": "length", "length": 54} and len(meta["output_token_logprobs"]) == 54
    body = {"input_ids": [5] * 63, "sampling_params": {"max_new_tokens": 1, "ignore_eos": True}}
    assert (await post(url, "/generate", body))["meta_info"]["completion_tokens"] == 1


def test_two_servers_start_at_once_and_each_ends_by_itself(model: Path, tmp_path: Path) -> None:
    config = sglang_config(model, {"max_context": 64, "backend": "sglang:d2"})

    async def run() -> None:
        first, second = await asyncio.gather(*(start_server(config, model, tmp_path, i) for i in range(2)))
        assert first.process is not None and second.process is not None
        try:
            assert first.n_ranks == 1 and first.process.log_path == tmp_path / "logs" / "rollout_0.log"
            sessions = [first.process.pid, second.process.pid]
            assert all(len(members(session)) >= 3 for session in sessions), "scheduler and detokenizer are processes of their own"
            await asyncio.gather(check_the_longest_answer(first.url), check_the_longest_answer(second.url))

            scheduler = next(p for p in members(sessions[0]) if "scheduler" in " ".join(p.cmdline()))
            scheduler.kill()
            deadline = time.monotonic() + 30
            while not first.has_died():
                assert time.monotonic() < deadline, "a server without its scheduler must not look alive"
                await asyncio.sleep(0.1)
            await check_the_longest_answer(second.url)
        finally:
            begin = time.monotonic()
            end_servers([first, second])
            took = time.monotonic() - begin
        assert took < 20
        for session in sessions:
            wait_until_empty(session, 10)

    asyncio.run(run())


STARTER = """
import asyncio, sys, threading
from pathlib import Path
from areal.config import GRPOConfig
from areal.inference import servers
def announce(*args, **kwargs):
    process = start(*args, **kwargs)
    print(process.pid, flush=True)
    return process
start, servers._start_sglang = servers._start_sglang, announce
config = GRPOConfig.model_validate_json(sys.argv[1])
async def run():
    await servers.start_server(config, Path(config.actor.path), Path(sys.argv[2]), 0)
    print("ready", flush=True)
    await asyncio.sleep(1000)
asyncio.run(run())
"""


@pytest.mark.parametrize("moment", ["its processes start", "ready"])
def test_nothing_of_a_server_outlives_a_killed_controller(model: Path, tmp_path: Path, moment: str) -> None:
    config = sglang_config(model)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    argv = [sys.executable, "-c", STARTER, config.model_dump_json(exclude_unset=True), str(tmp_path)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, env=env) as controller:
        assert controller.stdout is not None
        session = int(controller.stdout.readline())
        if moment == "ready":
            assert controller.stdout.readline() == "ready\n"
        else:  # they import for seconds before SGLang itself ties them to their parent
            while len(members(session)) < 3:
                assert controller.poll() is None
                time.sleep(0.05)
        n_processes = len(members(session))
        controller.kill()
    assert n_processes >= 3
    wait_until_empty(session, 15)  # one that is still importing looks for its parent once it is through, which takes longer under load


def test_a_refused_option_ends_the_start_with_the_servers_own_words(model: Path, tmp_path: Path) -> None:
    for options, words in (
        ({"frobnicate": 3}, r"unrecognized arguments: --frobnicate 3; correct sglang.options"),
        ({"dtype": "float33"}, r"argument --dtype: invalid choice: 'float33'"),
    ):
        begin = time.monotonic()
        with pytest.raises(ServerStartError, match=words):
            asyncio.run(start_server(sglang_config(model, **options), model, tmp_path, 0))
        assert time.monotonic() - begin < 150, "not the whole startup_timeout"


def test_served_in_the_foreground_and_used_by_its_address(model: Path, tmp_path: Path) -> None:
    """``areal serve`` here, ``rollout.urls`` there; paused by a run that was killed, it is taken into use all the same."""
    python = sglang_python()
    assert python is not None
    words = ["serve", str(model), "--backend", "sglang", "--python", python, "--port", "0", "--device", "cpu", "--threads", "1"]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    argv = [sys.executable, "-m", "areal", *words, "--max-context", "64", "--", "--max-total-tokens", "4096"]
    with (tmp_path / "err").open("w") as err, subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=err, text=True, env=env) as served:
        assert served.stdout is not None
        try:
            url = served.stdout.readline().strip()
            assert url.startswith("http://127.0.0.1:"), (tmp_path / "err").read_text()[-3000:]
            (child,) = psutil.Process(served.pid).children()

            async def run() -> None:
                config = sglang_config(model, {"urls": [url + "/"]})
                async with aiohttp.ClientSession() as session, session.get(url + "/server_info") as answer:
                    assert (await answer.json())["max_total_tokens"] == 4096
                await post(url, "/pause_generation", {"mode": "retract"})
                server = await start_server(config, model, tmp_path, 0)
                assert server.url == url and server.process is None and not server.has_died()
                await check_the_longest_answer(url)
                server.terminate()

            asyncio.run(run())
            assert served.poll() is None, "it is not ours to end"
        finally:
            served.send_signal(signal.SIGINT)
        assert served.wait(30) == 0
    wait_until_empty(child.pid, 10)
