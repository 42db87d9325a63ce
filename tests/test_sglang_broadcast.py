"""Weights by broadcast to real SGLang servers."""

from __future__ import annotations

import asyncio
import json
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import torch
from rollout_servers import make_model
from sglang_servers import SGLangServer
from trainer_setup import make_batch, make_config

from areal.models.loading import load_model
from areal.trainer.worker import TrainerHandle
from areal.weight_sync.stream import Target

pytestmark = [pytest.mark.sglang, pytest.mark.timeout(400)]

PROMPT = [5, 6, 7, 8, 9, 10]


def post(url: str, path: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(url + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.load(answer)


def logprobs_of(url: str) -> list[tuple[float, int]]:
    params = {"temperature": 0, "max_new_tokens": 12, "ignore_eos": True}
    answer = post(url, "/generate", {"input_ids": PROMPT, "return_logprob": True, "sampling_params": params})
    return [(row[0], row[1]) for row in answer["meta_info"]["output_token_logprobs"]]


def assert_generates_as(url: str, folder: Path) -> None:
    """Greedy tokens and their log-probs are those of the saved model."""
    rows = logprobs_of(url)
    tokens = [token for _, token in rows]
    model = load_model(folder, dtype=torch.float32)
    model.set_attn_implementation("sdpa")
    with torch.no_grad():
        logits = model(torch.tensor([PROMPT + tokens])).logits[0, len(PROMPT) - 1 : -1]
    assert tokens == logits.argmax(-1).tolist()
    expected = torch.log_softmax(logits, -1).gather(1, torch.tensor(tokens)[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor([logprob for logprob, _ in rows]), expected, rtol=0, atol=1e-4)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    make_model(folder)
    return folder


def config_of(model: Path, folder: Path, n_ranks: int = 1):
    return make_config(model, folder, backend=f"fsdp:d{n_ranks}").new(
        rollout={"backend": "sglang:d1", "consumer_batch_size": 6}, weight_sync={"bucket_mb": 1}
    )


def test_the_server_generates_with_the_trainers_weights(model: Path, tmp_path: Path) -> None:
    server = SGLangServer(model, tmp_path / "sglang.log")

    async def scenario() -> None:
        trainer = await TrainerHandle.start(config_of(model, tmp_path), model, tmp_path)
        try:
            server.wait()
            before = logprobs_of(server.url)
            for version in (1, 2):
                for step in range(3):
                    await trainer.train_step(make_batch(seed=10 * version + step))
                result = await trainer.send_weights(version, [Target(server.url)])
                assert [o.error for o in result.outcomes] == [None]
            await trainer.save(tmp_path / "saved")
            assert_generates_as(server.url, tmp_path / "saved")
            assert logprobs_of(server.url) != before
        finally:
            await trainer.close()

    try:
        asyncio.run(scenario())
    finally:
        server.process.kill()
