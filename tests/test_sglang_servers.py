"""Real SGLang servers started, watched and ended as a run does it."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import pytest
from rollout_servers import make_model

from areal.config import GRPOConfig
from areal.inference.servers import RolloutServer, ServerStartError, start_server
from tests.sglang_servers import sglang_python

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


def family(server: RolloutServer) -> list[psutil.Process]:
    main = psutil.Process(server.process.pid)
    return [main, *main.children(recursive=True)]


def test_a_server_starts_answers_and_ends(model: Path, tmp_path: Path) -> None:
    config = sglang_config(model, {"max_context": 64})

    async def run() -> None:
        server = await start_server(config, model, tmp_path, 0)
        try:
            assert server.n_ranks == 1 and server.process.log_path == tmp_path / "logs" / "rollout_0.log"
            assert os.getsid(server.process.pid) == server.process.pid, "Ctrl-C in a terminal is for the controller"
            # The longest answer that fits comes whole: SGLang alone would end it two tokens earlier.
            body = {"input_ids": [5] * 10, "sampling_params": {"max_new_tokens": 54, "ignore_eos": True}, "return_logprob": True}
            meta = (await post(server.url, "/generate", body))["meta_info"]
            assert meta["finish_reason"] == {"type": "length", "length": 54} and len(meta["output_token_logprobs"]) == 54
            processes = family(server)
            assert len(processes) >= 3, "scheduler and detokenizer are processes of their own"
        finally:
            server.process.terminate()
        _, alive = psutil.wait_procs(processes, timeout=20)
        assert alive == []

    asyncio.run(run())


def test_a_refused_option_ends_the_start_with_the_servers_own_words(model: Path, tmp_path: Path) -> None:
    for options, words in (
        ({"frobnicate": 3}, r"unrecognized arguments: --frobnicate 3; correct sglang.options"),
        ({"dtype": "float33"}, r"argument --dtype: invalid choice: 'float33'"),
    ):
        begin = time.monotonic()
        with pytest.raises(ServerStartError, match=words):
            asyncio.run(start_server(sglang_config(model, **options), model, tmp_path, 0))
        assert time.monotonic() - begin < 150, "not the whole startup_timeout"
